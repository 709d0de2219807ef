"""Latent weights in a byte: their distance to the levels that they stand on, as int8 codes.

The distance is kept as codes times a unit, one for each scale of the weights' grid, so that codes reach
from -127 to 127 whatever lies outside the levels: saturated weights may be many steps away, and
cutting them would shrink the grid a little in each step. Rounding is stochastic, so that what is
smaller than a unit counts on the average; and a unit stays as long as it fits, so that a residual that
does not change is kept to the bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.dither import dither
from optax_clipquant.grids import Grid
from optax_clipquant.qarray import QArray
from optax_clipquant.quantizers import Granular
from optax_clipquant.reductions import extremes
from optax_clipquant.scales import round_scale


def start(residual: jax.Array, grid: Grid) -> QArray:
    """``residual``, of weights on ``grid``, rounded to the nearest codes."""
    return _units(grid, residual.shape).quantize(residual)


def advance(
    residual: jax.Array, grid: Grid, before: QArray, stream: int, step: jax.typing.ArrayLike
) -> QArray:
    """``residual``, of weights on ``grid``, rounded stochastically; ``before`` is that of the last step."""
    units = _units(grid, residual.shape).fit(residual, start=before.grid)
    return QArray(units.encode(residual, draws=dither(residual, stream, step)), units)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Units(Granular):
    """The largest magnitude over 127, rounded up; or the unit before, where that is at most twice it."""

    def _fit_axes(self, w: jax.Array, axes: tuple[int, ...], start: Grid | None) -> Grid:
        w = w.astype(jnp.float32)
        high, low = extremes(w, axes)
        exact = jnp.maximum(high, -low) / 127
        unit = round_scale(exact * (1 + 2.0**-7), 127, np.dtype(np.float32))
        if start is not None:
            before = start.scale.astype(jnp.float32)
            # A code may be rounded up to 127 from a little below the edge, so the edge itself fits.
            fits = (exact <= before * (1 + 2.0**-16)) & (before <= 2 * unit)
            unit = jnp.where(fits, before, unit)
        return Grid(unit.astype(jnp.bfloat16), bits=8, lower=-127, upper=127)


def _units(grid: Grid, shape: tuple[int, ...]) -> _Units:
    """The rule with a unit for each scale of ``grid``."""
    grouped = None if grid.group is None else grid.group[0] + len(shape)
    channels = tuple(
        axis
        for axis, (n, scales) in enumerate(zip(shape, grid.scale.shape, strict=True))
        if n == scales and axis != grouped
    )
    return _Units(channel_axis=channels, group_size=None if grid.group is None else grid.group[1])
