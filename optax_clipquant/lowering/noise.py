"""Noise for stochastic rounding, computed where it is used."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.sharding import reshard, spec_of

_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio


def stream_of(number: int | jax.Array) -> jax.Array:
    """The start of a stream of ``noise``; for a Python integer, no program computes it."""
    if isinstance(number, int):
        return jnp.asarray(
            _mix(np.array([number], np.uint32))[0]
        )  # a scalar would warn of overflow
    return _mix(number.astype(jnp.uint32))


# Only the shape and sharding of `like` are used; keeping the argument tells jit the devices.
@functools.partial(jax.jit, keep_unused=True, static_argnames="alone")
def noise(
    like: jax.Array,
    stream: jax.typing.ArrayLike,
    step: jax.typing.ArrayLike,
    *,
    alone: bool = False,
) -> jax.Array:
    """Noise in [0, 1) with the shape and sharding of ``like``.

    Each element starts at a hash of its index, and advances by the golden ratio (modulo 1) in each
    step, a Kronecker sequence: over any run of steps, or every k-th step, the fraction of numbers below
    ``p`` is closer to ``p`` than with independent noise. A value rounded with it step by step keeps its
    mean, as with independent noise, but drifts less.

    JAX's own generators cost more than all the rest of a training step on a CPU, and not all give the
    same numbers on every mesh.

    Args:
      like: the array to be rounded.
      stream: ``stream_of`` a number that differs from array to array, so that no two get the same noise.
      step: the number of the step, an integer.
      alone: for arrays as large as weights, whether streams have no intermediate values in common. A TPU
        computes common values once and rounds all weights that read them in one fusion, so that all are
        in memory at the same time: 4.0 bytes a weight of temporaries instead of 2.0, with two weights.
    """
    start = index = jnp.asarray(stream).astype(jnp.uint32)
    # An odd multiplier for each axis spreads neighbours over all bits; mixing does the rest.
    multiplier = 0x9E3779B1
    for axis in range(like.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis)
        along = reshard(along, spec_of(like, like.shape))
        index += (along + start if alone else along) * jnp.uint32(multiplier)
        multiplier = multiplier * 0x85EBCA77 % 2**32
    turned = _mix(index) + jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    return (turned >> 8).astype(jnp.float32) * 2.0**-24


def _mix(x: Any) -> Any:
    """The 32-bit finalizer ``lowbias32`` of Wellons' hash prospector (public domain)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
