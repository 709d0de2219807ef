"""Latent weights in one byte each: their distance to their levels, as int8 codes.

The distance is stored as codes times a unit, one for each scale of the weights' grid. Codes from -127 to
127 cover even weights outside the levels: saturated weights may be many steps away, and clipping them would
shrink the grid a little in each step. Rounding is stochastic, so that changes smaller than a unit count on
average; and a unit is kept as long as it fits, so that an unchanged residual is kept bit for bit.

On a grid of two levels only the sign matters, and where a weight changes sign, where an error does most
harm, its distance to the levels is large. There, the codes hold the signed root of the weight itself, with
fine steps around zero and coarse ones far from it.
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
from optax_clipquant.quant.scales.closed_form import round_scale


def check_kept(path: str, kept: jax.Array | QArray, bits: int | None, anew: str) -> None:
    """Raises if latent weights are not kept in ``bits``, or if that is None, in float32; ``anew`` is a way out."""
    if isinstance(kept, QArray) != (bits is not None):
        found = "8 bits" if bits is None else "float32"
        raise ValueError(
            f"quantize_weights: the latent weights of leaf {path!r} are kept in {found} in the state, and not "
            f"as residual_bits={bits} keeps them; give the residual_bits that the state was made with, or {anew}"
        )


def start(latent: jax.Array, level: jax.Array, grid: Grid) -> QArray:
    """Encodes ``latent`` weights, whose levels on ``grid`` are ``level``, with nearest rounding."""
    return _keep(latent, level, grid, None, None)


def advance(
    latent: jax.Array,
    level: jax.Array,
    grid: Grid,
    before: QArray,
    stream: jax.typing.ArrayLike,
    step: jax.typing.ArrayLike,
) -> QArray:
    """Like ``start``, with stochastic rounding; ``before`` is the encoding of the previous step."""
    return _keep(latent, level, grid, before.grid, noise(latent, stream, step, alone=True))


def _keep(
    latent: jax.Array, level: jax.Array, grid: Grid, before: Grid | None, draws: jax.Array | None
) -> QArray:
    units = _units(latent, level, grid, before)
    kept = _between(latent, units) if _is_binary(grid) else latent - level
    return QArray(units.encode(kept, noise=draws), units)


def latent_of(level: jax.Array, grid: Grid, kept: QArray) -> jax.Array:
    """Decodes the latent weights from ``kept``."""
    return _square(kept.dequantize()) if _is_binary(grid) else level + kept.dequantize()


def resolution(grid: Grid, kept: QArray) -> jax.Array:
    """A bound on the error of decoded latent weights: slightly more than a unit."""
    one = jnp.ones(kept.shape, jnp.int8)
    unit = 1.01 * kept.grid.decode(one)
    if _is_binary(grid):
        return unit * (2 * jnp.abs(kept.dequantize()) + unit)
    return unit


def _is_binary(grid: Grid) -> bool:
    """Whether there are two levels, one on each side of zero."""
    return grid.upper - grid.lower == 1 and grid.zero_point is None


def _root(x: jax.Array) -> jax.Array:
    return jnp.sign(x) * jnp.sqrt(jnp.abs(x))


def _square(x: jax.Array) -> jax.Array:
    return x * jnp.abs(x)


def _between(latent: jax.Array, units: Grid) -> jax.Array:
    """The roots of ``latent``, shifted between neighbouring codes so that stochastic rounding is unbiased.

    Each root is placed where ``latent`` lies between the squares of the codes, so that the mean of the
    squares of rounded roots equals ``latent``.
    """
    below = units.encode(_root(latent), noise=jnp.ones_like(latent))
    below = jnp.minimum(below, units.upper - 1)
    low, high = units.decode(below), units.decode(below + 1)
    range_ = _square(high) - _square(low)
    share = (latent - _square(low)) / jnp.where(range_ == 0, 1, range_)
    return low + share * (high - low)


def _units(latent: jax.Array, level: jax.Array, grid: Grid, before: Grid | None) -> Grid:
    """A unit for each scale of ``grid`` with which codes cover the residual.

    The previous unit is kept if it still fits and is at most twice as large.
    """
    shared, group = groups_of(latent.shape, grid.scale.shape, grid.group)
    if _is_binary(grid):
        units = in_groups(_unit_of, _root(latent), shared, group, None, before)
    elif grid.zero_point is None and grid.dtype.itemsize >= 4:
        # Only in float32: after rounding to half precision, a level may not be the nearest to its latent weight.
        units = in_groups(_unit_of, latent, shared, group, _reach(grid), before)
    else:
        units = in_groups(_unit_of, latent - level, shared, group, None, before)
    return dataclasses.replace(units, group=group)


def _reach(grid: Grid) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest and the smallest level of each scale, and half of the widest gap between levels."""
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
    """A unit for ``w``: the largest magnitude over 127, rounded up.

    With the ``reach`` of levels, it is a unit for the distance to these, which is at most half a gap, or the
    distance beyond the outermost level. It then follows from the extremes of the weights, which the fit of
    the grid needs too, so that the weights are not read again.
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
        # The margin keeps a unit whose residual stochastic rounding has moved up to code 127.
        fits = (exact <= scale * (1 + 2.0**-16)) & (scale <= 2 * unit)
        unit = jnp.where(fits, scale, unit)
    return Grid(unit.astype(jnp.bfloat16), bits=8, lower=-127, upper=127)
