"""Any optimizer with the large arrays of its state in 8 or 4 bits a number."""

import dataclasses
import itertools
import warnings
from functools import partial
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clipquant.dither import dither
from optax_clipquant.params import PyTree, is_quantized
from optax_clipquant.paths import unboxed
from optax_clipquant.sharding import merge_axis, spec_of, split_axis
from optax_clipquant.weights import QuantizeWeightsState, RoundWeightsState

_TINY = float(jnp.finfo(jnp.float32).tiny)


class QuantizeStateState(NamedTuple):
    """State of ``quantize_state``.

    Attributes:
      count: the number of updates so far.
      inner_state: the optimizer's state, with a ``CompandedArray`` in place of each large array.
    """

    count: jax.typing.ArrayLike
    inner_state: PyTree


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
        k = split_axis(codes, axis, 0, codes.shape[axis], size).astype(jnp.float32)
        scale = jnp.expand_dims(self.scale, axis + 1)
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
    from [0, 1) one of the two around each number, right on the average.
    """
    axis, size = block
    axis += x.ndim

    def view(y: jax.Array) -> jax.Array:
        return split_axis(y, axis, 0, y.shape[axis], size)

    w = view(x).astype(jnp.float32)
    low, high = (f(w, axis=axis + 1, keepdims=True) for f in (jnp.min, jnp.max))
    negative = low < 0
    largest = jnp.maximum(high, -low)
    n = 2.0 ** (bits - 1) - 1
    ratio = jnp.abs(w) / jnp.where(largest == 0, 1, largest)
    root = jnp.sqrt(ratio)
    below = jnp.floor(jnp.where(negative, root * n, jnp.sqrt(root) * 2.0**bits - 1))

    def level(k: jax.Array) -> jax.Array:
        fourth = jnp.square(jnp.square((k + 1) / 2.0**bits))
        return jnp.where(negative, jnp.square(k / n), fourth)

    chance = (ratio - level(below)) / (level(below + 1) - level(below))
    up = chance > (0.5 if draws is None else view(draws))
    k = below + up.astype(jnp.float32)
    unsigned = jnp.where(w == 0, 0, jnp.clip(k, 1, 2.0**bits - 1))
    k = jnp.where(negative, jnp.sign(w) * jnp.minimum(k, n) + (n + 1), unsigned)
    codes = jnp.where(jnp.isfinite(largest), k, 0).astype(jnp.uint8)
    codes = merge_axis(codes, axis, spec_of(x, x.shape))
    scale = jnp.squeeze(jnp.where(negative, -largest, largest), axis + 1)
    return CompandedArray(_pack(codes) if bits == 4 else codes, scale, block, bits, x.dtype)


def quantize_state(
    optimizer: optax.GradientTransformation,
    *,
    bits: int = 8,
    block_size: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the large arrays of an optimizer's state in 8 or 4 bits a number.

    Before each update the state is decoded, and after it encoded again, in blocks that share a scale
    (see ``CompandedArray``). Rounding is stochastic, so that changes too small for a code count on
    the average: a second moment changes by a thousandth in a step.

    It takes any optimizer, or chain of them. Put transforms of the weights after it:
    ``optax.chain(quantize_state(optax.adamw(1e-3)), quantize_weights(quantizer))``. Do not wrap
    transforms whose state holds weights, such as ``optax.lookahead`` or ``optax.ema`` of params: they
    would be rounded as well.

    Blocks lie along the last axis, where it splits into blocks of at least a quarter of
    ``block_size``; else along the axis that splits into the largest. Arrays keep their rank, and on a
    mesh their sharding, without communication where each device holds whole blocks. Where an array
    holds a value that is not finite, its block decodes to NaN.

    Args:
      optimizer: any optax optimizer.
      bits: 8, or 4. (Arrays with an odd last axis are kept in 8.)
      block_size: the largest number of elements that share a float32 scale.
      min_size: arrays of fewer elements stay as they are.

    Returns:
      A ``GradientTransformationExtraArgs`` with a ``QuantizeStateState``. For Adam it keeps 2 bytes a
      weight, or 1, and 8 for each block, in place of 8.

    Raises:
      ValueError: ``bits`` is neither 4 nor 8, or ``block_size`` is below 16; in ``init``, ``optimizer``
        quantizes weights.

    Warns:
      UserWarning: in ``init``, the state holds no array of ``min_size`` and more.

    References:
      Dettmers et al., 8-bit optimizers via block-wise quantization, 2022 (arXiv:2110.02861). Li et
      al., Memory efficient optimizers with 4-bit states, 2023 (arXiv:2309.01507).

    Examples:
      >>> tx = quantize_state(optax.sgd(0.1, momentum=0.9))
      >>> params = {"kernel": jnp.zeros((512, 512))}
      >>> state = tx.init(params)
      >>> round(sum(x.nbytes for x in jax.tree.leaves(state)) / 512**2, 2)
      1.02
      >>> updates, state = jax.jit(tx.update)({"kernel": jnp.ones((512, 512))}, state, params)
      >>> updates["kernel"][0, 0]
      Array(-0.1, dtype=float32)
    """
    if bits not in (4, 8):
        raise ValueError(f"quantize_state: bits must be 8 or 4, got {bits!r}")
    if not isinstance(block_size, int) or block_size < 16:
        raise ValueError(
            f"quantize_state: block_size must be an integer of at least 16, got {block_size!r}"
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        inner = optimizer.init(unboxed(params))
        kinds = (QuantizeWeightsState, RoundWeightsState)
        if any(
            isinstance(x, kinds)
            for x in jax.tree.leaves(inner, is_leaf=lambda x: isinstance(x, kinds))
        ):
            raise ValueError(
                "quantize_state: the optimizer quantizes weights, whose state must be exact; put that "
                "transform after: optax.chain(quantize_state(optimizer), quantize_weights(quantizer))"
            )
        found = False

        def shrink(x: Any) -> Any:
            nonlocal found
            dtype = getattr(x, "dtype", jnp.int32)
            if is_quantized(x) or not jnp.issubdtype(dtype, jnp.floating) or x.size < min_size:
                return x
            found = True
            # Under jit these are mostly constants, which the compiler would take seconds to fold.
            return compand(jax.lax.optimization_barrier(x), *_blocks(x.shape, block_size, bits))

        inner = jax.tree.map(shrink, inner, is_leaf=is_quantized)
        if not found:
            warnings.warn(
                f"quantize_state: the optimizer's state has no floating array of {min_size} and more "
                "elements, so nothing is quantized",
                stacklevel=2,
            )
        return QuantizeStateState(jnp.zeros((), jnp.int32), inner)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        inner = jax.tree.map(
            lambda x: x.decode() if _is_companded(x) else x,
            state.inner_state,
            is_leaf=_is_companded,
        )
        updates, inner = optimizer.update(updates, inner, params, **extra_args)
        streams = itertools.count()

        def keep(before: Any, x: Any) -> Any:
            if not _is_companded(before):
                return x
            return compand(x, before.block, before.bits, dither(x, next(streams), state.count))

        inner = jax.tree.map(keep, state.inner_state, inner, is_leaf=_is_companded)
        return updates, QuantizeStateState(optax.safe_increment(state.count), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_companded(x: Any) -> bool:
    return isinstance(x, CompandedArray)


def _blocks(shape: tuple[int, ...], block_size: int, bits: int) -> tuple[tuple[int, int], int]:
    """The axis and size of the blocks of an array, and their bits.

    They follow from its shape alone, not from how it is sharded.
    """
    if bits == 4 and shape[-1] % 2:
        bits = 8
    largest = [max(k for k in range(1, min(n, block_size) + 1) if n % k == 0) for n in shape]
    axis = len(shape) - 1
    if 4 * largest[axis] < block_size:
        axis = max(range(len(shape)), key=lambda a: (largest[a], a))
    size = largest[axis]
    if 16 * size < block_size:
        # No axis splits well (they are primes, say): one block spans the longest.
        axis = max(range(len(shape)), key=lambda a: shape[a])
        size = shape[axis]
    return (axis - len(shape), size), bits


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
