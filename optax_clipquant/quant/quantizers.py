"""The rules that fit a grid to weights."""

import abc
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant.lowering.reduce import Span, extremes
from optax_clipquant.lowering.sharding import for_groups, for_pieces, piece_of, split_axis
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.quant.scales import (
    around_zero,
    between_extremes,
    least_squares,
    mean_magnitude,
    moments,
    round_scale,
)


class Quantizer(abc.ABC):
    """A rule that fits a ``Grid`` to an array.

    A subclass is a frozen dataclass registered as a pytree, whose leaves are the hyperparameters
    that may be traced.
    """

    @abc.abstractmethod
    def fit(self, w: jax.Array, *, start: Grid | None = None) -> Grid:
        """The grid for ``w``.

        Args:
          w: a floating array.
          start: the grid of the step before, to start a search from; the new grid has its dtype.

        Raises:
          TypeError: ``w`` is not a real floating array.
          ValueError: ``w`` lacks an axis that the quantizer names.
        """

    def quantize(self, w: jax.Array, *, key: jax.Array | None = None) -> QArray:
        """``w`` as codes on the grid that ``fit`` finds for it.

        Args:
          w: a floating array.
          key: a PRNG key, for stochastic rounding in place of the nearest level.
        """
        w = _floating(w)
        grid = self.fit(w)
        return QArray(grid.encode(w, key=key), grid)


