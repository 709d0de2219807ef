"""Extremes that see NaN."""

import jax
import jax.numpy as jnp


def extremes(x: jax.Array, axes: tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
    """The largest and the least element along ``axes`` (by default all), 0 among them; both NaN where
    an element is.

    XLA's CPU backend drops NaN from the maximum of a large array (seen with jaxlib 0.10.2), but not
    from a sum, which costs less than any other look at all elements. Where a sum overflows in both
    directions, which takes finite elements near the end of float32's range, it is NaN as well.
    """
    high = jnp.max(x, axis=axes, keepdims=True, initial=0)
    low = jnp.min(x, axis=axes, keepdims=True, initial=0)
    nan = jnp.isnan(jnp.sum(x, axis=axes, keepdims=True))
    return jnp.where(nan, jnp.nan, high), jnp.where(nan, jnp.nan, low)
