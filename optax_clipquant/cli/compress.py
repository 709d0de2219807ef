"""Safetensors files made small, and plain again, a tensor at a time and without JAX.

What quantizes a tensor is given: ``host.Absmax``, or where scales are searched for by JAX, one of
``searching.py``.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from optax_clipquant.cli.host import Read, Threads, decode
from optax_clipquant.formats.layout import Entry, Leaf, plain
from optax_clipquant.formats.names import name_of
from optax_clipquant.formats.native import Parts, SavedFile, is_saved, write
from optax_clipquant.formats.safetensors import Reader, Spec, bytes_of, nbytes, writing
from optax_clipquant.quant.selection import names_a_weight
from optax_clipquant.report.rows import Row

WIDTHS = (2, 3, 4, 6, 8)  # that a budget is spent on
# Others are left alone: jax would cut 64 bits, and 8 bits are small.
_QUANTIZED = {np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32)}

Progress = Callable[[int], None]
"""Is told of bytes done."""


class Rule(NamedTuple):
    """A ``Uniform`` by its arguments. ``bits`` of None is for a budget to choose, and 8 without one."""

    bits: int | None
    channel_axis: int
    group_size: int | None
    scale_rule: Literal["absmax", "mse"] | None

    @property
    def is_absmax(self) -> bool:
        """Whether ``Absmax`` can do it."""
        bits = self.bits or 8
        return bits >= 3 and (self.scale_rule or ("absmax" if bits > 3 else "mse")) == "absmax"


class Coder(Protocol):
    """What quantizes a tensor, such as ``Absmax``."""

    @property
    def leaf(self) -> Leaf: ...
    def encode(self, read: Read, threads: Threads) -> Parts: ...


class Contents:
    """The tensors of any file, by name; of one of ``save``, by path.

    Attributes:
      path: the file.
      leaves: what the file holds of each.
      metadata: its text, without what ``save`` adds.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader, self.path = reader, reader.path
        self._entries: dict[str, Entry] = {}
        if not is_saved(reader):
            self.leaves = {name: plain(spec) for name, spec in reader.specs.items()}
            self.metadata = reader.texts
            return
        self._file = SavedFile(reader)
        self.metadata = self._file.metadata
        for entry in self._file.entries:
            if entry.path in self._entries:
                raise ValueError(f"{reader.path}: two tensors would have the name {entry.path!r}")
            self._entries[entry.path] = entry
        self.leaves = {path: entry.leaf for path, entry in self._entries.items()}

    @property
    def rows(self) -> list[Row]:
        return [_row(path, leaf) for path, leaf in self.leaves.items()]

    def pieces(self, path: str, threads: Threads) -> Iterator[np.ndarray]:
        """What a tensor stands for, in pieces."""
        if path not in self._entries:
            yield from self._reader.pieces(path)
            return
        entry = self._entries[path]
        tensors = self._file.read(entry)
        if entry.leaf.levels is None:
            yield tensors[""]
            return
        with self._file.describing():
            yield from decode(entry.leaf, tensors, threads)

    def read(self, path: str, threads: Threads) -> np.ndarray:
        """What a tensor stands for."""
        dtype, shape = self.leaves[path].spec
        whole = np.empty(nbytes(dtype, shape), np.uint8)
        done = 0
        for piece in self.pieces(path, threads):
            whole[done : done + piece.nbytes] = bytes_of(piece)
            done += piece.nbytes
        return whole.view(dtype).reshape(shape)


def threads() -> Threads:
    return Threads(min(os.cpu_count() or 1, 8))


