"""Splits axes on any mesh, and handles groups of neighbours that span devices.

On a mesh with Explicit axes, the sharding of a reshaped array must be named. On other meshes it is None,
and the compiler determines it. A sharding holds its mesh, since arrays may be on a mesh that no
``jax.set_mesh`` has set.

A group of neighbours that share a scale may span devices. It is then handled in pieces that each lie on
one device: devices exchange one number per piece, and no elements.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
    """``x`` with ``axis`` and the next axis merged, and then partitioned by ``spec``."""
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    whole = spec if _divides(spec, axis, x.shape[axis]) else without(spec, axis)
    return reshard(jax.lax.reshape(x, shape, out_sharding=whole), spec)


def piece_of(x: jax.Array, axis: int, size: int) -> int:
    """The largest part of a group of ``size`` neighbours along ``axis`` that never spans two devices.

    On Auto axes of a mesh, only the compiler knows how ``x`` is split; it may be over all of them. Groups
    that span equal numbers of devices can be left to the compiler.
    """
    sharding, length = jax.typeof(x).sharding, x.shape[axis]
    kinds = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    auto = (name for name, kind in kinds if kind == jax.sharding.AxisType.Auto)
    known = _devices(sharding, axis)
    parts = math.gcd(length, known * math.prod(sharding.mesh.shape[name] for name in auto))
    whole_devices = length % size == 0 and parts % (length // size) == 0
    if parts == 1 or (known == 1 and whole_devices):
        return size
    return math.gcd(length // parts, size)


def is_on_one_device() -> bool:
    """Whether no array can lie across devices, so that nothing need be taken apart by device."""
    return jax.device_count() == 1


def repeat_axis(x: jax.Array, axis: int, times: int, length: int) -> jax.Array:
    """Repeats each entry along ``axis``, and cuts the result to ``length``."""
    if times == 1:
        return x
    cut = length % times > 0
    x = _whole(x, axis, cut)
    spec = spec_of(x, x.shape)
    repeated = jax.lax.broadcast_in_dim(
        x,
        (*x.shape[: axis + 1], times, *x.shape[axis + 1 :]),
        [i + (i > axis) for i in range(x.ndim)],
        out_sharding=split_spec(spec, axis),
    )
    merged = merge_axis(repeated, axis, spec)
    return _whole(jax.lax.slice_in_dim(merged, 0, length, axis=axis), axis, cut)


def reduce_runs(fn: Callable[..., jax.Array], x: jax.Array, axis: int, run: int) -> jax.Array:
    """Reduces each ``run`` neighbours along ``axis`` with ``fn``, and repeats the result for each of them.

    The last run may be shorter; it is padded with zeros, which must not change the result of ``fn``.
    """
    if run == 1:
        return x
    if run == x.shape[axis]:  # devices reduce one number, where they would gather one from each
        each = fn(x, axis=axis, keepdims=True)
    else:
        each = fn(_runs(x, axis, run), axis=axis + 1)
    return repeat_axis(each, axis, run, x.shape[axis])


def for_pieces(scale: jax.Array, axis: int, run: int, pieces: int) -> jax.Array:
    """Expands scales of groups to pieces, ``run`` per group, with a new next axis for the elements."""
    return jnp.expand_dims(repeat_axis(scale, axis, run, pieces), axis + 1)


def for_groups(scale: jax.Array, axis: int, run: int) -> jax.Array:
    """The inverse of ``for_pieces``: takes the first of each ``run`` along ``axis``, and drops the next axis."""
    scale = jnp.squeeze(scale, axis + 1)
    if run == 1:
        return scale
    return jax.lax.index_in_dim(_runs(scale, axis, run), 0, axis + 1, keepdims=False)


def _runs(x: jax.Array, axis: int, run: int) -> jax.Array:
    """Splits ``axis`` of ``x``, a small array, into runs; the last is padded with zeros."""
    missing = -x.shape[axis] % run
    x = _whole(x, axis, missing > 0)
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    return split_axis(x, axis, 0, x.shape[axis], run)


def _whole(x: jax.Array, axis: int, cut: bool) -> jax.Array:
    """Replicates ``x``, a small array, along ``axis``; on an Auto mesh only if it is ``cut``.

    Otherwise the compiler would split it like the weights, and move the parts in each step.
    """
    sharding = jax.typeof(x).sharding
    x = reshard(x, without(spec_of(x, x.shape), axis))
    if cut and jax.sharding.AxisType.Auto in sharding.mesh.axis_types:
        free = (None if i == axis else jax.P.UNCONSTRAINED for i in range(x.ndim))
        x = jax.lax.with_sharding_constraint(x, _with(sharding, *free))
    return x


def spec_of(x: jax.Array, shape: Sequence[int]) -> jax.NamedSharding | None:
    """The sharding of ``x`` applied to an array of ``shape``, which may have extent 1 along some axes."""
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


def gathered(x: jax.Array) -> jax.Array:
    """``x``, whole on each device where Explicit axes split it: a sum over these would have to name its sharding."""
    spec = spec_of(x, x.shape)
    return x if spec is None else reshard(x, _with(spec, *(None,) * x.ndim))


def sharding_of_scales(
    sharding: jax.sharding.Sharding, shape: Sequence[int], codes: Sequence[int]
) -> jax.sharding.Sharding:
    """The sharding of scales of ``shape``, for codes of shape ``codes`` with this ``sharding``.

    Scales are split like the codes, except that they are replicated along axes that codes share, or that
    do not divide.
    """
    if not isinstance(sharding, jax.NamedSharding):
        if sharding.num_devices == 1:
            return sharding
        devices = sorted(sharding.device_set, key=lambda device: device.id)
        return jax.NamedSharding(jax.sharding.Mesh(np.array(devices), "all"), jax.P())
    entries = (*sharding.spec, *(None,) * (len(codes) - len(sharding.spec)))
    kept = []
    for entry, extent in zip(entries, shape, strict=True):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        pieces = math.prod(sharding.mesh.shape[axis] for axis in axes)
        kept.append(entry if extent > 1 and extent % pieces == 0 else None)
    return jax.NamedSharding(sharding.mesh, jax.P(*kept), memory_kind=sharding.memory_kind)


def _divides(spec: jax.NamedSharding | None, axis: int, groups: int) -> bool:
    """Whether each device gets whole groups."""
    return spec is None or groups % _devices(spec, axis) == 0


def _devices(sharding: jax.NamedSharding, axis: int) -> int:
    """The number of devices that ``axis`` is partitioned over, as far as the sharding tells."""
    names = sharding.spec[axis] or ()
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def _with(sharding: jax.NamedSharding, *names: Any) -> jax.NamedSharding:
    return jax.NamedSharding(sharding.mesh, jax.P(*names))
