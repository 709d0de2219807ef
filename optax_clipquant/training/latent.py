"""The latent weights between two steps: what was done to the params meanwhile, and their derivative."""

import jax
import jax.numpy as jnp

from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.training import residual
from optax_clipquant.training.grids import level_of
from optax_clipquant.training.softness import soften

_EPS = float(jnp.finfo(jnp.float32).eps)
_SMALL = 1 / 128
"""The largest change from outside, beside the weight, that moves the latent weight and does not replace it."""


def recall(p: jax.Array, grid: Grid, kept: jax.Array | QArray) -> tuple[jax.Array, jax.Array]:
    """The levels and the latent weights, from what the state keeps.

    Args:
      p: the params. Where the distance to the levels is ``kept``, these are the nearest to ``p``.
      grid: the grid that the params stand on.
      kept: the latent weights, or what ``residual`` keeps of them.
    """
    if not isinstance(kept, QArray):
        return level_of(grid, kept), kept
    level = level_of(grid, p)
    return level, residual.latent_of(level, grid, kept)


def adopt(
    p: jax.Array, grid: Grid, kept: jax.Array | QArray, softness: jax.typing.ArrayLike
) -> jax.Array:
    """The latent weights, with what was changed in the params since the last update.

    Params are the truth: a change ``e`` that is small beside the weight, as by a decay outside the
    chain, moves the latent weight; any other, as by loaded weights, replaces it::

        e = p - served
        latent <- latent + e if abs(e) <= abs(served) / 128 else p

    The rounding in ``optax.apply_updates`` is no change. Nor is half a unit in the last place of
    half precision, by which a compiler that keeps params in float32 from one step to the next is off;
    nor what ``kept`` does not tell.

    Args:
      p: the params.
      grid: as for ``recall``.
      kept: as for ``recall``.
      softness: with which the params were served.
    """
    level, latent = recall(p, grid, kept)
    wide = p.astype(jnp.float32)
    served, rounding = soften(level, latent, softness), 4 * _EPS
    if p.dtype.itemsize < 4:
        rounding = 0.5 * float(jnp.finfo(p.dtype).eps)
        if isinstance(kept, QArray):
            # Rounded params may be nearest to another level than the one that they were served with.
            other = soften(level_of(grid, latent), latent, softness)
            nearer = jnp.abs(wide - other) < jnp.abs(wide - served)
            served = jnp.where(nearer, other, served)
    if not isinstance(kept, QArray):  # else it is not known to which side it was rounded
        served = grid.round(served).astype(jnp.float32)
    tolerance = rounding * jnp.maximum(jnp.abs(wide), jnp.abs(served))
    if isinstance(kept, QArray):
        tolerance += softness * residual.resolution(grid, kept)
    edit = jnp.abs(wide - served)
    changed = jnp.where(edit <= _SMALL * jnp.abs(served), latent + (wide - served), wide)
    return straight_through(jnp.where(edit <= tolerance, latent, changed), wide)


@jax.custom_jvp
def straight_through(value: jax.Array, like: jax.Array) -> jax.Array:
    """``value``, with the derivative of ``like``.

    Latent weights and the levels that are served for them are constant but for their steps, where
    they have no derivative. So derivatives through a step of training, as a meta-gradient takes, are
    those of the path of the latent weights::

        d served = d latent,    d adopted = d p
    """
    del like
    return value


@straight_through.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]
