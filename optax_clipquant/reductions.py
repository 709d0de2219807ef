"""Sums and extremes, which see NaN, of what shares a scale."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.sharding import reduce_runs


@dataclasses.dataclass(frozen=True)
class Span:
    """What is reduced together: all along ``axes`` (by default all axes), of ``run`` neighbours along
    ``axis``, each of which gets the result. The last run may be shorter.
    """

    axes: tuple[int, ...] | None = None
    axis: int = 0
    run: int = 1

    def reduce(self, fn: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """``fn`` is a reduction to which zeros are nothing."""
        return reduce_runs(fn, fn(x, axis=self.axes, keepdims=True), self.axis, self.run)

    def sum(self, x: jax.Array) -> jax.Array:
        return self.reduce(jnp.sum, x)

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
    high = span.reduce(functools.partial(jnp.max, initial=0), x)
    low = span.reduce(functools.partial(jnp.min, initial=0), x)
    nan = jnp.isnan(span.sum(x))
    return jnp.where(nan, jnp.nan, high), jnp.where(nan, jnp.nan, low)
