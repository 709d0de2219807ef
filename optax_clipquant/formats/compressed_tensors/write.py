"""``to_compressed_tensors`` writes a quantized tree as a Hugging Face folder, with the same weights."""

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_clipquant._atomic import new_folder
from optax_clipquant._tree import PyTree
from optax_clipquant.formats.compressed_tensors.folder import (
    float_config,
    is_weights,
    shards_of,
    write_json,
)
from optax_clipquant.formats.compressed_tensors.layout import PARTS, Scheme, words_of
from optax_clipquant.formats.leaves import Leaf, Written, dotted, leaves_in
from optax_clipquant.formats.rows import Names, Rows, integer_range, place
from optax_clipquant.formats.safetensors import Reader, Spec, nbytes, writing
from optax_clipquant.quant.grid import Grid

_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|emb)\b")
_CHUNK = 2**20  # elements


def to_compressed_tensors(
    folder: str | os.PathLike[str],
    qparams: PyTree,
    *,
    like: str | os.PathLike[str],
    names: Names | None = None,
) -> dict[str, str]:
    """Writes a quantized tree as a Hugging Face folder, which vLLM and transformers load.

    Nothing is requantized: the files hold the codes, zero points and scales of the grid, so that each
    weight that compressed-tensors decodes equals ``dequantize_params(qparams)``. The format is
    ``pack-quantized``; a weight has 4 bits (W4A16) if its codes fit, else 8 (W8A16), in groups along its
    rows or in channels, with or without zero points (which transformers cannot load with compressed-tensors
    0.20, whoever wrote them; vLLM can). vLLM's fastest kernels take groups of 32, 64 and
    128, and channels.

    Readers accept only quantized linear layers: other ``QArray`` leaves (embeddings, tied ones too,
    convolutions, vectors) are written dequantized, which is equal but not small. Arrays keep their dtype.

    Args:
      folder: the folder to write, which must not exist or be empty. It appears when complete.
      qparams: a tree of arrays and ``QArray`` leaves.
      like: the folder of the float model, in one safetensors file or several. It provides the
        configuration, the tokenizer, each tensor that ``qparams`` lacks, and the assignment of tensors
        to files.
      names: maps a leaf's path to a name in ``like``, as for ``to_gguf``. By default, and for paths that
        a mapping lacks, slashes become dots and a last ``kernel`` or ``embedding`` becomes ``weight``:
        ``"model/layers/0/mlp/up_proj/kernel"`` is ``model.layers.0.mlp.up_proj.weight``. A path without
        the layer's number is a leaf of stacked layers.

    Returns:
      The dtype of each weight of ``qparams`` by name, ``int4`` or ``int8`` where it is packed.

    Raises:
      FileExistsError: the folder exists and is not empty.
      OSError: a file cannot be opened.
      ValueError: the format cannot hold a linear layer's grid exactly (a codebook, fractional zero
        points, groups that do not divide the rows or do not run along them), or the leaf's dtype its
        scales; ``like`` lacks a leaf, or has it with another shape; or ``like`` is not a float model. The
        message names the leaf, its grid and the nearest grid that fits.

    Examples:
      Train on the grid, and let vLLM serve the trained weights::

        tx = optax.chain(optax.adam(1e-5), quantize_weights(Uniform(4, group_size=32)))
        ...
        to_compressed_tensors("served", export_params(params, opt_state), like="downloaded")

      A model with a single layer:

      >>> import json, pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> import safetensors.flax
      >>> from optax_clipquant import Uniform, from_compressed_tensors, quantize_params
      >>> folder = tempfile.TemporaryDirectory()
      >>> like = pathlib.Path(folder.name, "like")
      >>> like.mkdir()
      >>> _ = (like / "config.json").write_text(json.dumps({"model_type": "llama"}))
      >>> weights = {"up_proj.weight": jnp.ones((64, 32))}
      >>> safetensors.flax.save_file(weights, like / "model.safetensors")
      >>> qparams = quantize_params(weights, Uniform(4, channel_axis=0, group_size=32))
      >>> to_compressed_tensors(folder.name + "/served", qparams, like=like)
      {'up_proj.weight': 'int4'}
      >>> tree, config = from_compressed_tensors(folder.name + "/served")
      >>> config["quantization_config"]["format"], tree["up_proj.weight"].bits
      ('pack-quantized', 4)
      >>> folder.cleanup()
    """
    written = write_compressed_tensors(folder, leaves_in(qparams), like=like, names=names)
    return {item.name: item.kind for item in written}


