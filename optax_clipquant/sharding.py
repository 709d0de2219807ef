"""Splitting an axis in two on any mesh.

On a mesh with Explicit axes, the sharding of what is reshaped must be named. It is None on other
meshes, where the compiler finds it. It holds its mesh: arrays may be on one that no ``jax.set_mesh``
has named.
"""

import math
from collections.abc import Sequence
from typing import Any

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


def merge_axis(x: jax.Array, axis: int, spec: jax.NamedSharding | None) -> jax.Array:
    """``x`` with ``axis`` and the next made one, on which ``spec`` then partitions it."""
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    whole = spec if _divides(spec, axis, x.shape[axis]) else without(spec, axis)
    return reshard(jax.lax.reshape(x, shape, out_sharding=whole), spec)


def spec_of(x: jax.Array, shape: Sequence[int]) -> jax.NamedSharding | None:
    """The partition of ``x``, for an array of ``shape``, which may have extent 1 where ``x`` has not."""
    sharding = jax.typeof(x).sharding
    if all(name is None for name in sharding.spec):
        return None
    kept = zip(sharding.spec, x.shape, shape, strict=True)
    return _with(sharding, *(name if n == m else None for name, n, m in kept))


def without(spec: jax.NamedSharding | None, axis: int) -> jax.NamedSharding | None:
    return None if spec is None else _with(spec, *spec.spec[:axis], None, *spec.spec[axis + 1 :])


def split_spec(spec: jax.NamedSharding | None, axis: int) -> jax.NamedSharding | None:
    return (
        None if spec is None else _with(spec, *spec.spec[: axis + 1], None, *spec.spec[axis + 1 :])
    )


def reshard(x: jax.Array, spec: jax.NamedSharding | None) -> jax.Array:
    return x if spec is None else jax.sharding.reshard(x, spec)


def _divides(spec: jax.NamedSharding | None, axis: int, groups: int) -> bool:
    """Whether each device gets whole groups."""
    if spec is None or spec.spec[axis] is None:
        return True
    names = spec.spec[axis] if isinstance(spec.spec[axis], tuple) else (spec.spec[axis],)
    return groups % math.prod(spec.mesh.shape[name] for name in names) == 0


def _with(sharding: jax.NamedSharding, *names: Any) -> jax.NamedSharding:
    return jax.NamedSharding(sharding.mesh, jax.P(*names))
