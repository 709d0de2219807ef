"""Softness: the transition from latent weights to levels during training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_clipquant._tree import check_scalar


def softness_schedule(start: int, end: int, steepness: float = 20.0) -> optax.Schedule:
    """A schedule for ``quantize_weights(softness=...)`` that falls from 1 to 0.

    It is a sigmoid, scaled to reach both ends: with ``r = (count - start) / (end - start)`` and
    ``f(r) = 1 / (1 + exp(steepness * (r - 1/2)))``, it is ``(f(r) - f(1)) / (f(0) - f(1))``; exactly 1
    up to ``start`` and exactly 0 from ``end``. Leave some steps after ``end``, so that the params settle
    on the levels; ``start=0`` and ``end`` at three quarters of training work well.

    Args:
      start: the number of updates at which it begins to fall.
      end: the number of updates from which it is 0.
      steepness: how steeply it falls in the middle.

    Returns:
      A function from the number of updates to a float32 scalar.

    Raises:
      ValueError: ``0 <= start < end`` does not hold, or ``steepness`` is not positive and finite.

    References:
      Jin et al., PARQ, 2025 (arXiv:2503.15748).

    Examples:
      >>> schedule = softness_schedule(start=100, end=900)
      >>> [round(float(schedule(count)), 3) for count in (0, 100, 400, 500, 600, 900)]
      [1.0, 1.0, 0.924, 0.5, 0.076, 0.0]
    """
    if not 0 <= start < end:
        raise ValueError(f"softness_schedule: need 0 <= start < end, got {start} and {end}")
    if not 0 < steepness < float("inf"):
        raise ValueError(f"softness_schedule: steepness must be positive, got {steepness}")

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        ratio = (count - start).astype(jnp.float32) / (end - start)
        # The formula above in terms of tanh, in which nothing cancels at small steepness.
        reach = jnp.tanh(jnp.float32(steepness / 4))
        fall = (1 + jnp.tanh(steepness / 2 * (0.5 - ratio)) / reach) / 2
        return jnp.where(count >= end, 0.0, jnp.where(count <= start, 1.0, fall))

    return schedule


def check_softness(softness: Any) -> None:
    if isinstance(softness, Tracer) or softness is None:
        return
    check_scalar("quantize_weights", "softness", softness, "a number or a schedule")
    if not 0 <= float(softness) <= 1:  # fails for NaN too
        raise ValueError(f"quantize_weights: softness must be from 0 to 1, got {softness}")


def softness_at(
    softness: float | optax.Schedule | None, count: jax.typing.ArrayLike
) -> jax.typing.ArrayLike | None:
    """The softness after ``count`` updates."""
    if not callable(softness):
        return softness
    value = softness(count)
    check_scalar("quantize_weights", "softness, as the schedule gives it,", value, "a number")
    return value


def softness_before(
    softness: float | optax.Schedule | None, count: jax.typing.ArrayLike
) -> jax.Array:
    """The softness with which the last of ``count`` updates served the weights.

    It is 1 before the first update, when the params are the latent weights.
    """
    last = softness_at(softness, jnp.maximum(count - 1, 0))
    return jnp.where(
        count == 0, 1.0, jnp.clip(jnp.asarray(0.0 if last is None else last, jnp.float32), 0, 1)
    )


def soften(level: jax.Array, latent: jax.Array, softness: jax.typing.ArrayLike) -> jax.Array:
    """``level + softness * (latent - level)``; exactly ``level`` up to 0, and exactly ``latent`` from 1."""
    softness = jnp.clip(jnp.asarray(softness, jnp.float32), 0, 1)
    # Selected, since 0 times an infinite distance would be NaN.
    between = jnp.where(softness == 1, latent, level + softness * (latent - level))
    return jnp.where(softness == 0, level, between)
