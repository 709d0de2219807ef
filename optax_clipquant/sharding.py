"""Splitting an axis in two on any mesh.

On a mesh with Explicit axes, the sharding of what is reshaped must be named. A spec is None on other
meshes, where the compiler finds it.
"""

import math
from collections.abc import Sequence

import jax


def split_axis(x: jax.Array, axis: int, first: int, last: int, size: int) -> jax.Array:
    """``x[first:last]`` along ``axis``, with that axis split into ``(groups, size)``."""
    groups = (last - first) // size
    spec = spec_of(x, x.shape)
    if last - first < x.shape[axis] or not _divides(spec, axis, groups):
        spec = without(spec, axis)
    part = jax.lax.slice_in_dim(reshard(x, spec), first, last, axis=axis)
    return jax.lax.reshape(
        part,
        (*x.shape[:axis], groups, size, *x.shape[axis + 1 :]),
        out_sharding=split_spec(spec, axis),
    )


def merge_axis(x: jax.Array, axis: int, spec: jax.P | None) -> jax.Array:
    """``x`` with ``axis`` and the next made one, on which ``spec`` then partitions it."""
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    whole = spec if _divides(spec, axis, x.shape[axis]) else without(spec, axis)
    return reshard(jax.lax.reshape(x, shape, out_sharding=whole), spec)


def spec_of(x: jax.Array, shape: Sequence[int]) -> jax.P | None:
    """The partition of ``x``, for an array of ``shape``, which may have extent 1 where ``x`` has not."""
    spec = jax.typeof(x).sharding.spec
    if all(name is None for name in spec):
        return None
    kept = zip(spec, x.shape, shape, strict=True)
    return jax.P(*(name if n == m else None for name, n, m in kept))


def without(spec: jax.P | None, axis: int) -> jax.P | None:
    return None if spec is None else jax.P(*spec[:axis], None, *spec[axis + 1 :])


def split_spec(spec: jax.P | None, axis: int) -> jax.P | None:
    return None if spec is None else jax.P(*spec[: axis + 1], None, *spec[axis + 1 :])


def reshard(x: jax.Array, spec: jax.P | None) -> jax.Array:
    return x if spec is None else jax.sharding.reshard(x, spec)


def _divides(spec: jax.P | None, axis: int, groups: int) -> bool:
    """Whether each device gets whole groups."""
    if spec is None or spec[axis] is None:
        return True
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    mesh = jax.sharding.get_abstract_mesh()
    return groups % math.prod(mesh.shape[name] for name in names) == 0
