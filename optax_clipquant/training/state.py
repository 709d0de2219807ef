"""Optimizers whose state holds its large arrays in 8 or 4 bits per number."""

import itertools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_clipquant._tree import (
    check_scalar,
    check_state,
    is_placeholder,
    map_with_path,
    path_of,
    unboxed,
)
from optax_clipquant.lowering.noise import noise, stream_of
from optax_clipquant.lowering.outline import opaque, outlined
from optax_clipquant.quant.companding import (
    CompandedArray,
    block_of,
    compand,
    is_saved_form,
    row_axes,
)
from optax_clipquant.quant.params import PyTree, is_quantized
from optax_clipquant.quant.quantizers.base import is_int
from optax_clipquant.quant.selection import Where, check_where
from optax_clipquant.training.origins import check_optimizer, origins_of
from optax_clipquant.training.weights import weight_states

# From here on, an array whose last block is shorter costs a TPU more than in float: its temporaries, 28 bytes
# an element for a vector of 9,000,011, leave the chip's fast memory.
_CUT = 2**21


class QuantizeStateState(NamedTuple):
    """State of ``quantize_state``.

    Attributes:
      count: the number of updates so far.
      inner_state: the optimizer's state, with a ``CompandedArray`` in place of each large array.

    Examples:
      >>> state = quantize_state(optax.sgd(0.1, momentum=0.9)).init(jnp.zeros((64, 128)))
      >>> state.inner_state[0].trace.codes.dtype
      dtype('int8')
    """

    count: jax.typing.ArrayLike
    inner_state: PyTree


