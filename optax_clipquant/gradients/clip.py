"""Gradients clamped to a bound that is given or scheduled."""

import functools
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_clipquant._tree import (
    PyTree,
    check_option,
    check_scalar,
    check_state,
    flatten_with_path,
    is_float0,
    is_placeholder,
    listed,
    map_with_path,
    path_of,
)
from optax_clipquant.lowering.count import Mask, counts

Bound = (
    Any  # a number, a 0-d array, an optax.Schedule, or a tree of these, each for a leaf or subtree
)


class ClipByValueState(NamedTuple):
    """State of ``clip_by_value``.

    Attributes:
      count: the number of updates so far, or None where nothing depends on it.
      clip_fraction: the fraction of all elements that the last update clamped, a float32 scalar, or
        None without telemetry.

    Examples:
      >>> tx = optax.chain(clip_by_value(1.0), optax.sgd(0.1))
      >>> updates, state = tx.update(jnp.array([3.0, 0.5]), tx.init(jnp.zeros(2)))
      >>> state[0].clip_fraction
      Array(0.5, dtype=float32)
    """

    count: jax.typing.ArrayLike | None
    clip_fraction: jax.Array | None


def clip_by_value(c: Bound, *, telemetry: bool = True) -> optax.GradientTransformation:
    """Clamps each element of the gradients: ``g -> min(max(g, -c), c)``.

    The bound is rounded to each leaf's dtype, which the gradients keep. NaN passes through, so that
    ``optax.apply_if_finite`` and ``optax.zero_nans`` still see it; an infinity becomes the bound, unless
    that is infinite too. The real and imaginary parts of complex gradients are clamped separately.

    Args:
      c: the bound: a positive number or 0-d array, or an ``optax.Schedule`` of the step; or a tree
        with one of these for each leaf or subtree of the params, such as ``{"head": 0.1, "body": 1.0}``.
        It is matched by path, so a dict can be given for an ``nnx.State``, a ``FrozenDict`` or a module.
      telemetry: whether the state reports the fraction of clamped elements, which costs one pass over
        the gradients unless the compiler fuses it with another. Read it with
        ``optax.tree.get(opt_state, "clip_fraction")``, or from several transforms with
        ``clip_fractions(opt_state)``.

    Returns:
      A ``GradientTransformation`` with a ``ClipByValueState``. ``None``, ``optax.MaskedNode`` and
      ``float0`` leaves pass through.

    Raises:
      ValueError: a concrete bound is not positive, is NaN, or is not a scalar; in ``update``, a
        schedule returns something other than a scalar, or the state was made with another ``telemetry``. A
        traced or scheduled bound that is negative or NaN turns the updates into NaN, since nothing can be
        raised inside ``jax.jit``.
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
    bounds: dict[tuple[str, ...], Any] = {
        _names(path): bound for path, bound in flatten_with_path(c, lambda x: x is None)[0]
    }
    for bound in bounds.values():
        if not callable(bound):
            check_positive("clip_by_value", "c", bound, _BOUND_HELP)
    scheduled = any(map(callable, bounds.values()))

    def init(params: PyTree) -> PyTree:
        if not is_placeholder(params):
            _check_bounds(bounds, params)
        return ClipByValueState(
            count=jnp.zeros((), jnp.int32) if telemetry or scheduled else None,
            clip_fraction=jnp.zeros((), jnp.float32) if telemetry else None,
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        del params
        check_state("clip_by_value", state, ClipByValueState)
        check_option("clip_by_value", "telemetry", telemetry, state.clip_fraction is not None)
        if scheduled and state.count is None:
            raise ValueError(
                "clip_by_value: c is a schedule, but the state was made for a number and does not count the "
                "steps; make it anew with tx.init(params)"
            )
        outside = []
        values: dict[tuple[str, ...], Any] = {
            names: bound(state.count) if callable(bound) else bound
            for names, bound in bounds.items()
        }
        for value in values.values():
            check_scalar("clip_by_value", "c, as the schedule gives it,", value, "a number")

        def clip(path: jax.tree_util.KeyPath, g: Any) -> Any:
            bound = values[_bounding(path, bounds)]
            if is_float0(g):
                return g
            clipped, mask = clamp("clip_by_value", g, bound)
            outside.append((mask,))
            return clipped

        clipped = map_with_path(clip, updates)
        return clipped, ClipByValueState(
            count=None if state.count is None else optax.safe_increment(state.count),
            clip_fraction=_fraction(outside) if telemetry else None,
        )

    return optax.GradientTransformation(init, update)


def clip_fractions(opt_state: PyTree) -> list[jax.Array]:
    """The fractions of the elements that ``clip_by_value`` and ``clip_by_quantile`` clipped, in the order of the chain.

    ``optax.tree.get`` raises where there are several. ``clip_by_zscore`` rescales all elements or none, and has no
    fraction: ``optax.tree.get(opt_state, "clipped")`` tells whether it did.

    Examples:
      >>> tx = optax.chain(clip_by_value(2.0), clip_by_value(1.0))
      >>> _, state = tx.update(jnp.array([3.0, 1.5]), tx.init(jnp.zeros(2)))
      >>> clip_fractions(state)
      [Array(0.5, dtype=float32), Array(1., dtype=float32)]
    """
    return [
        fraction
        for _, found in optax.tree.get_all_with_path(opt_state, "clip_fraction")
        for fraction in jax.tree.leaves(found)  # none for None, and the array of an nnx.Variable
    ]


def _names(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
    return tuple(path_of((key,)) for key in path)


def _bounding(path: jax.tree_util.KeyPath, bounds: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """The path in ``bounds`` of the leaf at ``path``, or of a subtree that contains it."""
    names = _names(path)
    found = [names[:n] for n in range(len(names) + 1) if names[:n] in bounds]
    if not found:
        raise ValueError(
            f"clip_by_value: c has no bound for the leaf {path_of(path)!r}, only for "
            f"{listed(map('/'.join, bounds))}; give math.inf where nothing is to be clamped"
        )
    return found[0]


def _check_bounds(bounds: Collection[tuple[str, ...]], params: PyTree) -> None:
    """Raises if a leaf has no bound, or a bound matches no leaf; it may match None or a masked leaf."""

    def is_empty(x: Any) -> bool:
        return not jax.tree.leaves(x)

    found, _ = flatten_with_path(params, is_empty)
    used = {_bounding(path, bounds) for path, leaf in found if not is_empty(leaf)}
    known = {_names(path)[:n] for path, _ in found for n in range(len(path) + 1)}
    if unused := [names for names in bounds if names not in used and names not in known]:
        raise ValueError(
            f"clip_by_value: c has a bound for {listed(map('/'.join, unused))}, which params do not have; their leaves "
            f"are {listed('/'.join(_names(path)) for path, _ in found)}"
        )


_BOUND_HELP = "; give math.inf for a leaf that is not to be clamped, or a tree of scalars for a bound per leaf"


def check_positive(transform: str, name: str, value: Any, help: str = "") -> None:
    """Raises if ``value`` is concrete and not a positive scalar."""
    if isinstance(value, Tracer):
        return
    check_scalar(transform, name, value, "a positive number", help)
    if not float(value) > 0:
        raise ValueError(f"{transform}: {name} must be positive, got {value}{help}")


def weak(value: Any) -> Any:
    """``value``, in float32 unless it is a Python number: float64 would change the state's dtypes."""
    return value if type(value) in (int, float) else jnp.asarray(value, jnp.float32)


