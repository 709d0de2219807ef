"""``to_gguf`` writes a quantized tree as a GGUF file, with the same weights."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

import numpy as np

from optax_clipquant._tree import PyTree
from optax_clipquant.formats.gguf.blocks import BLOCKS, encode
from optax_clipquant.formats.gguf.container import PLAIN, GGUFFile, Tensor, uint32, writing
from optax_clipquant.formats.gguf.names import check_order, gguf_name, row_order
from optax_clipquant.formats.leaves import Leaf, Written, leaves_in
from optax_clipquant.formats.rows import Names, Rows, integer_range, place
from optax_clipquant.quant.grid import Grid

Float = Literal["float16", "bfloat16", "float32"]

_KINDS = {dtype: kind for kind, dtype in PLAIN.items()}
_HELD = tuple(PLAIN[kind] for kind in ("F32", "F16", "BF16"))  # those that float32 holds exactly
# Values of llama.cpp's llama_ftype.
_FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "BF16": 32, "TQ2_0": 37},
}
_CHUNK = 2**20  # elements


def to_gguf(
    path: str | os.PathLike[str],
    qparams: PyTree,
    *,
    like: str | os.PathLike[str],
    names: Names | None = None,
    otherwise: Float | None = None,
) -> dict[str, str]:
    """Writes a quantized tree as a GGUF file, which llama.cpp, Ollama and LM Studio run.

    Nothing is requantized: the file holds the codes of the grid and its scales, as float16, so that each
    weight that a runtime decodes equals ``dequantize_params(qparams)``; for bfloat16 and float16 leaves,
    after rounding to that dtype. (A decoded 0 may be -0.) The runtime's arithmetic may differ: llama.cpp
    rounds activations to 8 bits.

    A leaf gets the smallest type that holds all levels of its grid:

    | type | codes | bits per weight | such as |
    |---|---|---|---|
    | ``TQ2_0`` | -1, 0, 1 | 2.06 | ``Ternary(group_size=256)``, ``Binary(group_size=256)`` |
    | ``Q4_0`` | -8 to 7 | 4.5 | ``Uniform(4, group_size=32)``, or fewer bits |
    | ``Q5_0`` | -16 to 15 | 5.5 | ``Uniform(5, group_size=32)`` |
    | ``Q8_0`` | -128 to 127 | 8.5 | ``Uniform(8, group_size=32)``, or 6 and 7 bits |

    Blocks run along the contracted axis, whose length must be a multiple of 32 (or 256); the groups of the
    grid may be multiples of these, or whole rows. Arrays keep their dtype, except that those with one axis
    become float32. The file replaces ``path`` when complete; only one tensor is in memory at a time.

    Args:
      path: the file, conventionally ending in ``.gguf``.
      qparams: a tree of arrays and ``QArray`` leaves.
      like: a GGUF file of the same model in any precision, which may be ``path``. It provides the
        metadata, the tokenizer, and each tensor that ``qparams`` lacks.
      names: maps a leaf's path, as a mapping or a function, to its name in ``like``, to ``(name,
        transpose)``, or to None to leave the leaf out. ``transpose`` says whether a ``[in, out]`` leaf
        becomes GGUF's ``[out, in]``; for more axes it may be their order, after which neighbours are
        merged: ``(1, 2, 0)`` makes ``[d, heads, size]`` a tensor ``[heads * size, d]``. Without it, the
        grid, the shape or a last key ``kernel``, ``weight`` or ``embedding`` decides. A name with ``{}``,
        such as ``blk.{}.attn_q.weight``, stands for the tensors of all layers, which the leaf has along
        its leading axis. Leaves with a given name keep the order of their rows.

        By default, and for paths that a mapping lacks, a path is a name with ``/`` for ``.``; or, for a
        llama, Mistral, Mixtral, Qwen2 or Qwen3, the name in Hugging Face's model
        (``"model/layers/0/self_attn/q_proj/kernel"``, without the number for stacked layers). The rows of
        queries and keys are then put in GGUF's order, where the architecture has another. A leaf
        ``[experts, in, out]`` of ``mlp/experts`` is the tensor of all experts.
      otherwise: the dtype in which to write the dequantized values of leaves that no type holds exactly.

    Returns:
      The type of each tensor that came from ``qparams``, by name.

    Raises:
      OSError: a file cannot be opened.
      ValueError: no type holds a grid exactly (zero points, a codebook, other groups), or float16 its
        scales; ``like`` lacks a leaf, or has it with another shape, fewer or more
        layers, or visibly with the rows of queries or keys in another order; or ``like`` is not a GGUF file. The
        message names the leaf, its grid and the nearest grid that fits.

    References:
      ``blocks.py`` beside this module describes the layout of blocks, with its sources.

    Examples:
      Train ``params`` of a Hugging Face llama on the grid of Q4_0, and run the trained model::

        quantizer = Uniform(4, group_size=32, channel_axis=-1)  # kernels [in, out]
        tx = optax.chain(optax.adam(1e-5), quantize_weights(quantizer))
        ...
        to_gguf("mine.gguf", export_params(params, opt_state), like="llama-f16.gguf")

      ``like`` is a download, or what llama.cpp's ``convert_hf_to_gguf.py`` writes. For a model that was never
      elsewhere, write it with ``gguf.GGUFWriter``: the metadata, a tokenizer, and tensors of any values, since
      ``qparams`` replaces them. Ollama runs the file
      after ``echo "FROM ./mine.gguf" > Modelfile && ollama create mine -f Modelfile``.

      Here it is a minimal file. The leaf ``up`` has the kernels ``[in, out]`` of both layers:

      >>> import tempfile
      >>> import gguf
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from optax_clipquant import Uniform, from_gguf, quantize_params
      >>> folder = tempfile.TemporaryDirectory()
      >>> writer = gguf.GGUFWriter(folder.name + "/like.gguf", "llama")
      >>> for layer in range(2):
      ...     writer.add_tensor(f"blk.{layer}.ffn_up.weight", np.ones((64, 32), np.float16))
      >>> writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
      (None, None, None)
      >>> writer.close()
      >>> up = jnp.arange(2 * 32 * 64.0).reshape(2, 32, 64)
      >>> qparams = quantize_params({"up": up}, Uniform(4, channel_axis=(0, 2), group_size=32))
      >>> names = {"up": "blk.{}.ffn_up.weight"}
      >>> to_gguf(folder.name + "/mine.gguf", qparams, like=folder.name + "/like.gguf", names=names)
      {'blk.0.ffn_up.weight': 'Q4_0', 'blk.1.ffn_up.weight': 'Q4_0'}
      >>> tree, metadata = from_gguf(folder.name + "/mine.gguf")
      >>> decoded = tree["blk.1.ffn_up.weight"].dequantize()
      >>> bool((decoded == qparams["up"].dequantize()[1].T).all())
      True
      >>> folder.cleanup()
    """
    written = write_gguf(path, leaves_in(qparams), like=like, names=names, otherwise=otherwise)
    return {item.name: item.kind for item in written}


def write_gguf(
    path: str | os.PathLike[str],
    leaves: Mapping[str, Leaf],
    *,
    like: str | os.PathLike[str],
    names: Names | None = None,
    otherwise: Float | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Written]:
    """``to_gguf`` for leaves that need not be in memory; returns the tensors written from them.

    ``progress`` is called with the dequantized bytes of each tensor written from a leaf.
    """
    if otherwise not in (None, *get_args(Float)):
        raise ValueError(
            f"otherwise must be one of {', '.join(get_args(Float))} or None, got {otherwise!r}"
        )
    with GGUFFile(like) as source:
        if "split.count" in source.metadata:
            raise ValueError(f"{source.path} is one of several parts of a model; merge them first")
        placed = _placed(leaves, source, names)
        tensors = dict(source.tensors)
        for name, rows in placed.items():
            tensors[name] = _tensor(rows, source.tensors[name], otherwise)
        nbytes = {
            name: tensor.nbytes if name in placed else source.nbytes(name)
            for name, tensor in tensors.items()
        }
        announced = {name: (tensor, nbytes[name]) for name, tensor in tensors.items()}
        entries = _entries(source, tensors, nbytes)
        with writing(path, entries, announced, source.alignment) as file:
            for name, rows in placed.items():
                file.put(name, _content(rows, tensors[name].kind))
                progress(rows.nbytes)
            for name in tensors.keys() - placed.keys():
                file.put(name, source.pieces(name))
    return [Written(rows.leaf, name, *tensors[name], nbytes[name]) for name, rows in placed.items()]


def _placed(leaves: Mapping[str, Leaf], source: GGUFFile, names: Names | None) -> dict[str, Rows]:
    """The rows for each tensor that comes from a leaf, by name."""
    theirs: set[str] = set()

    def default(path: str) -> str:
        name, is_theirs = gguf_name(path, source)
        theirs.update([path] * is_theirs)
        return name

    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    placed = place(leaves, shapes, names, default, source.path)
    for name, rows in placed.items():
        translated = rows.leaf.path in theirs
        try:
            order = row_order(name, rows.shape[0], source.metadata)
        except ValueError:
            if translated:
                raise
            continue
        if order is not None:
            placed[name] = dataclasses.replace(rows, order=order if translated else None)
            check_order(placed[name], order, name, source)
    return placed


def _tensor(rows: Rows, theirs: Tensor, otherwise: Float | None) -> Tensor:
    """The tensor that a leaf becomes in place of ``theirs``."""
    return theirs._replace(kind=_kind(rows, theirs.kind, otherwise))


def _kind(rows: Rows, theirs: str, otherwise: Float | None) -> str:
    leaf = rows.leaf
    # ggml only computes with norms and biases in float32.
    single = len(rows.shape) == 1 and leaf.dtype in _HELD
    if leaf.grid is None:
        kind = _KINDS.get(leaf.dtype)
        if kind is not None and (leaf.dtype in _HELD or kind == theirs):
            return "F32" if single else kind
        problem = f"has dtype {leaf.dtype}, which weights in GGUF cannot have; cast it"
    elif single:
        return "F32"
    else:
        kind, problem = _block_kind(rows, leaf.grid)
        if kind is not None:
            return kind
    if otherwise is None:
        raise ValueError(
            f"leaf {leaf.path!r} of shape {leaf.shape} {problem}, or write its values by "
            "otherwise='float16'"
        )
    return _KINDS[np.dtype(otherwise)]


def _block_kind(rows: Rows, grid: Grid) -> tuple[str | None, str]:
    """The smallest type that holds the levels exactly; or None, and the reason why there is none."""
    lower, upper = integer_range(grid)
    length = rows.shape[-1]
    if grid.codebook is not None:
        problem = "has a codebook, and GGUF's levels are evenly spaced"
    elif grid.zero_point is not None:
        problem = "has zero points, which no type of GGUF holds exactly"
    else:
        for kind, blocks in BLOCKS.items():
            if blocks.lower <= lower and upper <= blocks.upper and rows.run % blocks.size == 0:
                wrong = _inexact(rows, blocks.size)
                return (kind, "") if wrong is None else (None, f"({grid.bits:.3g} bits) {wrong}")
        if grid.group is None:
            shared = "scales that its rows do not share"
        else:
            shared = f"groups of {grid.group[1]} along axis {grid.group[0]}"
        problem = f"has {shared} in rows of {length}, and GGUF's blocks are 32 of a row"
    if length % 32:
        nearest = "rows of this length fit no type: leave the leaf float"
    else:
        count = upper - lower + 1
        bits = next(bits for bits in (4, 5, 8) if count <= 2**bits)
        fitting = f"Uniform({bits}, group_size=32"
        if count <= 3 and length % 256 == 0:
            fitting = "Ternary(group_size=256"
        nearest = f"the nearest grid that fits is {fitting}{rows.channel_argument})"
    return None, f"({grid.bits:.3g} bits) {problem}; {nearest}"


def _scales(rows: Rows, size: int) -> np.ndarray:
    scales = rows.scales(size).astype(np.float32)
    assert rows.leaf.grid is not None
    return scales / 2 if rows.leaf.grid.offset else scales


def _inexact(rows: Rows, size: int) -> str | None:
    """The reason why float16 cannot hold the scales exactly, or None."""
    scales = _scales(rows, size)
    with np.errstate(over="ignore"):
        wrong = scales[(scales.astype(np.float16) != scales) | ~np.isfinite(scales)]
    if not wrong.size:
        return None
    if not np.isfinite(wrong[0]):
        return f"has a scale of {wrong[0]:g}, since its weights are not finite; mend them"
    return (
        f"has a scale of {wrong[0]:g}, which float16 does not hold exactly (it holds scales of 8 significant "
        "bits from 2**-17 to 65280); scale the weights"
    )


def _content(rows: Rows, kind: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor, a few rows at a time."""
    if kind in BLOCKS:
        yield from _encoded(rows, kind)
        return
    values = (rows.values() if rows.leaf.grid is not None else rows.codes()).reshape(-1)
    for first in range(0, values.size, _CHUNK):
        part = values[first : first + _CHUNK]
        with np.errstate(over="ignore"):
            cast = part.astype(PLAIN[kind])
        if kind == "F16" and not np.array_equal(np.isfinite(cast), np.isfinite(part)):
            largest = np.abs(part[np.isfinite(part)]).max()
            raise ValueError(
                f"leaf {rows.leaf.path!r} has a value of {float(largest):g}, beyond float16's 65504; "
                "choose otherwise='float32'"
            )
        yield cast


def _encoded(rows: Rows, kind: str) -> Iterator[np.ndarray]:
    grid, size = rows.leaf.grid, BLOCKS[kind].size
    assert grid is not None
    scales = _scales(rows, size).astype(np.float16).reshape(-1)
    codes = rows.codes().reshape(-1, size)
    step = _CHUNK // size
    for first in range(0, len(codes), step):
        part = rows.checked(codes[first : first + step])
        if grid.offset:
            part = 2 * part + np.int8(1)
        yield encode(kind, part, scales[first : first + step])


def _entries(
    source: GGUFFile, tensors: Mapping[str, Tensor], nbytes: Mapping[str, int]
) -> dict[str, bytes]:
    """The metadata of ``like``, with the entries that describe the types updated."""
    entries = dict(source.raw)
    total: dict[str, int] = collections.Counter()
    for name, tensor in tensors.items():
        total[tensor.kind] += nbytes[name]
    most = max(total, key=lambda kind: total[kind], default="F32")
    if most in _FILE_TYPES:
        entries["general.file_type"] = uint32(_FILE_TYPES[most])
    entries["general.quantization_version"] = uint32(2)
    return entries
