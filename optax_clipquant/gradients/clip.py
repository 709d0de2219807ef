"""Gradients in, clamped gradients out."""

import functools
import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_clipquant._tree import PyTree, is_float0, path_of
from optax_clipquant.lowering.reduce import SMALL, count, extremes

Masks = tuple[jax.Array, ...]  # that exclude each other: where elements of a leaf were clamped
Bound = Any  # a number, a 0-d array, an optax.Schedule, or a tree prefix with these at its leaves


class ClipByValueState(NamedTuple):
    """State of ``clip_by_value``.

    Attributes:
      count: the number of updates so far, or None where nothing depends on it.
      clip_fraction: the share of all elements that the last update clamped, a float32 scalar, or
        None without telemetry.
    """

    count: jax.typing.ArrayLike | None
    clip_fraction: jax.Array | None


def clip_by_value(c: Bound, *, telemetry: bool = True) -> optax.GradientTransformation:
    """Clamps each element of the gradients: ``g -> min(max(g, -c), c)``.

    The bound is rounded to each leaf's dtype, whose gradients keep their dtype. NaN passes, so that
    ``optax.apply_if_finite`` and ``optax.zero_nans`` still see it; an infinity becomes the bound, unless
    that is infinite too. The real and imaginary parts of complex gradients are clamped separately.

    Args:
      c: the bound: a positive number or 0-d array, or an ``optax.Schedule`` of the step; or a tree
        with one of these at each leaf, which is a prefix of the params.
      telemetry: whether the state reports the share of clamped elements, which costs one pass over
        the gradients unless the compiler fuses it with another. Read it with
        ``optax.tree.get(opt_state, "clip_fraction")``, or from several transforms with
        ``clip_fractions(opt_state)``.

    Returns:
      A ``GradientTransformation`` with a ``ClipByValueState``. ``None``, ``optax.MaskedNode`` and
      ``float0`` leaves pass.

    Raises:
      ValueError: a concrete bound is not positive, is NaN, or is not a scalar; in ``update``, a
        schedule gives no scalar. A traced or scheduled bound that is negative or NaN, for which
        nothing can be raised inside ``jax.jit``, turns the updates into NaN.
      TypeError: a bound is not a number, or a gradient is an integer.

    Examples:
      >>> tx = optax.chain(clip_by_value(1.0), optax.sgd(0.1))
      >>> params = jnp.zeros(4)
      >>> updates, state = tx.update(jnp.array([0.5, -3.0, 2.0, 0.0]), tx.init(params), params)
      >>> updates
      Array([-0.05,  0.1 , -0.1 , -0.  ], dtype=float32)
      >>> optax.tree.get(state, "clip_fraction")
      Array(0.5, dtype=float32)

    References:
      Pascanu et al., On the difficulty of training recurrent neural networks, 2013
      (arXiv:1211.5063).
    """
    jax.tree.map(
        lambda bound: callable(bound) or _check_positive("clip_by_value", "c", bound, _BOUND_HELP),
        c,
        is_leaf=lambda x: x is None,
    )
    scheduled = any(callable(bound) for bound in jax.tree.leaves(c))

    def init(params: PyTree) -> PyTree:
        jax.tree.map(lambda bound, subtree: None, c, params)  # raises where c is no prefix
        return ClipByValueState(
            count=jnp.zeros((), jnp.int32) if telemetry or scheduled else None,
            clip_fraction=jnp.zeros((), jnp.float32) if telemetry else None,
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        del params
        outside = []

        def clip(bound: Bound, g: Any) -> Any:
            if is_float0(g):
                return g
            clipped, masks = _clip("clip_by_value", g, bound)
            outside.append(masks)
            return clipped

        def clip_subtree(bound: Bound, subtree: PyTree) -> PyTree:
            value: Any = bound(state.count) if callable(bound) else bound
            if np.ndim(value) != 0:
                raise ValueError(
                    f"clip_by_value: c must be a scalar, but the schedule gave shape {np.shape(value)}"
                )
            return jax.tree.map(lambda g: clip(value, g), subtree)

        clipped = jax.tree.map(clip_subtree, c, updates)
        return clipped, ClipByValueState(
            count=None if state.count is None else optax.safe_increment(state.count),
            clip_fraction=_fraction(_number(outside), outside) if telemetry else None,
        )

    return optax.GradientTransformation(init, update)


class ClipByQuantileState(NamedTuple):
    """State of ``clip_by_quantile``.

    Attributes:
      threshold: the bound of the next update, a float32 scalar; with ``per_leaf`` a dict with one for
        each leaf, by its path.
      clip_fraction: the share of all elements that the last update clamped, a float32 scalar.
    """

    threshold: jax.Array | dict[str, jax.Array]
    clip_fraction: jax.Array


def clip_by_quantile(
    q: float = 0.99, *, learning_rate: float = 0.2, initial: float = 1.0, per_leaf: bool = False
) -> optax.GradientTransformation:
    """Clamps each element of the gradients to a bound that is adapted automatically.

    The bound ``c`` follows the quantile ``q`` of the magnitudes, so that a share ``1 - q`` of the
    elements is clamped. After each update it takes a geometric step, where ``f`` is the share that
    was clamped::

        g -> min(max(g, -c), c)
        c <- c * exp(learning_rate * clip(k * (f - (1 - q)) / min(q, 1 - q), -1, 1))

    It needs one look at the gradients and no sort, and arrives from 1000 times too small or too
    large within about 100 steps at any ``q``. ``k`` is 1, except for a ``learning_rate`` with which
    ``c`` would swing about the quantile of normal gradients (at the default, for ``q`` from 0.994):
    it is smaller there. The bound stays where the gradients are all zero or some are not finite, and
    is always a positive, finite float32.

    Args:
      q: the quantile of the magnitudes, in (0, 1).
      learning_rate: the largest change of ``log(c)`` in a step.
      initial: the first bound.
      per_leaf: whether each leaf has a bound of its own.

    Returns:
      A ``GradientTransformation`` with a ``ClipByQuantileState``. Dtypes, NaN, infinities, complex
      gradients and leaves that pass are as in ``clip_by_value``; elements are counted as there.

    Raises:
      ValueError: ``q`` is outside (0, 1), or ``learning_rate`` or ``initial`` is not positive and
        finite.
      TypeError: a gradient is an integer.

    Examples:
      >>> tx = clip_by_quantile(0.9)
      >>> g = jax.random.normal(jax.random.key(0), (1000,))
      >>> state = tx.init(g)
      >>> for _ in range(20):
      ...     _, state = tx.update(g, state)
      >>> print(f"{state.threshold:.2f} {state.clip_fraction:.2f}")
      1.59 0.10

    References:
      Andrew et al., Differentially private learning with adaptive clipping, 2021 (arXiv:1905.03871).
    """
    for name, value in (("q", q), ("learning_rate", learning_rate), ("initial", initial)):
        _check_positive("clip_by_quantile", name, value)
        limit = 1 if name == "q" else math.inf
        if not isinstance(value, Tracer) and not value < limit:
            raise ValueError(f"clip_by_quantile: {name} must be below {limit}, got {value}")
    q, learning_rate = _weak(q), _weak(learning_rate)

    def init(params: PyTree) -> PyTree:
        def start() -> jax.Array:
            return jnp.array(initial, jnp.float32, copy=True)  # so that all can be donated

        threshold: jax.Array | dict[str, jax.Array] = start()
        if per_leaf:
            paths = jax.tree_util.tree_flatten_with_path(params)[0]
            threshold = {path_of(path): start() for path, _ in paths}
            if len(threshold) < len(paths):
                raise ValueError(
                    "clip_by_quantile: two leaves of params have the same path, as "
                    "{'a': {'b': ...}, 'a/b': ...} would; rename one, or leave out per_leaf"
                )
        return ClipByQuantileState(threshold, clip_fraction=jnp.zeros((), jnp.float32))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        del params
        share = 1 - q
        rarer = jnp.minimum(q, share)
        gain = _quantile_gain(share, learning_rate) / rarer
        thresholds = state.threshold if per_leaf else {"": state.threshold}
        seen: dict[str, list[tuple[Masks, jax.Array]]] = {}

        def clip(path: jax.tree_util.KeyPath, g: Any) -> Any:
            if is_float0(g):
                return g
            name = path_of(path) if per_leaf else ""
            if name not in thresholds:
                raise ValueError(
                    f"clip_by_quantile: updates have a leaf {name!r}, which the params of init had not"
                )
            clipped, masks = _clip("clip_by_quantile", g, thresholds[name])
            seen.setdefault(name, []).append((masks, _peak(g)))
            return clipped

        clipped = jax.tree_util.tree_map_with_path(clip, updates)
        tracked = dict(thresholds)
        number = jnp.zeros((), jnp.float32)
        for name, found in seen.items():
            masks, peaks = zip(*found, strict=True)
            here = _number(masks)
            number += here
            off = _fraction(here, masks) - share
            step = learning_rate * jnp.clip(off * gain, -1, 1)
            moved = jnp.clip(thresholds[name] * jnp.exp(step), _TINY, _HUGE)
            peak = sum(peaks, jnp.zeros((), jnp.float32))
            tracked[name] = jnp.where((peak > 0) & (peak < jnp.inf), moved, thresholds[name])
        return clipped, ClipByQuantileState(
            threshold=tracked if per_leaf else tracked[""],
            clip_fraction=_fraction(
                number, [masks for found in seen.values() for masks, _ in found]
            ),
        )

    return optax.GradientTransformation(init, update)


class ClipByZScoreState(NamedTuple):
    """State of ``clip_by_zscore``.

    Attributes:
      count: the number of norms recorded so far.
      mean: the running mean of the norms.
      variance: their running variance.
      norm: the global norm of the last gradients, before clipping.
      threshold: the norm above which the last gradients would have been rescaled.
      clipped: whether they were, a bool.
    """

    count: jax.typing.ArrayLike
    mean: jax.Array
    variance: jax.Array
    norm: jax.Array
    threshold: jax.Array
    clipped: jax.Array


def clip_by_zscore(
    z: float = 2.5, *, decay: float = 0.97, warmup_steps: int = 25, max_norm: float = 1.0
) -> optax.GradientTransformation:
    """Rescales gradients whose global norm is a spike among the norms before (ZClip).

    With ``m`` and ``s`` the running mean and standard deviation of the norms, gradients of a norm
    ``g > m + z * s`` are rescaled to the norm::

        m + z * s / ((g - m) / (s * z))

    which is the smaller the larger the spike. The running moments then take the norm after
    clipping: ``m <- decay * m + (1 - decay) * g``, and the same for the variance, from the new mean.
    During the first ``warmup_steps`` the norms are only collected, and norms above ``max_norm`` are
    rescaled to it. The mean and variance of the collected norms are the initial moments.

    Norms that are zero or not finite are not recorded. Gradients with NaN pass unchanged. Where the
    norm is infinite, finite gradients become 0 and infinite ones NaN, so that
    ``optax.apply_if_finite`` and ``optax.zero_nans`` still see them. Norms are summed in float32 in
    units of the running mean: one 1e19 times as large counts as infinite.

    Args:
      z: how many standard deviations above the mean a norm is a spike.
      decay: of the running moments, in [0, 1).
      warmup_steps: how many norms are collected first, at least 2.
      max_norm: the largest norm meanwhile; ``math.inf`` for none.

    Returns:
      A ``GradientTransformation`` with a ``ClipByZScoreState``. Gradients keep their dtypes; ``None``,
      ``optax.MaskedNode`` and ``float0`` leaves pass.

    Raises:
      ValueError: ``z`` or ``max_norm`` is not positive, ``decay`` is outside [0, 1), or
        ``warmup_steps`` is below 2.
      TypeError: ``warmup_steps`` is no integer, or a gradient is one.

    Examples:
      >>> tx = clip_by_zscore(warmup_steps=2, max_norm=10.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> for norm in (4.0, 6.0, 100.0):
      ...     g, state = tx.update(jnp.array([0.0, norm]), state)
      >>> g, state.threshold, state.clipped
      (Array([0.       , 5.0657897], dtype=float32), Array(7.5, dtype=float32), Array(True, dtype=bool))

    References:
      Kumar et al., ZClip: adaptive spike mitigation for LLM pre-training, 2025 (arXiv:2504.02507).
    """
    _check_positive("clip_by_zscore", "z", z)
    _check_positive("clip_by_zscore", "max_norm", max_norm, "; for no bound give math.inf")
    if not isinstance(decay, Tracer) and not 0 <= decay < 1:
        raise ValueError(f"clip_by_zscore: decay must be in [0, 1), got {decay}")
    if not isinstance(warmup_steps, Tracer):
        try:
            least = operator.index(warmup_steps)
        except TypeError:
            raise TypeError(
                f"clip_by_zscore: warmup_steps must be an integer, got {warmup_steps!r}"
            ) from None
        if least < 2:
            raise ValueError(
                "clip_by_zscore: warmup_steps must be at least 2, since one norm has no spread, got "
                f"{warmup_steps}"
            )
    z, decay, max_norm = _weak(z), _weak(decay), _weak(max_norm)

    def init(params: PyTree) -> PyTree:
        del params
        zero = jnp.zeros((), jnp.float32)
        return ClipByZScoreState(
            count=jnp.zeros((), jnp.int32),
            mean=zero,
            variance=zero + 0,  # an array each, so that all can be donated
            norm=zero + 0,
            threshold=jnp.array(max_norm, jnp.float32, copy=True),
            clipped=jnp.zeros((), bool),
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        del params
        count, mean, variance = state.count, state.mean, state.variance
        norm = _norm(updates, jnp.where(count == 0, 1, mean))
        warming = count < warmup_steps
        threshold = jnp.where(warming, max_norm, mean + z * jnp.sqrt(variance))
        spike = norm > threshold
        above = jnp.where(spike, norm - mean, 1)
        limit = jnp.where(warming, max_norm, mean + z**2 * variance / above)
        scale = jnp.where(spike, limit / norm, 1)

        def rescale(g: Any) -> Any:
            if is_float0(g):
                return g
            if jnp.issubdtype(g.dtype, jnp.complexfloating):
                return jax.lax.complex(rescale(g.real), rescale(g.imag))
            wide = g.astype(jnp.float32) if g.dtype.itemsize < 4 else g
            return (wide * scale.astype(wide.dtype)).astype(g.dtype)

        # While they are collected, moments of all norms; then exponential ones of those clipped.
        taken = jnp.where(spike & ~warming, limit, norm)
        keep = jnp.where(warming, count / (count + 1), decay)
        new_mean = keep * mean + (1 - keep) * taken
        off = jnp.where(warming, taken - mean, taken - new_mean)
        new_variance = keep * variance + (1 - keep) * off * (taken - new_mean)
        recorded = (norm > 0) & (norm < jnp.inf)
        return jax.tree.map(rescale, updates), ClipByZScoreState(
            count=jnp.where(recorded, optax.safe_increment(count), count),
            mean=jnp.where(recorded, new_mean, mean),
            variance=jnp.where(recorded, new_variance, variance),
            norm=norm,
            threshold=threshold,
            clipped=spike,
        )

    return optax.GradientTransformation(init, update)


def clip_fractions(opt_state: PyTree) -> list[jax.Array]:
    """The clip fractions in an optimizer's state, in the order of the chain.

    ``optax.tree.get`` finds one; where there are several it raises.

    Examples:
      >>> tx = optax.chain(clip_by_value(2.0), clip_by_value(1.0))
      >>> _, state = tx.update(jnp.array([3.0, 1.5]), tx.init(jnp.zeros(2)))
      >>> clip_fractions(state)
      [Array(0.5, dtype=float32), Array(1., dtype=float32)]
    """
    return [
        fraction
        for _, fraction in optax.tree.get_all_with_path(opt_state, "clip_fraction")
        if fraction is not None
    ]


_BOUND_HELP = (
    "; for a leaf that is not to be clamped give math.inf, for a bound a leaf a tree of scalars"
)


def _check_positive(transform: str, name: str, value: Any, help: str = "") -> None:
    """Raises where ``value`` is concrete and no positive scalar."""
    if isinstance(value, Tracer):
        return
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)) or isinstance(
        value, bool
    ):
        raise TypeError(f"{transform}: {name} must be a positive number, got {value!r}{help}")
    if np.ndim(value) != 0:
        raise ValueError(
            f"{transform}: {name} must be a scalar, got an array of shape {np.shape(value)}{help}"
        )
    if not float(value) > 0:
        raise ValueError(f"{transform}: {name} must be positive, got {value}{help}")


