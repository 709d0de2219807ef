"""``save`` and ``load``: trees of arrays and ``QArray`` leaves in small files."""

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

from optax_clipquant._tree import PyTree, refuse_abstract
from optax_clipquant.formats.checkpoint import Checkpoint, files_of
from optax_clipquant.formats.dtypes import DTYPES, Opaque, Spec
from optax_clipquant.formats.native.calibration import KEY, calibration_of, text_of
from optax_clipquant.formats.native.description import LeafSpec, check_leaf, plain
from optax_clipquant.formats.native.file import Parts, Tensors, writing_saved
from optax_clipquant.formats.native.names import assemble, name_of, path_of_name
from optax_clipquant.formats.native.placement import fill, place
from optax_clipquant.formats.packing import pack, unpack
from optax_clipquant.quant.devices import narrow as narrow_codes
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.qarray import QArray, is_qarray
from optax_clipquant.quant.uses import Calibration

_STORED = set(DTYPES.values())
_CODES = {np.dtype(t) for t in (np.int8, ml_dtypes.int4, ml_dtypes.int2)}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def save(
    path: str | os.PathLike[str], tree: PyTree, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a tree of arrays and ``QArray`` leaves to a safetensors file.

    The write is atomic: the file is written beside ``path``, synced and renamed, so that a
    crash leaves the old file unchanged. Checksums cover every byte that matters.

    Args:
      path: the file, conventionally ending in ``.safetensors``.
      tree: nested dicts, lists, tuples and None; other nodes (an ``nnx.State``, a dataclass) are
        stored as dicts of their children, and restored with ``load(path, like=...)``. Numbers are
        stored as 0-d arrays. Or a ``Calibration``, which ``load`` returns as one.
      metadata: text to store with it, for ``safetensors.safe_open(path, "numpy").metadata()``.

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
    if isinstance(tree, Calibration):
        tree, metadata = dict(tree.moments), {**(metadata or {}), KEY: text_of(tree)}
    leaves: dict[str, Any] = {}
    nodes: dict[str, str] = {}
    _flatten(tree, (), leaves, nodes)
    for name, leaf in leaves.items():
        refuse_abstract(_where(path_of_name(name)), leaf)
    announced = {name: leaf_of(leaf, path_of_name(name)) for name, leaf in leaves.items()}
    with writing_saved(path, announced, nodes=nodes, metadata=metadata) as file:
        for name, leaf in leaves.items():
            file.put(name, parts_of(leaf, path_of_name(name)))


def load(path: str | os.PathLike[str], *, like: PyTree = None, narrow: bool = False) -> PyTree:
    """Reads a tree that ``save`` wrote, exactly.

    Args:
      path: the file; for a sharded checkpoint, its index ``*.safetensors.index.json`` or its folder. A
        sharded checkpoint from another program is read as a dict of its tensors by name. (Dtypes that
        NumPy lacks, such as F6_E2M3, come as bytes, uint8.)
      like: a tree with the structure to restore (an ``nnx.State``, a ``FrozenDict``, a dataclass), whose
        leaves have the expected shapes: arrays, ``jax.ShapeDtypeStruct`` or ``QArray``. Leaves are
        matched by path, and get the sharding that they have in ``like``, scales as far as it applies to
        them. Without it, what ``save`` stored as dicts stays dicts.
      narrow: whether to return codes as int4 or int2 where they fit, as ``narrow`` does.

    Returns:
      The tree. Arrays are ``jax.Array``, except that those of a dtype that jax would truncate (float64
      without x64) stay NumPy arrays.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is truncated, altered, or not written by ``save``; or it does not match
        ``like``. The message names the file, and the tensor or leaf.

    Examples:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from optax_clipquant import Uniform, quantize_params
      >>> qparams = quantize_params({"kernel": jnp.ones((8, 2))}, Uniform(bits=4))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/model.safetensors", qparams)
      ...     load(folder + "/model.safetensors")["kernel"].dequantize().sum()
      Array(16., dtype=float32)

      An NNX model and an Equinox model, whose functions are not saved. (``eqx.combine`` takes ``QArray`` leaves too, with
      ``is_leaf=lambda x: isinstance(x, QArray)``.)

      >>> import equinox as eqx
      >>> from flax import nnx
      >>> from optax_clipquant import dequantize_params
      >>> model = nnx.Linear(8, 2, rngs=nnx.Rngs(0))
      >>> arrays, functions = eqx.partition(eqx.nn.Linear(8, 2, key=jax.random.key(0)), eqx.is_array)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = folder + "/model.safetensors"
      ...     save(path, quantize_params(nnx.state(model, nnx.Param), Uniform(bits=4)))
      ...     nnx.update(model, dequantize_params(load(path, like=nnx.state(model, nnx.Param))))
      ...     save(path, quantize_params(arrays, Uniform(bits=4)))
      ...     module = eqx.combine(dequantize_params(load(path, like=arrays)), functions)
      >>> model(jnp.ones(8)).shape, module(jnp.ones(8)).shape
      ((2,), (2,))

      A file that another program wrote is read by ``safetensors.flax.load_file``.
    """
    with Checkpoint(path) as checkpoint:
        if not checkpoint.is_saved and files_of(path) == [os.fspath(path)]:
            raise ValueError(
                f"{checkpoint.path}: not written by optax_clipquant.save; read it with "
                "safetensors.flax.load_file"
            )
        leaves = {}
        for name, leaf in checkpoint.leaves.items():
            tensors = checkpoint.tensors(name)
            with checkpoint.describing(name):
                leaves[name] = restored(leaf, tensors)
        tree = assemble(leaves, checkpoint.nodes) if checkpoint.is_saved else leaves
    if like is None:
        tree = jax.tree.map(place, tree, is_leaf=is_qarray)
    else:
        tree = fill(like, tree, os.fspath(path))
    if checkpoint.is_saved and KEY in checkpoint.metadata:
        try:
            return calibration_of(checkpoint.metadata[KEY], tree)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {error}; write it again") from error
    return narrow_codes(tree) if narrow else tree


def _flatten(
    tree: PyTree, keys: tuple[Any, ...], leaves: dict[str, Any], nodes: dict[str, str]
) -> None:
    """Adds the leaves of ``tree`` to ``leaves``, and the kinds of its nodes to ``nodes``."""
    name = name_of(keys)
    if tree is None:
        nodes[name] = "none"
        return
    children = None if is_qarray(tree) else _children(tree)
    if children is None:
        leaves[name] = tree
        return
    for key, _ in children:
        if type(key) not in (str, int):
            path = "/".join(map(str, keys))
            raise TypeError(f"{path or 'the tree'}: keys must be text or integers, got {key!r}")
    if type(tree) in (list, tuple):
        nodes[name] = type(tree).__name__
    elif not children:
        nodes[name] = "dict"
    elif all(type(key) is int for key, _ in children):
        nodes[name] = "int"
    for key, child in children:
        _flatten(child, (*keys, key), leaves, nodes)


def _children(tree: PyTree) -> list[tuple[Any, PyTree]] | None:
    """The key and value of each child of a node; None for a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(flat) == 1 and not flat[0][0]:
        return None
    # A None child counts as a leaf, so that its key is listed.
    names = ("key", "idx", "name")
    return [
        (next((getattr(path[0], n) for n in names if hasattr(path[0], n)), str(path[0])), child)
        for path, child in flat
    ]


def leaf_of(leaf: Any, path: str) -> LeafSpec:
    """The description of ``leaf`` in a file. Raises as ``save`` does if it cannot be stored.

    It may be abstract, made of ``jax.ShapeDtypeStruct``; the scales of a ``QArray`` must then fit
    bfloat16.
    """
    if not is_qarray(leaf):
        return plain(_spec(leaf, path))
    grid = leaf.grid
    where = _where(path)
    if grid.bits != math.log2(3) and grid.bits not in range(1, 9):
        raise ValueError(f"{where}: bits must be 1 to 8 or log2(3), got {grid.bits}")
    _, shape = _spec(leaf.qvalue, path, _CODES)
    specs: dict[str, Spec] = {"": (np.dtype(np.uint8), (grid.packed_size(math.prod(shape)),))}
    if isinstance(grid.scale, jax.ShapeDtypeStruct):
        specs["s"] = _BFLOAT16, grid.scale.shape
        if grid.zero_point is not None:
            specs["z"] = grid.zero_point.dtype, grid.zero_point.shape
    else:
        specs |= {kind: (x.dtype, x.shape) for kind, x in _grid_arrays(leaf, path).items()}
    stored = LeafSpec(specs, grid.levels, shape)
    try:
        check_leaf(stored)
    except ValueError as error:
        raise ValueError(f"{where}: its grid cannot be stored: {error}") from None
    return stored


def parts_of(leaf: Any, path: str) -> Parts:
    """The tensors of ``leaf`` for a file; raises as ``save`` does."""
    if not is_qarray(leaf):
        yield "", [_host(leaf)]
        return
    codes = np.asarray(leaf.qvalue).astype(np.int8, copy=False)
    _check_codes(codes, leaf.grid, path)
    yield "", [pack(codes, leaf.grid)]
    for kind, array in _grid_arrays(leaf, path).items():
        yield kind, [array]


def _grid_arrays(q: QArray, path: str) -> dict[str, np.ndarray]:
    """The arrays of a grid by kind, broadcast to one shape and cast to the dtypes of the file format."""
    arrays = {"s": q.grid.scale, "z": q.grid.zero_point, "m": q.grid.max_code}
    for array in arrays.values():
        if array is not None:
            _spec(array, path)
    found = {kind: np.asarray(x) for kind, x in arrays.items() if x is not None}
    shape = np.broadcast_shapes((1,) * q.ndim, *(x.shape for x in found.values()))
    found = {kind: np.broadcast_to(x, shape) for kind, x in found.items()}
    scale = found["s"].astype(np.float32)
    short = scale.astype(ml_dtypes.bfloat16)
    exact = np.array_equal(short.astype(np.float32), scale, equal_nan=True)
    found["s"] = short if exact else scale
    if "z" in found:
        whole = found["z"].dtype.kind == "i" and np.all(np.abs(found["z"]) <= 127)
        found["z"] = found["z"].astype(np.int8 if whole or found["z"].dtype == np.int8 else np.float32)  # fmt: skip
    if "m" in found:
        found["m"] = found["m"].astype(np.int32)
    return found


def restored(leaf: LeafSpec, tensors: Tensors) -> Any:
    """Rebuilds a leaf, made of NumPy arrays, from its tensors."""
    if isinstance(leaf.dtype, Opaque):
        # As uint8, with the bytes of a row along the last axis if rows fill whole bytes.
        rows = leaf.shape[:-1] if leaf.shape and leaf.shape[-1] * leaf.dtype.bits % 8 == 0 else ()
        return tensors[""].reshape(*rows, -1) if math.prod(rows) else tensors[""]
    if leaf.levels is None:
        return tensors[""]
    grid = Grid(
        scale=tensors["s"].astype(np.float32),  # pyright: ignore[reportArgumentType]
        zero_point=tensors.get("z"),  # pyright: ignore[reportArgumentType]
        max_code=tensors.get("m"),  # pyright: ignore[reportArgumentType]
        **dataclasses.asdict(leaf.levels),
    )
    codes = unpack(tensors[""], math.prod(leaf.shape), leaf.levels)
    return QArray(codes.reshape(leaf.shape), grid)  # pyright: ignore[reportArgumentType]


def _where(path: str) -> str:
    return f"leaf {path!r}" if path else "the tree"


def _check_codes(codes: np.ndarray, grid: Grid, path: str) -> None:
    """Raises if codes do not fit their bits, which only a ``QArray`` made by hand can cause."""
    levels = 3 if grid.bits == math.log2(3) else 2 ** int(grid.bits)
    upper = min(grid.upper, grid.lower + levels - 1)
    if codes.size and not (grid.lower <= codes.min() and codes.max() <= upper):
        raise ValueError(
            f"leaf {path!r}: codes from {codes.min()} to {codes.max()} do not fit its grid, which has "
            f"room for {grid.lower} to {upper}; correct the grid's bits, lower and upper"
        )


def _spec(leaf: Any, path: str, stored: set[np.dtype] = _STORED) -> Spec:
    """The dtype and shape of ``leaf`` in a file. Raises ``TypeError`` if it cannot be stored."""
    where = _where(path)
    if isinstance(leaf, Tracer):
        raise TypeError(f"{where} is traced; call save outside jax.jit")
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where} is a PRNG key; store jax.random.key_data of it")
    if isinstance(leaf, (bool, int, float, complex)):
        leaf = np.asarray(leaf)
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        raise TypeError(
            f"{where} is a {type(leaf).__name__}; only arrays and numbers can be stored: of an Equinox "
            "module, give eqx.filter(module, eqx.is_array)"
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
