"""Fitting to a large array a block at a time, so that what is read again is still in the cache."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from optax_clipquant.lowering.reduce import Span

T = TypeVar("T")  # a tree of arrays, with one entry for each span

# Elements, of 4 MB. With fewer, more loops are started; with more, less stays in the cache.
_SIZE = 2**20


def fit_in_blocks(
    fit: Callable[..., T], w: jax.Array, span: Span, *others: T, factor: int = 1
) -> T:
    """``fit(w, *others)``, which reads ``w`` several times or sums much, and treats each span by itself.

    XLA's CPU backend reads a large array from memory each time, and writes what its reduction leaves
    (see ``Span.reduce``) to memory that each call gets afresh: for several loops over all arrays of a
    model, that takes longer than to compute. So there, on a single device, one block is fitted after the
    other. They are larger by ``factor``: those that are read once need not stay in the cache.
    """
    axis, size = _block(w, span, factor * _SIZE)
    if size == 0:
        return fit(w, *others)
    length = w.shape[axis]

    def in_turn() -> T:
        def body(i: jax.Array, grid: T) -> T:
            # The last block reaches back over the one before, whose scales it finds again.
            first = jnp.minimum(i * size, length - size)

            def block(x: jax.Array) -> jax.Array:
                # XLA's CPU backend has no slices of bfloat16: it would convert all of the array first.
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


def _block(w: jax.Array, span: Span, most: int) -> tuple[int, int]:
    """Along which axis a block has how many elements: along one that is not reduced; 0 where all are one
    block.
    """
    kept = [axis for axis in range(w.ndim) if axis not in span.reduced(w.ndim)]
    blocks = -(-w.size // most)
    if blocks <= 1 or not kept or jax.device_count() > 1:
        return 0, 0
    # The first of those that are long enough, since its blocks are of neighbours in memory.
    axis = max(kept, key=lambda axis: (min(w.shape[axis], blocks), -axis))
    length = w.shape[axis]
    # Along the last axis lie the vectors.
    unit, least = (16, 64) if axis == w.ndim - 1 else (1, 1)
    size = max(-(-length // blocks), least)
    size = -(-size // unit) * unit
    return axis, size if size < length else 0
