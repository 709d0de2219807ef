"""Latent weights between two steps: adopting outside edits of the params, and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.training import residual
from optax_clipquant.training.grids import level_of
from optax_clipquant.training.softness import soften

_EPS = float(jnp.finfo(jnp.float32).eps)
_SMALL = 1 / 128
"""The largest outside edit, relative to the weight, that moves the latent weight rather than replacing it."""


def recall(p: jax.Array, grid: Grid, kept: jax.Array | QArray) -> tuple[jax.Array, jax.Array]:
    """The levels and the latent weights, recovered from the state.

    Args:
      p: the params. If ``kept`` holds distances to levels, these are the levels nearest to ``p``.
      grid: the grid of the params.
      kept: the latent weights, or their encoding by ``residual``.
    """
    if not isinstance(kept, QArray):
        return level_of(grid, kept), kept
    level = level_of(grid, p)
    return level, residual.latent_of(level, grid, kept)


def adopt(
    p: jax.Array,
    grid: Grid,
    kept: jax.Array | QArray,
    softness: jax.typing.ArrayLike,
    count: jax.typing.ArrayLike,
    *,
    between: bool,
) -> jax.Array:
    """The latent weights, with the edits made to the params since the last update.

    Params are the truth: an edit ``e`` that is small relative to the weight, such as a decay outside the
    chain, moves the latent weight; any larger one, such as loading weights, replaces it::

        e = p - served
        latent <- latent + e if abs(e) <= abs(served) / 128 else p

    Differences within rounding are not edits: the rounding of ``optax.apply_updates``; in half precision, half
    a unit in the last place (a compiler may keep params in float32 from one step to the next); and for
    weights that would cross to another level, the resolution of ``kept``. Before the first update nothing
    has been rounded, and the params are the latent weights: with 8 bits in bfloat16, half a unit in the last
    place is a quarter of a step, and what was loaded after ``init`` would otherwise be taken for what was
    there before.

    Args:
      p: the params.
      grid: as for ``recall``.
      kept: as for ``recall``.
      softness: the softness that the params were served with.
      count: the number of updates so far.
      between: whether the params may lie between levels after an update.
    """
    level, latent = recall(p, grid, kept)
    wide, slack = p.astype(jnp.float32), 0.0
    # Without softness it is 1 before the first update, then 0.
    served = soften(level, latent, softness) if between else jnp.where(softness == 1, latent, level)
    if isinstance(kept, QArray) and (between or p.dtype.itemsize < 4):
        # Those that would cross were served from exact latent weights, and perhaps from another level.
        crossing = crosses(served, level, grid)
        slack = jnp.where(crossing, softness * residual.resolution(grid, kept), 0)
        other = soften(level_of(grid, latent), latent, softness)
        nearer = jnp.abs(wide - other) < jnp.abs(wide - served)
        served = jnp.where(crossing & nearer, other, served)
    if not isinstance(kept, QArray):  # otherwise the direction of rounding is unknown
        served = grid.round(served).astype(jnp.float32)
    # p + (served - p) is computed in float32, and then rounded to the params' dtype.
    tolerance = slack + 4 * _EPS * jnp.maximum(jnp.abs(wide), jnp.abs(served))
    if p.dtype.itemsize < 4:
        # Of two numbers that one rounding lies between, the smaller one has the finer unit.
        tolerance += _half_unit(jnp.minimum(jnp.abs(wide), jnp.abs(served)), p.dtype)
    tolerance *= jnp.minimum(jnp.asarray(count, jnp.float32), 1)
    edit = jnp.abs(wide - served)
    # By a whole unit of half precision, rounded weights may seem to move twice as far.
    small = _SMALL * jnp.abs(served) + tolerance
    changed = jnp.where(edit <= small, latent + (wide - served), wide)
    return straight_through(jnp.where(edit <= tolerance, latent, changed), wide)


def crosses(served: jax.Array, level: jax.Array, grid: Grid) -> jax.Array:
    """Whether params at ``served``, rounded to their dtype, would be nearest to another level than ``level``."""
    return level_of(grid, grid.round(served)) != level


def _half_unit(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Half a unit in the last place of ``dtype`` at ``x``, which is not negative.

    A tolerance proportional to ``x`` would take a change by a whole unit below a power of two for rounding.
    """
    info = jnp.finfo(dtype)
    # Rounds to a power of two, down: the largest one that is not above x.
    power = jax.lax.reduce_precision(x * (0.75 + 2.0**-20), 8, 0)
    return 0.5 * jnp.maximum(float(info.eps) * power, float(info.smallest_subnormal))


@jax.custom_jvp
def straight_through(value: jax.Array, like: jax.Array) -> jax.Array:
    """``value``, with the derivative of ``like``.

    As functions of the params and the latent weights, adopted weights and levels are piecewise constant.
    Derivatives through a training step, as for a meta-gradient, therefore follow the path of the latent
    weights::

        d served = d latent,    d adopted = d p
    """
    del like
    return value


@straight_through.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]
