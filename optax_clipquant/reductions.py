"""Reductions of several arrays in one look at memory, and extremes that see NaN."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from optax_clipquant.sharding import split_axis

Kind = Literal["max", "min", "sum"]
Zero = jax.Array | float
_FOLD = {"max": jax.lax.max, "min": jax.lax.min, "sum": jax.lax.add}
_WHOLE = {"max": jnp.max, "min": jnp.min, "sum": jnp.sum}


def reduce_together(
    kinds: Sequence[Kind],
    compute: Callable[[Zero], Sequence[jax.Array]],
    axes: tuple[int, ...],
    zero: Zero = 0.0,
) -> list[jax.Array]:
    """The largest or least element, 0 among them, or the sum of several arrays along ``axes``.

    XLA's CPU backend makes a loop of each reduction, and in many of them computes an element at a time.
    Runs of up to 8 are reduced first, of all arrays in one loop over vectors of neighbours: twice as
    fast for extremes, 5 times and more where the arrays are computed. (Loops of more steps, or over
    more than 3 arrays, are not unrolled, and fall back to single elements.)

    Args:
      kinds: what to do with each array.
      compute: the arrays, of one shape. It is given a zero that broadcasts against them. Added to what
        several of them share, it keeps that from being written to memory where each has a loop of its
        own: it waits for the array before.
      axes: which axes to reduce. They stay, with extent 1.
    """
    whole = [partial(_WHOLE[kind], axis=axes, keepdims=True, initial=0) for kind in kinds]
    axis, size, runs = _runs(jax.eval_shape(lambda: compute(0.0))[0], axes)
    if size == 1:
        found: list[jax.Array] = []
        for i, reduce in enumerate(whole):
            found.append(reduce(compute(zero)[i]))
            zero += 0 * found[-1]
        return found
    arrays = compute(0.0)
    parts = jax.lax.reduce(
        tuple(split_axis(x, axis, 0, x.shape[axis], size) for x in arrays),
        tuple(jnp.zeros((), x.dtype) for x in arrays),
        lambda a, b: tuple(_FOLD[kind](x, y) for kind, x, y in zip(kinds, a, b, strict=True)),
        (runs,),
    )
    return [reduce(x) for reduce, x in zip(whole, parts, strict=True)]


def _runs(x: jax.ShapeDtypeStruct, axes: tuple[int, ...]) -> tuple[int, int, int]:
    """An axis, the size of the parts to split it into, 1 for none, and which of the two axes to reduce.

    Vectors lie along the last axis: it stays, or runs are of elements that are far from each other on it.
    Each device must hold whole runs, or they would be moved.
    """
    none = 0, 1, 0
    if x.size <= 4096 or not axes:
        return none
    last = x.ndim - 1
    axis = max(axes, key=lambda a: (a != last, x.shape[a]))
    length, devices = x.shape[axis], jax.device_count()
    run = max(k for k in range(1, 9) if length % (k * devices) == 0 or k == 1)
    if axis != last:
        return axis, run, axis + 1
    return (axis, length // run, axis) if devices == 1 and length >= 4 * run > 4 else none


def extremes(x: jax.Array, axes: tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
    """The largest and the least element along ``axes`` (by default all), 0 among them; both NaN where
    an element is.

    XLA's CPU backend drops NaN from the maximum of a large array (seen with jaxlib 0.10.2), but not
    from a sum, which costs less than any other look at all elements. Where a sum overflows in both
    directions, which takes finite elements near the end of float32's range, it is NaN as well.
    """
    axes = tuple(range(x.ndim)) if axes is None else axes
    high, low, total = reduce_together(("max", "min", "sum"), lambda _: (x, x, x), axes)
    nan = jnp.isnan(total)
    return jnp.where(nan, jnp.nan, high), jnp.where(nan, jnp.nan, low)
