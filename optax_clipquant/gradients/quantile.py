"""Gradients clamped to a bound that follows a quantile of their magnitudes."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_clipquant._tree import (
    PyTree,
    check_option,
    check_state,
    flatten_with_path,
    is_float0,
    map_with_path,
    on_shapes,
    path_of,
)
from optax_clipquant.gradients.clip import check_positive, clamp, fraction_of, weak
from optax_clipquant.lowering.count import Mask, counts


class ClipByQuantileState(NamedTuple):
    """State of ``clip_by_quantile``.

    Attributes:
      threshold: the bound of the next update, a float32 scalar; with ``per_leaf``, a dict of them by the
        path of the leaf.
      clip_fraction: the fraction of all elements that the last update clamped, a float32 scalar.

    Examples:
      >>> tx = clip_by_quantile(0.5)
      >>> updates, state = tx.update(jnp.arange(4.0), tx.init(jnp.zeros(4)))
      >>> bool(0 < state.threshold < 3)
      True
    """

    threshold: jax.Array | dict[str, jax.Array]
    clip_fraction: jax.Array


def clip_by_quantile(
    q: float = 0.99, *, learning_rate: float = 0.2, initial: float = 1.0, per_leaf: bool = False
) -> optax.GradientTransformation:
    """Clamps each element of the gradients to a bound that follows a quantile of their magnitudes.

    The bound ``c`` follows the quantile ``q`` of the magnitudes of the non-zero elements, so that a
    fraction ``1 - q`` of these is clamped. (The gradient of an embedding is zero in all but a few rows:
    a quantile of all its elements would be zero.) After each update with ``n`` non-zero elements, of
    which ``m`` were clamped, the bound takes a geometric step::

        g -> min(max(g, -c), c)
        c <- c * exp(learning_rate * clip(k * (m - n * (1 - q)) / max(n * min(q, 1 - q), 1), -1, 1))

    This reads the gradients once and needs no sort. A bound that is 1000 times too small or too large
    converges within about 100 steps at any ``q``. ``k`` is 1, or smaller where ``c`` would otherwise
    oscillate about the quantile of normally distributed gradients (at the default ``learning_rate``, for
    ``q`` from 0.994). The bound does not move when the gradients are all zero or some are not finite,
    and is always a positive, finite float32.

    This departs from the paper in three points: zeros are not counted; the step is measured in units of
    the rarer side, so that bounds converge equally fast at any ``q``, and is limited to
    ``learning_rate``; and no noise is added, since there is no privacy to protect.

    Args:
      q: the quantile of the non-zero magnitudes, in (0, 1).
      learning_rate: the largest change of ``log(c)`` in a step.
      initial: the first bound.
      per_leaf: whether each leaf has a separate bound.

    Returns:
      A ``GradientTransformation`` with a ``ClipByQuantileState``. Dtypes, NaN, infinities, complex
      gradients and other leaves are treated as in ``clip_by_value``; elements are counted as there.

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
        check_positive("clip_by_quantile", name, value)
        limit = 1 if name == "q" else math.inf
        if not isinstance(value, Tracer) and not value < limit:
            raise ValueError(f"clip_by_quantile: {name} must be below {limit}, got {value}")
    q, learning_rate = weak(q), weak(learning_rate)

    def init(params: PyTree) -> PyTree:
        def start() -> jax.Array:
            return jnp.array(initial, jnp.float32, copy=True)  # a copy, which can be donated

        threshold: jax.Array | dict[str, jax.Array] = start()
        if per_leaf:
            paths = flatten_with_path(params)[0]
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
        check_state("clip_by_quantile", state, ClipByQuantileState)
        check_option("clip_by_quantile", "per_leaf", per_leaf, isinstance(state.threshold, Mapping))
        rarer = jnp.minimum(q, 1 - q)
        gain = _quantile_gain(1 - q, learning_rate)
        thresholds = state.threshold if per_leaf else {"": state.threshold}
        seen: dict[str, list[tuple[Mask, Mask, Mask]]] = {}

        def clip(path: jax.tree_util.KeyPath, g: Any) -> Any:
            if is_float0(g):
                return g
            name = path_of(path) if per_leaf else ""
            if name not in thresholds:
                raise ValueError(
                    f"clip_by_quantile: updates have a leaf {name!r} that params did not have in init; "
                    "call tx.init again"
                )
            g = jnp.asarray(g)
            clipped, outside = clamp("clip_by_quantile", g, thresholds[name])
            seen.setdefault(name, []).append((outside, (g != 0,), (~jnp.isfinite(g),)))
            return clipped

        clipped = map_with_path(clip, updates)
        tracked = dict(thresholds)
        number, sizes = jnp.zeros((), jnp.float32), []
        for name, masks in seen.items():
            clamped, nonzero, bad = counts(masks)
            number += clamped
            sizes += [outside[0].size for outside, _, _ in masks]
            off = (clamped - nonzero * (1 - q)) / jnp.maximum(nonzero * rarer, 1)
            step = jnp.where(bad > 0, 0, learning_rate * jnp.clip(gain * off, -1, 1))
            tracked[name] = jnp.clip(thresholds[name] * jnp.exp(step), _TINY, _HUGE)
        return clipped, ClipByQuantileState(
            threshold=tracked if per_leaf else tracked[""],
            clip_fraction=fraction_of(number, sizes),
        )

    return optax.GradientTransformation(on_shapes(init) if per_leaf else init, update)


_TINY = float(jnp.finfo(jnp.float32).tiny)
_HUGE = float(jnp.finfo(jnp.float32).max)


def _quantile_gain(fraction: Any, learning_rate: Any) -> jax.Array:
    """The gain ``k``: 1, or less where the bound would oscillate about the quantile of normal gradients.

    The tracking is a fixed-point iteration: near the quantile, a step removes a fraction
    ``learning_rate * slope`` of the distance, which must be below 2.
    """
    z = -jax.scipy.special.ndtri(jnp.asarray(fraction, jnp.float32) / 2)
    density = jnp.exp(-jnp.square(z) / 2) * (2 / math.pi) ** 0.5
    slope = density * z / jnp.minimum(fraction, 1 - fraction)
    return jnp.minimum(1.0, 1.6 / (learning_rate * slope))
