"""The JSON in the header of a file of ``save``, which describes its tensors: writing and validation.

``FORMAT.md`` beside this folder specifies it. Everything it demands is checked here, whatever the checksums
say.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from optax_clipquant.formats.dtypes import DType, Spec, bits_of, check_shape, nbytes
from optax_clipquant.formats.native.grids import checked_levels, is_count, listed, short
from optax_clipquant.formats.native.names import ROOT, path_of_name
from optax_clipquant.quant.groups import weights_per_scale
from optax_clipquant.quant.levels import Levels

VERSION = 1

_UINT8, _INT8, _INT32, _BFLOAT16, _FLOAT32 = map(
    np.dtype, (np.uint8, np.int8, np.int32, ml_dtypes.bfloat16, np.float32)
)
_PARTS = {
    "s": ("scales", {_BFLOAT16, _FLOAT32}),
    "z": ("zero points", {_INT8, _FLOAT32}),
    "m": ("bounds on codes", {_INT32}),
}
_PART = re.compile(r"~[szm]")


class LeafSpec(NamedTuple):
    """The description of a leaf in a file.

    Attributes:
      specs: the dtype and shape of each of its tensors, by kind: ``""`` for packed codes or the whole
        array, ``s`` for scales, ``z`` for zero points, ``m`` for the bound on codes.
      levels: the levels of a ``QArray``, None for an array.
      shape: the logical shape.
    """

    specs: dict[str, Spec]
    levels: Levels | None
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """The dtype of the leaf, dequantized."""
        return self.specs[""][0] if self.levels is None else self.levels.dtype

    @property
    def spec(self) -> Spec:
        """The dtype and shape of the leaf, dequantized."""
        return self.dtype, self.shape

    @property
    def bits(self) -> float:
        """Bits per code, or per element of an array."""
        return float(bits_of(self.dtype)) if self.levels is None else self.levels.bits

    @property
    def grid(self) -> str | None:
        """The kind of its grid, or None."""
        zero_point, _ = self.specs.get("z", (None, ()))
        return None if self.levels is None else self.levels.kind(zero_point)  # pyright: ignore[reportArgumentType]

    @property
    def weights_per_scale(self) -> int | None:
        """The number of weights that share a scale, or None."""
        if self.levels is None:
            return None
        return weights_per_scale(self.shape, self.specs["s"][1], self.levels.group)

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(nbytes(*spec) for spec in self.specs.values())


def plain(spec: Spec) -> LeafSpec:
    """The description of an array."""
    return LeafSpec({"": spec}, None, spec[1])


class Entry(NamedTuple):
    """A leaf in a file.

    Attributes:
      name: its name.
      leaf: its description.
      tensors: the names of its tensors, by kind.
      checksum: the CRC-32 of its tensors, in that order.
    """

    name: str
    leaf: LeafSpec
    tensors: dict[str, str]
    checksum: int

    @property
    def path(self) -> str:
        """The keys that lead to the leaf, joined by slashes."""
        return path_of_name(self.name)


class Description:
    """The description of a file to be written, known before any of its content.

    Args:
      leaves: the descriptions of the leaves by name.
      nodes: the kinds of the nodes by name.

    Attributes:
      specs: the dtype and shape of each tensor.
      entries: the leaves, by name.
    """

    def __init__(self, leaves: Mapping[str, LeafSpec], nodes: Mapping[str, str]) -> None:
        self.specs: dict[str, Spec] = {}
        self.entries: dict[str, Entry] = {}
        self._nodes = dict(nodes)
        count = 0
        for name in sorted(leaves):
            leaf = leaves[name]
            tensors = {kind: f"~{kind}{count}" if kind else name for kind in leaf.specs}
            count += leaf.levels is not None
            # The largest checksum reserves enough room for any.
            self.entries[name] = Entry(name, leaf, tensors, 2**32 - 1)
            self.specs |= {tensors[kind]: spec for kind, spec in leaf.specs.items()}

    def note(self, name: str, checksum: int) -> None:
        """Sets the checksum of a leaf."""
        self.entries[name] = self.entries[name]._replace(checksum=checksum)

    def content(self) -> dict[str, Any]:
        """The JSON for the header."""
        grids: dict[str, int] = {}
        leaves: list[Any] = []
        for entry in self.entries.values():
            if entry.leaf.levels is None:
                leaves.append(entry.checksum)
                continue
            grid = json.dumps(listed(entry.leaf.levels))
            index = grids.setdefault(grid, len(grids))
            leaves.append([entry.checksum, index, list(entry.leaf.shape)])
        return {
            "version": VERSION,
            "leaves": leaves,
            "grids": [json.loads(grid) for grid in grids],
            "nodes": self._nodes,
        }


def read_description(specs: Mapping[str, Spec], content: Any) -> tuple[list[Entry], dict[str, str]]:
    """Parses the JSON of a header: the leaves in the order of names, and the kinds of the nodes.

    Raises:
      ValueError: ``content`` does not describe tensors with these ``specs``.
    """
    leaves, grids, nodes = (_member(content, k, t) for k, t in (("leaves", list), ("grids", list), ("nodes", dict)))  # fmt: skip
    levels = []
    for index, grid in enumerate(grids):
        with _naming(f"grid {index}"):
            levels.append(checked_levels(grid))
    names = sorted(name for name in specs if name == ROOT or not _PART.match(name))
    if len(names) != len(leaves):
        raise ValueError(f"it lists {len(leaves)} leaves, but there are {len(names)}")
    parts = {name for name in specs if name != ROOT and _PART.match(name)}
    entries: list[Entry] = []
    count = 0
    for name, item in zip(names, leaves, strict=True):
        if type(item) is int:
            tensors, leaf, checksum = {"": name}, plain(specs[name]), item
        else:
            tensors = {"": name} | {k: f"~{k}{count}" for k in "szm" if f"~{k}{count}" in specs}
            parts.difference_update(tensors.values())
            found = {kind: specs[tensor] for kind, tensor in tensors.items()}
            with _naming(f"tensor {name!r}"):
                leaf, checksum = _quantized(item, found, levels)
            count += 1
        if not 0 <= checksum < 2**32:
            raise ValueError(f"tensor {name!r}: its checksum is {checksum}")
        entries.append(Entry(name, leaf, tensors, checksum))
    if parts:
        raise ValueError(f"tensor {min(parts)!r} belongs to no leaf")
    for name, kind in nodes.items():
        if not isinstance(kind, str):
            raise ValueError(f"the node {name!r} is {kind!r}")
    return entries, nodes


def _quantized(item: Any, specs: Mapping[str, Spec], levels: list[Levels]) -> tuple[LeafSpec, int]:
    """Parses the item of a quantized leaf; returns the leaf, with the tensors it has, and its checksum."""
    if not (isinstance(item, list) and len(item) == 3):
        raise ValueError(f"it is listed as {short(item)}, neither a checksum nor three items")
    checksum, index, shape = item
    if not (is_count(checksum, index) and 0 <= index < len(levels)):
        raise ValueError(f"it has the grid {short(index)} of {len(levels)}")
    if not (isinstance(shape, list) and is_count(*shape) and all(0 <= n < 2**63 for n in shape)):
        raise ValueError(f"its shape is {short(shape)}")
    leaf = LeafSpec(dict(specs), levels[index], tuple(shape))
    check_leaf(leaf)
    return leaf, checksum


def check_leaf(leaf: LeafSpec) -> None:
    """Raises ``ValueError`` if a quantized leaf is not valid in a file."""
    levels, shape, specs = leaf.levels, leaf.shape, leaf.specs
    assert levels is not None
    checked_levels(listed(levels))
    check_shape(shape)
    room = levels.packed_size(math.prod(shape))
    if specs[""] != (_UINT8, (room,)):
        raise ValueError(f"{_of(specs[''])} cannot hold its codes, which take {room} bytes")
    if "s" not in specs:
        raise ValueError("it has no scales")
    if levels.codebook and "z" in specs:
        raise ValueError("it has a codebook and zero points")
    wanted = tuple(_extents(levels, shape))
    for kind, (what, dtypes) in _PARTS.items():
        if kind not in specs:
            continue
        dtype, found = specs[kind]
        if dtype not in dtypes:
            raise ValueError(f"its {what} are {_of(specs[kind])}")
        fits = len(found) == len(wanted) and all(map(tuple.__contains__, wanted, found))
        if not fits or found != specs["s"][1]:
            raise ValueError(f"its {what} are {_of(specs[kind])}, which do not fit the shape {shape}")  # fmt: skip


def _extents(levels: Levels, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """For each axis, the extents that scales may have along it."""
    axis, size = levels.group or (0, 1)
    if -axis > len(shape):
        raise ValueError(f"its groups lie along axis {axis}, but it has {len(shape)} axes")
    for index, length in enumerate(shape, -len(shape)):
        yield (-(-length // size),) if index == axis else (1, length)


def _member(content: Any, key: str, kind: type) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"it is {short(content)}")
    if not isinstance(content.get(key), kind):
        raise ValueError(f"its {key!r} are {short(content.get(key))}")
    return content[key]


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _of(spec: Spec) -> str:
    dtype, shape = spec
    return f"{dtype.name} {list(shape)}"
