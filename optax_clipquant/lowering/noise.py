"""Thresholds for stochastic rounding, computed where they are used."""

import functools

import jax
import jax.numpy as jnp

from optax_clipquant.lowering.sharding import reshard, spec_of

_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio


# Only the shape and sharding of `like` are used; kept, it says on which devices.
@functools.partial(jax.jit, keep_unused=True)
def noise(like: jax.Array, stream: jax.typing.ArrayLike, step: jax.typing.ArrayLike) -> jax.Array:
    """Numbers in [0, 1) of the shape and sharding of ``like``.

    Each element starts at a hash of its index, and moves on by the golden ratio (modulo 1) in each
    step: of any run of steps, the share with a number below ``p`` is nearer to ``p`` than chance
    would bring it (a Kronecker sequence; the same holds for every k-th step). What is rounded step by
    step with these numbers keeps its mean, as with independent ones, but walks less far from it.

    JAX's own generators cost more than all the rest of a training step on a CPU, and not all give the
    same numbers on every mesh.

    Args:
      like: the array to be rounded.
      stream: a number that differs from array to array, so that no two get the same noise.
      step: the number of the step, an integer.
    """
    index = _mix(jnp.asarray(stream).astype(jnp.uint32))
    # An odd multiplier for each axis spreads neighbours over all bits; the mixing does the rest.
    multiplier = 0x9E3779B1
    for axis in range(like.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis)
        index += reshard(along, spec_of(like, like.shape)) * jnp.uint32(multiplier)
        multiplier = multiplier * 0x85EBCA77 % 2**32
    turned = _mix(index) + jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    return (turned >> 8).astype(jnp.float32) * 2.0**-24


def _mix(x: jax.Array) -> jax.Array:
    """The 32-bit finalizer ``lowbias32`` of Wellons' hash prospector (public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
