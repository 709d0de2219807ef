"""Arrays in 8 or 4 bits per number, in blocks that share a scale, with levels that are denser near zero."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.outline import to_int4, to_int8
from optax_clipquant.lowering.sharding import (
    for_groups,
    for_pieces,
    merge_axis,
    piece_of,
    reduce_runs,
    spec_of,
    split_axis,
    without,
)
from optax_clipquant.quant.restore import as_text, check_restored, register_with_layout

_TINY = float(jnp.finfo(jnp.float32).tiny)


@partial(
    register_with_layout,
    data_fields=("codes", "scale", "row"),
    meta_fields=("block", "bits", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class CompandedArray:
    """An array in blocks that share a scale, with levels that are denser near zero.

    A block is a run of neighbours along one axis, and a row holds all elements at one index of that axis
    and of those before it. Where blocks span the last axis, a row lies along the second-to-last instead.
    An element is scaled by the smaller of two magnitudes, the largest of its block and the largest of its
    row (rank-1 normalization), in a matrix whose blocks lie along the first axis::

        s[i, j] = min(row[i], abs(scale[i // size, j]))

    so that rows and columns that are decades smaller than their neighbours keep their precision. The
    levels of a block with negative numbers are those in the first line, and of a block without those in the
    second::

        sign(k) * (k / n)**2 * s,           abs(k) <= n = 2**(bits - 1) - 1
        ((k + 1) / (n + 1))**4 * s, or 0,   0 <= k <= n = 2**bits - 1, 0 at k = 0

    so that zero and the largest number of a block are exact. Second moments span twice as many decades as
    first moments, and the smallest levels have the same ratio as the largest: Adam's steps do not grow
    where both moments are small. In a block without negative numbers, a number that is not zero never gets
    the code of zero, since an optimizer may divide by it.

    Invariants:
      * ``codes`` has the array's shape; ``scale`` has its rank, with one entry per block along the blocks'
        axis; ``row`` has extent 1 along the axes that a row lies along.
      * ``scale`` is negative for a block with negative numbers.
      * Scales are finite. The code ``-(n + 1)``, which no level of the first line has, stands for NaN.

    Attributes:
      codes: ``k``, or ``k - 2**(bits - 1)`` in a block without negative numbers; int8 or int4.
      scale: the float32 scale of each block.
      row: the float32 magnitude of each row; None if rows are short.
      block: the negative axis along which blocks lie, and their size. The last block may be shorter.
      bits: 8 or 4.
      dtype: the dtype of the array.

    References:
      Li et al., Memory efficient optimizers with 4-bit states, 2023 (arXiv:2309.01507), for rank-1
      normalization.

    Examples:
      >>> import optax
      >>> from optax_clipquant import quantize_state
      >>> state = quantize_state(optax.sgd(0.1, momentum=0.9)).init(jnp.zeros((64, 128)))
      >>> trace = state.inner_state[0].trace
      >>> trace.codes.dtype, trace.decode().shape
      (dtype('int8'), (64, 128))
    """

    codes: jax.Array
    scale: jax.Array
    row: jax.Array | None
    block: tuple[int, int]
    bits: int
    dtype: np.dtype

    @jax.jit
    def decode(self) -> jax.Array:
        """Decodes the array, in its dtype."""
        codes = self.codes if self.bits == 8 else to_int8(self.codes)
        view = _View(codes, self.block)
        k = view.split(codes).astype(jnp.float32)
        s, negative = view.scales(self.scale, self.row)
        half = 2.0 ** (self.bits - 1)
        first = jnp.sign(k) * jnp.square(k / (half - 1)) * s
        first = jnp.where(k < 1 - half, jnp.nan, first)
        # Keeps even the smallest level of a small scale from being flushed to zero.
        second = jnp.maximum(jnp.square(jnp.square((k + (half + 1)) / (2 * half))) * s, _TINY)
        second = jnp.where(k > -half, second, 0)
        values = jnp.where(negative, first, second).astype(self.dtype)
        return view.merge(values)


@partial(jax.jit, static_argnames=("block", "bits", "keep_nan", "rows"))
def compand(
    x: jax.Array,
    block: tuple[int, int],
    bits: int,
    noise: jax.Array | None = None,
    *,
    keep_nan: bool = False,
    rows: bool = True,
) -> CompandedArray:
    """Encodes ``x`` in blocks of ``block[1]`` elements along axis ``block[0]``.

    Numbers that are not finite are kept out of the scales. They become the largest level of their block,
    so that their neighbours keep their values and they may recover.

    Args:
      x: a floating array.
      block: the negative axis, and the size of blocks along it.
      bits: 8 or 4.
      noise: noise in [0, 1), of the shape of the scales or of ``x``, for stochastic rounding, which is
        unbiased. By default, numbers are rounded to the nearest level.
      keep_nan: whether numbers that are not finite become NaN instead; their block then counts as one with
        negative numbers.
      rows: whether rows that are long enough have a magnitude.
    """
    view = _View(x, block)
    w = view.split(x).astype(jnp.float32)
    finite = jnp.isfinite(w)
    kept = jnp.where(finite, w, -_TINY if keep_nan else 0)
    # All extremes are those of one array, which a TPU reads once for all: with those of its magnitudes among them,
    # a step of the benchmark's transformer with 12 layers peaks at 13.9 GiB instead of 12.1.
    low = view.reduce(jnp.min, kept)
    largest = jnp.maximum(view.reduce(jnp.max, kept), -low)
    scale = jnp.where(low < 0, -jnp.maximum(largest, _TINY), largest)
    row = view.row(kept) if rows else None
    s, negative = view.scales(scale, row)
    half = 2.0 ** (bits - 1)
    # Levels are counted by their distance from zero: codes from 1 up without negative numbers, else magnitudes.
    steps = jnp.where(negative, half - 1, 2 * half)
    # The inverse of a scale above 2**126 is flushed to zero, and so is s / 16 of a small one. It follows
    # from s: one array more of a number for each block, and a TPU encodes two moments in two passes.
    near_one = jnp.where(s > 1, 2.0**-4, 2.0**24)
    magnitude = jnp.where(finite, jnp.abs(w), s)
    ratio = jnp.minimum((magnitude * near_one) / jnp.maximum(s * near_one, _TINY), 1)
    root = jnp.sqrt(ratio)
    below = jnp.floor(jnp.where(negative, root, jnp.sqrt(root)) * steps)

    def level(k: jax.Array) -> jax.Array:
        square = jnp.square(k / steps)
        return jnp.where(negative, square, jnp.square(square))

    low = level(below)
    if noise is None:
        part: jax.Array | float = 0.5
    else:
        part = view.split(noise) if noise.shape == x.shape else view.spread(noise)
    up = ratio - low > part * (level(below + 1) - low)
    k = jnp.minimum(jnp.where(up, below + 1, below), steps)
    first = jnp.where(w < 0, -k, k)
    first = jnp.where(finite, first, -half) if keep_nan else jnp.where(jnp.isnan(w), 0, first)
    second = jnp.where(magnitude == 0, 0, jnp.maximum(k - 1, 1)) - half
    codes = view.merge(jnp.where(negative, first, second).astype(jnp.int8))
    return CompandedArray(codes if bits == 8 else to_int4(codes), scale, row, block, bits, x.dtype)


def block_of(shape: tuple[int, ...], largest: int) -> tuple[int, int]:
    """The negative axis and the size of the blocks of an array.

    The axis is the second-to-last, whose neighbours an accelerator holds in the same lanes, if it gives
    blocks of at least 64; else the axis that gives the largest blocks. Each block spans the last axis,
    however long, where the second-to-last has no blocks of equal size that an accelerator takes apart
    without moving elements, or is far longer. The choice depends on the shape alone, not on how the
    array is sharded.
    """
    last = len(shape) - 1
    axis = last - 1
    if axis < 0 or min(shape[axis], largest) < min(64, largest):
        axis = max(range(len(shape)), key=lambda a: (min(shape[a], largest), a < last, a))
    n, most = shape[axis], min(shape[axis], largest)
    wide = axis == last - 1 and shape[last] >= 64
    # A TPU keeps 32 neighbours of 8-bit codes together. Blocks of 250 of 10,000 rows need 39 bytes a weight
    # of temporaries, whole rows 4. It fuses the reductions of 196 blocks of 768 columns with nothing: 20.
    tiled = wide and largest >= 32
    sizes = (k for k in range(1, most + 1) if n % k == 0 and (k == n or k % 32 == 0 or not tiled))
    size = max(sizes, default=0)
    if wide and (2 * size < most or n >= max(8 * shape[last], 4096)):
        return -1, shape[last]
    # Blocks of equal size if these are at least half as large, else the last block is shorter.
    return axis - len(shape), size if 2 * size >= most else largest


def row_axes(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The axes along which rows lie; none if rows are so short that a number for each would cost much."""
    axis = len(shape) + block[0]
    axes = tuple(range(axis + 1, len(shape)))
    if not axes and axis > 0 and block[1] == shape[axis]:
        axes = (axis - 1,)
    return axes if math.prod(shape[a] for a in axes) >= 64 else ()


class _View:
    """A view of an array with pieces of blocks along an axis, and the elements of a piece along the next."""

    def __init__(self, x: jax.Array, block: tuple[int, int]):
        self.axis, self.size = block[0] + x.ndim, block[1]
        self.length, self.spec = x.shape[self.axis], spec_of(x, x.shape)
        # If the last block is shorter, pieces divide it too.
        self.piece = math.gcd(piece_of(x, self.axis, self.size), self.length)
        if self.axis == x.ndim - 1 and self.size < self.length:
            # A TPU holds 128 neighbours of a vector in a row of lanes, and takes such rows apart without moving
            # them. Pieces of 256 cost a vector of 8,388,608 elements 48 bytes an element of temporaries, these 2.
            self.piece = math.gcd(self.piece, 128)
        self.rows = row_axes(x.shape, block)

    @property
    def run(self) -> int:
        """The number of pieces in a block."""
        return self.size // self.piece

    def split(self, x: jax.Array) -> jax.Array:
        return split_axis(x, self.axis, 0, self.length, self.piece)

    def merge(self, x: jax.Array) -> jax.Array:
        return merge_axis(x, self.axis, self.spec)

    def spread(self, scale: jax.Array) -> jax.Array:
        """Expands values of blocks to pieces."""
        return for_pieces(scale, self.axis, self.run, self.length // self.piece)

    def reduce(self, fn: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """The largest or smallest number of each block; 0 may count as one of them."""
        each = fn(x, axis=self.axis + 1, keepdims=True)
        return for_groups(reduce_runs(fn, each, self.axis, self.run), self.axis, self.run)

    def row(self, x: jax.Array) -> jax.Array | None:
        """The largest magnitude of each row, or None if rows are short."""
        if not self.rows:
            return None
        axes = tuple(a + (a > self.axis) for a in self.rows)
        high, low = (fn(x, axis=axes, keepdims=True) for fn in (jnp.max, jnp.min))
        spec = self.spec
        for axis in self.rows:
            spec = without(spec, axis)
        return merge_axis(jnp.maximum(high, -low), self.axis, spec)

    def scales(self, scale: jax.Array, row: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The magnitude ``s`` of each element, and whether its block has negative numbers."""
        spread = self.spread(scale)
        s = jnp.abs(spread)
        if row is not None:
            s = jnp.minimum(s, self.split(row))
        return s, spread < 0


def _to_state(x: CompandedArray) -> dict[str, Any]:
    # msgpack has no int4.
    arrays = {"codes": x.codes.astype(jnp.int8), "scale": x.scale, "row": x.row}
    return {**arrays, "layout": as_text(_layout_of(x))}


def _layout_of(x: CompandedArray) -> dict[str, Any]:
    return {"bits": x.bits, "block": x.block, "dtype": x.dtype}


def is_saved_form(x: Any) -> bool:
    """Whether ``x`` is what ``flax.serialization`` saves of a ``CompandedArray``."""
    return isinstance(x, Mapping) and {"codes", "scale", "row", "layout"} <= x.keys()


def _from_state(x: CompandedArray, state: Any) -> CompandedArray:
    path = flax.serialization.current_path()
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path.removeprefix('./')}: the checkpoint holds an array in float, and the tree to restore into "
            f"one in {x.bits} bits; build that tree with the quantize_state that the checkpoint was saved with"
        )
    codes, scale, row = state["codes"], state["scale"], state.get("row")
    if codes.dtype == np.uint8:
        raise ValueError(
            "CompandedArray: this checkpoint holds the layout of version 0.1 (uint8 codes, blocks along "
            "the last axis), which has no row magnitudes; restore the params, and start the optimizer's "
            "state anew with tx.init(params)"
        )
    check_restored(
        path,
        _layout_of(x),
        state.get("layout"),
        {"codes": x.codes, "scale": x.scale, "row": x.row},
        {"codes": codes, "scale": scale, "row": row},
    )
    return dataclasses.replace(x, codes=jnp.asarray(codes, x.codes.dtype), scale=scale, row=row)


flax.serialization.register_serialization_state(CompandedArray, _to_state, _from_state)
