"""Gradients rescaled where their norm spikes."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_clipquant._tree import PyTree, check_scalar, check_state, is_float0
from optax_clipquant.gradients.clip import check_gradient, check_positive, parts, weak


class ClipByZScoreState(NamedTuple):
    """State of ``clip_by_zscore``.

    Attributes:
      count: the number of norms recorded so far.
      mean: the running mean of the norms.
      variance: their running variance.
      norm: the global norm of the last gradients, before clipping.
      threshold: the norm above which the last gradients would have been rescaled.
      clipped: whether the last gradients were rescaled, a bool.

    Examples:
      >>> tx = clip_by_zscore(max_norm=1.0)
      >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> state.norm, state.clipped
      (Array(5., dtype=float32), Array(True, dtype=bool))
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
    """Rescales gradients whose global norm spikes above the norms of previous steps (ZClip).

    With ``m`` and ``s`` the running mean and standard deviation of the norms, gradients with a norm
    ``g > m + z * s`` are rescaled to the norm::

        m + z * s / ((g - m) / (s * z))

    which is smaller the larger the spike. The running moments then take in the norm, capped a little above
    the threshold: with ``t = min(g, m + 1.5 * z * s)``, ``m <- decay * m + (1 - decay) * t``, and the same
    for the variance, about the new mean. During the first ``warmup_steps`` the norms are only collected,
    and norms above ``max_norm`` are rescaled to it. The mean and variance of the collected norms are the
    initial moments.

    This departs from the paper, whose moments take in the norm after clipping. That is closer to the mean
    the larger the spike, so that after a lasting rise of the norm all later steps would be clipped. Here
    the moments grow until such norms pass: within about 20 steps of a rise to 3 times the norm, and about
    30 of a rise to 10 times. A single spike is clipped as in the paper.

    Norms that are zero or not finite are not recorded. Gradients with NaN pass unchanged. Where the
    norm is infinite, finite gradients become 0 and infinite ones NaN, so that
    ``optax.apply_if_finite`` and ``optax.zero_nans`` still see them. Norms are summed in float32 in
    units of the running mean: a norm 1e19 times as large counts as infinite.

    Args:
      z: how many standard deviations above the mean make a norm a spike.
      decay: the decay of the running moments, in [0, 1).
      warmup_steps: how many norms are collected first, at least 2.
      max_norm: the largest norm during the warmup; ``math.inf`` for no limit.

    Returns:
      A ``GradientTransformation`` with a ``ClipByZScoreState``. Gradients keep their dtypes; ``None``,
      ``optax.MaskedNode`` and ``float0`` leaves pass through.

    Raises:
      ValueError: ``z`` or ``max_norm`` is not positive, ``decay`` is outside [0, 1), or
        ``warmup_steps`` is below 2.
      TypeError: ``warmup_steps`` is not an integer, or a gradient is.

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
    check_positive("clip_by_zscore", "z", z)
    check_positive("clip_by_zscore", "max_norm", max_norm, "; give math.inf for no limit")
    check_scalar("clip_by_zscore", "decay", decay, "a number in [0, 1)")
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
    z, decay, max_norm = weak(z), weak(decay), weak(max_norm)

    def init(params: PyTree) -> PyTree:
        del params
        zero = jnp.zeros((), jnp.float32)
        return ClipByZScoreState(
            count=jnp.zeros((), jnp.int32),
            mean=zero,
            variance=zero + 0,  # distinct arrays, so that each can be donated
            norm=zero + 0,
            threshold=jnp.array(max_norm, jnp.float32, copy=True),
            clipped=jnp.zeros((), bool),
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        del params
        check_state("clip_by_zscore", state, ClipByZScoreState)
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
            g = jnp.asarray(g)
            if jnp.issubdtype(g.dtype, jnp.complexfloating):
                return jax.lax.complex(rescale(g.real), rescale(g.imag))
            wide = g.astype(jnp.float32) if g.dtype.itemsize < 4 else g
            return (wide * scale.astype(wide.dtype)).astype(g.dtype)

        # During the warmup, the plain moments of all norms; then exponential ones of the capped norms.
        taken = jnp.where(warming, norm, jnp.minimum(norm, mean + 1.5 * (threshold - mean)))
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


def _norm(updates: PyTree, unit: jax.Array) -> jax.Array:
    """The global norm, from squares in units of a power of two near ``unit``."""
    unit = jax.lax.reduce_precision(unit, 8, 0)
    total = jnp.zeros((), jnp.float32)
    for g in jax.tree.leaves(updates):
        if is_float0(g):
            continue
        g = jnp.asarray(g)
        check_gradient("clip_by_zscore", g)
        for part in parts(g):
            total += jnp.sum(jnp.square(part.astype(jnp.float32) / unit))
    return unit * jnp.sqrt(total)
