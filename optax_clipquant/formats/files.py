"""save, load: a tree of arrays and ``QArray`` leaves in a small file (``saved.py``)."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from optax_clipquant._tree import path_of
from optax_clipquant.formats.layout import Leaf, plain
from optax_clipquant.formats.names import path_of_name
from optax_clipquant.formats.native import Parts, SavedFile, Tensors, write
from optax_clipquant.formats.packing import pack, unpack
from optax_clipquant.formats.safetensors import DTYPES, Reader, Spec
from optax_clipquant.formats.trees import assemble, flatten
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.params import PyTree
from optax_clipquant.quant.qarray import QArray, is_qarray
from optax_clipquant.quant.qarray import narrow as narrow_codes

_STORED = set(DTYPES.values())
_CODES = {np.dtype(t) for t in (np.int8, ml_dtypes.int4, ml_dtypes.int2)}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def save(
    path: str | os.PathLike[str], tree: PyTree, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a tree of arrays and ``QArray`` leaves to a safetensors file.

    The write is atomic: the file is written beside ``path``, synced and renamed, so that a
    crash leaves the old file as it was. A checksum covers every byte that matters.

    Args:
      path: the file, by custom with the ending ``.safetensors``.
      tree: nested dicts, lists, tuples and None; other nodes (an ``nnx.State``, a dataclass) are
        stored as dicts of their children, and restored with ``load(path, like=...)``. Numbers are
        stored as 0-d arrays.
      metadata: text to store beside it, for ``safetensors.safe_open(path, "numpy").metadata()``.

    Raises:
      TypeError: a leaf cannot be stored, or ``metadata`` is not text.
      ValueError: ``metadata`` has a key that this library reserves, or the codes of a leaf do not fit
        their grid.

    Examples:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from optax_clipquant import Uniform, quantize_params
      >>> qparams = quantize_params({"kernel": jnp.ones((64, 64))}, Uniform(bits=3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/model.safetensors", qparams)
      ...     os.path.getsize(folder + "/model.safetensors")
      2040
    """
    leaves, nodes = flatten(tree)
    announced = {name: leaf_of(leaf, path_of_name(name)) for name, leaf in leaves.items()}
    contents = ((name, parts_of(leaf, path_of_name(name))) for name, leaf in leaves.items())
    write(path, announced, contents, nodes=nodes, metadata=metadata)


def load(path: str | os.PathLike[str], *, like: PyTree = None, narrow: bool = False) -> PyTree:
    """Reads a tree that ``save`` wrote, exactly.

    Args:
      path: the file.
      like: a tree of the structure to restore (an ``nnx.State``, a ``FrozenDict``, a dataclass), whose
        leaves have the shapes expected: arrays, ``jax.ShapeDtypeStruct`` or ``QArray``. Leaves are
        matched by their paths. Without it, what ``save`` stored as dicts stays dicts.
      narrow: whether codes come as int4 or int2 where they fit: see ``narrow``.

    Returns:
      The tree. Arrays are ``jax.Array``, but those of a dtype that jax would cut (float64 without
      x64) stay NumPy arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, altered, or not one of ``save``; or it does not fit ``like``.
        The message names the file, and the tensor or leaf.

    Examples:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from optax_clipquant import Uniform, quantize_params
      >>> qparams = quantize_params({"kernel": jnp.ones((8, 2))}, Uniform(bits=4))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/model.safetensors", qparams)
      ...     load(folder + "/model.safetensors")["kernel"].dequantize().sum()
      Array(16., dtype=float32)
    """
    with Reader(path) as reader:
        file = SavedFile(reader)
        leaves = {}
        for entry in file.entries:
            tensors = file.read(entry)
            with file.describing():
                leaves[entry.name] = _restored(entry.leaf, tensors)
        with file.describing():
            tree = assemble(leaves, file.nodes)
    if like is not None:
        tree = _fill(like, tree, os.fspath(path))
    return narrow_codes(tree) if narrow else tree


def leaf_of(leaf: Any, path: str) -> Leaf:
    """What a file holds of ``leaf``. Raises as ``save`` does where one cannot be stored.

    It may stand for what it will be, of ``jax.ShapeDtypeStruct``; then the scales of a ``QArray`` must
    fit bfloat16.
    """
    if not is_qarray(leaf):
        return plain(_spec(leaf, path))
    grid = leaf.grid
    where = f"leaf {path!r}" if path else "the tree"
    if grid.bits != math.log2(3) and grid.bits not in range(1, 9):
        raise ValueError(f"{where}: bits must be 1 to 8 or log2(3), got {grid.bits}")
    _, shape = _spec(leaf.qvalue, path, _CODES)
    scale = _spec(grid.scale, path)
    concrete = not isinstance(grid.scale, jax.ShapeDtypeStruct)
    specs = {
        "": (np.dtype(np.uint8), (grid.packed_size(math.prod(shape)),)),
        "s": (_scale(grid).dtype if concrete else _BFLOAT16, scale[1]),
    }
    if grid.zero_point is not None:
        specs["z"] = _spec(grid.zero_point, path)
    if grid.max_code is not None:
        specs["m"] = _spec(grid.max_code, path)
    return Leaf(specs, grid.levels, shape)


