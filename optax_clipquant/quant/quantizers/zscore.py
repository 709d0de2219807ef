"""Quantization to rounded z-scores, the article's method."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.groups import ChannelAxis, contracted_axes, scale_shape
from optax_clipquant.quant.quantizers.base import (
    Quantizer,
    check_channel_axis,
    floating,
    target_dtype,
)
from optax_clipquant.quant.scales.closed_form import moments, round_scale
from optax_clipquant.quant.uses import Use


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("R", "resolution"), meta_fields=("channel_axis",)
)
@dataclasses.dataclass(frozen=True)
class ZScore(Quantizer):
    """Codes that are rounded z-scores, by default of the whole tensor: ``clip(round(resolution * z), -R, R)``.

    With ``z = (w - mean) / std``, a code ``k`` stands for ``k * std / resolution + mean``. The mean is
    stored as a zero point that is a multiple of 1/64, which keeps levels exact in float32 as long as
    the zero point's magnitude is at most 256. Constant weights have codes 0 and dequantize to themselves.

    Args:
      R: the largest code, 1 to 127. It may be traced; then codes take 8 bits.
      resolution: codes per standard deviation. It may be traced.
      channel_axis: the axis, or axes, with a mean and standard deviation for each index; None, as in
        the article, for one pair per tensor. Where ``use`` has stacked layers, each layer is a tensor.
        ``"auto"`` as for ``Uniform``.

    Raises:
      ValueError: ``R`` is concrete and not an integer in 1..127, or ``resolution`` is concrete and not
        positive and finite. A traced ``R`` outside 1..127 gives NaN scales.

    Examples:
      >>> ZScore(R=3).quantize(jnp.array([-1.0, -1.0, 1.0, 9.0])).qvalue
      Array([-1, -1,  0,  2], dtype=int8)
    """

    R: int | jax.Array = 7
    _: dataclasses.KW_ONLY
    resolution: float | jax.Array = 1.0
    channel_axis: ChannelAxis = None

    def __post_init__(self) -> None:
        R = _concrete(self.R)
        if R is not None and not (1 <= R <= 127 and round(R) == R):
            raise ValueError(f"ZScore: R must be an integer from 1 to 127, got {self.R}")
        resolution = _concrete(self.resolution)
        if resolution is not None and not 0 < resolution < math.inf:
            raise ValueError(f"ZScore: resolution must be positive, got {self.resolution}")
        check_channel_axis("ZScore", self.channel_axis)

    def fit(
        self,
        w: jax.Array,
        *,
        start: Grid | None = None,
        use: Use | None = None,
        importance: jax.Array | None = None,
    ) -> Grid:
        if importance is not None:
            raise ValueError(
                "ZScore: its scales follow from mean and standard deviation, and cannot follow "
                "importance; use Uniform, Ternary or NormalFloat"
            )
        w = floating(w)
        dtype = target_dtype(w, start)
        try:
            axes = contracted_axes(w.ndim, self.channel_axis, use)
        except ValueError as error:
            raise ValueError(f"ZScore: {error}") from error
        shape = scale_shape(w.shape, axes, None)
        R = _concrete(self.R)
        if R is None:
            if not isinstance(self.R, (Tracer, jax.Array, np.ndarray)):
                raise TypeError(f"ZScore: R must be an integer, got {self.R!r}")
            bits, largest = 8, 127
            max_code = jnp.asarray(self.R, jnp.int32)
            valid = (max_code >= 1) & (max_code <= 127)
        else:
            largest = int(R)
            bits, max_code, valid = _bits_of(2 * largest + 1), None, None
        if w.size == 0:
            step, mean, constant = jnp.ones(shape), jnp.zeros(shape), jnp.zeros(shape, bool)
        else:
            mean, std, constant = moments(w.astype(jnp.float32), axes)
            step = std / jnp.asarray(self.resolution, jnp.float32)
        scale = round_scale(step, largest, dtype)
        zero_point = jnp.round(-mean / jnp.where(scale == 0, 1, scale) * 64) / 64
        # Code 0 decodes to the constant, with a scale that is 0 or has a normal reciprocal.
        constant_zero_point = jnp.where(jnp.abs(mean) > 2.0**100, -4, jnp.where(mean == 0, 0, -1))
        zero_point = jnp.where(constant, constant_zero_point, zero_point)
        scale = jnp.where(constant, -mean / jnp.where(zero_point == 0, 1, zero_point), scale)
        if valid is not None:
            scale = jnp.where(valid, scale, jnp.nan)
        return Grid(
            scale=scale,
            zero_point=zero_point,
            max_code=None if max_code is None else jnp.broadcast_to(max_code, shape),
            bits=bits,
            lower=-largest,
            upper=largest,
            dtype=dtype,
        )


def _concrete(x: Any) -> float | None:
    """``x`` as a Python number, or None where it is traced, stacked or a transform's placeholder."""
    if np.ndim(x) > 0 or isinstance(x, Tracer) or not isinstance(x, (int, float, np.generic, np.ndarray, jax.Array)):  # fmt: skip
        return None
    return float(x)


def _bits_of(levels: int) -> float:
    return math.log2(3) if levels == 3 else math.ceil(math.log2(levels))
