"""Levels at quantiles of the normal distribution."""

import dataclasses
import statistics

import jax
import jax.numpy as jnp

from optax_clipquant.lowering.reduce import Span, extremes
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.quantizers.base import ChannelwiseQuantizer, is_int, target_dtype
from optax_clipquant.quant.scales.closed_form import round_scale


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NormalFloat(ChannelwiseQuantizer):
    """Levels at quantiles of the normal distribution, scaled by the largest magnitude of a group.

    There are ``2**bits`` levels, in units of that magnitude: 0, and ``2**(bits-1) - 1`` negative and
    ``2**(bits-1)`` positive ones, at evenly spaced probabilities and reaching -1 and 1. The entries
    are rounded to multiples of 2**-10, which keeps every level exact in float32.

    Args:
      bits: 2 to 4. At more bits, evenly spaced levels (``Uniform``) lose little.
      channel_axis: as for ``Uniform``.
      group_size: as for ``Uniform``.

    Raises:
      ValueError: an argument outside its range.

    References:
      Dettmers et al., QLoRA, 2023 (arXiv:2305.14314).

    Examples:
      >>> NormalFloat(bits=2, channel_axis=None).quantize(jnp.array([0.3, -2.0, 4.0])).dequantize()
      Array([ 0., -4.,  4.], dtype=float32)
    """

    bits: int = 4
    _: dataclasses.KW_ONLY
    group_size: int | None = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_int(self.bits) and 2 <= self.bits <= 4):
            raise ValueError(
                f"NormalFloat: bits must be an integer from 2 to 4, got {self.bits!r}; use Uniform"
            )

    def _fit_axes(self, w: jax.Array, span: Span, start: Grid | None) -> Grid:
        dtype, w = target_dtype(w, start), w.astype(jnp.float32)
        high, low = extremes(w, span)
        half = 2 ** (self.bits - 1)
        return Grid(
            round_scale(jnp.maximum(high, -low), 1, dtype),
            bits=self.bits,
            lower=-half,
            upper=half - 1,
            dtype=dtype,
            codebook=_normal_levels(self.bits),
        )


def _normal_levels(bits: int) -> tuple[float, ...]:
    """The codebook: 0, and quantiles at even steps between probability 1/2 and the outermost on each side.

    The outermost probability is a little below 1: at 4 bits the mean of ``1 - 1/(2 * 15)`` and
    ``1 - 1/(2 * 16)``, the midpoints of the last cell for 15 and for 16 levels.
    """
    half = 2 ** (bits - 1)
    outermost = 1 - (1 / (2 * (2 * half - 1)) + 1 / (4 * half)) / 2
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(0.5 + (outermost - 0.5) * k / half) for k in range(1, half + 1)]
    negative = [-quantile(0.5 + (outermost - 0.5) * k / (half - 1)) for k in range(half - 1, 0, -1)]
    unit = quantile(outermost) / 2**10
    return tuple(round(x / unit) / 2**10 for x in (*negative, 0.0, *positive))
