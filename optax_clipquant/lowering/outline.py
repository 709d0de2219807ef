"""What a compiler should treat as a whole: functions on a CPU, and constants."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from optax_clipquant.lowering.sharding import is_on_one_device

F = TypeVar("F", bound=Callable[..., Any])


def outlined(fn: F, statics: int = 0) -> F:
    """``fn`` under ``jax.jit``, which XLA's CPU backend neither inlines nor fuses with what is around it.

    For a long function of each leaf. XLA's CPU backend (jaxlib 0.10.2) compiles equal kernels once, and
    fuses a cheap operand into each kernel that reads it. Kept apart, calls for equal shapes have equal
    kernels, and operands are computed once: a step of a language model with 210 matrices, with ``quantize_state``
    and ``residual_bits``, compiles in 0.6 of the time, and needs 0.45 instead of 0.74 GB of temporaries. Other backends
    fuse across the call, which on a TPU saves a pass over the weights.

    Args:
      fn: a function of arrays, or trees of them; it returns a tree of arrays.
      statics: the number of leading arguments that are static.
    """
    given = tuple(range(statics))
    inner = jax.jit(fn, static_argnums=given)

    def call(*args: Any) -> Any:
        results, tree = jax.tree.flatten(
            inner(*args[:statics], *jax.tree.map(_operand, args[statics:]))
        )
        # The call is the operation that produces each of the results.
        return tree.unflatten([set_xla_metadata(results[0], inlineable="false"), *results[1:]])

    @functools.partial(jax.jit, static_argnums=given)
    @functools.wraps(fn)
    def outer(*args: Any) -> Any:
        if not is_on_one_device():  # the partitioner splits what is inlined
            return inner(*args)
        bound = (functools.partial(f, *args[:statics]) for f in (call, inner))
        return jax.lax.platform_dependent(*args[statics:], cpu=next(bound), default=next(bound))

    return outer  # pyright: ignore[reportReturnType]


def opaque(x: jax.Array) -> jax.Array:
    """``x``, whose value the compiler does not know if it is constant.

    Otherwise XLA would fold what follows from it: for the zeros that an optimizer's state starts with,
    that takes minutes (8-bit Adam of a model with 31 million weights, on a CPU: over 180 s instead of 0.8).
    """
    return jax.lax.optimization_barrier(x)


def _to_int4(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.int4)


def _to_int8(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.int8)


to_int4 = outlined(_to_int4)
"""Converts int8 codes to int4.

XLA's CPU backend (jaxlib 0.10.2) writes int4 by an atomic operation for each number, and computes what is fused
with it one number at a time: to encode 2048 x 2048 numbers in 4 bits takes 56 ms so, and 27 ms apart. Of
these, the conversion takes 17, whichever operation it is written as; the emitters that XLA had before take 1.2
(``XLA_FLAGS=--xla_cpu_use_fusion_emitters=false``), but fewer other loops are fast with them. Codes packed in
pairs into bytes would avoid it, at a TPU's expense: 88 bytes of traffic a weight in place of 29.
"""

to_int8 = outlined(_to_int8)
"""Converts int4 codes to int8; apart, 2048 x 2048 numbers are decoded in 2.8 ms instead of 4.1 on a CPU."""


def _operand(x: jax.Array) -> jax.Array:
    """``x``; a constant scalar would be compiled into the function, whose kernels would then differ."""
    return x if x.ndim else opaque(x)
