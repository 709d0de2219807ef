"""Any optimizer with the large arrays of its state in 8 or 4 bits a number."""

import itertools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clipquant._tree import unboxed
from optax_clipquant.lowering.noise import dither
from optax_clipquant.quant.companding import CompandedArray, compand
from optax_clipquant.quant.params import PyTree, is_quantized
from optax_clipquant.quant.quantizers import is_int
from optax_clipquant.training.weights import weight_states


class QuantizeStateState(NamedTuple):
    """State of ``quantize_state``.

    Attributes:
      count: the number of updates so far.
      inner_state: the optimizer's state, with a ``CompandedArray`` in place of each large array.
    """

    count: jax.typing.ArrayLike
    inner_state: PyTree


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
    mesh their sharding, without communication where each device holds whole blocks; else they
    exchange a few numbers for each piece of a block. Where an array holds a value that is
    not finite, its block decodes to NaN.

    Args:
      optimizer: any optax optimizer.
      bits: 8, or 4. (Arrays with an odd last axis are kept in 8.)
      block_size: the largest number of elements that share a float32 scale.
      min_size: arrays of fewer elements stay as they are, and so do scalars.

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
    if not is_int(block_size) or block_size < 16:
        raise ValueError(
            f"quantize_state: block_size must be an integer of at least 16, got {block_size!r}"
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        inner = optimizer.init(unboxed(params))
        if weight_states(inner):
            raise ValueError(
                "quantize_state: the optimizer quantizes weights, whose state must be exact; put that "
                "transform after: optax.chain(quantize_state(optimizer), quantize_weights(quantizer))"
            )
        found = False

        def shrink(x: Any) -> Any:
            nonlocal found
            dtype = getattr(x, "dtype", jnp.int32)
            if is_quantized(x) or not jnp.issubdtype(dtype, jnp.floating):
                return x
            if x.ndim == 0 or x.size < max(min_size, 1):
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
        # The state is that of bare arrays; NNX's variables are put around the updates again.
        boxes = jax.tree.structure(updates)
        updates, inner = optimizer.update(unboxed(updates), inner, unboxed(params), **extra_args)
        if jax.tree.structure(updates) != boxes:
            updates = jax.tree.unflatten(boxes, jax.tree.leaves(updates))
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
