"""Arrays in blocks that share a scale, at levels that are dense near zero, in 8 or 4 bits a number."""

import dataclasses
from functools import partial

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.reduce import Span, extremes
from optax_clipquant.lowering.sharding import (
    for_groups,
    for_pieces,
    merge_axis,
    piece_of,
    spec_of,
    split_axis,
)

_TINY = float(jnp.finfo(jnp.float32).tiny)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scale"),
    meta_fields=("block", "bits", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class CompandedArray:
    """An array in blocks that share a scale, with levels that are dense near zero.

    With ``s`` the largest magnitude in a block, the levels of a block that has negative numbers are
    those on the left, of one that has none those on the right::

        sign(k) * (k / n)**2 * s,           abs(k) <= n = 2**(bits - 1) - 1
        ((k + 1) / (n + 1))**4 * s, or 0,   0 <= k <= n = 2**bits - 1, 0 at k = 0

    so the largest number of a block is kept exactly, and zero is. Second moments span twice as many
    decades as first ones, and in the least levels one stands to the other as in the largest: Adam's
    steps do not grow where both are small. A number that is not zero gets a code that is not, where
    there are no negative ones: a step would divide by nothing.

    Invariants:
      * ``scale`` is ``-s`` for a block that has negative numbers; it has the array's rank, and as
        many entries along the blocks' axis as there are blocks.
      * ``codes`` has the array's rank; at 4 bits half its extent along the last axis, where a byte
        holds two neighbours, the first in its low bits.

    Attributes:
      codes: ``k``, or ``k + n + 1`` where there are negative numbers; uint8.
      scale: float32.
      block: the axis along which blocks lie, counted from the last, and their size.
      bits: 8 or 4.
      dtype: of the array.
    """

    codes: jax.Array
    scale: jax.Array
    block: tuple[int, int]
    bits: int
    dtype: np.dtype

    @jax.jit
    def decode(self) -> jax.Array:
        """The array, in its dtype."""
        axis, size = self.block
        codes = _unpack(self.codes) if self.bits == 4 else self.codes
        axis += codes.ndim
        spec = spec_of(codes, codes.shape)
        piece = piece_of(codes, axis, size)
        k = split_axis(codes, axis, 0, codes.shape[axis], piece).astype(jnp.float32)
        scale = for_pieces(self.scale, axis, size // piece, k.shape[axis])
        shifted = k - 2.0 ** (self.bits - 1)
        first = jnp.square(shifted / (2.0 ** (self.bits - 1) - 1)) * -scale
        second = jnp.square(jnp.square((k + 1) / 2.0**self.bits)) * scale
        # Not even the least level of a small scale is flushed to zero.
        second = jnp.where(k > 0, jnp.maximum(second, _TINY), 0 * scale)
        values = jnp.where(scale < 0, jnp.sign(shifted) * first, second)
        values = jnp.where(jnp.isfinite(scale), values, jnp.nan).astype(self.dtype)
        return merge_axis(values, axis, spec)


@partial(jax.jit, static_argnames=("block", "bits"))
def compand(
    x: jax.Array, block: tuple[int, int], bits: int, draws: jax.Array | None = None
) -> CompandedArray:
    """``x`` in blocks along ``block[0]`` of ``block[1]`` elements: nearest levels, or with ``draws``
    from [0, 1) one of the two around each number, unbiased.
    """
    axis, size = block
    axis += x.ndim
    piece = piece_of(x, axis, size)

    def view(y: jax.Array) -> jax.Array:
        return split_axis(y, axis, 0, y.shape[axis], piece)

    w = view(x).astype(jnp.float32)
    high, low = extremes(w, Span((axis + 1,), axis, size // piece))
    negative = low < 0
    largest = jnp.maximum(high, -low)
    n = 2.0 ** (bits - 1) - 1
    # Levels by their distance from zero: codes from 1 up where none is negative, else magnitudes.
    steps = jnp.where(negative, n, 2.0**bits)
    ratio = jnp.abs(w) / jnp.where(largest == 0, 1, largest)
    root = jnp.sqrt(ratio)
    below = jnp.floor(jnp.where(negative, root, jnp.sqrt(root)) * steps)

    def level(k: jax.Array) -> jax.Array:
        square = jnp.square(k / steps)
        return jnp.where(negative, square, jnp.square(square))

    low = level(below)
    up = ratio - low > (0.5 if draws is None else view(draws)) * (level(below + 1) - low)
    k = jnp.where(up, below + 1, below)
    unsigned = jnp.where(w == 0, 0, jnp.clip(k - 1, 1, 2.0**bits - 1))
    k = jnp.minimum(k, n)
    k = jnp.where(negative, jnp.where(w < 0, -k, k) + (n + 1), unsigned)
    codes = jnp.where(jnp.isfinite(largest), k, 0).astype(jnp.uint8)
    codes = merge_axis(codes, axis, spec_of(x, x.shape))
    scale = for_groups(jnp.where(negative, -largest, largest), axis, size // piece)
    return CompandedArray(_pack(codes) if bits == 4 else codes, scale, block, bits, x.dtype)


def _pack(codes: jax.Array) -> jax.Array:
    """Two neighbours along the last axis in a byte, the first in its low bits.

    As a number of 16 bits, which XLA's CPU backend fuses; slices it does not (6 times as slow).
    """
    pairs = split_axis(codes, codes.ndim - 1, 0, codes.shape[-1], 2)
    both = jax.lax.bitcast_convert_type(pairs, jnp.uint16)
    return (both | (both >> 4)).astype(jnp.uint8)


def _unpack(packed: jax.Array) -> jax.Array:
    wide = packed.astype(jnp.uint16)
    pairs = jax.lax.bitcast_convert_type((wide & 15) | ((wide & 240) << 4), jnp.uint8)
    return merge_axis(pairs, packed.ndim - 1, spec_of(packed, packed.shape))


flax.serialization.register_serialization_state(
    CompandedArray,
    lambda x: {"codes": x.codes, "scale": x.scale},
    lambda x, state: dataclasses.replace(x, **state),
)
