"""Counts the true elements of masks over a tree."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_clipquant.lowering.reduce import SMALL, Kind, Span
from optax_clipquant.lowering.sharding import is_on_one_device

Mask = tuple[jax.Array, ...]  # mutually exclusive arrays; an element is true where one of them is
_COUNTABLE = 2**31  # elements that an int32 cannot count
_TOGETHER = 16  # small masks to add up before counting


@jax.jit
def counts(leaves: Sequence[tuple[Mask, ...]]) -> list[jax.Array]:
    """Counts the true elements of each mask over all leaves, as float32 scalars.

    On a TPU, the float32 sum of a mask joins the fusion that computes the gradient, which is then not
    written out for it (v5e, libtpu 0.0.52, leaves of 8192 x 8192: 30.1 bytes of HBM traffic per weight and
    step with Adam; an integer sum costs 38.1). It is exact up to 2**24 in each of the many partial
    sums. XLA's CPU backend sums floats one by one; integers are summed there, exactly.

    Args:
      leaves: for each leaf the same number of masks of its shape.
    """
    return jax.lax.platform_dependent(
        cpu=functools.partial(_of_integers, leaves), default=functools.partial(_of_floats, leaves)
    )


def _of_floats(leaves: Sequence[tuple[Mask, ...]]) -> list[jax.Array]:
    return [
        sum(
            (jnp.sum(functools.reduce(jnp.logical_or, mask).astype(jnp.float32)) for mask in masks),
            jnp.zeros((), jnp.float32),
        )
        for masks in zip(*leaves, strict=True)
    ]


def _of_integers(leaves: Sequence[tuple[Mask, ...]]) -> list[jax.Array]:
    """Exact integer counts of leaves, summed in float32, which cannot overflow.

    Masks of small leaves of equal shape are added up first, 8 leaves at a time, since the compile time of
    a small leaf goes into the kernel that counts it. All masks of a large leaf are counted in one loop,
    since XLA's CPU backend is slow at a single mask (jaxlib 0.10.2); on several devices the arrays of a
    mask are joined first, as each would be a message.
    """
    several = not is_on_one_device()
    totals = [jnp.zeros((), jnp.float32) for _ in leaves[0]]
    small: dict[tuple[int, ...], list[tuple[Mask, ...]]] = {}
    for leaf in leaves:
        if several:
            leaf = tuple((functools.reduce(jnp.logical_or, mask),) for mask in leaf)
        elif leaf[0][0].size <= SMALL:
            small.setdefault(leaf[0][0].shape, []).append(leaf)
            continue
        found = iter(_count_each([array for mask in leaf for array in mask]))
        totals = [
            sum((next(found) for _ in mask), total)
            for mask, total in zip(leaf, totals, strict=True)
        ]
    for alike in small.values():
        for i, masks in enumerate(zip(*alike, strict=True)):
            arrays = [array for mask in masks for array in mask]
            for first in range(0, len(arrays), _TOGETHER):
                ones = sum(array.astype(jnp.int32) for array in arrays[first : first + _TOGETHER])
                totals[i] += jnp.sum(ones, dtype=jnp.int32).astype(jnp.float32)
    return totals


def _count_each(masks: Sequence[jax.Array]) -> list[jax.Array]:
    """Counts each mask exactly, then rounds; from 2**31 elements on, rounds at each index of the first axis."""
    kinds: list[Kind] = ["sum" for _ in masks]
    axes = None if masks[0].size < _COUNTABLE else tuple(range(1, masks[0].ndim))
    found = Span(axes).reduce(kinds, [mask.astype(jnp.int32) for mask in masks])
    return [jnp.sum(x.astype(jnp.float32)) for x in found]