def _weak(value: Any) -> Any:
    """A Python number as it is, and any other in float32: float64 would change the state's dtypes."""
    return value if type(value) in (int, float) else jnp.asarray(value, jnp.float32)


_TINY = float(jnp.finfo(jnp.float32).tiny)
_HUGE = float(jnp.finfo(jnp.float32).max)


def _check_gradient(transform: str, g: jax.Array) -> None:
    if not jnp.issubdtype(g.dtype, jnp.inexact):
        raise TypeError(
            f"{transform}: gradients must be floating or complex, got {g.dtype}; "
            "leave other leaves out with optax.masked"
        )


# Leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnames="transform")
def _clip(transform: str, g: jax.Array, c: Any) -> tuple[jax.Array, Masks]:
    """``g`` clamped to ``[-c, c]``, and where elements were outside."""
    _check_gradient(transform, g)
    if jnp.issubdtype(g.dtype, jnp.complexfloating):
        real, _ = _clip(transform, jnp.real(g), c)
        imag, _ = _clip(transform, jnp.imag(g), c)
        clipped = jax.lax.complex(real, imag)
        # NaN differs from itself, but was not clamped.
        return clipped, ((clipped != g) & ~jnp.isnan(g),)
    wide = jnp.asarray(c, g.dtype if g.dtype.itemsize > 4 else jnp.float32)
    # A finite bound must stay finite in half precision for an infinity to become it.
    largest = float(jnp.finfo(g.dtype).max)
    bound = jnp.where(jnp.isinf(wide), wide, jnp.minimum(wide, largest)).astype(g.dtype)
    bound = jnp.where(bound >= 0, bound, jnp.nan)
    return jnp.minimum(jnp.maximum(g, -bound), bound), (g > bound, g < -bound)


