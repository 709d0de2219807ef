"""Search of the scale, with its sign, that minimises a weighted squared error."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.blocks import fit_in_blocks
from optax_clipquant.lowering.reduce import Span, extremes
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.levels import Levels
from optax_clipquant.quant.scales.closed_form import round_scale
from optax_clipquant.quant.scales.nearest import (
    is_mirrored,
    largest_level,
    nearest_levels,
)

# Sums each array over the weights that share a scale, keeping the axes.
Totals = Callable[[list[jax.Array]], list[jax.Array]]


def search_scale(
    w: jax.Array,
    importance: jax.Array | float,
    levels: Levels,
    totals: Totals,
    high: jax.Array,
    low: jax.Array,
    *,
    zero_points: bool = False,
    count: int = 24,
) -> tuple[jax.Array, jax.Array | None]:
    """Searches the scale, and zero point, that minimise ``sum(importance * (w - w_hat)**2)``.

    It tries ``count`` scales of each sign around the one that maps the weights of the largest magnitude to
    the outermost levels, and then two least-squares fits from the best. The sign matters as much as the
    size of the scale: the levels ``-8 .. 7`` reach further on one side, and which side is better depends on
    all weights, not only on the largest one.

    Args:
      w: float32 weights.
      importance: the importance of each weight, at least 0; broadcastable to ``w``.
      levels: the static half of the grid.
      totals: sums arrays over the weights that share a scale.
      high: the largest weight (at least 0) that shares each scale, in the shape that ``totals`` returns.
      low: the smallest weight (at most 0), likewise.
      zero_points: whether the grid is affine.
      count: the number of sizes of the scale to try.

    Returns:
      The scale, rounded to a grid's precision, and the zero point as float32 or None. Where all weights or
      all importances are 0, the scale is the one that spans the weights.
    """
    number = levels.upper - levels.lower + 1
    unit = _spanning(levels, high, low, zero_points)
    # With fewer levels it pays to clip more of the largest weights.
    ratios = np.linspace(max(1 - 1.6 / number**0.5, 0.08), 1 + 0.6 / number**0.5, count)
    ratios[np.argmin(np.abs(ratios - 1))] = 1
    if zero_points:
        middle = jnp.round(levels.lower - low / jnp.where(unit == 0, 1, unit))
        ratios, shifts = (x.ravel() for x in np.meshgrid(ratios[::2], (0, -1, 1)))
    else:
        middle, shifts = None, np.zeros(count)
        if not is_mirrored(levels):
            ratios, shifts = np.concatenate([ratios, -ratios]), np.zeros(2 * count)

    # In units of one scale, so that the ratios to try are numbers rather than arrays: five times as fast.
    x = w * (1 / jnp.where(unit == 0, 1, unit))
    if is_mirrored(levels, middle):
        x = jnp.abs(x)

    def attempt(best: tuple, choices: jax.Array) -> tuple[tuple, None]:
        least, *kept = best
        errors, tried = [], []
        for ratio, shift in choices:
            zero = None if middle is None else jnp.clip(middle + shift, levels.lower, levels.upper)
            level = nearest_levels(levels, x * (1 / ratio), zero)
            errors.append(importance * jnp.square(x - level * ratio))
            tried.append((ratio, zero))
        for error, found in zip(totals(errors), tried, strict=True):
            wins = error < least
            least = jnp.where(wins, error, least)
            kept = [
                None if y is None else jnp.where(wins, x, y)
                for x, y in zip(found, kept, strict=True)
            ]
        return (least, *kept), None

    choices = jnp.asarray(np.stack([ratios, shifts], axis=1), jnp.float32)
    best = (jnp.full_like(unit, jnp.inf), jnp.ones_like(unit), middle)
    (_, ratio, zero), _ = jax.lax.scan(attempt, best, choices.reshape(-1, 3, 2), unroll=2)
    for _ in range(2):  # least squares for the nearest codes, which never raises the error
        level = nearest_levels(levels, x * (1 / ratio), zero)
        squares, products = totals([importance * jnp.square(level), importance * x * level])
        refit = products / jnp.where(squares == 0, 1, squares)
        ratio = jnp.where(jnp.isfinite(refit) & (refit != 0), refit, ratio)
    return round_scale(unit * ratio, largest_level(levels, zero_points), levels.dtype), zero


def _spanning(levels: Levels, high: jax.Array, low: jax.Array, zero_points: bool) -> jax.Array:
    """The scale at which the levels span the weights, by the further side for levels around zero."""
    steps = levels.upper - levels.lower
    if zero_points:
        return (high - low) / steps
    book = levels.codebook
    return jnp.maximum(high, -low) / (steps / 2 if book is None else max(map(abs, book)))


def weighted_least_squares(
    w: jax.Array, importance: jax.Array, span: Span, grid: Grid, *, count: int = 9
) -> Grid:
    """``grid`` with the scales that minimise ``sum(importance * (w - w_hat)**2)`` in each span.

    Args:
      w: the weights.
      importance: above 0, broadcastable to ``w``.
      span: the weights that share a scale.
      grid: gives the levels, and whether there are zero points; its arrays are not read.
      count: the number of sizes of the scale to try, see ``search_scale``.
    """

    def totals(arrays: list[jax.Array]) -> list[jax.Array]:
        return span.reduce(("sum",) * len(arrays), arrays)

    def fit(w: jax.Array, importance: jax.Array) -> Grid:
        w = w.astype(jnp.float32)
        high, low = extremes(w, span)
        has_zero = grid.zero_point is not None
        scale, zero = search_scale(
            w, importance, grid.levels, totals, high, low, zero_points=has_zero, count=count
        )
        scale = jnp.where(jnp.isfinite(high) & jnp.isfinite(low), scale, jnp.maximum(high, -low))
        zero = None if zero is None else zero.astype(jnp.int8)
        return dataclasses.replace(grid, scale=scale, zero_point=zero)

    return fit_in_blocks(fit, w, span, importance)


def weighted_refit(w: jax.Array, importance: jax.Array, span: Span, start: Grid) -> Grid:
    """``start`` with the scales that minimise ``sum(importance * (w - w_hat)**2)`` for its nearest codes.

    One round, which reads ``w`` once and keeps the zero points: weights that stand on levels of
    ``start`` find its scales again. Where a scale is 0 or not finite, or no weight of any importance has a
    level but 0, it is that which spans the weights.
    """
    levels, zero = start.levels, start.zero_point
    w, scale = w.astype(jnp.float32), start.scale.astype(jnp.float32)
    zero = None if zero is None else zero.astype(jnp.float32)
    usable = jnp.isfinite(scale) & (scale != 0)
    scale = jnp.where(usable, scale, 1)
    if is_mirrored(levels, zero):
        w, scale = jnp.abs(w), jnp.abs(scale)
    steps = w * (1 / scale)
    level = nearest_levels(levels, steps, zero)
    # In units of the scale, so that none overflows.
    sums = [importance * jnp.square(level), importance * steps * level]
    high, low, squares, products = extremes(w, span, *sums)
    ratio = products / jnp.where(squares == 0, 1, squares)
    unit = _spanning(levels, high, low, zero is not None)
    valid = usable & jnp.isfinite(ratio) & (ratio != 0) & jnp.isfinite(unit)
    largest = largest_level(levels, zero is not None)
    found = round_scale(jnp.where(valid, scale * ratio, unit), largest, levels.dtype)
    return dataclasses.replace(start, scale=found)


def aligned(importance: Any, shape: tuple[int, ...]) -> jax.Array:
    """``importance`` in float32, above 0, with leading axes of extent 1 added up to the rank of ``shape``.

    Above 0, so that weights whose inputs are all 0 on the data are weighted equally.
    """
    importance = jnp.asarray(importance, jnp.float32)
    rank = len(shape)
    fits = importance.ndim <= rank and all(
        a in (1, b) for a, b in zip(importance.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"importance of shape {importance.shape} does not broadcast to weights of shape {shape}"
        )
    importance = importance.reshape((1,) * (rank - importance.ndim) + importance.shape)
    return jnp.maximum(importance, jnp.maximum(1e-6 * jnp.mean(importance), 1e-30))
