"""Evenly spaced levels."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from optax_clipquant.lowering.reduce import Span, extremes
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.groups import ChannelAxis
from optax_clipquant.quant.quantizers.base import ChannelwiseQuantizer, is_int, target_dtype
from optax_clipquant.quant.scales.closed_form import (
    around_zero,
    between_extremes,
    mean_magnitude,
    round_scale,
)
from optax_clipquant.quant.scales.least_squares import least_squares


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Uniform(ChannelwiseQuantizer):
    """Evenly spaced levels, 2**bits of them, with a scale for each channel or group.

    * Symmetric, 3 bits and more (mid-tread): levels ``k * s``, ``k`` in ``-2**(bits-1) ..
      2**(bits-1)-1``. The sign of ``s`` puts the extra level on the side of the largest weight.
    * Symmetric, 1 and 2 bits (mid-rise): levels ``(k + 1/2) * s``; there is no level at 0.
    * Affine (not symmetric): levels ``(k - zero_point) * s`` from the smallest weight (or 0) to the
      largest (or 0), with an integer zero point, so that 0 is a level.

    Args:
      bits: 1 to 8.
      symmetric: whether the levels are symmetric about 0, without a zero point.
      channel_axis: the axis, or axes, with a scale for each index; None for one scale per tensor.
        ``"auto"``: all axes that the function does not contract, if ``use`` is given, else the last.
      group_size: if given, a scale serves at most this many weights, all of one output channel:
        neighbours along the last of the axes that are not channel axes, and as much of the axes
        before it as fits. The last group along an axis may be shorter.
      scale_rule: ``"absmax"``: the levels span the weights. ``"mse"``: the scale minimises the
        squared error, by least squares and nearest codes in turn; never worse than absmax. None:
        "mse" at 3 bits and below, else "absmax". One symmetric bit always has the optimal scale, ``2 *
        mean(abs(w))`` (levels ``+-mean(abs(w))``).

    Raises:
      ValueError: an argument outside its range.

    References:
      Rastegari et al., XNOR-Net, 2016 (arXiv:1603.05279), for 1 bit.

    Examples:
      >>> Uniform(bits=4, channel_axis=None).quantize(jnp.array([0.5, -2.0, 4.0])).dequantize()
      Array([ 0.5, -2. ,  4. ], dtype=float32)
    """

    bits: int = 8
    _: dataclasses.KW_ONLY
    symmetric: bool = True
    scale_rule: Literal["absmax", "mse"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_int(self.bits) and 1 <= self.bits <= 8):
            raise ValueError(f"Uniform: bits must be an integer from 1 to 8, got {self.bits!r}")
        if self.scale_rule not in (None, "absmax", "mse"):
            raise ValueError(
                f"Uniform: scale_rule must be 'absmax', 'mse' or None, got {self.scale_rule!r}"
            )

    def _fit_axes(self, w: jax.Array, span: Span, start: Grid | None) -> Grid:
        dtype = target_dtype(w, start)
        lower, upper = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        grid = Grid(jnp.zeros(()), bits=self.bits, lower=lower, upper=upper, dtype=dtype)
        if self.symmetric and self.bits <= 2:
            grid = dataclasses.replace(grid, offset=0.5)
        if self.symmetric and self.bits == 1:
            mean = mean_magnitude(w.astype(jnp.float32), span)
            return dataclasses.replace(grid, scale=round_scale(2 * mean, 0.5, dtype))

        place = functools.partial(around_zero if self.symmetric else between_extremes, grid)
        rule = self.scale_rule or ("mse" if self.bits <= 3 else "absmax")
        return least_squares(w, span, start, place) if rule == "mse" else place(*extremes(w, span))


def Binary(*, channel_axis: ChannelAxis = "auto", group_size: int | None = None) -> Uniform:
    """``Uniform(bits=1)``: two levels, ``+-mean(abs(w))``, which minimise the squared error.

    References:
      Rastegari et al., XNOR-Net, 2016 (arXiv:1603.05279).

    Examples:
      >>> Binary(channel_axis=None).quantize(jnp.array([1.0, -3.0])).dequantize()
      Array([ 2., -2.], dtype=float32)
    """
    return Uniform(bits=1, channel_axis=channel_axis, group_size=group_size)
