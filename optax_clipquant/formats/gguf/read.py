"""``from_gguf`` reads a GGUF file as a tree with exact quantized leaves."""

import math
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_clipquant.formats.gguf.blocks import BLOCKS, decode
from optax_clipquant.formats.gguf.container import PLAIN, SIZES, GGUFFile
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.qarray import QArray


def from_gguf(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a GGUF file as a tree.

    Q4_0, Q5_0, Q8_0 and TQ2_0 tensors become ``QArray`` leaves with the same levels, ``[out, in]`` with
    groups along the last axis, from which training can continue: ``quantize_weights(Uniform(4,
    channel_axis=0, group_size=32))`` starts with exactly the codes of a Q4_0 tensor that llama.cpp
    quantized (and rounds its scales to 8 bits, by less than half a percent). Tensors of other types become
    arrays; K-quants, I-quants and the like are decoded to float32.

    Args:
      path: the file.

    Returns:
      A dict of the tensors by name, with axes in NumPy's order; and the metadata by key: numbers, text,
      bools, and lists of these.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the file is truncated, is not a GGUF file, or has a type that the package ``gguf``
        cannot decode.
      ImportError: the file has a type that needs the package ``gguf``, which is not installed.

    Examples:
      Continue training a file that llama.cpp wrote::

        tree, metadata = from_gguf("model-q4_0.gguf")
        params = dequantize_params(tree)

      Here the file is a minimal one:

      >>> import tempfile
      >>> import gguf
      >>> import numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     writer = gguf.GGUFWriter(folder + "/model.gguf", "llama")
      ...     writer.add_tensor("output.weight", np.ones((64, 32), np.float16))
      ...     writer.write_header_to_file()
      ...     writer.write_kv_data_to_file()
      ...     writer.write_tensors_to_file()
      ...     writer.close()
      ...     tree, metadata = from_gguf(folder + "/model.gguf")
      >>> tree["output.weight"].shape, metadata["general.architecture"]
      ((64, 32), 'llama')
    """
    with GGUFFile(path) as file:
        tree = {name: _leaf(file, name) for name in file.tensors}
        return tree, file.metadata


def _leaf(file: GGUFFile, name: str) -> Any:
    kind, shape = file.tensors[name]
    content = file.read(name)
    if kind in PLAIN:
        array = content.view(PLAIN[kind]).reshape(shape)
        # JAX would truncate 64 bits to 32.
        return jnp.asarray(array) if array.itemsize <= 4 else array
    if kind not in BLOCKS:
        return jnp.asarray(_decoded(file, name, content))
    blocks = BLOCKS[kind]
    codes, scales = decode(kind, content.reshape(-1, SIZES[kind][1]))
    lower, upper, bits = blocks.lower, blocks.upper, math.log2(blocks.upper - blocks.lower + 1)
    if codes.size and codes.max() > upper:
        upper, bits = 2, 2  # a TQ2_0 file can hold four codes, of which llama.cpp writes three
    grid = Grid(
        jnp.asarray(scales.astype(np.float32).reshape(*shape[:-1], shape[-1] // blocks.size)),
        bits=bits if bits == math.log2(3) else int(bits),
        lower=lower,
        upper=upper,
        group=(-1, blocks.size),
    )
    return QArray(jnp.asarray(codes.reshape(shape)), grid)


def _decoded(file: GGUFFile, name: str, content: np.ndarray) -> np.ndarray:
    """The values of a tensor of another type."""
    kind, shape = file.tensors[name]
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{file.path}: tensor {name!r} is {kind}, whose decoding needs the package gguf: pip install "
            "'optax-clipquant[gguf]'",
            name="gguf",
        ) from error
    try:
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        rows = content[: math.prod(shape) // block * size].reshape(*shape[:-1], -1)
        return gguf.dequantize(rows, number).reshape(shape)
    except Exception as error:
        raise ValueError(
            f"{file.path}: tensor {name!r} of type {kind} cannot be decoded ({error})"
        ) from error
