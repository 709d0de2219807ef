"""Latent weights in a byte: their distance to the levels that they stand on, as int8 codes.

The distance is kept as codes times a unit, one for each scale of the weights' grid, so that codes reach
from -127 to 127 whatever lies outside the levels: saturated weights may be many steps away, and
cutting them would shrink the grid a little in each step. Rounding is stochastic, so that changes
smaller than a unit count on the average; and a unit stays as long as it fits, so that a residual that
does not change is kept to the bit.

On a grid of two levels only the sign counts, and the distance is of one size where a weight changes
it, which is where an error does most harm. There, the codes hold the signed root of the weight itself:
fine steps around zero, coarse ones far from it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.noise import noise
from optax_clipquant.lowering.reduce import Span, extremes, in_groups
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.groups import groups_of
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.quant.scales import round_scale


def start(latent: jax.Array, level: jax.Array, grid: Grid) -> QArray:
    """What is kept of ``latent`` weights, whose levels on ``grid`` are ``level``: the nearest codes."""
    return _keep(latent, level, grid, None, None)


def advance(
    latent: jax.Array,
    level: jax.Array,
    grid: Grid,
    before: QArray,
    stream: int,
    step: jax.typing.ArrayLike,
) -> QArray:
    """As ``start``, rounded stochastically; ``before`` was kept in the step before."""
    return _keep(latent, level, grid, before.grid, noise(latent, stream, step))


def _keep(
    latent: jax.Array, level: jax.Array, grid: Grid, before: Grid | None, draws: jax.Array | None
) -> QArray:
    kept = _root(latent) if _is_binary(grid) else latent - level
    units = _units(latent, level, grid, before)
    if _is_binary(grid):
        kept = _between(latent, units)
    return QArray(units.encode(kept, draws=draws), units)


def latent_of(level: jax.Array, grid: Grid, kept: QArray) -> jax.Array:
    """The latent weights of which ``kept`` was kept."""
    return _square(kept.dequantize()) if _is_binary(grid) else level + kept.dequantize()


def resolution(grid: Grid, kept: QArray) -> jax.Array:
    """How far the latent weights may be from those of which ``kept`` was kept: a unit, and a little."""
    one = jnp.ones(kept.shape, jnp.int8)
    unit = 1.01 * kept.grid.decode(one)
    if _is_binary(grid):
        return unit * (2 * jnp.abs(kept.dequantize()) + unit)
    return unit


def _is_binary(grid: Grid) -> bool:
    """Whether the levels are two, one on each side of zero."""
    return grid.upper - grid.lower == 1 and grid.zero_point is None


def _root(x: jax.Array) -> jax.Array:
    return jnp.sign(x) * jnp.sqrt(jnp.abs(x))


def _square(x: jax.Array) -> jax.Array:
    return x * jnp.abs(x)


def _between(latent: jax.Array, units: Grid) -> jax.Array:
    """The roots of ``latent``, moved between their codes so that the mean of the rounded ones' squares is
    right: as far as ``latent`` is between the squares.
    """
    below = units.encode(_root(latent), draws=jnp.ones_like(latent))
    below = jnp.minimum(below, units.upper - 1)
    low, high = units.decode(below), units.decode(below + 1)
    range_ = _square(high) - _square(low)
    share = (latent - _square(low)) / jnp.where(range_ == 0, 1, range_)
    return low + share * (high - low)


def _units(latent: jax.Array, level: jax.Array, grid: Grid, before: Grid | None) -> Grid:
    """A unit for each scale of ``grid``, with which codes reach what is kept; or the unit before, where
    that is at most twice it.
    """
    shared, group = groups_of(latent.shape, grid.scale.shape, grid.group)
    if _is_binary(grid):
        units = in_groups(_unit_of, _root(latent), shared, group, None, before)
    elif grid.zero_point is None and grid.dtype.itemsize >= 4:
        # The level of params that were rounded to half precision may not be the nearest to the latent.
        units = in_groups(_unit_of, latent, shared, group, _reach(grid), before)
    else:
        units = in_groups(_unit_of, latent - level, shared, group, None, before)
    return dataclasses.replace(units, group=group)


def _reach(grid: Grid) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each scale the largest and the least level, and half of the widest gap between two."""
    each = dataclasses.replace(grid, group=None)
    ends = [
        each.decode(jnp.full(grid.scale.shape, end, jnp.int8)) for end in (grid.lower, grid.upper)
    ]
    first, last = (end.astype(jnp.float32) for end in ends)
    gap = 1.0 if grid.codebook is None else float(np.diff(grid.codebook).max())
    half = jnp.abs(grid.scale.astype(jnp.float32)) * (gap / 2)
    return jnp.maximum(first, last), jnp.minimum(first, last), half


def _unit_of(
    w: jax.Array,
    span: Span,
    reach: tuple[jax.Array, jax.Array, jax.Array] | None,
    before: Grid | None,
) -> Grid:
    """The largest magnitude over 127, rounded up.

    With the ``reach`` of levels around zero, of the distance to these: half a gap between two, or
    what is beyond the outermost. So it follows from the extremes of the weights, of which the fit of the
    grid is made too, and the weights are not read again.
    """
    high, low = extremes(w.astype(jnp.float32), span)
    if reach is None:
        largest = jnp.maximum(high, -low)
    else:
        top, bottom, half = reach
        largest = jnp.maximum(half, jnp.maximum(high - top, bottom - low))
    exact = largest / 127
    unit = round_scale(exact * (1 + 2.0**-7), 127, np.dtype(np.float32))
    if before is not None:
        scale = before.scale.astype(jnp.float32)
        # A code may be rounded up to 127 from a little below the edge, so the edge itself fits.
        fits = (exact <= scale * (1 + 2.0**-16)) & (scale <= 2 * unit)
        unit = jnp.where(fits, scale, unit)
    return Grid(unit.astype(jnp.bfloat16), bits=8, lower=-127, upper=127)
