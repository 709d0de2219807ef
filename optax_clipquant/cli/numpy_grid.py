"""Encoding and decoding in NumPy, a block of rows at a time, so that the command need not import JAX.

The results equal, bit for bit, those of ``Uniform`` with absmax scales from 3 bits on, and of
``Grid.decode``. Blocks fit a cache, and threads work on them in turn.
"""

import collections
import concurrent.futures
import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, Self, TypeVar

import ml_dtypes
import numpy as np

from optax_clipquant.cli.rules import Rule, scale_layout
from optax_clipquant.formats.dtypes import Spec
from optax_clipquant.formats.native.description import LeafSpec
from optax_clipquant.formats.native.file import Parts, Tensors
from optax_clipquant.formats.packing import pack, unpack
from optax_clipquant.quant.levels import Levels, largest_scale

S = TypeVar("S")
T = TypeVar("T")
Threads = concurrent.futures.ThreadPoolExecutor
Read = Callable[[int, np.ndarray], None]
"""Fills an array with the bytes of a tensor from a given byte on; threads call it."""

_BLOCK = 2**19  # elements; with smaller blocks, threads spend more time waiting than working
_AHEAD = 4  # blocks
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NORMAL = np.float32(2.0**-126)  # below it, XLA flushes to 0


class Coder(Protocol):
    """An object that quantizes a tensor, such as ``Absmax``."""

    @property
    def leaf(self) -> LeafSpec: ...
    def encode(self, read: Read, threads: Threads) -> Parts: ...