def write_compressed_tensors(
    folder: str | os.PathLike[str],
    leaves: Mapping[str, Leaf],
    *,
    like: str | os.PathLike[str],
    names: Names | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Written]:
    """``to_compressed_tensors`` for leaves that need not be in memory; returns the tensors written from them."""
    like = os.fspath(like)
    config = float_config(like)
    with contextlib.ExitStack() as stack, new_folder(folder) as new:
        shards = {name: stack.enter_context(Reader(path)) for name, path in shards_of(like).items()}
        specs = {name: spec for reader in shards.values() for name, spec in reader.specs.items()}
        shapes = {name: shape for name, (_, shape) in specs.items()}
        placed = place(leaves, shapes, names, lambda path: _default(path, specs), like)
        schemes: dict[str, Scheme] = {}
        for name, rows in placed.items():
            if rows.leaf.grid is not None and _is_linear(name, rows.shape):
                schemes[name] = _scheme(rows, rows.leaf.grid)
        sizes = {
            shard: _write_shard(os.path.join(new, shard), reader, placed, schemes, progress)
            for shard, reader in shards.items()
        }
        if shards.keys() != {"model.safetensors"}:  # readers only find that one without an index
            where = {name: shard for shard, tensors in sizes.items() for name in tensors}
            total = sum(itertools.chain.from_iterable(t.values() for t in sizes.values()))
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(os.path.join(new, "model.safetensors.index.json"), index)
        linear = [name for name, shape in shapes.items() if _is_linear(name, shape)]
        if schemes:
            config["quantization_config"] = _quantization(schemes, linear)
        dtypes = {placed[name].leaf.dtype.name for name in schemes}
        if len(dtypes) == 1:
            # Readers decode in this dtype, whatever the dtype of the scales in the files.
            config["dtype" if "dtype" in config else "torch_dtype"] = dtypes.pop()
        write_json(os.path.join(new, "config.json"), config)
        for entry in os.scandir(like):
            if entry.is_file() and entry.name != "config.json" and not is_weights(entry.name):
                shutil.copyfile(entry.path, os.path.join(new, entry.name))
    every = {name: size for tensors in sizes.values() for name, size in tensors.items()}
    return [_written(name, rows, schemes.get(name), every) for name, rows in placed.items()]


def takes_codes(
    path: str, shape: tuple[int, ...], names: Mapping[str, Any], specs: Mapping[str, Spec]
) -> bool:
    """Whether a folder with tensors of ``specs`` can hold a leaf as codes; it holds others dequantized."""
    target = names[path] if path in names else _default(path, specs)
    name = target[0] if isinstance(target, tuple | list) else target
    if not isinstance(name, str):
        return True  # left out, or refused when it is written
    name = name.replace("{}", "0")
    return _is_linear(name, specs[name][1] if name in specs else shape)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer, judged by its name and shape."""
    return len(shape) == 2 and name.endswith(".weight") and not _EMBEDDING.search(name)


def _written(name: str, rows: Rows, scheme: Scheme | None, sizes: Mapping[str, int]) -> Written:
    kind = rows.leaf.dtype.name if scheme is None else f"int{scheme.bits}"
    names = [name] if scheme is None else [f"{name}_{part}" for part in PARTS]
    return Written(rows.leaf, name, kind, rows.shape, sum(sizes.get(part, 0) for part in names))


def _default(path: str, specs: Mapping[str, Spec]) -> str:
    """The default name of a leaf."""
    if path in specs:
        return path
    name = dotted(path).removeprefix("params.")
    stacked = re.sub(r"\blayers\.(?!\d)", "layers.{}.", name, count=1)
    return stacked if name not in specs and stacked.replace("{}", "0") in specs else name


def _scheme(rows: Rows, grid: Grid) -> Scheme:
    """The scheme for a layer's weight. Raises ``ValueError`` if none is exact."""
    lower, upper = integer_range(grid)
    length = rows.shape[-1]
    if grid.codebook is not None:
        problem = "has a codebook, and these levels are evenly spaced"
    elif grid.zero_point is not None and not jnp.issubdtype(grid.zero_point.dtype, jnp.integer):
        problem = "has fractional zero points"
    elif rows.run == 1 < length:
        shared = f"groups of {grid.group[1]}" if grid.group else "scales that its rows do not share"
        along = f" along axis {grid.group[0]}" if grid.group else ""
        problem = f"has {shared}{along}, which do not divide rows of {length}"
    else:
        scales = _scales(rows)
        wrong = (scales.astype(rows.leaf.dtype).astype(np.float32) != scales) | ~np.isfinite(scales)
        bits = 4 if lower >= -8 and upper <= 7 else 8
        if wrong.any():
            problem = f"has a scale of {scales[wrong][0]:g}, which {rows.leaf.dtype} does not hold exactly"
        elif grid.zero_point is None:
            return Scheme(bits, rows.run if rows.run < length else None, True)
        else:
            zeros = rows.scales(rows.run, "zero_point").astype(np.int32)
            farthest = np.maximum(abs(lower - zeros), abs(upper - zeros)) * abs(scales)
            if zeros.size and not (
                -(2 ** (bits - 1)) <= zeros.min() <= zeros.max() < 2 ** (bits - 1)
            ):
                problem = f"has zero points from {zeros.min()} to {zeros.max()}, beyond {bits} bits"
            elif farthest.max(initial=0) > float(jnp.finfo(rows.leaf.dtype).max):
                problem = f"has levels beyond the largest {rows.leaf.dtype}"
            else:
                return Scheme(bits, rows.run if rows.run < length else None, False)
    bits = 4 if upper - lower < 16 else 8
    raise ValueError(
        f"leaf {rows.leaf.path!r} of shape {rows.leaf.shape} ({grid.bits:.3g} bits) {problem}; the nearest "
        f"grid that fits is Uniform({bits}{rows.channel_argument}), also with a group_size that divides "
        f"{length}, of a leaf in float32 or bfloat16"
    )


