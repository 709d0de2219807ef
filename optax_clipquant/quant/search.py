"""Search of the scale, with its sign, that minimises a weighted squared error."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.reduce import Span, extremes
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.levels import Levels
from optax_clipquant.quant.scales import round_scale

# Sums each array over the weights that share a scale, keeping the axes.
Totals = Callable[[list[jax.Array]], list[jax.Array]]


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


def levels_of(levels: Levels, codes: jax.Array, zero_point: jax.Array | None = None) -> jax.Array:
    """The levels of ``codes``, in units of the scale."""
    if levels.codebook is not None:
        book = np.asarray(levels.codebook, np.float32)
        level = jnp.full_like(codes, book[0])
        for i, value in enumerate(book[1:], 1):
            level = jnp.where(codes == levels.lower + i, value, level)
        return level
    return codes + levels.offset if zero_point is None else codes + levels.offset - zero_point


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
    # With fewer levels it pays to clip more of the largest weights.
    ratios = np.linspace(max(1 - 1.6 / number**0.5, 0.08), 1 + 0.6 / number**0.5, count)
    ratios[np.argmin(np.abs(ratios - 1))] = 1
    if zero_points:
        unit = (high - low) / (number - 1)
        middle = jnp.round(levels.lower - low / jnp.where(unit == 0, 1, unit))
        ratios, shifts = (x.ravel() for x in np.meshgrid(ratios[::2], (0, -1, 1)))
    else:
        book = levels.codebook
        reach = (number - 1) / 2 if book is None else max(map(abs, book))
        unit = jnp.maximum(high, -low) / reach
        middle, shifts = None, np.zeros(count)
        if not is_mirrored(levels):
            ratios, shifts = np.concatenate([ratios, -ratios]), np.zeros(2 * count)

    def fit(scale: jax.Array, zero: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The error at a scale, and the levels of the nearest codes."""
        steps = w * (1 / jnp.where(scale == 0, 1, scale))
        level = levels_of(levels, nearest_codes(levels, steps, zero), zero)
        return totals([importance * jnp.square(w - level * scale)])[0], level

    def rounded(scale: jax.Array) -> jax.Array:
        return round_scale(scale, largest_level(levels, zero_points), levels.dtype)

    def better(best: tuple, error: jax.Array, scale: jax.Array, zero: jax.Array | None) -> tuple:
        least, *kept = best
        wins = error < least
        found = (scale, zero)
        return (
            jnp.where(wins, error, least),
            *(
                None if x is None else jnp.where(wins, x, y)
                for x, y in zip(found, kept, strict=True)
            ),
        )

    # In units of one scale, so that the ratios to try are numbers rather than arrays: five times as fast.
    x = w * (1 / jnp.where(unit == 0, 1, unit))

    def attempt(best: tuple, choices: jax.Array) -> tuple[tuple, None]:
        errors, tried = [], []
        for ratio, shift in choices:
            zero = None if middle is None else jnp.clip(middle + shift, levels.lower, levels.upper)
            level = levels_of(levels, nearest_codes(levels, x * (1 / ratio), zero), zero)
            errors.append(importance * jnp.square(x - level * ratio))
            tried.append((jnp.full_like(unit, ratio), zero))
        for error, (ratio, zero) in zip(totals(errors), tried, strict=True):
            best = better(best, error, ratio, zero)
        return best, None

    choices = jnp.asarray(np.stack([ratios, shifts], axis=1), jnp.float32)
    choices = choices.reshape(-1, 3, 2)
    best = (jnp.full_like(unit, jnp.inf), jnp.ones_like(unit), middle)
    (_, ratio, zero), _ = jax.lax.scan(attempt, best, choices, unroll=2)
    scale = rounded(unit * ratio)
    best = (fit(scale, zero)[0], scale, zero)
    for _ in range(2):
        _, scale, zero = best
        _, level = fit(scale, zero)
        squares, products = totals([importance * jnp.square(level), importance * w * level])
        scale = rounded(products / jnp.where(squares == 0, 1, squares))
        scale = jnp.where(squares == 0, best[1], scale)
        best = better(best, fit(scale, zero)[0], scale, zero)
    return best[1], best[2]


def is_mirrored(levels: Levels) -> bool:
    """Whether the levels are the same for a scale and its negative."""
    if levels.codebook is not None:
        return levels.codebook == tuple(-x for x in reversed(levels.codebook))
    return levels.lower + levels.offset == -(levels.upper + levels.offset)


def largest_level(levels: Levels, zero_points: bool) -> float:
    """The largest level that must be finite with any scale, in units of the scale."""
    if zero_points:
        return 0.49 * (levels.upper - levels.lower)
    if levels.codebook is not None:
        return max(map(abs, levels.codebook))
    return -levels.lower - levels.offset


def weighted_least_squares(
    w: jax.Array, importance: jax.Array, span: Span, grid: Grid, *, count: int = 9
) -> Grid:
    """``grid`` with the scales that minimise ``sum(importance * (w - w_hat)**2)`` in each span.

    Args:
      w: the weights.
      importance: at least 0, broadcastable to ``w``. A span where all of it is 0 is weighted equally.
      span: the weights that share a scale.
      grid: gives the levels, and whether there are zero points; its arrays are not read.
      count: the number of sizes of the scale to try, see ``search_scale``.
    """

    def fit(w: jax.Array, importance: jax.Array) -> Grid:
        w = w.astype(jnp.float32)

        def totals(arrays: list[jax.Array]) -> list[jax.Array]:
            return span.reduce(("sum",) * len(arrays), arrays)

        (weight,) = totals([importance])
        importance = jnp.where(weight > 0, importance, 1)
        high, low = extremes(w, span)
        has_zero = grid.zero_point is not None
        scale, zero = search_scale(
            w, importance, grid.levels, totals, high, low, zero_points=has_zero, count=count
        )
        scale = jnp.where(jnp.isfinite(high) & jnp.isfinite(low), scale, jnp.maximum(high, -low))
        zero = None if zero is None else zero.astype(jnp.int8)
        return dataclasses.replace(grid, scale=scale, zero_point=zero)

    return fit(w, jnp.broadcast_to(importance, w.shape))


def aligned(importance: Any, shape: tuple[int, ...]) -> jax.Array:
    """``importance`` in float32, with leading axes of extent 1 added up to the rank of ``shape``."""
    importance = jnp.asarray(importance, jnp.float32)
    rank = len(shape)
    fits = importance.ndim <= rank and all(
        a in (1, b) for a, b in zip(importance.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"importance of shape {importance.shape} does not broadcast to weights of shape {shape}"
        )
    return importance.reshape((1,) * (rank - importance.ndim) + importance.shape)
