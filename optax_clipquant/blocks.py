"""Fitting to a large array a block at a time, so that what is read again is still in the cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_clipquant.grids import Grid
from optax_clipquant.reductions import Span

_SIZE = 2**20  # elements of a block: 4 MB, of which each pass has its loops and their start
_Fit = Callable[[jax.Array, Grid | None], Grid]


def fit_in_blocks(fit: _Fit, w: jax.Array, span: Span, start: Grid | None) -> Grid:
    """``fit(w, start)``, where ``fit`` reads ``w`` several times and treats each span by itself.

    XLA's CPU backend writes out what a reduction by vectors leaves (see ``Span.reduce``), which for a
    large array is much, and fresh memory; and it reads the array from memory in each pass. So there, on a
    single device, a loop fits one block after the other.
    """
    axis, blocks = _split(w, span)
    if blocks == 1:
        return fit(w, start)
    length = w.shape[axis]
    size = -(-length // blocks)

    def in_turn() -> Grid:
        like = jax.eval_shape(fit, w, start)
        grid = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

        def body(i: jax.Array, grid: Grid) -> Grid:
            # The last block reaches back over the one before, whose scales it finds again.
            first = jnp.minimum(i * size, length - size)

            def block(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, first, size, axis)

            part = fit(block(w), jax.tree.map(block, start))
            return jax.tree.map(
                lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x, first, axis),
                grid,
                part,
            )

        return jax.lax.fori_loop(0, -(-length // size), body, grid)

    return jax.lax.platform_dependent(cpu=in_turn, default=lambda: fit(w, start))


def _split(w: jax.Array, span: Span) -> tuple[int, int]:
    """Which axis to split, and into how many blocks: an axis along which nothing is reduced."""
    axes = () if span.axes is None else {axis % w.ndim for axis in span.axes}
    kept = [axis for axis in range(w.ndim) if axis not in axes]
    wanted = -(-w.size // _SIZE)
    if span.axes is None or not kept or jax.device_count() > 1:
        return 0, 1
    # The first of those that are long enough, since its blocks are of neighbours in memory.
    axis = max(kept, key=lambda axis: (min(w.shape[axis], wanted), -axis))
    return axis, min(w.shape[axis], wanted)