def check_gradient(transform: str, g: jax.Array) -> None:
    if not jnp.issubdtype(g.dtype, jnp.inexact):
        raise TypeError(
            f"{transform}: gradients must be floating or complex, got {g.dtype}; "
            "leave other leaves out with optax.masked"
        )


# Jitted so that leaves of equal shapes are traced once.
@functools.partial(jax.jit, static_argnames="transform")
def clamp(transform: str, g: jax.Array, c: Any) -> tuple[jax.Array, Mask]:
    """``g`` clamped to ``[-c, c]``, and a mask of the elements that were outside."""
    check_gradient(transform, g)
    if jnp.issubdtype(g.dtype, jnp.complexfloating):
        real, _ = clamp(transform, jnp.real(g), c)
        imag, _ = clamp(transform, jnp.imag(g), c)
        clipped = jax.lax.complex(real, imag)
        # NaN differs from itself, but was not clamped.
        return clipped, ((clipped != g) & ~jnp.isnan(g),)
    wide = jnp.asarray(c, g.dtype if g.dtype.itemsize > 4 else jnp.float32)
    # A finite bound must stay finite in half precision, so that infinities are clamped to it.
    largest = float(jnp.finfo(g.dtype).max)
    bound = jnp.where(jnp.isinf(wide), wide, jnp.minimum(wide, largest)).astype(g.dtype)
    bound = jnp.where(bound >= 0, bound, jnp.nan)
    return jnp.minimum(jnp.maximum(g, -bound), bound), (g > bound, g < -bound)


def fraction_of(number: jax.Array, sizes: Iterable[int]) -> jax.Array:
    # A float, since an integer beyond 32 bits would overflow.
    return number / float(max(sum(sizes), 1))


def _fraction(outside: list[tuple[Mask]]) -> jax.Array:
    if not outside:
        return jnp.zeros((), jnp.float32)
    return fraction_of(counts(outside)[0], (mask[0].size for (mask,) in outside))


def parts(g: jax.Array) -> tuple[jax.Array, ...]:
    """The real arrays that ``g`` is made of."""
    return (g.real, g.imag) if jnp.issubdtype(g.dtype, jnp.complexfloating) else (g,)
