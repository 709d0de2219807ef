"""Quantizers, which fit a grid to weights."""

import abc
import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.reduce import Span, extremes, in_groups
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.groups import (
    ChannelAxis,
    Group,
    contracted_axes,
    cut_groups,
    groups_of,
    scale_shape,
)
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.quant.scales import (
    around_zero,
    between_extremes,
    least_squares,
    mean_magnitude,
    round_scale,
)
from optax_clipquant.quant.search import aligned, weighted_least_squares, weighted_refit
from optax_clipquant.quant.uses import Use


class Quantizer(abc.ABC):
    """A rule that fits a ``Grid`` to an array.

    A subclass is a frozen dataclass registered as a pytree, whose leaves are the hyperparameters
    that may be traced.
    """

    @abc.abstractmethod
    def fit(
        self,
        w: jax.Array,
        *,
        start: Grid | None = None,
        use: Use | None = None,
        importance: jax.Array | None = None,
    ) -> Grid:
        """The grid for ``w``.

        Args:
          w: a floating array.
          start: the grid of the previous step, from which a search starts; the new grid has its dtype.
          use: how the function uses ``w``, from ``trace_weights``: which axes are contracted, and so
            may share a scale, where ``channel_axis`` does not say.
          importance: weights of the squared errors, at least 0 and broadcastable to ``w``: the scale
            then minimises ``sum(importance * (w - w_hat)**2)``.

        Raises:
          TypeError: ``w`` is not a real floating array.
          ValueError: ``w`` lacks an axis that the quantizer or ``use`` names, or ``start`` has
            groups that this quantizer does not make.
        """

    def quantize(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        use: Use | None = None,
        importance: jax.Array | None = None,
    ) -> QArray:
        """Quantizes ``w`` on the grid that ``fit`` finds for it.

        Args:
          w: a floating array.
          key: a PRNG key, for stochastic rounding instead of rounding to the nearest level.
          use: as for ``fit``.
          importance: as for ``fit``.
        """
        w = floating(w)
        grid = self.fit(w, use=use, importance=importance)
        return QArray(grid.encode(w, key=key), grid)


def floating(w: Any) -> jax.Array:
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"only real floating arrays can be quantized, got dtype {w.dtype}")
    return w


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelwiseQuantizer(Quantizer):
    """Base class of the quantizers that have a scale for each channel or group."""

    channel_axis: ChannelAxis = "auto"
    group_size: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_channel_axis(name, self.channel_axis)
        if self.group_size is not None and not (is_int(self.group_size) and self.group_size >= 1):
            raise ValueError(
                f"{name}: group_size must be an integer of at least 1 or None, got {self.group_size!r}"
            )

    def fit(
        self,
        w: jax.Array,
        *,
        start: Grid | None = None,
        use: Use | None = None,
        importance: jax.Array | None = None,
    ) -> Grid:
        w = floating(w)
        shared, group = self._groups(w.shape, use, start)
        if importance is not None:
            importance = aligned(importance, w.shape)
        return _fit(self, w, start, shared, group, importance)

    def _groups(
        self, shape: tuple[int, ...], use: Use | None, start: Grid | None
    ) -> tuple[tuple[int, ...], Group]:
        """The axes to reduce whole and the axis to cut into runs, as from ``cut_groups``."""
        name = type(self).__name__
        try:
            contracted = contracted_axes(len(shape), self.channel_axis, use)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not contracted and self.group_size is not None and shape:
            contracted = (len(shape) - 1,)  # or each weight would have a scale to itself
        shared, group = cut_groups(shape, contracted, self.group_size)
        if start is None:
            return shared, group
        expected = scale_shape(shape, shared, group)
        if start.scale.shape != expected or (start.group != group and start.group and group):
            raise ValueError(
                f"{name}: the grid to start from has scales of shape {start.scale.shape} in groups "
                f"{start.group}, but an array of shape {shape} gets {expected} in groups {group}"
            )
        return groups_of(shape, start.scale.shape, start.group)

    @abc.abstractmethod
    def _fit_axes(self, w: jax.Array, span: Span, start: Grid | None) -> Grid:
        """The grid with a scale for each span; runs of a group repeat the group's scale."""


def target_dtype(w: jax.Array, start: Grid | None) -> np.dtype:
    """The dtype of the params, in whose range the levels must lie.

    In training, latent weights are float32 whatever the params are; ``start`` has the dtype of the params.
    """
    return w.dtype if start is None else start.dtype


def check_channel_axis(name: str, given: Any) -> None:
    axes = given if isinstance(given, tuple) else (given,)
    if given not in ("auto", None) and not all(map(is_int, axes)):
        raise ValueError(
            f"{name}: channel_axis must be an int, a tuple of ints, None or 'auto', got {given!r}"
        )


def is_int(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


@functools.partial(jax.jit, static_argnames=("quantizer", "shared", "group"))
def _fit(
    quantizer: ChannelwiseQuantizer,
    w: jax.Array,
    start: Grid | None,
    shared: tuple[int, ...],
    group: Group,
    importance: jax.Array | None,
) -> Grid:
    if importance is None or w.size == 0:
        grid = in_groups(quantizer._fit_axes, w, shared, group, start)
    else:

        def fit(w: jax.Array, span: Span, start: Grid | None, importance: jax.Array) -> Grid:
            levels = jax.eval_shape(lambda: quantizer._fit_axes(w, span, start))
            if start is None:
                return weighted_least_squares(w, importance, span, levels)
            kept = dataclasses.replace(levels, scale=start.scale, zero_point=start.zero_point)
            return weighted_refit(w, importance, span, kept)

        grid = in_groups(fit, w, shared, group, start, beside=(importance,))
    return dataclasses.replace(grid, group=group)


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
