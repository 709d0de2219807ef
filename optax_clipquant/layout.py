"""How a tree lies in a file: its leaves as named tensors, the rest as JSON. No input or output here.

Names. The name of a leaf is the keys that lead to it, each with ``~`` written ``~0`` and ``/`` written
``~1`` (JSON pointer, RFC 6901, without the leading slash), joined by ``/``. The tree itself is ``~``;
``__metadata__``, which safetensors keeps for itself, is ``~_metadata__``.

Tensors. An array is stored under its name. Of a ``QArray``, the packed codes (``packing.py``) are stored
as bytes under its name; for the ``k``-th in the order of names, ``~sk`` holds its scales, as bfloat16
where that loses nothing and else as float32, and where there are any, ``~zk`` its zero points and
``~mk`` its bound on codes. So a path is written once, and a leaf costs few bytes beside its content.

JSON. ``leaves`` has an entry for each leaf in the order of names: the CRC-32 of its tensor; or of a
``QArray``, ``[CRC-32 of codes, scales, zero points and bound in turn, index into grids, shape]``.
``grids`` lists the distinct ``[bits, lower, upper, offset, group, dtype, code book]``, with 0 for log2(3)
bits, for no group and for no code book. ``nodes`` tells by name what is not a dict with text for keys: ``list``, ``tuple``, ``int``
(a dict with integers for keys), ``none``, and ``dict`` for an empty one.
"""

import math
import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from optax_clipquant.grids import Grid
from optax_clipquant.packing import pack, unpack
from optax_clipquant.params import PyTree
from optax_clipquant.qarray import QArray, is_qarray

_ROOT = "~"
_STORED = {
    np.dtype(t)
    for t in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64"),
        ml_dtypes.bfloat16,
    )
}
_CODES = {np.dtype(t) for t in (np.int8, ml_dtypes.int4, ml_dtypes.int2)}

Tensors = dict[str, np.ndarray]


def describe(tree: PyTree) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of ``tree`` and the JSON that goes with them. Raises as ``save`` does."""
    leaves: dict[str, Any] = {}
    nodes: dict[str, str] = {}
    _collect(tree, (), leaves, nodes)
    tensors: Tensors = {}
    grids: list[list[Any]] = []
    entries: list[Any] = []
    count = 0
    for name in sorted(leaves):
        leaf, path = leaves[name]
        if not is_qarray(leaf):
            array = _host(leaf, path)
            tensors[name] = np.ascontiguousarray(array).reshape(array.shape)
            entries.append(_crc32(tensors[name]))
            continue
        parts = _parts_of(leaf, path)
        static = _static(leaf.grid)
        if static not in grids:
            grids.append(static)
        entries.append([_crc32(*parts.values()), grids.index(static), list(leaf.shape)])
        tensors |= {f"~{kind}{count}" if kind else name: part for kind, part in parts.items()}
        count += 1
    return tensors, {"leaves": entries, "grids": grids, "nodes": nodes}


def rebuild(tensors: Tensors, header: dict[str, Any]) -> PyTree:
    """The tree that ``describe`` described.

    Raises:
      Altered: the content of a leaf has another checksum.
      Exception: of many kinds, where ``header`` is not what ``describe`` made of ``tensors``.
    """
    names = sorted(name for name in tensors if name == _ROOT or not _is_part(name))
    nodes = header["nodes"]
    found: dict[tuple[str, ...], Any] = {}
    count = 0
    for name, entry in list(zip(names, header["leaves"], strict=True)):
        if isinstance(entry, int):
            checksum, parts, make = entry, {}, _device
        else:
            checksum, grid, shape = entry
            parts = {k: tensors[f"~{k}{count}"] for k in "szm" if f"~{k}{count}" in tensors}
            make = partial(_qarray, parts=parts, static=header["grids"][grid], shape=shape)
            count += 1
        if _crc32(tensors[name], *parts.values()) != checksum:
            raise Altered(name)
        found[_keys(name)] = make(tensors[name])
    return _assemble(found, {_keys(name): kind for name, kind in nodes.items()})


class Altered(Exception):
    """The content of the leaf of this name has another checksum."""


def _collect(
    tree: PyTree, keys: tuple[Any, ...], leaves: dict[str, Any], nodes: dict[str, str]
) -> None:
    """Puts the leaves under ``tree`` and their paths in ``leaves``, and the kinds of nodes in ``nodes``."""
    name = _name(keys)
    if tree is None:
        nodes[name] = "none"
        return
    children = None if is_qarray(tree) else _children(tree)
    if children is None:
        leaves[name] = (tree, "/".join(map(str, keys)))
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
        _collect(child, (*keys, key), leaves, nodes)


def _children(tree: PyTree) -> list[tuple[Any, PyTree]] | None:
    """Key and value of each child of a node, None for a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(flat) == 1 and not flat[0][0]:
        return None
    # A node without children has no key to show; None among children is one.
    names = ("key", "idx", "name")
    return [
        (next((getattr(path[0], n) for n in names if hasattr(path[0], n)), str(path[0])), child)
        for path, child in flat
    ]


def _name(keys: tuple[Any, ...]) -> str:
    if not keys:
        return _ROOT
    name = "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in keys)
    return "~_metadata__" if name == "__metadata__" else name


