"""Gradients in, clamped gradients out."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_clipquant._tree import PyTree, is_float0
from optax_clipquant.lowering.reduce import SMALL, count

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
        lambda bound: callable(bound) or check_positive("clip_by_value", "c", bound, _BOUND_HELP),
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
            clipped, masks = clamp("clip_by_value", g, bound)
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
            clip_fraction=clamped_fraction(count_clamped(outside), outside) if telemetry else None,
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


def check_positive(transform: str, name: str, value: Any, help: str = "") -> None:
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


def weak(value: Any) -> Any:
    """A Python number as it is, and any other in float32: float64 would change the state's dtypes."""
    return value if type(value) in (int, float) else jnp.asarray(value, jnp.float32)


def check_gradient(transform: str, g: jax.Array) -> None:
    if not jnp.issubdtype(g.dtype, jnp.inexact):
        raise TypeError(
            f"{transform}: gradients must be floating or complex, got {g.dtype}; "
            "leave other leaves out with optax.masked"
        )


# Leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnames="transform")
def clamp(transform: str, g: jax.Array, c: Any) -> tuple[jax.Array, Masks]:
    """``g`` clamped to ``[-c, c]``, and where elements were outside."""
    check_gradient(transform, g)
    if jnp.issubdtype(g.dtype, jnp.complexfloating):
        real, _ = clamp(transform, jnp.real(g), c)
        imag, _ = clamp(transform, jnp.imag(g), c)
        clipped = jax.lax.complex(real, imag)
        # NaN differs from itself, but was not clamped.
        return clipped, ((clipped != g) & ~jnp.isnan(g),)
    wide = jnp.asarray(c, g.dtype if g.dtype.itemsize > 4 else jnp.float32)
    # A finite bound must stay finite in half precision for an infinity to become it.
    largest = float(jnp.finfo(g.dtype).max)
    bound = jnp.where(jnp.isinf(wide), wide, jnp.minimum(wide, largest)).astype(g.dtype)
    bound = jnp.where(bound >= 0, bound, jnp.nan)
    return jnp.minimum(jnp.maximum(g, -bound), bound), (g > bound, g < -bound)


def clamped_fraction(number: jax.Array, masks: Iterable[Masks]) -> jax.Array:
    # A float, for an integer beyond 32 bits would overflow.
    return number / float(max(sum(leaf[0].size for leaf in masks), 1))


def count_clamped(masks: Iterable[Masks]) -> jax.Array:
    """The number of true elements, in float32: partial counts are exact integers, and their sum cannot overflow.

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


def parts(g: jax.Array) -> tuple[jax.Array, ...]:
    """The real arrays that ``g`` is made of."""
    return (g.real, g.imag) if jnp.issubdtype(g.dtype, jnp.complexfloating) else (g,)
