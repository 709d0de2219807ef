"""The interface of quantizers, which fit a grid to weights, and what those with channels share."""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.reduce import Span, in_groups
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
from optax_clipquant.quant.scales.weighted import aligned, weighted_least_squares, weighted_refit
from optax_clipquant.quant.uses import Use


class Quantizer(abc.ABC):
    """A rule that fits a ``Grid`` to an array.

    A subclass is a frozen dataclass registered as a pytree, whose leaves are the hyperparameters
    that may be traced.

    Examples:
      >>> from optax_clipquant import Uniform
      >>> grid = Uniform(bits=4).fit(jnp.array([[3.5, -1.0]]))
      >>> grid.encode(jnp.array([[3.5, -1.0]]))
      Array([[-8, -8]], dtype=int8)
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
    """Base class of the quantizers that have a scale for each channel or group.

    Examples:
      >>> from optax_clipquant import Ternary, ZScore
      >>> isinstance(Ternary(), ChannelwiseQuantizer), isinstance(ZScore(), ChannelwiseQuantizer)
      (True, False)
    """

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


def quantize_rows(quantizer: ChannelwiseQuantizer, rows: jax.Array, valid: jax.Array) -> QArray:
    """Quantizes rows that end in padding, with a scale for each.

    The scales are those of the rows without padding, if ``FEW`` is above the numbers of weights with and
    without it, or above neither.

    Args:
      quantizer: its axes and groups are ignored.
      rows: ``[rows, weights]``, with 0 as padding.
      valid: ``[1, weights]`` in float32: 1 for weights, and 0 for padding.
    """
    grid = quantizer._fit_axes(rows, Span((1,), valid=valid), None)
    return QArray(grid.encode(rows), grid)


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