def _fraction(number: jax.Array, masks: Iterable[Masks]) -> jax.Array:
    # A float, for an integer beyond 32 bits would overflow.
    return number / float(max(sum(leaf[0].size for leaf in masks), 1))


def _number(masks: Iterable[Masks]) -> jax.Array:
    """How many elements are true, a float32: what is counted at once is exact, the sum cannot overflow.

    Masks of small leaves of one shape are added up first, 8 leaves at a time: most of the time that a
    compiler takes for a small one goes into a kernel to count it.
    """
    counts = []
    small: dict[tuple[int, ...], list[jax.Array]] = {}
    for leaf in masks:
        if leaf[0].size > SMALL or jax.device_count() > 1:
            counts.append(count(*leaf))
        else:
            small.setdefault(leaf[0].shape, []).extend(leaf)
    for found in small.values():
        for i in range(0, len(found), 16):
            ones = sum(mask.astype(jnp.int32) for mask in found[i : i + 16])
            counts.append(jnp.sum(ones, dtype=jnp.int32).astype(jnp.float32))
    return sum(counts, jnp.zeros((), jnp.float32))


def _parts(g: jax.Array) -> tuple[jax.Array, ...]:
    """The real arrays that ``g`` is made of."""
    return (g.real, g.imag) if jnp.issubdtype(g.dtype, jnp.complexfloating) else (g,)


