"""What shares a scale, and sums and extremes of it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.sharding import reduce_runs, split_axis

Kind = Literal["max", "min", "sum"]
Zero = jax.Array | float
_WHOLE = {kind: partial(getattr(jnp, kind), initial=0) for kind in ("max", "min", "sum")}
_PAIR = {"max": jax.lax.max, "min": jax.lax.min, "sum": jax.lax.add}


@dataclasses.dataclass(frozen=True)
class Span:
    """What is reduced together: all along ``axes`` (by default all axes), of ``run`` neighbours along
    ``axis``, each of which gets the result. The last run may be shorter.
    """

    axes: tuple[int, ...] | None = None
    axis: int = 0
    run: int = 1

    def reduce(
        self,
        kinds: Sequence[Kind],
        compute: Callable[[Zero], Sequence[jax.Array]],
        zero: Zero = 0.0,
        most: int = 16,
    ) -> list[jax.Array]:
        """The largest or least element, 0 among them, or the sum, of several arrays of one shape.

        XLA's CPU backend makes a loop of each reduction, and in most of them computes one element at a
        time. There, a few elements are reduced first, of all arrays in one loop over vectors of
        neighbours: twice as fast for extremes, 5 times and more where the arrays are computed. (Other
        backends fuse reductions by themselves.)

        Args:
          kinds: what to do with each array.
          compute: gives the arrays. Its argument is 0, or where each array has a loop of its own,
            ``zero`` and something that is known when the loop before is done: added to what arrays
            share, it keeps that from being written to memory.
          zero: a zero of the result's shape that no compiler takes for a constant.
          most: how many elements are reduced first. A loop that computes much for each is unrolled, and
            fast, only if they are few; but what it writes is as much smaller as they are many.
        """
        axis, size, part = self._parts(jax.eval_shape(lambda: compute(0.0))[0], most)

        def one_by_one() -> list[jax.Array]:
            found: list[jax.Array] = []
            for i, kind in enumerate(kinds):
                later = zero + 0 * found[-1] if found else zero
                found.append(self._whole(kind, compute(later)[i]))
            return found

        def together() -> list[jax.Array]:
            arrays = compute(0.0)
            few = jax.lax.reduce(
                tuple(split_axis(x, axis, 0, x.shape[axis], size) for x in arrays),
                tuple(jnp.zeros((), x.dtype) for x in arrays),
                lambda a, b: tuple(_PAIR[k](x, y) for k, x, y in zip(kinds, a, b, strict=True)),
                (part,),
            )
            return [self._whole(kind, x) for kind, x in zip(kinds, few, strict=True)]

        if size == 1:
            return one_by_one()
        return jax.lax.platform_dependent(cpu=together, default=one_by_one)

    def _whole(self, kind: Kind, x: jax.Array) -> jax.Array:
        each = _WHOLE[kind](x, axis=self.axes, keepdims=True)
        return reduce_runs(_WHOLE[kind], each, self.axis, self.run)

    def _parts(self, x: jax.ShapeDtypeStruct, most: int) -> tuple[int, int, int]:
        """An axis, the size of the parts to split it into, 1 for none, and which of the two axes to reduce.

        Vectors lie along the last axis: it stays, or elements far from each other on it are reduced.
        Each device must hold all that is, or it would be moved.
        """
        none = 0, 1, 0
        axes = range(x.ndim) if self.axes is None else [axis % x.ndim for axis in self.axes]
        if x.size <= 4096 or not axes:
            return none
        last = x.ndim - 1
        axis = max(axes, key=lambda a: (a != last, x.shape[a]))
        length, devices = x.shape[axis], jax.device_count()
        few = max(k for k in range(1, most + 1) if length % (k * devices) == 0 or k == 1)
        if axis != last:
            return axis, few, axis + 1
        return (axis, length // few, axis) if devices == 1 and length >= 4 * few > 4 else none

    def counts(self, shape: tuple[int, ...]) -> np.ndarray:
        """How many elements are reduced together: a scalar, or for runs an array with each of them."""
        axes = range(len(shape)) if self.axes is None else self.axes
        count = math.prod(shape[axis] for axis in axes)
        if self.run == 1:
            return np.asarray(count)
        n = shape[self.axis]
        first = np.arange(n) // self.run * self.run
        runs = np.minimum(self.run, n - first)
        return count * runs.reshape([n if axis == self.axis else 1 for axis in range(len(shape))])


def extremes(x: jax.Array, span: Span = Span()) -> tuple[jax.Array, jax.Array]:
    """The largest and the least element of each span, 0 among them; both NaN where an element is.

    XLA's CPU backend drops NaN from the maximum of a large array (seen with jaxlib 0.10.2), but not
    from a sum, which costs less than any other look at all elements. Where a sum overflows in both
    directions, which takes finite elements near the end of float32's range, it is NaN as well.
    """
    high, low, total = span.reduce(("max", "min", "sum"), lambda _: (x, x, x))
    nan = jnp.isnan(total)
    return jnp.where(nan, jnp.nan, high), jnp.where(nan, jnp.nan, low)
