"""Fits grids to large arrays block by block, so that what is read again is still in the cache."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from optax_clipquant.lowering.reduce import Span
from optax_clipquant.lowering.sharding import is_on_one_device

T = TypeVar("T")  # a tree of arrays, with one entry for each span

# Elements of a block, 4 MB. Smaller blocks start more loops; larger ones stay less in the cache.
_SIZE = 2**20


def fit_in_blocks(fit: Callable[..., T], w: jax.Array, span: Span, *others: Any) -> T:
    """Computes ``fit(w, *others)``, where ``fit`` reads ``w`` several times and treats each span separately.

    ``others`` are trees of arrays with an entry for each span, or that broadcast to ``w``.

    XLA's CPU backend reads a large array from memory each time, and writes partial reductions (see
    ``Span.reduce``) to memory newly allocated by each call: for several loops over all arrays of a model,
    that takes longer than the computation. So on a single CPU device, one block is fitted after the other.
    """
    axis, size = _block(w, span)
    if size == 0:
        return fit(w, *others)
    length = w.shape[axis]

    def in_turn() -> T:
        def body(i: jax.Array, grid: T) -> T:
            # The last block overlaps the one before, and finds the same scales again.
            first = jnp.minimum(i * size, length - size)

            def block(x: jax.Array) -> jax.Array:
                if x.shape[axis] < length:
                    return x  # broadcast as a whole
                # XLA's CPU backend cannot slice bfloat16, and would convert the whole array first.
                is_bfloat16 = x.dtype == jnp.bfloat16
                bits = jax.lax.bitcast_convert_type(x, jnp.uint16) if is_bfloat16 else x
                part = jax.lax.dynamic_slice_in_dim(bits, first, size, axis)
                return jax.lax.bitcast_convert_type(part, x.dtype)

            part = fit(*jax.tree.map(block, (w, *others)))
            return jax.tree.map(
                lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x, first, axis),
                grid,
                part,
            )

        grid = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fit, w, *others))
        return jax.lax.fori_loop(0, -(-length // size), body, grid)

    return jax.lax.platform_dependent(cpu=in_turn, default=lambda: fit(w, *others))


def _block(w: jax.Array, span: Span) -> tuple[int, int]:
    """The axis to cut into blocks, one that is not reduced, and a block's extent; 0 for a single block."""
    kept = [axis for axis in range(w.ndim) if axis not in span.reduced(w.ndim)]
    blocks = -(-w.size // _SIZE)
    if blocks <= 1 or not kept or not is_on_one_device():
        return 0, 0
    # The first axis that is long enough, since its blocks are contiguous in memory.
    axis = max(kept, key=lambda axis: (min(w.shape[axis], blocks), -axis))
    length = w.shape[axis]
    # Vector instructions work along the last axis.
    unit, least = (16, 64) if axis == w.ndim - 1 else (1, 1)
    size = max(-(-length // blocks), least)
    size = -(-size // unit) * unit
    return axis, size if size < length else 0