def _peak(g: jax.Array) -> jax.Array:
    """A float32: 0 where all elements are, not finite where one is not."""
    ends = [jnp.maximum(high, -low) for high, low in map(extremes, _parts(g))]
    return sum((jnp.squeeze(end).astype(jnp.float32) for end in ends), jnp.zeros((), jnp.float32))


def _quantile_gain(share: Any, learning_rate: Any) -> jax.Array:
    """1, or less where the tracking of a bound would swing about the quantile of normal gradients.

    The tracking is a fixed-point iteration: near the quantile, a step takes ``learning_rate * slope``
    of the distance away, which must be below 2.
    """
    z = -jax.scipy.special.ndtri(jnp.asarray(share, jnp.float32) / 2)
    density = jnp.exp(-jnp.square(z) / 2) * (2 / math.pi) ** 0.5
    slope = density * z / jnp.minimum(share, 1 - share)
    return jnp.minimum(1.0, 1.6 / (learning_rate * slope))


def _norm(updates: PyTree, unit: jax.Array) -> jax.Array:
    """The global norm, from squares in units of the power of two at ``unit``."""
    unit = jax.lax.reduce_precision(unit, 8, 0)
    total = jnp.zeros((), jnp.float32)
    for g in jax.tree.leaves(updates):
        if is_float0(g):
            continue
        _check_gradient("clip_by_zscore", g)
        for part in _parts(g):
            total += jnp.sum(jnp.square(part.astype(jnp.float32) / unit))
    return unit * jnp.sqrt(total)
