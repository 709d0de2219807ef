"""Scales of grids: from extremes (absmax), by least squares, and from mean and standard deviation."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.blocks import fit_in_blocks
from optax_clipquant.lowering.reduce import Span, extremes, sum_magnitudes
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.levels import Levels, largest_scale

_HALF = 0.49
"""The fraction of an affine grid's steps whose span must stay finite: the weights may span twice the
largest number of their dtype. A bit below 1/2, since the scale is rounded up; ``decode`` clips levels
beyond the dtype's range.
"""
Place = Callable[[jax.Array, jax.Array], Grid]  # takes the largest and the smallest weight
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
    return jnp.where(jnp.isinf(scale), scale, rounded)


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
    fraction = jnp.asarray(0.5 / np.maximum(span.counts(w.shape), 1), jnp.float32)
    half = sum_magnitudes(w * fraction, span)
    return 2 * jnp.where(jnp.isinf(half), half, jnp.minimum(half, _LARGEST / 4))


def around_zero(grid: Grid, high: jax.Array, low: jax.Array) -> Grid:
    """``grid`` with the scale that puts its outermost level at the extreme further from 0."""
    reach = _largest(grid)
    if _is_mirrored(grid):
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
    largest = _HALF * steps
    scale = round_scale(step, largest, grid.dtype)
    # Rounded up, so that the levels span the weights and no weight is more than half a step off.
    scale = round_scale(
        jnp.where(scale < step, scale * (1 + 1.5 / 256), scale), largest, grid.dtype
    )
    zero_point = jnp.round(grid.lower - low / jnp.where(scale == 0, 1, scale))
    zero_point = jnp.where(jnp.isnan(zero_point), 0, zero_point)
    zero_point = jnp.clip(zero_point, grid.lower, grid.upper).astype(jnp.int8)
    return dataclasses.replace(grid, scale=scale, zero_point=zero_point)


def least_squares(w: jax.Array, span: Span, start: Grid | None, place: Place) -> Grid:
    """The grid that ``place`` makes from the extremes of ``w``, with a scale that minimises the squared error.

    Alternates nearest codes for a scale and the least-squares scale for these codes, so that the error
    never rises. Without ``start``, it takes two rounds from the best of several scales, among them the
    one of ``place``. With ``start``, it takes one round from that scale, and reads ``w`` once; where that
    scale is 0 or not finite, or all codes are 0, the scale is the one of ``place``.
    """
    if start is None:
        return fit_in_blocks(partial(_from_scratch, place=place, span=span), w, span)
    if start.zero_point is None:
        return _from_start(w, start, place, span)
    fit = partial(_from_start, place=place, span=span)
    return fit_in_blocks(fit, w, span, start, factor=2)


def _from_scratch(w: jax.Array, place: Place, span: Span) -> Grid:
    w = w.astype(jnp.float32)
    grid = place(*extremes(w, span))
    scale = _search(w, span, grid)
    for _ in range(2):
        scale = jnp.where(scale == 0, 1, scale)
        scale = _best(grid, scale, *span.reduce(("sum", "sum"), _terms(w, grid, scale)))
    return dataclasses.replace(grid, scale=scale)


def _from_start(w: jax.Array, start: Grid, place: Place, span: Span) -> Grid:
    w = w.astype(jnp.float32)
    scale = start.scale.astype(jnp.float32)
    usable = jnp.isfinite(scale) & (scale != 0)
    scale = jnp.where(usable, scale, 1)
    levels = dataclasses.replace(jax.eval_shape(place, scale, scale), zero_point=start.zero_point)
    high, low, squares, products = extremes(w, span, *_terms(w, levels, scale))
    grid = place(high, low)
    best = _best(grid, scale, squares, products)
    return dataclasses.replace(grid, scale=jnp.where(usable, best, grid.scale))


def _terms(w: jax.Array, grid: Grid, scale: jax.Array) -> list[jax.Array]:
    """The squares of the nearest levels and their products with ``w``, whose sums give the least-squares scale.

    In units of the scale, so that none overflows.
    """
    if _is_mirrored(grid):
        w, scale = jnp.abs(w), jnp.abs(scale)
    steps = w * (1 / scale)
    levels = nearest_levels(grid, steps, grid.zero_point)
    return [jnp.square(levels), steps * levels]


def _best(grid: Grid, scale: jax.Array, squares: jax.Array, products: jax.Array) -> jax.Array:
    """The least-squares scale for the nearest codes at ``scale``; where there is none, the scale of ``grid``."""
    ratio = products / jnp.where(squares == 0, 1, squares)
    found = round_scale(scale * ratio, _largest(grid), grid.dtype)
    valid = jnp.isfinite(ratio) & (ratio != 0) & jnp.isfinite(grid.scale)
    return jnp.where(valid, found, grid.scale)


def _search(w: jax.Array, span: Span, absmax: Grid) -> jax.Array:
    """The scale of least squared error among several, from a narrow one to absmax."""
    base = absmax.scale
    narrowest = min(0.02 * (absmax.upper - absmax.lower + 1), 0.7)
    # In units of the absmax scale, so that no square overflows.
    x = w / jnp.where(base == 0, 1, base)
    x = jnp.abs(x) if _is_mirrored(absmax) else x

    def search(
        best: tuple[jax.Array, jax.Array], ratios: jax.Array, here: np.ndarray
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        ratio, least = best
        errors = [
            jnp.square(x - r * nearest_levels(absmax, x / r, absmax.zero_point)) for r in ratios
        ]
        for r, error in zip(ratios, span.reduce(("sum",) * 3, errors), strict=True):
            better = (error < least) & here
            ratio = jnp.where(better, r, ratio)
            least = jnp.where(better, error, least)
        return (ratio, least), None

    best = jnp.ones_like(base), jnp.full_like(base, jnp.inf)
    # The fewer weights share a scale, the more rugged the error is as a function of it.
    few = span.counts(w.shape) < 32
    for starts, here in ((6, ~few), (24, few)):
        if here.any():
            ratios = jnp.asarray([1.0, *np.geomspace(narrowest, 1, starts)[:-1]], jnp.float32)
            ratios = ratios.reshape(-1, 3)
            # Unrolled, a scan of two steps is no loop; one of eight compiles in a quarter of the time.
            best, _ = jax.lax.scan(partial(search, here=here), best, ratios, unroll=2)
    return round_scale(base * best[0], _largest(absmax), absmax.dtype)


def _is_mirrored(grid: Grid) -> bool:
    return grid.zero_point is None and is_mirrored(grid)


def is_mirrored(levels: Levels) -> bool:
    """Whether a symmetric grid has the same levels for a scale and its negative."""
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
    if zero_point is None and is_mirrored(levels):
        return jnp.minimum(nearest, high)
    if zero_point is not None:
        shift = zero_point.astype(jnp.float32)
        low, high = low - shift, high - shift
    return jnp.clip(nearest, low, high)


def _largest(grid: Grid) -> float:
    """The largest level, in steps, that must be finite with any scale of ``grid``."""
    if grid.zero_point is not None:
        return _HALF * (grid.upper - grid.lower)
    return -grid.lower - grid.offset
