"""Three levels."""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from optax_clipquant.lowering.reduce import Span, extremes
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.quantizers.base import ChannelwiseQuantizer, target_dtype
from optax_clipquant.quant.scales.closed_form import around_zero
from optax_clipquant.quant.scales.least_squares import least_squares


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(ChannelwiseQuantizer):
    """Three levels, ``-s``, 0 and ``s``, with the scale that minimises the squared error.

    Several scales are tried, and the best is refined by least squares and nearest codes in turn: given
    the weights that round to ``+-s``, the best ``s`` is the mean of their magnitudes. No sort is needed.

    Args:
      channel_axis: as for ``Uniform``.
      group_size: as for ``Uniform``.
      scale_rule: ``"mse"``, the scale above; or ``"absmax"``, two thirds of the largest magnitude, for
        training: few weights are then non-zero, and they are large (see ``quantize_weights``).

    Raises:
      ValueError: an argument outside its range.

    References:
      Li et al., Ternary Weight Networks, 2016 (arXiv:1605.04711).

    Examples:
      >>> Ternary(channel_axis=None).quantize(jnp.array([2.0, -4.0, 0.5])).dequantize()
      Array([ 3., -3.,  0.], dtype=float32)
    """

    scale_rule: Literal["absmax", "mse"] = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_rule not in ("absmax", "mse"):
            raise ValueError(
                f"Ternary: scale_rule must be 'absmax' or 'mse', got {self.scale_rule!r}"
            )

    def _fit_axes(self, w: jax.Array, span: Span, start: Grid | None) -> Grid:
        dtype = target_dtype(w, start)
        grid = Grid(jnp.zeros(()), bits=math.log2(3), lower=-1, upper=1, dtype=dtype)
        if self.scale_rule == "mse":
            return least_squares(w, span, start, functools.partial(around_zero, grid))
        # No weight is more than half a step beyond a level, as with 2 bits.
        high, low = extremes(w, span)
        return around_zero(grid, high / 1.5, low / 1.5)
