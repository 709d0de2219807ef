"""Scales that a formula gives: from extremes, mean magnitudes, and mean and standard deviation."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.reduce import Span, extremes, sum_magnitudes
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.levels import largest_scale
from optax_clipquant.quant.scales.nearest import HALF, is_mirrored, largest_level

_LARGEST = float(jnp.finfo(jnp.float32).max)


def round_scale(scale: jax.Array, largest: float, dtype: np.dtype) -> jax.Array:
    """Rounds ``scale`` to bfloat16's precision, and caps it so that ``largest * scale`` does not overflow.

    Scales below 2**-126 become 0, and those from 2**126 the largest number below it, since the
    reciprocals of others are subnormal; grids of 1 and 2 bits and ternary ones saturate at weights beyond
    that. With 8 significant bits in the scale, its product with a code, and the difference of two such
    products, is exact in float32. A compiler may drop plain casts to bfloat16 and back.
    """
    cap = largest_scale(largest, dtype)
    rounded = jnp.clip(jax.lax.reduce_precision(scale, 8, 7), -cap, cap)
    rounded = jnp.where(jnp.abs(rounded) < 2.0**-126, 0, rounded)
    return jnp.where(jnp.isfinite(scale), rounded, scale)


@partial(jax.jit, static_argnames="axes")
def moments(w: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean, the standard deviation, and whether all elements are equal (the mean is then that value).

    The moments of each column are taken first, in units of the column's largest magnitude, then those
    over the columns: nothing cancels or overflows, and the weights are read twice.
    """
    last = w.ndim - 1
    columns = (last,) if last in axes and len(axes) > 1 else ()
    rows = tuple(axis for axis in axes if axis not in columns)
    span, count = Span(rows), math.prod(w.shape[axis] for axis in rows)
    # Halves, since a sum may round up.
    high, low, halves = extremes(w, span, w * (0.5 / count))
    means = jnp.clip(2 * halves, low, high)
    reach = jnp.maximum(high, -low)
    unit = jnp.where(reach == 0, 1, reach)
    any_element = jnp.where(high > 0, high, low)
    squares, differ = span.reduce(
        ("sum", "max"),
        [jnp.square(_ratio(w, unit) - _ratio(means, unit)), (w != any_element).astype(jnp.int32)],
    )

    def over_columns(fn: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        return fn(x, axis=columns, keepdims=True)

    number = math.prod(w.shape[axis] for axis in columns)
    mean = 2 * over_columns(jnp.sum, means * (0.5 / number))
    largest = over_columns(jnp.max, unit)
    between = jnp.square(_ratio(means, largest) - _ratio(mean, largest))
    within = squares / count * jnp.square(_ratio(unit, largest))
    spread = jnp.sqrt(over_columns(jnp.mean, within + between))
    std = jnp.minimum(largest * jnp.minimum(spread, 1), _LARGEST)
    highest = over_columns(jnp.max, any_element)
    constant = (over_columns(jnp.max, differ) == 0) & (
        highest == over_columns(jnp.min, any_element)
    )
    constant &= ~jnp.isnan(mean)
    return jnp.where(constant, highest, mean), std, constant


def _ratio(x: jax.Array, unit: jax.Array) -> jax.Array:
    """``x / unit``, also where the reciprocal of ``unit`` is subnormal, which XLA flushes to 0."""
    shrink = jnp.where(unit > 1, 2.0**-8, 1)
    return x * shrink / (unit * shrink)


def mean_magnitude(w: jax.Array, span: Span) -> jax.Array:
    """The mean of ``abs(w)`` in each span, capped so that twice the mean is finite where ``w`` is."""
    if span.valid is None:
        fraction = jnp.asarray(0.5 / np.maximum(span.counts(w.shape), 1), jnp.float32)
    else:
        fraction = 0.5 / jnp.maximum(jnp.sum(span.valid), 1)
    half = sum_magnitudes(w * fraction, span)
    return 2 * jnp.where(jnp.isinf(half), half, jnp.minimum(half, _LARGEST / 4))


def around_zero(grid: Grid, high: jax.Array, low: jax.Array) -> Grid:
    """``grid`` with the scale that puts its outermost level at the extreme further from 0."""
    reach = largest_level(grid, grid.zero_point is not None)
    if is_mirrored(grid, grid.zero_point):
        scale = jnp.maximum(high, -low) / reach
    else:
        scale = jnp.where(high > -low, high, low) / -reach
    return dataclasses.replace(grid, scale=round_scale(scale, reach, grid.dtype))


def between_extremes(grid: Grid, high: jax.Array, low: jax.Array) -> Grid:
    """``grid`` with the scale and zero point whose levels span ``[low, high]``."""
    steps = grid.upper - grid.lower
    step = high / steps - low / steps
    # A single step may span twice the largest number.
    finite = jnp.isfinite(high) & jnp.isfinite(low)
    step = jnp.where(finite, jnp.minimum(step, float(jnp.finfo(jnp.float32).max)), step)
    largest = HALF * steps
    scale = round_scale(step, largest, grid.dtype)
    # Rounded up, so that the levels span the weights and no weight is more than half a step off.
    scale = round_scale(
        jnp.where(scale < step, scale * (1 + 1.5 / 256), scale), largest, grid.dtype
    )
    zero_point = jnp.round(grid.lower - low / jnp.where(scale == 0, 1, scale))
    zero_point = jnp.where(jnp.isnan(zero_point), 0, zero_point)
    zero_point = jnp.clip(zero_point, grid.lower, grid.upper).astype(jnp.int8)
    return dataclasses.replace(grid, scale=scale, zero_point=zero_point)