def _floating(w: Any) -> jax.Array:
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"only real floating arrays can be quantized, got dtype {w.dtype}")
    return w


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("R", "resolution"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class ZScore(Quantizer):
    """Codes are rounded z-scores of the whole tensor: ``clip(round(resolution * z), -R, R)``.

    With ``z = (w - mean) / std``, a code ``k`` stands for ``k * std / resolution + mean``. The mean is
    kept as a zero point that is a multiple of 1/64, which keeps levels exact in float32 as long as
    its magnitude is at most 256. A constant tensor has codes 0 and dequantizes to itself.

    Args:
      R: the largest code, 1 to 127. It may be traced; then codes take 8 bits.
      resolution: codes per standard deviation. It may be traced.

    Raises:
      ValueError: ``R`` is a concrete number outside 1..127, or ``resolution`` one that is not
        positive. A traced ``R`` outside 1..127 gives NaN scales.

    Examples:
      >>> ZScore(R=3).quantize(jnp.array([-1.0, -1.0, 1.0, 9.0])).qvalue
      Array([-1, -1,  0,  2], dtype=int8)
    """

    R: int | jax.Array = 7
    _: dataclasses.KW_ONLY
    resolution: float | jax.Array = 1.0

    def __post_init__(self) -> None:
        R = _concrete(self.R)
        if R is not None and not (1 <= R <= 127 and round(R) == R):
            raise ValueError(f"ZScore: R must be an integer from 1 to 127, got {self.R}")
        resolution = _concrete(self.resolution)
        if resolution is not None and not 0 < resolution < math.inf:
            raise ValueError(f"ZScore: resolution must be positive, got {self.resolution}")

    def fit(self, w: jax.Array, *, start: Grid | None = None) -> Grid:
        w = _floating(w)
        dtype = _dtype(w, start)
        ones = (1,) * w.ndim
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
            step, mean, constant = jnp.ones(()), jnp.zeros(()), jnp.zeros((), bool)
        else:
            mean, std, constant = moments(w.astype(jnp.float32))
            step = std / jnp.asarray(self.resolution, jnp.float32)
        scale = round_scale(step, largest, dtype)
        zero_point = jnp.round(-mean / jnp.where(scale == 0, 1, scale) * 64) / 64
        # A constant is the level of code 0, by a scale that has a normal reciprocal or is 0.
        constant_zero_point = jnp.where(jnp.abs(mean) > 2.0**100, -4, jnp.where(mean == 0, 0, -1))
        zero_point = jnp.where(constant, constant_zero_point, zero_point)
        scale = jnp.where(constant, -mean / jnp.where(zero_point == 0, 1, zero_point), scale)
        if valid is not None:
            scale = jnp.where(valid, scale, jnp.nan)
        return Grid(
            scale=scale.reshape(ones),
            zero_point=zero_point.reshape(ones),
            max_code=None if max_code is None else max_code.reshape(ones),
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Granular(Quantizer):
    """What quantizers with a scale for each channel or group share."""

    channel_axis: int | tuple[int, ...] | None = -1
    group_size: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        axes = self.channel_axis if isinstance(self.channel_axis, tuple) else (self.channel_axis,)
        for axis in axes:
            if not (is_int(axis) or self.channel_axis is None):
                raise ValueError(
                    f"{name}: channel_axis must be an int, a tuple of ints or None, got {self.channel_axis!r}"
                )
        if self.group_size is not None and not (is_int(self.group_size) and self.group_size >= 1):
            raise ValueError(
                f"{name}: group_size must be an integer of at least 1 or None, got {self.group_size!r}"
            )

    def fit(self, w: jax.Array, *, start: Grid | None = None) -> Grid:
        return _fit(self, _floating(w), start)

    def _reduced_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes that share a scale."""
        channels = (
            self.channel_axis if isinstance(self.channel_axis, tuple) else (self.channel_axis,)
        )
        kept = set()
        for axis in channels:
            if axis is None or ndim == 0:
                continue
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"{type(self).__name__}: channel_axis {axis} is out of range for an array with "
                    f"{ndim} axes; name an axis in [{-ndim}, {ndim - 1}], or None for one scale a tensor"
                )
            kept.add(axis % ndim)
        return tuple(axis for axis in range(ndim) if axis not in kept)

    @abc.abstractmethod
    def _fit_axes(self, w: jax.Array, span: Span, start: Grid | None) -> Grid:
        """A grid with one scale for each span, which each of its runs has."""


def _dtype(w: jax.Array, start: Grid | None) -> np.dtype:
    """Of what the grid decodes, within whose range the levels must lie.

    In training, latent weights are float32 whatever the params are; the grid of the start knows these.
    """
    return w.dtype if start is None else start.dtype


def is_int(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _map_scales(grid: Grid, fn: Callable[[jax.Array], jax.Array]) -> Grid:
    """``grid`` with ``fn`` applied to the arrays that have the rank of the weights."""
    zero_point = None if grid.zero_point is None else fn(grid.zero_point)
    return dataclasses.replace(grid, scale=fn(grid.scale), zero_point=zero_point)


@functools.partial(jax.jit, static_argnames="quantizer")
def _fit(quantizer: Granular, w: jax.Array, start: Grid | None) -> Grid:
    axes = quantizer._reduced_axes(w.ndim)
    if not axes and quantizer.group_size is not None:
        axes = (w.ndim - 1,) if w.ndim else ()  # else each weight would have a scale of its own
    if quantizer.group_size is None or not axes or w.size == 0:
        return quantizer._fit_axes(w, Span(axes), start)
    axis = max(axes, key=lambda a: w.shape[a])
    length = w.shape[axis]
    size = min(quantizer.group_size, length)
    reduced = (*(a + (a > axis) for a in axes if a != axis), axis + 1)

    def fit_groups(first: int, last: int, run: int, piece: int) -> Grid:
        """The grid of ``w[first:last]`` in groups of ``run`` pieces, of which each is reduced over its
        own axis.
        """
        part = split_axis(w, axis, first, last, piece)

        def each_piece(x: jax.Array) -> jax.Array:
            x = jax.lax.slice_in_dim(x, first // size, -(-last // size), axis=axis)
            return for_pieces(x, axis, run, part.shape[axis])

        part_start = start and _map_scales(start, each_piece)
        grid = quantizer._fit_axes(part, Span(reduced, axis, run), part_start)
        return _map_scales(grid, lambda x: for_groups(x, axis, run))

    piece = piece_of(w, axis, size)
    if 4 <= piece < size:
        grid = fit_groups(0, length, size // piece, piece)
    else:
        # Of smaller pieces, all that is reduced is more than the weight.
        whole = length // size * size
        grid = fit_groups(0, whole, 1, size)
        if whole < length:
            # The last, shorter group by itself: padding it would count in its sums.
            rest = fit_groups(whole, length, 1, length - whole)
            grid = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis), grid, rest)
    return dataclasses.replace(grid, group=(axis - w.ndim, size))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Uniform(Granular):
    """Evenly spaced levels, 2**bits of them, with a scale for each channel or group.

    * Symmetric, 3 bits and more (mid-tread): levels ``k * s``, ``k`` in ``-2**(bits-1) ..
      2**(bits-1)-1``. The sign of ``s`` puts the extra level on the side of the largest weight.
    * Symmetric, 1 and 2 bits (mid-rise): levels ``(k + 1/2) * s``; there is no level at 0.
    * Not symmetric: levels ``(k - zero_point) * s`` from the least weight (or 0) to the largest (or
      0), with an integer zero point, so that 0 is a level.

    Args:
      bits: 1 to 8.
      symmetric: whether the levels lie around 0.
      channel_axis: the axis, or axes, with a scale for each index; None for one scale a tensor.
      group_size: if given, runs of so many neighbours share a scale, along the longest of the axes
        that are not channel axes, or where there are none, the last. A shorter last group is a group
        of its own.
      scale_rule: ``"absmax"``: the levels span the weights. ``"mse"``: the scale that minimises the
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
        dtype = _dtype(w, start)
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


def Binary(
    *, channel_axis: int | tuple[int, ...] | None = -1, group_size: int | None = None
) -> Uniform:
    """Two levels, ``+-mean(abs(w))``, which have the least squared error: ``Uniform(bits=1)``.

    References:
      Rastegari et al., XNOR-Net, 2016 (arXiv:1603.05279).

    Examples:
      >>> Binary(channel_axis=None).quantize(jnp.array([1.0, -3.0])).dequantize()
      Array([ 2., -2.], dtype=float32)
    """
    return Uniform(bits=1, channel_axis=channel_axis, group_size=group_size)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(Granular):
    """Three levels, ``-s``, 0 and ``s``, with the scale of the least squared error.

    With the weights that round to ``+-s`` given, the best ``s`` is the mean of their magnitudes, and
    the error falls by ``S_k**2 / k`` where ``S_k`` is the sum of the ``k`` magnitudes. That is
    evaluated at a range of thresholds, and the best is refined; no sort.

    Args:
      channel_axis: as for ``Uniform``.
      group_size: as for ``Uniform``.
      scale_rule: ``"mse"``, the scale above; or ``"absmax"``, two thirds of the largest magnitude, for
        training: few weights are then not 0, and they are large (see ``quantize_weights``).

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
        dtype = _dtype(w, start)
        grid = Grid(jnp.zeros(()), bits=_bits_of(3), lower=-1, upper=1, dtype=dtype)
        if self.scale_rule == "mse":
            return least_squares(w, span, start, functools.partial(around_zero, grid))
        # No weight is more than half a step beyond a level, as with 2 bits.
        high, low = extremes(w, span)
        return around_zero(grid, high / 1.5, low / 1.5)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NormalFloat(Granular):
    """Levels at quantiles of the normal distribution, scaled by the largest magnitude of a group.

    With ``2**bits`` levels, in units of that magnitude: 0; ``2**(bits-1) - 1`` negative and
    ``2**(bits-1)`` positive ones, at evenly spaced probabilities out to 1 on both sides. The entries
    are rounded to multiples of 2**-10, which keeps every level exact in float32.

    Args:
      bits: 2 to 4. With more levels, evenly spaced ones lose little: ``Uniform``.
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
        dtype, w = _dtype(w, start), w.astype(jnp.float32)
        high, low = extremes(w, span)
        half = 2 ** (self.bits - 1)
        return Grid(
            round_scale(jnp.maximum(high, -low), 1, dtype),
            bits=self.bits,
            lower=-half,
            upper=half - 1,
            dtype=dtype,
            code_book=_normal_levels(self.bits),
        )


def _normal_levels(bits: int) -> tuple[float, ...]:
    """0, and quantiles at even steps from 1/2 to the outermost probability, a little below 1.

    That is the mean of 1 - 1/(2 * 15) and 1 - 1/(2 * 16) for 4 bits: of the midpoints of the first
    cell for one level fewer and for all.
    """
    half = 2 ** (bits - 1)
    outermost = 1 - (1 / (2 * (2 * half - 1)) + 1 / (4 * half)) / 2
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(0.5 + (outermost - 0.5) * k / half) for k in range(1, half + 1)]
    negative = [-quantile(0.5 + (outermost - 0.5) * k / (half - 1)) for k in range(half - 1, 0, -1)]
    unit = quantile(outermost) / 2**10
    return tuple(round(x / unit) / 2**10 for x in (*negative, 0.0, *positive))
