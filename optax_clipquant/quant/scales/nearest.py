"""The levels of a grid nearest to given positions, in units of the scale."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.quant.levels import Levels

HALF = 0.49
"""The fraction of an affine grid's steps whose span must stay finite: the weights may span twice the
largest number of their dtype. A bit below 1/2, since the scale is rounded up; ``decode`` clips levels
beyond the dtype's range.
"""


def nearest_codes(
    levels: Levels, steps: jax.Array, zero_point: jax.Array | None = None
) -> jax.Array:
    """The codes, in float32, of the levels nearest to ``steps``, which are in units of the scale."""
    if levels.codebook is not None:
        book = np.asarray(levels.codebook, np.float32)
        above = [steps > middle for middle in (book[1:] + book[:-1]) / 2]
        return sum((x.astype(jnp.float32) for x in above), jnp.full_like(steps, levels.lower))
    codes = steps - levels.offset if zero_point is None else steps + zero_point - levels.offset
    return jnp.clip(jnp.round(codes), levels.lower, levels.upper)


def decode_codes(
    levels: Levels, codes: jax.Array, zero_point: jax.Array | None = None
) -> jax.Array:
    """The levels of ``codes``, in units of the scale."""
    if levels.codebook is not None:
        book = np.asarray(levels.codebook, np.float32)
        level = jnp.full_like(codes, book[0])
        for i, value in enumerate(book[1:], 1):
            level = jnp.where(codes == levels.lower + i, value, level)
        return level
    return codes + levels.offset if zero_point is None else codes + levels.offset - zero_point


def is_mirrored(levels: Levels, zero_point: jax.Array | None = None) -> bool:
    """Whether the levels are the same for a scale and its negative, as they are not with zero points."""
    if zero_point is not None:
        return False
    if levels.codebook is not None:
        return levels.codebook == tuple(-x for x in reversed(levels.codebook))
    return levels.lower + levels.offset == -(levels.upper + levels.offset)


def nearest_levels(
    levels: Levels, steps: jax.Array, zero_point: jax.Array | None = None
) -> jax.Array:
    """The level nearest to each position, both in steps; where levels are mirrored, positions are
    magnitudes.
    """
    if levels.codebook is not None:
        book = levels.codebook
        level = jnp.full_like(steps, book[0])
        for below, above in itertools.pairwise(book):  # sums of multiples of 2**-10 are exact
            level += jnp.where(steps > (below + above) / 2, above - below, 0)
        return level
    low, high = levels.lower + levels.offset, levels.upper + levels.offset
    nearest = jnp.floor(steps) + levels.offset if levels.offset else jnp.round(steps)
    if is_mirrored(levels, zero_point):
        return jnp.minimum(nearest, high)
    if zero_point is not None:
        shift = zero_point.astype(jnp.float32)
        low, high = low - shift, high - shift
    return jnp.clip(nearest, low, high)


def largest_level(levels: Levels, zero_points: bool) -> float:
    """The largest level that must be finite with any scale, in units of the scale."""
    if zero_points:
        return HALF * (levels.upper - levels.lower)
    if levels.codebook is not None:
        return max(map(abs, levels.codebook))
    return -levels.lower - levels.offset