def quantize_state(
    optimizer: optax.GradientTransformation,
    *,
    bits: int = 8,
    block_size: int = 256,
    min_size: int = 4096,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the large arrays of an optimizer's state in 8 or 4 bits per number.

    The state is decoded before each update and encoded after it, in blocks that share a scale (see
    ``CompandedArray``). Rounding is stochastic, so that changes too small for a code count on average: a
    second moment changes by a thousandth per step.

    It takes any optimizer or chain. Put transforms of the weights after it:
    ``optax.chain(quantize_state(optax.adamw(1e-3)), quantize_weights(quantizer))``.

    Not every state can be rounded. Iterates cannot, such as the ``z`` of ``optax.contrib.schedule_free``,
    and neither can differences of iterates, as in the memory of L-BFGS. Leaves that ``init`` computes from
    the values of the params, and the state of L-BFGS and of line searches, are refused by name, and
    ``where`` can exclude them. The README of the benchmarks lists which optimizers of optax and
    optax.contrib work and which are refused.

    Blocks lie along the second-to-last axis if it has at least 64 elements, else along the axis that
    gives the largest blocks. Where that axis has no equal blocks of a multiple of 32 elements, or is far
    longer than the last, as in most embeddings, each block spans the last axis. Arrays keep their rank, and
    on a mesh their sharding (but under ``jax.jit``, XLA replicates zeros on Auto axes: there, make the
    state by ``tx.init(params)``); devices exchange nothing larger than the scales. Numbers that are not finite
    become the largest level of their block.

    Args:
      optimizer: any optax optimizer.
      bits: 8, or 4.
      block_size: the largest number of elements that share a float32 scale, except where blocks span the
        last axis.
      min_size: arrays with fewer elements are left alone, as are scalars and arrays that would not become
        smaller.
      where: which arrays may be quantized, a function of the path, such as ``"0/mu/Dense_0/kernel"``, and
        the leaf in the optimizer's state. By default all.

    Returns:
      A ``GradientTransformationExtraArgs`` with a ``QuantizeStateState``. For Adam it keeps 2 bytes per
      weight, or 1 at 4 bits, plus 8 for each block and each row, instead of 8 per weight.

    Raises:
      ValueError: ``bits`` is neither 4 nor 8, or ``block_size`` is below 16; in ``init``, ``optimizer``
        quantizes weights, or its state holds iterates; in ``update``, the state was made with other
        ``bits`` or another ``block_size``.
      TypeError: an argument has another type, or in ``update``, the state is that of another transform.

    Warns:
      UserWarning: in ``init``, the state holds no array of at least ``min_size`` elements; or large arrays
        that equal blocks do not fill stay float, such as a vector of 9,000,011 elements.

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
    check_scalar("quantize_state", "min_size", min_size, "a number of elements")
    check_where(where)
    check_optimizer("quantize_state", optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        inner = optimizer.init(unboxed(params))
        if weight_states(inner):
            raise ValueError(
                "quantize_state: the optimizer quantizes weights, whose state must be exact; put that "
                "transform after: optax.chain(quantize_state(optimizer), quantize_weights(quantizer))"
            )
        found, refused, ragged = False, [], []
        known: dict[Any, CompandedArray] = {}

        def shrink(path: jax.tree_util.KeyPath, x: Any, is_iterate: bool, is_zero: bool) -> Any:
            nonlocal found
            if not _is_large(x, min_size) or (where is not None and not where(path_of(path), x)):
                return x
            block = block_of(x.shape, block_size)
            if _bytes(x.shape, block, bits) >= x.size * x.dtype.itemsize:
                return x
            if x.shape[block[0]] % block[1] and x.size >= _CUT:
                ragged.append(path_of(path))
                return x
            found = True
            if is_iterate:
                refused.append(path)
                return x
            if not (is_zero and isinstance(x, Tracer)):
                return compand(opaque(x), block, bits)
            # A program that encoded each of hundreds of zero arrays would take long to compile.
            kind = jax.typeof(x)
            if kind not in known:
                known[kind] = compand(opaque(x), block, bits)
            return jax.tree.map(jnp.copy, known[kind])

        origins = origins_of(optimizer, params, inner)
        inner = map_with_path(shrink, inner, *origins, is_leaf=is_quantized)
        if refused:
            raise ValueError(_refusal(refused, bits))
        if ragged:
            warnings.warn(
                f"quantize_state: {', '.join(map(repr, ragged))} of the optimizer's state stay float, since "
                f"no equal blocks of up to {block_size} elements fill them; pad them to a multiple of {block_size}",
                stacklevel=2,
            )
        if not found and not ragged and not is_placeholder(params):
            warnings.warn(
                f"quantize_state: the optimizer's state has no floating array of {min_size} and more "
                "elements, so nothing is quantized",
                stacklevel=2,
            )
        return QuantizeStateState(jnp.zeros((), jnp.int32), inner)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        check_state("quantize_state", state, QuantizeStateState)

        def widen(path: jax.tree_util.KeyPath, x: Any) -> Any:
            if is_saved_form(x):
                raise ValueError(
                    f"quantize_state: {path_of(path)!r} of the state was restored from a checkpoint in which it "
                    "was quantized, and stays float here; make the state anew with tx.init(params)"
                )
            if not _is_companded(x):
                return x
            expected = block_of(x.codes.shape, block_size)
            if (x.bits, x.block) != (bits, expected):
                raise ValueError(
                    f"quantize_state: {path_of(path)!r} of the state is kept in {x.bits} bits with blocks "
                    f"of {x.block[1]} along axis {x.block[0]}, and bits={bits}, block_size={block_size} "
                    f"give blocks of {expected[1]} along axis {expected[0]}; use the bits and block_size "
                    "that the state was made with, or make it anew with tx.init(params)"
                )
            return x.decode()

        def is_leaf(x: Any) -> bool:
            return _is_companded(x) or is_saved_form(x)

        inner = map_with_path(widen, state.inner_state, is_leaf=is_leaf)
        # The state is that of bare arrays; NNX's variables are put around the updates again. What else
        # changes the structure is meant to: lookahead takes gradients of the half of its params.
        boxes, bare = jax.tree.structure(updates), unboxed(updates)
        updates, inner = optimizer.update(bare, inner, unboxed(params), **extra_args)
        if jax.tree.structure(updates) == jax.tree.structure(bare):
            map_with_path(_check_shape, bare, updates)
        if jax.tree.structure(updates) == jax.tree.structure(bare) != boxes:
            updates = jax.tree.unflatten(boxes, jax.tree.leaves(updates))
        streams = itertools.count()

        def keep(before: Any, x: Any) -> Any:
            if not _is_companded(before):
                return x
            stream = stream_of(next(streams))
            return _encode(before.block, before.bits, x, before.scale, stream, state.count)

        inner = jax.tree.map(keep, state.inner_state, inner, is_leaf=_is_companded)
        return updates, QuantizeStateState(optax.safe_increment(state.count), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_shape(path: jax.tree_util.KeyPath, g: Any, u: Any) -> None:
    """Raises if a gradient was broadcast to the state of a leaf that had another shape in ``init``.

    An update smaller than its gradient is meant: ``optax.contrib.dpsgd`` takes a gradient for each example.
    """
    if jnp.size(u) > jnp.size(g):
        raise ValueError(
            f"quantize_state: updates leaf {path_of(path)!r} has shape {jnp.shape(g)}, but had "
            f"{jnp.shape(u)} in init; call tx.init again for params of other shapes"
        )


def _compand_at(
    block: tuple[int, int],
    bits: int,
    x: jax.Array,
    scale: jax.Array,
    stream: jax.Array,
    count: jax.Array,
) -> CompandedArray:
    # Noise for each element would cost a TPU 4 more bytes of traffic per weight and step.
    return compand(x, block, bits, noise(scale, stream, count))


_encode = outlined(_compand_at, statics=2)


def _is_companded(x: Any) -> bool:
    return isinstance(x, CompandedArray)


def _is_large(x: Any, min_size: int) -> bool:
    if is_quantized(x) or not jnp.issubdtype(getattr(x, "dtype", jnp.int32), jnp.floating):
        return False
    return x.ndim > 0 and x.size >= max(min_size, 1)


def _bytes(shape: tuple[int, ...], block: tuple[int, int], bits: int) -> float:
    """Bytes of an encoded array of ``shape``."""
    axis = len(shape) + block[0]
    across = row_axes(shape, block)
    rows = math.prod(shape) // math.prod(shape[a] for a in across) if across else 0
    scales = math.prod(shape) // shape[axis] * -(-shape[axis] // block[1])
    return math.prod(shape) * bits / 8 + 4 * (scales + rows)


def _refusal(paths: list[jax.tree_util.KeyPath], bits: int) -> str:
    fields = tuple(dict.fromkeys(path_of(_field(path)) for path in paths))
    fields = repr(fields[0] if len(fields) == 1 else fields)
    return (
        f"quantize_state: {path_of(paths[0])!r} of the optimizer's state holds params or gradients of one "
        f"step, or their differences, which {bits} bits would spoil; leave such arrays unquantized with "
        f"where=lambda path, leaf: not path.startswith({fields}), or do not quantize this state"
    )


def _field(path: jax.tree_util.KeyPath) -> jax.tree_util.KeyPath:
    """The start of ``path`` up to the last field of a named tuple, without the names of params."""
    ends = [i for i, key in enumerate(path, 1) if isinstance(key, jax.tree_util.GetAttrKey)]
    return path[: ends[-1]] if ends else path
