"""Gradients in, clamped gradients out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_clipquant.sharding import split_axis

PyTree = Any
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
    ``optax.apply_if_finite`` and ``optax.zero_nans`` still see it; an infinity becomes the bound.
    The real and imaginary parts of complex gradients are clamped separately.

    Args:
      c: the bound: a positive number or 0-d array, or an ``optax.Schedule`` of the step; or a tree
        with one of these at each leaf, which is a prefix of the params.
      telemetry: whether the state reports the share of clamped elements, which costs a pass over
        the gradients where it is not fused with another. Read it with
        ``optax.tree.get(opt_state, "clip_fraction")``, or from several transforms with
        ``clip_fractions(opt_state)``.

    Returns:
      A ``GradientTransformation`` with a ``ClipByValueState``. ``None``, ``optax.MaskedNode`` and
      ``float0`` leaves pass.

    Raises:
      ValueError: a concrete bound is not positive, is NaN, or is not a scalar. Inside ``jax.jit``,
        where this cannot be raised, a traced or scheduled bound that is negative or NaN turns the
        updates into NaN.
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
    jax.tree.map(_check_bound, c, is_leaf=lambda x: x is None)
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
        counts = []
        size = 0

        def clip(bound: Bound, g: Any) -> Any:
            nonlocal size
            if _is_float0(g):
                return g
            clipped, count = _clip(g, bound, telemetry)
            counts.append(count)
            size += g.size
            return clipped

        def clip_subtree(bound: Bound, subtree: PyTree) -> PyTree:
            value = bound(state.count) if callable(bound) else bound
            return jax.tree.map(lambda g: clip(value, g), subtree)

        clipped = jax.tree.map(clip_subtree, c, updates)
        return clipped, ClipByValueState(
            count=None if state.count is None else optax.safe_increment(state.count),
            clip_fraction=_fraction(counts, size) if telemetry else None,
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


def _check_bound(c: Any) -> None:
    if callable(c) or isinstance(c, Tracer):
        return
    if not isinstance(c, (int, float, np.generic, np.ndarray, jax.Array)) or isinstance(c, bool):
        raise TypeError(
            f"clip_by_value: c must be a positive number or a schedule, got {c!r}; "
            "for a leaf that is not to be clamped give math.inf"
        )
    if np.ndim(c) != 0:
        raise ValueError(
            f"clip_by_value: c must be a scalar, got an array of shape {np.shape(c)}; "
            "for a bound a leaf give a tree of scalars"
        )
    if not float(c) > 0:
        raise ValueError(f"clip_by_value: c must be positive, got {c}")


def _is_float0(g: Any) -> bool:
    return getattr(g, "dtype", None) == jax.dtypes.float0


def _clip(g: jax.Array, c: Any, count: bool) -> tuple[jax.Array, jax.Array | None]:
    """``g`` clamped to ``[-c, c]``, and the number of elements that were outside."""
    if jnp.issubdtype(g.dtype, jnp.complexfloating):
        real, real_count = _clip(jnp.real(g), c, False)
        imag, _ = _clip(jnp.imag(g), c, False)
        clipped = jax.lax.complex(real, imag)
        # NaN differs from itself, but was not clamped.
        outside = (clipped != g) & ~jnp.isnan(g)
        return clipped, _count(outside) if count else real_count
    if not jnp.issubdtype(g.dtype, jnp.floating):
        raise TypeError(
            f"clip_by_value: gradients must be floating or complex, got {g.dtype}; "
            "leave other leaves out with optax.masked"
        )
    # A half-precision bound must stay finite for an infinity to become it.
    bound = jnp.minimum(jnp.asarray(c, jnp.float32), float(jnp.finfo(g.dtype).max)).astype(g.dtype)
    bound = jnp.where(bound >= 0, bound, jnp.nan)
    clipped = jnp.minimum(jnp.maximum(g, -bound), bound)
    return clipped, _count(jnp.abs(g) > bound) if count else None


def _count(mask: jax.Array) -> jax.Array:
    """The number of true elements, exactly.

    Runs of up to 16 are summed in int8 first: XLA's CPU backend then reads the mask at the speed of
    memory, 5 times as fast as it counts in one go. The axis is split only where each of the devices
    that there are would hold whole runs, so that no sharded array is moved.
    """
    if mask.ndim >= 2 and mask.size > 4096:
        axis = max(range(mask.ndim - 1), key=lambda a: mask.shape[a])
        length, devices = mask.shape[axis], jax.device_count()
        run = max(k for k in range(1, 17) if length % (k * devices) == 0 or k == 1)
        if run > 1:
            runs = split_axis(mask, axis, 0, length, run)
            mask = jnp.sum(runs, axis=axis + 1, dtype=jnp.int8)
    return jnp.sum(mask, dtype=jnp.int32)


def _fraction(counts: list[jax.Array], size: int) -> jax.Array:
    """The share of elements counted. Each count is exact, the sum a float32 that cannot overflow."""
    total = sum((count.astype(jnp.float32) for count in counts), jnp.zeros((), jnp.float32))
    return total / max(size, 1)
