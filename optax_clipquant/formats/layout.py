"""How leaves (``names.py``) lie in a file: as named tensors and JSON. No input or output here, and no JAX.

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
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_clipquant.formats.names import ROOT, path_of_name
from optax_clipquant.formats.safetensors import Spec, nbytes
from optax_clipquant.quant.levels import Levels


def listed(levels: Levels) -> list[Any]:
    """``levels`` as the JSON has them."""
    bits = 0 if levels.bits == math.log2(3) else levels.bits
    group, book = list(levels.group or ()), list(levels.codebook or ())
    return [
        *(bits, levels.lower, levels.upper, levels.offset),
        *(group or 0, levels.dtype.name, book or 0),
    ]


def levels_of(items: list[Any]) -> Levels:
    """The levels that ``listed`` listed."""
    bits, lower, upper, offset, group, dtype, book = items
    return Levels(
        bits=bits or math.log2(3),
        lower=lower,
        upper=upper,
        offset=offset,
        group=tuple(group) if group else None,
        dtype=np.dtype(dtype),
        codebook=tuple(book) if book else None,
    )


class Leaf(NamedTuple):
    """What a file holds of a leaf.

    Attributes:
      specs: dtype and shape of each of its tensors, by kind: ``""`` for packed codes or the whole array,
        ``s`` for scales, ``z`` for zero points, ``m`` for the bound on codes.
      levels: of the grid of a ``QArray``, None for an array.
      shape: of what it stands for.
    """

    specs: dict[str, Spec]
    levels: Levels | None
    shape: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        """Dtype and shape of what it stands for."""
        return self.specs[""] if self.levels is None else (self.levels.dtype, self.shape)

    @property
    def bits(self) -> float:
        """Of a code, or an element."""
        return 8.0 * self.spec[0].itemsize if self.levels is None else self.levels.bits

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(nbytes(*spec) for spec in self.specs.values())


def plain(spec: Spec) -> Leaf:
    """A leaf that is an array."""
    return Leaf({"": spec}, None, spec[1])


class Entry(NamedTuple):
    """A leaf in a file.

    Attributes:
      name: its name.
      leaf: what the file holds of it.
      tensors: the names of its tensors, by kind.
      checksum: the CRC-32 of these in turn.
    """

    name: str
    leaf: Leaf
    tensors: dict[str, str]
    checksum: int

    @property
    def path(self) -> str:
        """The keys that lead to the leaf, joined by slashes."""
        return path_of_name(self.name)


class Plan:
    """What the file of a tree will hold, known before any of its content is at hand.

    Args:
      leaves: the leaves by name.
      nodes: the kinds of the nodes by name.

    Attributes:
      specs: dtype and shape of each tensor.
      entries: the leaves, by name.
    """

    def __init__(self, leaves: Mapping[str, Leaf], nodes: Mapping[str, str]) -> None:
        self.specs: dict[str, Spec] = {}
        self.entries: dict[str, Entry] = {}
        self._nodes = dict(nodes)
        count = 0
        for name in sorted(leaves):
            leaf = leaves[name]
            tensors = {kind: f"~{kind}{count}" if kind else name for kind in leaf.specs}
            count += leaf.levels is not None
            # The largest checksums take the most room.
            self.entries[name] = Entry(name, leaf, tensors, 2**32 - 1)
            self.specs |= {tensors[kind]: spec for kind, spec in leaf.specs.items()}

    def note(self, name: str, checksum: int) -> None:
        """Notes the checksum of a leaf."""
        self.entries[name] = self.entries[name]._replace(checksum=checksum)

    def content(self) -> dict[str, Any]:
        """The JSON that goes with the tensors."""
        grids: list[list[Any]] = []
        leaves: list[Any] = []
        for entry in self.entries.values():
            if entry.leaf.levels is None:
                leaves.append(entry.checksum)
                continue
            grid = listed(entry.leaf.levels)
            if grid not in grids:
                grids.append(grid)
            leaves.append([entry.checksum, grids.index(grid), list(entry.leaf.shape)])
        return {"leaves": leaves, "grids": grids, "nodes": self._nodes}


def entries_of(specs: Mapping[str, Spec], content: Mapping[str, Any]) -> list[Entry]:
    """The leaves of a file with these tensors, in the order of names.

    Raises:
      Exception: of many kinds, where ``content`` is not that of a ``Plan``.
    """
    found: list[Entry] = []
    count = 0
    names = sorted(name for name in specs if name == ROOT or not _is_part(name))
    for name, item in zip(names, content["leaves"], strict=True):
        if isinstance(item, int):
            found.append(Entry(name, plain(specs[name]), {"": name}, item))
            continue
        checksum, grid, shape = item
        tensors = {"": name} | {k: f"~{k}{count}" for k in "szm" if f"~{k}{count}" in specs}
        levels = levels_of(content["grids"][grid])
        parts = {kind: specs[tensor] for kind, tensor in tensors.items()}
        found.append(Entry(name, Leaf(parts, levels, tuple(shape)), tensors, checksum))
        count += 1
    return found


def _is_part(name: str) -> bool:
    """Whether a tensor is part of a ``QArray``: no name of a leaf has ``~s``, ``~z`` or ``~m``."""
    return name[:2] in ("~s", "~z", "~m")
