"""Scales that minimise the squared error."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.blocks import fit_in_blocks
from optax_clipquant.lowering.reduce import Span, extremes, furthest
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.scales.closed_form import round_scale
from optax_clipquant.quant.scales.nearest import is_mirrored, largest_level, nearest_levels

FEW = 32
"""Weights: with fewer for a scale, the search tries more scales."""
Place = Callable[[jax.Array, jax.Array], Grid]  # takes the largest and the smallest weight


def least_squares(w: jax.Array, span: Span, start: Grid | None, place: Place) -> Grid:
    """The grid that ``place`` makes from the extremes of ``w``, with a scale that minimises the squared error.

    Alternates nearest codes for a scale and the least-squares scale for these codes, so that the error
    never rises. Without ``start``, it takes two rounds from the best of several scales, among them the
    one of ``place``. With ``start``, it takes one round from that scale, and reads ``w`` once; where that
    scale is 0 or not finite, or all codes are 0, the scale is the one of ``place``.
    """
    if start is None:
        return fit_in_blocks(partial(_from_scratch, place=place, span=span), w, span)
    return _from_start(w, start, place, span)


def _from_scratch(w: jax.Array, place: Place, span: Span) -> Grid:
    w = w.astype(jnp.float32)
    grid = place(*extremes(w, span))
    scale = _search(w, span, grid)
    for _ in range(2):
        scale = jnp.where(scale == 0, 1, scale)
        scale = _best(grid, scale, *span.reduce(("sum", "sum"), _terms(w, grid, scale, span)))
    return dataclasses.replace(grid, scale=scale)


def _from_start(w: jax.Array, start: Grid, place: Place, span: Span) -> Grid:
    w = w.astype(jnp.float32)
    scale = start.scale.astype(jnp.float32)
    usable = jnp.isfinite(scale) & (scale != 0)
    scale = jnp.where(usable, scale, 1)
    levels = dataclasses.replace(jax.eval_shape(place, scale, scale), zero_point=start.zero_point)
    terms = _terms(w, levels, scale, span)
    if start.zero_point is None:
        far, squares, products = furthest(w, span, *terms)
        high, low = jnp.maximum(far, 0), jnp.minimum(far, 0)
    else:
        high, low, squares, products = extremes(w, span, *terms)
    grid = place(high, low)
    best = _best(grid, scale, squares, products)
    return dataclasses.replace(grid, scale=jnp.where(usable, best, grid.scale))


def _terms(w: jax.Array, grid: Grid, scale: jax.Array, span: Span) -> list[jax.Array]:
    """The squares of the nearest levels and their products with ``w``, whose sums give the least-squares scale.

    In units of the scale, so that none overflows.
    """
    if is_mirrored(grid, grid.zero_point):
        w, scale = jnp.abs(w), jnp.abs(scale)
    steps = w * (1 / scale)
    levels = _levels(grid, steps, span)
    return [jnp.square(levels), steps * levels]


def _levels(grid: Grid, steps: jax.Array, span: Span) -> jax.Array:
    """The nearest levels, and 0 for padding, whatever the level nearest to 0 is."""
    levels = nearest_levels(grid, steps, grid.zero_point)
    return levels * span.valid if grid.offset and span.valid is not None else levels


def _best(grid: Grid, scale: jax.Array, squares: jax.Array, products: jax.Array) -> jax.Array:
    """The least-squares scale for the nearest codes at ``scale``; where there is none, the scale of ``grid``."""
    ratio = products / jnp.where(squares == 0, 1, squares)
    found = round_scale(scale * ratio, largest_level(grid, grid.zero_point is not None), grid.dtype)
    valid = jnp.isfinite(ratio) & (ratio != 0) & jnp.isfinite(grid.scale)
    return jnp.where(valid, found, grid.scale)


def _search(w: jax.Array, span: Span, absmax: Grid) -> jax.Array:
    """The scale of least squared error among several, from a narrow one to absmax."""
    base = absmax.scale
    narrowest = min(0.02 * (absmax.upper - absmax.lower + 1), 0.7)
    # In units of the absmax scale, so that no square overflows.
    x = w / jnp.where(base == 0, 1, base)
    x = jnp.abs(x) if is_mirrored(absmax, absmax.zero_point) else x

    def search(
        best: tuple[jax.Array, jax.Array], ratios: jax.Array, here: np.ndarray
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        ratio, least = best
        errors = [jnp.square(x - r * _levels(absmax, x / r, span)) for r in ratios]
        for r, error in zip(ratios, span.reduce(("sum",) * 3, errors), strict=True):
            better = (error < least) & here
            ratio = jnp.where(better, r, ratio)
            least = jnp.where(better, error, least)
        return (ratio, least), None

    best = jnp.ones_like(base), jnp.full_like(base, jnp.inf)
    # The fewer weights share a scale, the more rugged the error is as a function of it.
    few = span.counts(w.shape) < FEW
    for starts, here in ((6, ~few), (24, few)):
        if here.any():
            ratios = jnp.asarray([1.0, *np.geomspace(narrowest, 1, starts)[:-1]], jnp.float32)
            ratios = ratios.reshape(-1, 3)
            # Unrolled, a scan of two steps is no loop; one of eight compiles in a quarter of the time.
            best, _ = jax.lax.scan(partial(search, here=here), best, ratios, unroll=2)
    return round_scale(
        base * best[0], largest_level(absmax, absmax.zero_point is not None), absmax.dtype
    )