class Absmax(NamedTuple):
    """The coder of a tensor with absmax scales.

    Attributes:
      leaf: the description of the leaf in a file.
      levels: the levels of ``leaf``.
      dtype: the dtype of the weights.
      axes: the axes that share a scale.
    """

    leaf: LeafSpec
    levels: Levels
    dtype: np.dtype
    axes: tuple[int, ...]

    @classmethod
    def of(cls, spec: Spec, rule: Rule) -> Self:
        """The coder for ``Uniform(bits, ..., scale_rule="absmax")``; float8 goes through float32."""
        dtype, shape = spec
        assert isinstance(dtype, np.dtype)
        axes, scales, group = scale_layout(shape, rule.channel_axis, rule.group_size)
        half = 2 ** (rule.width - 1)
        decoded = np.dtype(np.float32) if dtype.itemsize == 1 else dtype
        levels = Levels(bits=rule.width, lower=-half, upper=half - 1, group=group, dtype=decoded)
        specs = {
            "": (np.dtype(np.uint8), (levels.packed_size(math.prod(shape)),)),
            "s": (_BFLOAT16, scales),
        }
        return cls(LeafSpec(specs, levels, shape), levels, dtype, axes)

    def encode(self, read: Read, threads: Threads) -> Parts:
        """The codes, and then the scales, of the weights that ``read`` reads."""
        blocks = _blocks(self.leaf.shape, self.levels)
        scales: list[np.ndarray] = []
        shape = self.leaf.specs["s"][1]
        shared = 0 in self.axes
        # Scales that blocks share need all blocks before any can be encoded.
        if shared:
            high = low = np.zeros(shape, np.float32)
            extremes = in_turn(
                threads, lambda rows: self._extremes(self._weights(read, rows)), blocks
            )
            for up, down in extremes:
                high, low = np.maximum(high, up), np.minimum(low, down)
            scales.append(self._scale(high, low))

        def encode_block(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            w = self._weights(read, rows)
            scale = scales[0] if shared else self._scale(*self._extremes(w))
            return scale, pack(self._codes(w, scale), self.levels)

        def codes() -> Iterator[np.ndarray]:
            for scale, packed in in_turn(threads, encode_block, blocks):
                if not shared:
                    scales.append(scale)
                yield packed

        yield "", codes()
        found = np.concatenate(scales) if blocks else np.zeros(shape)
        yield "s", [found.astype(_BFLOAT16)]

    def _weights(self, read: Read, rows: slice) -> np.ndarray:
        dtype, shape = self.dtype, self.leaf.shape
        w = np.empty((rows.stop - rows.start, *shape[1:]), dtype)
        read(rows.start * math.prod(shape[1:]) * dtype.itemsize, w.reshape(-1).view(np.uint8))
        return w.astype(np.float32, copy=False)

    def _extremes(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The largest and the smallest weight of each scale, or NaN if one is."""
        axis, _ = _group(self.levels, w.ndim)
        found = []
        for (run,) in _runs(self.levels, [w]):
            axes = self.axes
            if axis is not None:
                axes = (*(a + (a > axis) for a in axes), axis + 1)
            pair = run.max(axes, keepdims=True), run.min(axes, keepdims=True)
            found.append(pair if axis is None else [x.squeeze(axis + 1) for x in pair])
        high, low = (np.concatenate(parts, axis or 0) for parts in zip(*found, strict=True))
        return high, low

    def _scale(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        lower = self.levels.lower
        base = np.where(high > -low, high, low) / np.float32(lower)
        cap = np.float32(largest_scale(-lower, self.levels.dtype))
        with np.errstate(over="ignore"):
            scale = np.clip(base.astype(_BFLOAT16).astype(np.float32), -cap, cap)
        scale[np.abs(scale) < _NORMAL] = 0
        return np.where(np.isinf(base), base, scale)

    def _codes(self, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The codes of ``w``, which is overwritten."""
        if w.size and np.min(np.abs(scale)) < 2.0**-100:
            w[np.abs(w) < _NORMAL] = 0
        codes = np.empty(w.shape, np.int8)
        reciprocal = np.float32(1) / np.where(scale == 0, 1, scale)
        finite = np.isfinite(scale).all()
        for run, out, factor in _runs(self.levels, [w, codes], [reciprocal]):
            with np.errstate(invalid="ignore"):
                run *= factor
            np.rint(run, out=run)
            np.clip(run, self.levels.lower, self.levels.upper, out=run)
            if not finite:
                run[np.isnan(run)] = 0
            out[...] = run
        return codes


@contextlib.contextmanager
def threads(count: int = min(os.cpu_count() or 1, 8)) -> Iterator[Threads]:
    """Threads that on an error, or Ctrl-C, begin nothing more."""
    pool = Threads(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def decode(leaf: LeafSpec, tensors: Tensors, threads: Threads) -> Iterator[np.ndarray]:
    """Dequantizes a ``QArray``, a block at a time."""
    levels = leaf.levels
    assert levels is not None
    shape = leaf.shape or (1,)
    # Scales may have fewer axes than the codes.
    full = {
        kind: x.astype(np.float32).reshape((1,) * (len(shape) - x.ndim) + x.shape)
        for kind, x in tensors.items()
        if kind in ("s", "z")
    }
    size = math.prod(shape[1:])
    book = None if levels.codebook is None else np.array(levels.codebook, np.float32)
    largest = (
        np.float32(ml_dtypes.finfo(levels.dtype).max) if levels.dtype.itemsize <= 4 else np.inf
    )

    def decode_block(rows: slice) -> np.ndarray:
        count = (rows.stop - rows.start) * size
        first = levels.packed_size(rows.start * size)
        packed = tensors[""][first : first + levels.packed_size(count)]
        codes = unpack(packed, count, levels).reshape(-1, *shape[1:])
        if book is None:
            values = codes.astype(np.float32)
        else:
            values = book[codes.astype(np.intp) - levels.lower]
        values += np.float32(levels.offset)
        axis, run = _group(levels, len(shape))
        step = run if axis == 0 else 1
        part = {
            kind: x if len(x) == 1 else x[rows.start // step : -(-rows.stop // step)]
            for kind, x in full.items()
        }
        with np.errstate(all="ignore"):
            for out, scale, *shift in _runs(levels, [values], list(part.values())):
                if not shift:
                    out *= scale
                    continue
                unit = np.where(scale == 0, 1, scale)
                out -= shift[0] / (unit / unit)
                out *= scale
                out[...] = np.where(np.isfinite(scale), np.clip(out, -largest, largest), out)
            if part["s"].size and np.min(np.abs(part["s"])) < 2.0**-100:
                values[np.abs(values) < _NORMAL] = 0
            rounded = values.astype(levels.dtype, copy=False)
            rounded += levels.dtype.type(0)  # turns -0 into 0, as in Grid.round
        return rounded

    return in_turn(threads, decode_block, _blocks(shape, levels))


def _group(levels: Levels, ndim: int) -> tuple[int | None, int]:
    """The axis along which neighbours share a scale (None if none do), and the size of a group."""
    return (None, 1) if levels.group is None else (levels.group[0] + ndim, levels.group[1])


def _blocks(shape: tuple[int, ...], levels: Levels) -> list[slice]:
    """Slices of rows that hold whole groups, and whose packed codes fill whole bytes."""
    size = math.prod(shape[1:])
    if not shape[0] * size:
        return []
    axis, run = _group(levels, len(shape))
    bits, byte = (1, 5) if levels.bits == math.log2(3) else (int(levels.bits), 8)
    unit = math.lcm(run if axis == 0 else 1, byte // math.gcd(byte, size * bits))
    step = max(_BLOCK // size // unit, 1) * unit
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def _runs(
    levels: Levels, arrays: Sequence[np.ndarray], scales: Sequence[np.ndarray] = ()
) -> Iterator[list[np.ndarray]]:
    """Views of ``arrays`` with groups as a separate axis, and of ``scales`` that broadcast against them.

    The first views hold the whole groups, and the second the last group if it is shorter.
    """
    shape = arrays[0].shape
    axis, size = _group(levels, len(shape))
    if axis is None:
        yield [*arrays, *scales]
        return
    before = (slice(None),) * axis
    count, rest = divmod(shape[axis], size)
    for first, last, length in ((0, count, size), (count, count + 1, rest)):
        if first < last and length:
            here = (*before, slice(first * size, first * size + (last - first) * length))
            split = (*shape[:axis], last - first, length, *shape[axis + 1 :])
            groups = [np.expand_dims(x[(*before, slice(first, last))], axis + 1) for x in scales]
            yield [*(x[here].reshape(split) for x in arrays), *groups]


def in_turn(threads: Threads, fn: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Applies ``fn`` to ``items`` in threads, in order and a few items ahead."""
    futures: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    for item in items:
        futures.append(threads.submit(fn, item))
        if len(futures) > _AHEAD:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()