def _keys(name: str) -> tuple[str, ...]:
    """The keys that ``_name`` joined."""
    if name == _ROOT:
        return ()
    if name == "~_metadata__":
        return ("__metadata__",)
    return tuple(key.replace("~1", "/").replace("~0", "~") for key in name.split("/"))


def _is_part(name: str) -> bool:
    """Whether a tensor is part of a ``QArray``: no name of a leaf has ``~s``, ``~z`` or ``~m``."""
    return name[:2] in ("~s", "~z", "~m")


def _assemble(leaves: dict[tuple[str, ...], Any], nodes: dict[tuple[str, ...], str]) -> PyTree:
    """The tree with ``leaves`` at their keys."""
    # Dicts as sets that keep their order.
    children: dict[tuple[str, ...], dict[str, None]] = {}
    for keys in (*leaves, *nodes):
        for depth, key in enumerate(keys):
            children.setdefault(keys[:depth], {})[key] = None

    def build(keys: tuple[str, ...]) -> PyTree:
        if keys in leaves:
            return leaves[keys]
        kind = nodes.get(keys)
        if kind == "none":
            return None
        inner = {key: build((*keys, key)) for key in children.get(keys, {})}
        if kind in ("list", "tuple"):
            items = [inner[str(index)] for index in range(len(inner))]
            return items if kind == "list" else tuple(items)
        if kind == "int":
            return {int(key): child for key, child in inner.items()}
        return inner

    return build(())


def _parts_of(q: QArray, path: str) -> Tensors:
    """What is stored of ``q``, by kind; its codes have none."""
    grid = q.grid
    codes = _host(q.qvalue, path, codes=True)
    _check_codes(codes, grid, path)
    scale = _host(grid.scale, path).astype(np.float32)
    short = scale.astype(ml_dtypes.bfloat16)
    exact = np.array_equal(short.astype(np.float32), scale, equal_nan=True)
    parts = {"": pack(codes, grid), "s": short if exact else scale}
    if grid.zero_point is not None:
        parts["z"] = _host(grid.zero_point, path)
    if grid.max_code is not None:
        parts["m"] = _host(grid.max_code, path)
    return parts


def _static(grid: Grid) -> list[Any]:
    bits = 0 if grid.bits == math.log2(3) else grid.bits
    group = 0 if grid.group is None else list(grid.group)
    book = 0 if grid.code_book is None else list(grid.code_book)
    return [bits, grid.lower, grid.upper, grid.offset, group, grid.dtype.name, book]


def _qarray(packed: np.ndarray, parts: Tensors, static: list[Any], shape: list[int]) -> QArray:
    bits, lower, upper, offset, group, dtype, book = static
    grid = Grid(
        scale=_device(parts["s"].astype(np.float32)),
        zero_point=_device(parts["z"]) if "z" in parts else None,
        max_code=_device(parts["m"]) if "m" in parts else None,
        offset=offset,
        bits=bits or math.log2(3),
        lower=lower,
        upper=upper,
        group=tuple(group) if group else None,
        dtype=jnp.dtype(dtype),
        code_book=tuple(book) if book else None,
    )
    codes = unpack(packed, math.prod(shape), grid)
    return QArray(jnp.asarray(codes.reshape(shape)), grid)


def _check_codes(codes: np.ndarray, grid: Grid, path: str) -> None:
    """Raises where packing would cut codes: only a ``QArray`` made by hand can hold such."""
    if grid.bits != math.log2(3) and grid.bits not in range(1, 9):
        raise ValueError(f"leaf {path!r}: bits must be 1 to 8 or log2(3), got {grid.bits}")
    levels = 3 if grid.bits == math.log2(3) else 2 ** int(grid.bits)
    upper = min(grid.upper, grid.lower + levels - 1)
    if codes.size and not (grid.lower <= codes.min() and codes.max() <= upper):
        raise ValueError(
            f"leaf {path!r}: codes from {codes.min()} to {codes.max()} do not fit its grid, which has "
            f"room for {grid.lower} to {upper}; correct the grid's bits, lower and upper"
        )


def _host(leaf: Any, path: str, *, codes: bool = False) -> np.ndarray:
    """``leaf`` as an array that safetensors can hold."""
    where = f"leaf {path!r}" if path else "the tree"
    if isinstance(leaf, Tracer):
        raise TypeError(f"{where} is traced; call save outside jax.jit")
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where} is a PRNG key; store jax.random.key_data of it")
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
        raise TypeError(
            f"{where} is a {type(leaf).__name__}; only arrays and numbers can be stored"
        )
    array = np.asarray(leaf)
    if codes:
        if array.dtype not in _CODES:
            raise TypeError(f"{where} has codes of dtype {array.dtype}; cast them to int8")
        return array.astype(np.int8)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in _STORED:
        raise TypeError(f"{where} has dtype {array.dtype}, which a file cannot hold; cast it first")
    return array


def _device(array: np.ndarray) -> Any:
    """As a jax array, but where jax would cut it."""
    return (
        array if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype else jnp.asarray(array)
    )


def _crc32(*arrays: np.ndarray) -> int:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data, checksum)
    return checksum