def _scales(rows: Rows) -> np.ndarray:
    scales = rows.scales(rows.run).astype(np.float32)
    assert rows.leaf.grid is not None
    return scales / 2 if rows.leaf.grid.offset else scales


def _write_shard(
    path: str,
    reader: Reader,
    placed: Mapping[str, Rows],
    schemes: Mapping[str, Scheme],
    progress: Callable[[int], None],
) -> dict[str, int]:
    """Writes a file like the one of ``reader``; returns the bytes of each of its tensors."""
    specs: dict[str, Spec] = {}
    for name, spec in reader.specs.items():
        if name in schemes:
            specs |= _packed_specs(name, placed[name], schemes[name])
        else:
            specs[name] = (placed[name].leaf.dtype, spec[1]) if name in placed else spec
    with writing(path, specs, {"format": "pt"} | reader.texts) as file:
        for name in reader.specs:
            contents: Iterable[tuple[str, Iterable[np.ndarray]]]
            if name in schemes:
                contents = _packed(name, placed[name], schemes[name])
            else:
                pieces = [placed[name].values()] if name in placed else reader.pieces(name)
                contents = [(name, pieces)]
            for part, pieces in contents:
                for _ in file.putting(part, pieces):
                    pass
            if name in placed:
                progress(placed[name].nbytes)
    return {name: nbytes(*spec) for name, spec in specs.items()}


def _packed_specs(name: str, rows: Rows, scheme: Scheme) -> dict[str, Spec]:
    outputs, length = rows.shape
    groups = length // (scheme.group or length or 1)
    specs = {
        f"{name}_packed": (_INT32, (outputs, -(-length * scheme.bits // 32))),
        f"{name}_scale": (rows.leaf.dtype, (outputs, groups)),
        f"{name}_shape": (_INT64, (2,)),
    }
    if not scheme.symmetric:
        specs[f"{name}_zero_point"] = (_INT32, (-(-outputs * scheme.bits // 32), groups))
    return specs


def _packed(name: str, rows: Rows, scheme: Scheme) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    """The tensors that replace a layer's weight."""
    yield f"{name}_packed", _packed_codes(rows, scheme)
    yield f"{name}_scale", [_scales(rows).astype(rows.leaf.dtype)]
    yield f"{name}_shape", [np.array(rows.shape, np.int64)]
    if not scheme.symmetric:
        zeros = rows.scales(rows.run, "zero_point").astype(np.int8)
        yield f"{name}_zero_point", [np.ascontiguousarray(words_of(zeros.T, scheme.bits).T)]


def _packed_codes(rows: Rows, scheme: Scheme) -> Iterator[np.ndarray]:
    grid = rows.leaf.grid
    assert grid is not None
    codes = rows.codes()
    step = max(_CHUNK // max(codes.shape[1], 1), 1)
    for first in range(0, len(codes), step):
        part = rows.checked(codes[first : first + step])
        yield words_of(2 * part + np.int8(1) if grid.offset else part, scheme.bits)


def _quantization(schemes: Mapping[str, Scheme], linear: list[str]) -> dict[str, Any]:
    """The entry ``quantization_config``."""
    layers: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        layers.setdefault(scheme, []).append(name.removesuffix(".weight"))
    groups = {}
    for number, (scheme, found) in enumerate(layers.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(layers) == 1 else found,
            "weights": scheme.args(),
            "input_activations": None,
            "output_activations": None,
        }
    ignored = [name.removesuffix(".weight") for name in linear if name not in schemes]
    if "lm_head.weight" not in schemes and "lm_head" not in ignored:
        ignored.append("lm_head")  # a linear layer even when tied to the embedding
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
