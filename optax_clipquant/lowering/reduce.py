"""Sums and extremes over the weights that share a scale."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.sharding import (
    for_groups,
    for_pieces,
    is_on_one_device,
    piece_of,
    reduce_runs,
    split_axis,
)

Kind = Literal["max", "sum"]
T = TypeVar("T")  # a tree of arrays, with one entry for each span
SMALL = 4096  # elements; below this, the number of loops matters more than their speed
_VECTOR = 4  # neighbouring numbers that are worth a vector instruction
# Elements to reduce at a time. A loop that computes much per element is unrolled, and fast, only for a few
# (3 sums: 12 ms at 8, 117 ms at 16); but the more are reduced at a time, the less the loop writes.
_AT_A_TIME, _OF_MUCH = 16, 8
_MUCH = (
    6  # work, where an array that is compared counts as 1, and one that is computed and added as 2
)
_LEFT = 2**16  # integers that are reduced at once after a first loop
_FEW = 64  # elements that may be summed in sequence; for more, partial sums round less often
_WHOLE = {
    "max": functools.partial(jnp.max, initial=0),
    "sum": lambda x, **at: jnp.sum(x, dtype=x.dtype, **at),  # with x64 too
}
_PAIR = {"max": jax.lax.max, "sum": jax.lax.add}


@dataclasses.dataclass(frozen=True)
class Span:
    """The elements that are reduced together: all along ``axes`` (by default all axes), for ``run`` neighbours
    along ``axis``.

    Each of the neighbours gets the result. The last run may be shorter. If ``valid`` is given, which broadcasts
    to the array, elements where it is 0 are padding: they are 0 too, and must not count.
    """

    axes: tuple[int, ...] | None = None
    axis: int = 0
    run: int = 1
    valid: jax.Array | None = None

    def reduced(self, ndim: int) -> tuple[int, ...]:
        """The non-negative ``axes`` of an array with ``ndim`` axes."""
        return tuple(range(ndim) if self.axes is None else (axis % ndim for axis in self.axes))

    def reduce(self, kinds: Sequence[Kind], arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Reduces several arrays of one shape, each to its largest element (at least 0) or its sum.

        XLA's CPU backend makes a loop of each reduction, and most of these compute one element at a time.
        There, all arrays are reduced in one loop. Along the last axis, integers are reduced at the speed
        of memory, since their order does not matter. Otherwise a few elements are reduced at a time, over
        vectors of neighbours, and leftover elements separately; for computed floating arrays this is
        several times as fast. (Other backends fuse reductions by themselves.)

        Args:
          kinds: the reduction of each array.
          arrays: the arrays, which may be computed on the fly.
        """
        integers = all(map(_is_integer, arrays))
        if self._part(arrays) is None and not integers:
            return self._each(kinds, *arrays)
        return jax.lax.platform_dependent(
            *arrays,
            cpu=functools.partial(self._together, kinds),
            default=functools.partial(self._each, kinds),
        )

    def _each(self, kinds: Sequence[Kind], *arrays: jax.Array) -> list[jax.Array]:
        return [self._whole(kind, x) for kind, x in zip(kinds, arrays, strict=True)]

    def _together(
        self, kinds: Sequence[Kind], *arrays: jax.Array, again: bool = False
    ) -> list[jax.Array]:
        integers = all(map(_is_integer, arrays))
        # What is left of integers is few enough for one loop more, which costs compile time.
        last = again and integers and arrays[0].size <= _LEFT
        if part := None if last else self._part(arrays):
            axis, size, reduced, rest = part
            length = arrays[0].shape[axis] - rest
            parts = [split_axis(x, axis, 0, length, size) for x in arrays]
            found = self._together(kinds, *_reduce(kinds, parts, (reduced,)), again=True)
            if not rest:
                return found
            tail = [jax.lax.slice_in_dim(x, length, length + rest, axis=axis) for x in arrays]
            pairs = zip(kinds, found, self._together(kinds, *tail), strict=True)
            return [_PAIR[kind](x, y) for kind, x, y in pairs]
        axes = self.reduced(arrays[0].ndim)
        few = math.prod(arrays[0].shape[axis] for axis in axes) <= _FEW
        if is_on_one_device() and (integers or few):
            found = (jnp.expand_dims(x, axes) for x in _reduce(kinds, arrays, axes))
            return [self._runs(kind, x) for kind, x in zip(kinds, found, strict=True)]
        return self._each(kinds, *arrays)

    def _whole(self, kind: Kind, x: jax.Array) -> jax.Array:
        return self._runs(kind, _WHOLE[kind](x, axis=self.axes, keepdims=True))

    def _runs(self, kind: Kind, each: jax.Array) -> jax.Array:
        return reduce_runs(_WHOLE[kind], each, self.axis, self.run)

    def _part(self, arrays: Sequence[jax.Array]) -> tuple[int, int, int, int] | None:
        """How to split an axis: the axis, the size of parts, which of the two axes to reduce, and the remainder.

        Vectors lie along the last axis, so it is kept, or elements far apart on it are reduced. Each device
        must hold all that is reduced, or data would be moved.
        """
        x, integers = arrays[0], all(map(_is_integer, arrays))
        work = sum(1 if _is_integer(y) else 2 for y in arrays)
        axes, most = self.reduced(x.ndim), _AT_A_TIME if work < _MUCH else _OF_MUCH
        if x.size <= SMALL or not axes:
            return None
        last = max(axis for axis in range(x.ndim) if x.shape[axis] > 1)
        devices = jax.device_count()
        if integers and last in axes:
            share, rest = divmod(x.shape[last], devices)
            if share >= 16 and rest == 0:
                return last, share, last + 1, 0
        axis = max(axes, key=lambda a: (a != last, x.shape[a]))
        length = x.shape[axis]
        if axis == last:
            if devices > 1:
                return None
            most = min(most, length // _VECTOR)
        few = max((k for k in range(1, most + 1) if length % (k * devices) == 0), default=1)
        if devices == 1 and 2 * few < min(most, length):
            few = most  # better to leave a remainder than to reduce few at a time
        if few <= 1:
            return None
        share, rest = divmod(length, few)
        return (axis, few, axis + 1, rest) if axis != last else (axis, share, axis, rest)

    def counts(self, shape: tuple[int, ...]) -> np.ndarray:
        """The number of elements that are reduced together, with padding: a scalar, or with runs an array with
        one per run.
        """
        count = math.prod(shape[axis] for axis in self.reduced(len(shape)))
        if self.run == 1:
            return np.asarray(count)
        n = shape[self.axis]
        first = np.arange(n) // self.run * self.run
        runs = np.minimum(self.run, n - first)
        return count * runs.reshape([n if axis == self.axis else 1 for axis in range(len(shape))])


def _reduce(
    kinds: Sequence[Kind], arrays: Sequence[jax.Array], axes: tuple[int, ...]
) -> list[jax.Array]:
    """Reduces all arrays in one loop."""
    if all(arrays[0].shape[axis] == 1 for axis in axes):
        # XLA would return the only element (seen with jaxlib 0.10.2), without comparing it with 0.
        each = (jax.lax.squeeze(x, axes) for x in arrays)
        return [jnp.maximum(x, 0) if k == "max" else x for k, x in zip(kinds, each, strict=True)]
    return jax.lax.reduce(
        tuple(arrays),
        tuple(jnp.zeros((), x.dtype) for x in arrays),
        lambda a, b: tuple(_PAIR[k](x, y) for k, x, y in zip(kinds, a, b, strict=True)),
        axes,
    )


def _is_integer(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _plain_extremes(span: Span, x: jax.Array, *sums: jax.Array) -> list[jax.Array]:
    low = jnp.min(x, axis=span.axes, keepdims=True, initial=0)
    high = jnp.max(x, axis=span.axes, keepdims=True, initial=0)
    least = functools.partial(jnp.min, initial=0)
    return [
        reduce_runs(_WHOLE["max"], high, span.axis, span.run),
        reduce_runs(least, low, span.axis, span.run),
        *span._each(("sum",) * len(sums), *sums),
    ]


def extremes(x: jax.Array, span: Span = Span(), *sums: jax.Array) -> list[jax.Array]:
    """The largest and the smallest element of each span, with 0 included, in float32; NaN if an element is.

    Also the sums of further float32 arrays of the shape of ``x``, which XLA's CPU backend computes in the
    same loop.

    XLA's CPU backend drops NaN from the maximum of a large floating array (seen with jaxlib 0.10.2). There,
    the bits are compared: as integers they order numbers from 0 up, with NaN above infinity, so that NaN
    of either sign makes one of the two results NaN. A reduction whose comparison keeps NaN takes as long to
    compile, runs 14 times as long over a whole array, and has no all-reduce on several CPUs or GPUs.
    """

    def of_bits(x: jax.Array, *sums: jax.Array) -> list[jax.Array]:
        bits = [jax.lax.bitcast_convert_type(y, jnp.int32) for y in (x, -x)]
        kinds: list[Kind] = ["max", "max", *("sum" for _ in sums)]
        up, down, *found = span._together(kinds, *bits, *sums)
        high, low = (jax.lax.bitcast_convert_type(y, jnp.float32) for y in (up, down))
        nan = jnp.isnan(high) | jnp.isnan(low)
        return [jnp.where(nan, jnp.nan, high), jnp.where(nan, jnp.nan, -low), *found]

    # Bits have no derivative, so there is none on any platform.
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    plain = functools.partial(_plain_extremes, span)
    return jax.lax.platform_dependent(x, *sums, cpu=of_bits, default=plain)


def furthest(x: jax.Array, span: Span, *sums: jax.Array) -> list[jax.Array]:
    """The element of each span that is furthest from 0, of two the negative one; else as ``extremes``.

    XLA's CPU backend takes half as long for this and two sums as for both extremes and two sums (fitting 25
    million weights by least squares: 20 ms instead of 43). Of the bits, it compares the magnitude, then the sign.
    """

    def plain(x: jax.Array, *sums: jax.Array) -> list[jax.Array]:
        high, low, *found = _plain_extremes(span, x, *sums)
        return [jnp.where(high > -low, high, low), *found]

    def of_bits(x: jax.Array, *sums: jax.Array) -> list[jax.Array]:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        kinds: list[Kind] = ["max", *("sum" for _ in sums)]
        key, *found = span._together(kinds, (bits << 1) | (bits >> 31), *sums)
        return [jax.lax.bitcast_convert_type((key >> 1) | (key << 31), jnp.float32), *found]

    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    return jax.lax.platform_dependent(x, *sums, cpu=of_bits, default=plain)


def sum_magnitudes(x: jax.Array, span: Span) -> jax.Array:
    """The sum of ``abs(x)`` in each span, as two sums, since XLA's CPU backend is slower at a single one."""
    # One of the two has any NaN.
    up, down = span.reduce(("sum", "sum"), [jnp.where(x > 0, x, 0), jnp.where(x > 0, 0, x)])
    return up - down


def in_groups(
    fit: Callable[..., T],
    w: jax.Array,
    shared: tuple[int, ...],
    group: tuple[int, int] | None,
    *others: Any,
    beside: Sequence[jax.Array] = (),
) -> T:
    """Applies ``fit(part, span, *others, *beside)`` to ``w`` in groups; results have the rank of ``w``.

    Args:
      fit: a function of ``w`` with runs along the group's axis as a separate axis, of the span to reduce,
        and of the ``others``, which broadcast against that array.
      w: an array.
      shared: the axes that are reduced whole.
      group: the negative axis whose runs are reduced, and the length of runs. The last may be shorter.
      others: trees of arrays with an entry for each span.
      beside: arrays that broadcast to ``w``; ``fit`` gets the parts that correspond to that of ``w``.
    """
    if group is None:
        return fit(w, Span(shared), *others, *beside)
    axis, size = group[0] + w.ndim, group[1]
    length = w.shape[axis]
    size = min(size, max(length, 1))
    reduced = (*(a + (a > axis) for a in shared), axis + 1)

    def fit_part(first: int, last: int, run: int, piece: int) -> T:
        """Fits ``w[first:last]`` in groups of ``run`` pieces, each of which is reduced over an axis."""
        part = split_axis(w, axis, first, last, piece)
        parts = [split_axis(_long(x, axis, length), axis, first, last, piece) for x in beside]

        def each_piece(x: jax.Array) -> jax.Array:
            x = jax.lax.slice_in_dim(x, first // size, -(-last // size), axis=axis)
            return for_pieces(x, axis, run, part.shape[axis])

        found = fit(part, Span(reduced, axis, run), *jax.tree.map(each_piece, others), *parts)
        return jax.tree.map(lambda x: for_groups(x, axis, run), found)

    piece = piece_of(w, axis, size)
    if 4 <= piece < size:
        return fit_part(0, length, size // piece, piece)
    # With smaller pieces, what devices exchange would exceed the weight.
    whole = length // size * size
    found = fit_part(0, whole, 1, size)
    if whole == length:
        return found
    # The last, shorter group is fitted separately, since padding would count in its sums.
    rest = fit_part(whole, length, 1, length - whole)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis), found, rest)


def _long(x: jax.Array, axis: int, length: int) -> jax.Array:
    """``x`` repeated along ``axis`` where it has extent 1."""
    return jnp.broadcast_to(x, (*x.shape[:axis], length, *x.shape[axis + 1 :]))