def parts_of(leaf: Any, path: str) -> Parts:
    """The tensors of ``leaf`` for a file. Raises as ``save`` does."""
    if not is_qarray(leaf):
        yield "", [_host(leaf)]
        return
    grid = leaf.grid
    codes = np.asarray(leaf.qvalue).astype(np.int8, copy=False)
    _check_codes(codes, grid, path)
    yield "", [pack(codes, grid)]
    yield "s", [_scale(grid)]
    if grid.zero_point is not None:
        yield "z", [_host(grid.zero_point)]
    if grid.max_code is not None:
        yield "m", [_host(grid.max_code)]


def _restored(leaf: Leaf, tensors: Tensors) -> Any:
    """The leaf whose tensors these are."""
    if leaf.levels is None:
        return _device(tensors[""])
    grid = Grid(
        scale=_device(tensors["s"].astype(np.float32)),
        zero_point=_device(tensors["z"]) if "z" in tensors else None,
        max_code=_device(tensors["m"]) if "m" in tensors else None,
        **dataclasses.asdict(leaf.levels),
    )
    codes = unpack(tensors[""], math.prod(leaf.shape), leaf.levels)
    return QArray(jnp.asarray(codes.reshape(leaf.shape)), grid)


def _scale(grid: Grid) -> np.ndarray:
    """As bfloat16 where that loses nothing."""
    scale = np.asarray(grid.scale).astype(np.float32)
    short = scale.astype(ml_dtypes.bfloat16)
    exact = np.array_equal(short.astype(np.float32), scale, equal_nan=True)
    return short if exact else scale


def _check_codes(codes: np.ndarray, grid: Grid, path: str) -> None:
    """Raises where packing would cut codes: only a ``QArray`` made by hand can hold such."""
    levels = 3 if grid.bits == math.log2(3) else 2 ** int(grid.bits)
    upper = min(grid.upper, grid.lower + levels - 1)
    if codes.size and not (grid.lower <= codes.min() and codes.max() <= upper):
        raise ValueError(
            f"leaf {path!r}: codes from {codes.min()} to {codes.max()} do not fit its grid, which has "
            f"room for {grid.lower} to {upper}; correct the grid's bits, lower and upper"
        )


def _spec(leaf: Any, path: str, stored: set[np.dtype] = _STORED) -> Spec:
    """Dtype and shape of ``leaf`` in a file. Raises where it cannot be there."""
    where = f"leaf {path!r}" if path else "the tree"
    if isinstance(leaf, Tracer):
        raise TypeError(f"{where} is traced; call save outside jax.jit")
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where} is a PRNG key; store jax.random.key_data of it")
    if isinstance(leaf, (bool, int, float, complex)):
        leaf = np.asarray(leaf)
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        raise TypeError(
            f"{where} is a {type(leaf).__name__}; only arrays and numbers can be stored"
        )
    dtype = np.dtype(leaf.dtype).newbyteorder("=")
    if dtype not in stored:
        if stored is _CODES:
            raise TypeError(f"{where} has codes of dtype {dtype}; cast them to int8")
        raise TypeError(f"{where} has dtype {dtype}, which a file cannot hold; cast it first")
    return dtype, tuple(leaf.shape)


def _host(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _device(array: np.ndarray) -> Any:
    """As a jax array, but where jax would cut it."""
    return (
        array if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype else jnp.asarray(array)
    )


def _fill(like: PyTree, tree: PyTree, file: str) -> PyTree:
    """``like`` with the leaves of ``tree``, matched by path."""
    expected, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_qarray)
    found = {
        _parts(key): leaf
        for key, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qarray)[0]
    }
    leaves = []
    for key, leaf in expected:
        path, parts = path_of(key), _parts(key)
        if parts not in found:
            raise ValueError(
                f"{file}: no leaf {path!r}, which `like` has; left to match are {_some(found)}"
            )
        shape = np.shape(found[parts])
        if shape != np.shape(leaf):
            raise ValueError(
                f"{file}: leaf {path!r} has shape {shape}, but {np.shape(leaf)} in `like`"
            )
        leaves.append(found.pop(parts))
    if found:
        raise ValueError(f"{file}: has leaves that `like` lacks: {_some(found)}")
    return treedef.unflatten(leaves)


def _parts(key: jax.tree_util.KeyPath) -> tuple[str, ...]:
    """A path as the text of its keys, without a box's ``value``, as ``path_of`` has it.

    Not joined: Haiku's keys hold slashes, and ``{"a/b": x}`` is not ``{"a": {"b": x}}``.
    """
    parts = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in key)
    return parts[:-1] if parts[-1:] == ("value",) else parts


def _some(found: Mapping[tuple[str, ...], Any]) -> list[str]:
    return ["/".join(parts) for parts in list(found)[:8]]