def widths_of(
    specs: Mapping[str, Spec], rules: Sequence[tuple[str, int | None]]
) -> dict[str, int | None]:
    """The bits of each tensor that is to be quantized: those with at least 2 axes, not bias or scale.

    Args:
      specs: dtypes and shapes by name.
      rules: an expression and bits, or None for a tensor to be kept; the first that is found decides.

    Returns:
      The bits by name, None where no rule is found.

    Raises:
      ValueError: an expression is found nowhere, or in no tensor that could be quantized; or no tensor
        is to be quantized.
    """
    chosen: dict[str, int | None] = {
        name: None for name, spec in specs.items() if _is_weight(name, spec)
    }
    kept: set[str] = set()
    decided: set[str] = set()
    for pattern, bits in rules:
        found = [name for name in specs if re.search(pattern, name)]
        if not found:
            raise ValueError(f"rule {pattern!r} is found in the name of no tensor: see `inspect`")
        if bits is not None and not chosen.keys() & set(found):
            raise ValueError(
                f"rule {pattern!r} is found only in tensors that are never quantized: {found[:5]}"
            )
        for name in (chosen.keys() & set(found)) - decided:
            decided.add(name)
            if bits is None:
                kept.add(name)
            else:
                chosen[name] = bits
    chosen = {name: bits for name, bits in chosen.items() if name not in kept}
    if not chosen:
        raise ValueError(
            "no tensor is left to quantize: these are float16, bfloat16 or float32 with at least 2 "
            "axes, not named bias or scale, and not kept by a rule"
        )
    return chosen


def check_axes(specs: Mapping[str, Spec], rules: Mapping[str, Rule]) -> None:
    """Raises where a tensor lacks the axis that its rule names."""
    for name, rule in rules.items():
        ndim = len(specs[name][1])
        if not -ndim <= rule.channel_axis < ndim:
            raise ValueError(
                f"tensor {name!r}: channel_axis {rule.channel_axis} is out of range for an array with "
                f"{ndim} axes; name an axis in [{-ndim}, {ndim - 1}], or keep the tensor by a rule"
            )


def compress(
    source: Reader,
    output: str | os.PathLike[str],
    coders: Mapping[str, Coder],
    progress: Progress,
) -> list[Row]:
    """Writes what ``save`` would write for the dict of all tensors, those in ``coders`` quantized."""
    leaves = {name: plain(spec) for name, spec in source.specs.items()}
    leaves |= {name: coder.leaf for name, coder in coders.items()}

    def contents(pool: Threads) -> Iterator[tuple[str, Parts]]:
        for name, spec in source.specs.items():
            if name in coders:
                parts = coders[name].encode(functools.partial(source.read_at, name), pool)
            else:
                parts = [("", source.pieces(name))]
            yield name_of((name,)), parts
            progress(nbytes(*spec))

    named = {name_of((name,)): leaf for name, leaf in leaves.items()}
    with threads() as pool:
        write(output, named, contents(pool), nodes={}, metadata=source.texts)
    return [_row(name, leaves[name]) for name in source.specs]


def decompress(contents: Contents, output: str | os.PathLike[str], progress: Progress) -> list[Row]:
    """Writes the tensors of a file of ``save`` as a plain file, with the metadata given to ``save``."""
    if "__metadata__" in contents.leaves:
        raise ValueError(f"{contents.path}: a plain file cannot have a tensor named '__metadata__'")
    specs = {path: leaf.spec for path, leaf in contents.leaves.items()}
    with threads() as pool, writing(output, specs, contents.metadata) as file:
        for path, spec in specs.items():
            for _ in file.putting(path, contents.pieces(path, pool)):
                pass
            progress(nbytes(*spec))
    return [
        Row(path, leaf.shape, leaf.bits, leaf.nbytes, nbytes(*leaf.spec))
        for path, leaf in contents.leaves.items()
    ]


def _row(path: str, leaf: Leaf) -> Row:
    return Row(path, leaf.shape, leaf.bits, nbytes(*leaf.spec), leaf.nbytes)


def _is_weight(name: str, spec: Spec) -> bool:
    dtype, shape = spec
    return dtype in _QUANTIZED and len(shape) >= 2 and names_a_weight(name.replace(".", "/"))
