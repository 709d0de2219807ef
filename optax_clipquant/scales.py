"""Statistics of weights, and the scales that follow from them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.grids import Grid

_LARGEST = float(jnp.finfo(jnp.float32).max)


def round_scale(scale: jax.Array, largest: float, dtype: np.dtype) -> jax.Array:
    """``scale`` to the precision of bfloat16, so that no level ``largest * scale`` overflows.

    Scales below 2**-126 become 0 and those from 2**126 the number before that, since the reciprocals
    of others are no normal numbers: 1 and 2 bits and ternary saturate at weights beyond that. With 8 significant bits in the scale, the product with a code, and the difference of two such
    products, is exact in float32. Plain casts to bfloat16 and back may be dropped by a compiler.
    """
    limit = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.bfloat16).max)) / largest
    mantissa, exponent = math.frexp(limit)
    cap = min(math.ldexp(math.floor(mantissa * 256) / 256, exponent), 2.0**126 * (1 - 2.0**-8))
    rounded = jnp.clip(jax.lax.reduce_precision(scale, 8, 7), -cap, cap)
    rounded = jnp.where(jnp.abs(rounded) < 2.0**-126, 0, rounded)
    return jnp.where(jnp.isinf(scale), scale, rounded)


@jax.jit
def moments(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, standard deviation, and whether all elements are equal (then the mean is that value).

    Moments of each column first, in units of the column's range, then those of the columns: nothing
    cancels or overflows, and each pass is one fused reduction.
    """
    w = w.reshape(-1, 1) if w.ndim < 2 else w
    axes = tuple(range(w.ndim - 1))
    rows = w.size // w.shape[-1]
    high = jnp.max(w, axis=axes, keepdims=True)
    low = jnp.min(w, axis=axes, keepdims=True)
    span = jnp.maximum(high, -low)
    unit = jnp.where(span == 0, 1, span)
    means = 2 * jnp.sum(
        w * (0.5 / rows), axis=axes, keepdims=True
    )  # halves, for a sum can round up
    squares = jnp.sum(jnp.square(w / unit - means / unit), axis=axes, keepdims=True) / rows
    mean = 2 * jnp.sum(means * (0.5 / means.size))
    largest = jnp.max(unit)
    between = jnp.square(means / largest - mean / largest)
    spread = jnp.sqrt(jnp.mean(squares * jnp.square(unit / largest) + between))
    std = jnp.minimum(largest * jnp.minimum(spread, 1), _LARGEST)
    constant = jnp.max(high) == jnp.min(low)
    return jnp.where(constant, jnp.max(high), mean), std, constant


def mean_magnitude(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean of ``abs(w)`` along ``axes``, cut so that twice the mean is finite where ``w`` is."""
    count = math.prod(w.shape[axis] for axis in axes)
    half = jnp.sum(jnp.abs(w) * (0.5 / max(count, 1)), axis=axes, keepdims=True)
    return 2 * jnp.where(jnp.isinf(half), half, jnp.minimum(half, _LARGEST / 4))


def extremes(w: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The largest and the least element along ``axes``, 0 among them."""
    return (
        jnp.max(w, axis=axes, keepdims=True, initial=0),
        jnp.min(w, axis=axes, keepdims=True, initial=0),
    )


def least_squares(w: jax.Array, axes: tuple[int, ...], start: Grid | None, absmax: Grid) -> Grid:
    """``absmax`` with the scale that minimises the squared error of ``w``.

    Nearest codes for a scale, then the least-squares scale for these codes, in turn: the error never
    rises. Without ``start``, two rounds from the best of several scales, the absmax scale among them; with
    it, one round from the scale that it holds.
    """
    base, offset = absmax.scale, absmax.offset
    low, high = absmax.lower + offset, absmax.upper + offset
    if absmax.zero_point is not None:
        shift = absmax.zero_point.astype(jnp.float32)
        low, high = low - shift, high - shift
        largest = float(absmax.upper - absmax.lower)
    else:
        largest = absmax.upper + offset if offset else float(-absmax.lower)
    if start is not None:
        # Which side has the largest weight may change from step to step; the grid is not mirrored.
        base = jnp.where(start.scale * base < 0, -base, base)
    unit = jnp.where(base == 0, 1, base)
    x = w / unit

    def settle(factor: jax.Array) -> jax.Array:
        """``factor`` such that ``base * factor`` is a scale that a grid can have."""
        rounded = round_scale(base * factor, largest, absmax.dtype)
        return jnp.where(rounded == 0, 1, rounded / unit)

    def levels(factor: jax.Array) -> jax.Array:
        # Bounds of the shape of the scale, not scalars: XLA's CPU backend then fuses all of this
        # into the reductions, which is three times as fast.
        inside = jnp.minimum(jnp.maximum(x, low * factor), high * factor)
        half = offset + 0 * factor
        return jnp.round(inside / factor - half) + half if offset else jnp.round(inside / factor)

    def error(factor: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(x - factor * levels(factor)), axis=axes, keepdims=True)

    def refit(factor: jax.Array) -> jax.Array:
        """The least-squares factor for the codes at ``factor``."""
        squares = jnp.sum(jnp.square(levels(factor)), axis=axes, keepdims=True)
        # Were it the same factor in both sums, XLA's CPU backend would write the levels to memory.
        same = factor + 0 * squares
        products = jnp.sum(x * levels(same), axis=axes, keepdims=True)
        return settle(products / jnp.where(squares == 0, 1, squares))

    if start is not None:
        factor = jnp.abs(start.scale / unit)
        # Far enough from 0 that the largest weight keeps a code that is not 0.
        factor = settle(jnp.where(jnp.isfinite(factor), jnp.clip(factor, 1e-3, 1), 1))
    else:
        factor = settle(jnp.ones_like(base))
        least = error(factor)
        narrowest = min(0.02 * (absmax.upper - absmax.lower + 1), 0.7)
        # The fewer weights share a scale, the more rugged is their error.
        starts = 6 if math.prod(w.shape[axis] for axis in axes) >= 32 else 24
        for ratio in np.geomspace(narrowest, 1, starts)[:-1]:
            guess = settle(jnp.full_like(base, ratio))
            found = error(guess)
            factor = jnp.where(found < least, guess, factor)
            least = jnp.minimum(found, least)
        factor = refit(factor)
    factor = refit(factor)
    return dataclasses.replace(absmax, scale=round_scale(base * factor, largest, absmax.dtype))
