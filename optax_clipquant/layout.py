"""How the leaves of a tree (``names.py``) lie in a file: as named tensors and JSON. No input or output here.

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
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from optax_clipquant.container import DTYPES, Spec, bytes_of
from optax_clipquant.grids import Grid
from optax_clipquant.names import ROOT, path_of_name
from optax_clipquant.packing import pack, unpack
from optax_clipquant.qarray import QArray, is_qarray, packed_size

_STORED = set(DTYPES.values())
_CODES = {np.dtype(t) for t in (np.int8, ml_dtypes.int4, ml_dtypes.int2)}
_BFLOAT16, _FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

Tensors = dict[str, np.ndarray]


class Entry(NamedTuple):
    """A leaf in a file.

    Attributes:
      name: its name.
      tensors: the names of its tensors, by kind: ``""`` for codes or the whole array, else a letter.
      checksum: the CRC-32 of these in turn.
      static: the static part of its grid, None for an array.
      shape: the shape of a ``QArray``, None for an array.
    """

    name: str
    tensors: dict[str, str]
    checksum: int
    static: list[Any] | None = None
    shape: list[int] | None = None

    @property
    def path(self) -> str:
        """The keys that lead to the leaf, joined by slashes."""
        return path_of_name(self.name)


class Altered(Exception):
    """The content of the leaf of this name has another checksum."""


class Plan:
    """What the file of a tree will hold, known before any of its content is at hand.

    Args:
      leaves: the leaves by name. One may stand for what it will be, of ``jax.ShapeDtypeStruct``; then
        the scales of a ``QArray`` must fit bfloat16.
      nodes: the kinds of the nodes by name.

    Attributes:
      specs: dtype and shape of each tensor.

    Raises:
      TypeError, ValueError: as ``save`` does for a leaf that cannot be stored.
    """

    def __init__(self, leaves: Mapping[str, Any], nodes: Mapping[str, str]) -> None:
        self.specs: dict[str, Spec] = {}
        self._nodes = dict(nodes)
        # The largest checksums take the most room.
        self._entries: dict[str, Entry] = {}
        count = 0
        for name in sorted(leaves):
            leaf = leaves[name]
            specs = _specs_of(leaf, path_of_name(name))
            if is_qarray(leaf):
                tensors = {kind: f"~{kind}{count}" if kind else name for kind in specs}
                static, shape = _static(leaf.grid), list(leaf.shape)
                self._entries[name] = Entry(name, tensors, 2**32 - 1, static, shape)
                count += 1
            else:
                tensors = {"": name}
                self._entries[name] = Entry(name, tensors, 2**32 - 1)
            self.specs |= {tensors[kind]: spec for kind, spec in specs.items()}

    def tensors_of(self, name: str, leaf: Any) -> Tensors:
        """The tensors of a leaf, whose checksum is noted. Raises as ``save`` does."""
        parts = _parts_of(leaf, path_of_name(name)) if is_qarray(leaf) else {"": _host(leaf)}
        entry = self._entries[name]._replace(checksum=_crc32(*parts.values()))
        self._entries[name] = entry
        return {entry.tensors[kind]: part for kind, part in parts.items()}

    def content(self) -> dict[str, Any]:
        """The JSON that goes with the tensors."""
        grids: list[list[Any]] = []
        leaves: list[Any] = []
        for entry in self._entries.values():
            if entry.static is None:
                leaves.append(entry.checksum)
                continue
            if entry.static not in grids:
                grids.append(entry.static)
            leaves.append([entry.checksum, grids.index(entry.static), entry.shape])
        return {"leaves": leaves, "grids": grids, "nodes": self._nodes}


def entries_of(names: Iterable[str], content: Mapping[str, Any]) -> list[Entry]:
    """The leaves of a file with tensors of these names, in the order of names.

    Raises:
      Exception: of many kinds, where ``content`` is not that of a ``Plan``.
    """
    names = set(names)
    found: list[Entry] = []
    count = 0
    leaves = sorted(name for name in names if name == ROOT or not _is_part(name))
    for name, item in zip(leaves, content["leaves"], strict=True):
        if isinstance(item, int):
            found.append(Entry(name, {"": name}, item))
            continue
        checksum, grid, shape = item
        tensors = {"": name} | {k: f"~{k}{count}" for k in "szm" if f"~{k}{count}" in names}
        found.append(Entry(name, tensors, checksum, content["grids"][grid], shape))
        count += 1
    return found


def leaf_of(entry: Entry, read: Callable[[str], np.ndarray]) -> Any:
    """The leaf, of tensors that ``read`` gives by their names.

    Raises:
      Altered: its content has another checksum.
      Exception: of many kinds, where the entry does not fit its tensors.
    """
    parts = {kind: read(name) for kind, name in entry.tensors.items()}
    if _crc32(*parts.values()) != entry.checksum:
        raise Altered(entry.name)
    if entry.static is None or entry.shape is None:
        return _device(parts[""])
    return _qarray(parts, entry.static, entry.shape)


def _is_part(name: str) -> bool:
    """Whether a tensor is part of a ``QArray``: no name of a leaf has ``~s``, ``~z`` or ``~m``."""
    return name[:2] in ("~s", "~z", "~m")


def _specs_of(leaf: Any, path: str) -> dict[str, Spec]:
    """Dtype and shape of each part of ``leaf``, by kind. Raises where one cannot be stored."""
    if not is_qarray(leaf):
        return {"": _spec(leaf, path)}
    grid = leaf.grid
    where = f"leaf {path!r}" if path else "the tree"
    if grid.bits != math.log2(3) and grid.bits not in range(1, 9):
        raise ValueError(f"{where}: bits must be 1 to 8 or log2(3), got {grid.bits}")
    _, shape = _spec(leaf.qvalue, path, _CODES)
    scale = _spec(grid.scale, path)
    concrete = not isinstance(grid.scale, jax.ShapeDtypeStruct)
    specs = {
        "": (np.dtype(np.uint8), (packed_size(math.prod(shape), grid.bits),)),
        "s": (_scale(grid).dtype if concrete else _BFLOAT16, scale[1]),
    }
    if grid.zero_point is not None:
        specs["z"] = _spec(grid.zero_point, path)
    if grid.max_code is not None:
        specs["m"] = _spec(grid.max_code, path)
    return specs


def _parts_of(q: QArray, path: str) -> Tensors:
    """What is stored of ``q``, by kind; its codes have none."""
    grid = q.grid
    codes = np.asarray(q.qvalue).astype(np.int8, copy=False)
    _check_codes(codes, grid, path)
    parts = {"": pack(codes, grid), "s": _scale(grid)}
    if grid.zero_point is not None:
        parts["z"] = _host(grid.zero_point)
    if grid.max_code is not None:
        parts["m"] = _host(grid.max_code)
    return parts


def _scale(grid: Grid) -> np.ndarray:
    """As bfloat16 where that loses nothing."""
    scale = np.asarray(grid.scale).astype(np.float32)
    short = scale.astype(ml_dtypes.bfloat16)
    exact = np.array_equal(short.astype(np.float32), scale, equal_nan=True)
    return short if exact else scale


def _static(grid: Grid) -> list[Any]:
    bits = 0 if grid.bits == math.log2(3) else grid.bits
    group = 0 if grid.group is None else list(grid.group)
    book = 0 if grid.code_book is None else list(grid.code_book)
    return [bits, grid.lower, grid.upper, grid.offset, group, grid.dtype.name, book]


def _qarray(parts: Tensors, static: list[Any], shape: list[int]) -> QArray:
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
    codes = unpack(parts[""], math.prod(shape), grid)
    return QArray(jnp.asarray(codes.reshape(shape)), grid)


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


def _crc32(*arrays: np.ndarray) -> int:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(bytes_of(array).data, checksum)
    return checksum
