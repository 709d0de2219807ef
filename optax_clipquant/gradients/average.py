"""The mean of gradients over devices, communicated in 8 or 4 bits per number."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clipquant._tree import (
    PyTree,
    check_option,
    check_state,
    check_unchanged,
    flatten_with_path,
    is_float0,
    path_of,
)
from optax_clipquant.lowering.noise import noise, stream_of
from optax_clipquant.quant.companding import CompandedArray, compand

AxisName = str | tuple[str, ...]

_BLOCK = 256
_MIN_SIZE = 4096  # elements; smaller arrays cost more in latency than in bytes


class AverageGradientsState(NamedTuple):
    """State of ``average_gradients``.

    Attributes:
      count: the number of updates so far.
      error: a tree with the rounding error that this device has yet to send of each large leaf, a float32
        array with a leading axis for the device; None at small leaves, or without error feedback.

    Examples:
      >>> state = average_gradients("data").init({"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)})
      >>> state.error["kernel"].shape, state.error["bias"]
      ((1, 64, 64), None)
    """

    count: jax.typing.ArrayLike
    error: PyTree


def average_gradients(
    axis_name: AxisName, *, bits: int = 8, error_feedback: bool = True
) -> optax.GradientTransformation:
    """Averages gradients over the devices of a mesh axis, which send each other 8 or 4 bits per number.

    For data-parallel loops under ``jax.shard_map``; put it first in the chain, in place of
    ``jax.lax.pmean``. Each leaf is cut into one part per device. The parts are encoded (as a
    ``CompandedArray``) and sent to their owners (all-to-all), which average them in float32, encode
    the mean, and send it to all (all-gather), so that every device gets the same bits. Leaves of fewer
    than 4,096 elements go through ``jax.lax.pmean``.

    With error feedback, the rounding error is added to the next gradients. A device keeps the error ``e`` of
    what it sent and, for the part of the mean ``m`` that it computes for all ``n`` devices, ``n`` times that error::

        x = g + e;   e <- x - decode(encode(x)),   in that part + n * (m - decode(encode(m)))

    so the sum of all updates stays within one rounding of the sum of all means, however long the run.
    Without error feedback, rounding is stochastic.

    The errors differ between devices, so they have a leading axis for the device, along which
    ``jax.shard_map`` splits them. ``state_specs`` gives the specs for the whole state. Each device must
    pass its local gradients. JAX sums gradients with respect to replicated params over the devices, so
    differentiate with respect to ``jax.lax.pcast(params, axis_name, to="varying")``.

    Args:
      axis_name: the mesh axis, or axes, over which the batch is split.
      bits: 8, or 4.
      error_feedback: whether to keep the rounding errors, at 4 bytes per weight.

    Returns:
      A ``GradientTransformation`` with an ``AverageGradientsState``. Updates keep their dtypes. Where
      a device's gradients are not finite, the mean of those elements is NaN on all devices, and their
      stored error is reset to 0.

    Raises:
      ValueError: ``bits`` is neither 4 nor 8; in ``update``, the gradients do not differ between the devices,
        or the state was made with another ``error_feedback`` or for other leaves.
      TypeError: ``axis_name`` is not a name or a tuple of names.

    Examples:
      >>> from jax.sharding import PartitionSpec as P
      >>> from optax_clipquant import average_gradients, state_specs
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = optax.chain(average_gradients("data"), optax.sgd(0.1))
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> specs = state_specs(jax.eval_shape(tx.init, params), "data")
      >>> state = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)(params)
      >>> def step(params, state, x):
      ...     def loss(params):
      ...         return jnp.mean(jnp.square(x @ params["kernel"]))
      ...     grads = jax.grad(loss)(jax.lax.pcast(params, "data", to="varying"))
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> step = jax.jit(
      ...     jax.shard_map(
      ...         step, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs)
      ...     )
      ... )
      >>> x = jax.device_put(jnp.ones((16, 64)) / 64, jax.NamedSharding(mesh, P("data")))
      >>> params, state = step(params, state, x)

    References:
      Seide et al., 1-bit stochastic gradient descent, 2014, for error feedback. Tang et al., 1-bit
      Adam, 2021 (arXiv:2102.02888), and Wang et al., ZeRO++, 2023 (arXiv:2306.10209), for the
      all-reduce in two stages.
    """
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not (isinstance(names, tuple) and names and all(isinstance(name, str) for name in names)):
        raise TypeError(
            "average_gradients: axis_name must be the name of a mesh axis, or a tuple of names, got "
            f"{axis_name!r}"
        )
    if bits not in (4, 8):
        raise ValueError(f"average_gradients: bits must be 8 or 4, got {bits!r}")

    def init(params: PyTree) -> PyTree:
        def error(p: Any) -> jax.Array | None:
            return jnp.zeros((1, *p.shape), jnp.float32) if _is_large(p) else None

        return AverageGradientsState(
            count=jnp.zeros((), jnp.int32),
            error=jax.tree.map(error, params) if error_feedback else None,
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        del params
        check_state("average_gradients", state, AverageGradientsState)
        leaves, treedef = flatten_with_path(updates)
        errors = dict(flatten_with_path(state.error)[0])
        if errors or any(_is_large(g) for _, g in leaves):
            check_option("average_gradients", "error_feedback", error_feedback, bool(errors))
        if lost := errors.keys() - dict(leaves):
            raise ValueError(
                f"average_gradients: updates have no leaf {path_of(lost.pop())!r}, which params had in init; "
                "give all of them, or call tx.init again"
            )
        means, left = [], []
        for stream, (path, g) in enumerate(leaves):
            error = errors.get(path)
            if error is not None:
                check_unchanged("average_gradients", "updates", path_of(path), g, error.shape[1:])
            elif error_feedback and _is_large(g):
                raise ValueError(
                    f"average_gradients: updates leaf {path_of(path)!r}, of shape {g.shape}, was smaller or missing "
                    "in init; call tx.init again"
                )
            if is_float0(g):
                mean = g
            else:
                _check_differs(g, axis_name)
                if not _is_large(g):
                    mean = jax.lax.pmean(g, axis_name)
                else:
                    mean, error = _mean(g, error, axis_name, bits, stream, state.count)
            means.append(mean)
            left.append(error)
        return treedef.unflatten(means), AverageGradientsState(
            count=optax.safe_increment(state.count),
            error=treedef.unflatten(left) if error_feedback else None,
        )

    return optax.GradientTransformation(init, update)


def state_specs(opt_state: PyTree, axis_name: AxisName) -> PyTree:
    """Partition specs of an optimizer's state, for ``jax.shard_map``.

    The errors of ``average_gradients`` are split along ``axis_name``; the rest is replicated.

    Args:
      opt_state: the state, or its shapes, as from ``jax.eval_shape(tx.init, params)``.
      axis_name: the one given to ``average_gradients``.

    Returns:
      The tree with a ``jax.P`` in place of each array.

    Examples:
      >>> tx = optax.chain(average_gradients("data"), optax.sgd(0.1))
      >>> state = jax.eval_shape(tx.init, {"kernel": jnp.zeros((512, 512))})
      >>> state_specs(state, "data")[0].error == jax.P("data")
      True
    """
    specs: tuple[Any, Any] = (jax.P(), jax.P(axis_name))
    return jax.tree.map(
        lambda x: AverageGradientsState(*specs) if _is_state(x) else jax.P(),
        opt_state,
        is_leaf=_is_state,
    )


def _is_state(x: Any) -> bool:
    return isinstance(x, AverageGradientsState)


def _is_large(x: Any) -> bool:
    return np.size(x) >= _MIN_SIZE and jnp.issubdtype(x.dtype, jnp.floating)


def _check_differs(g: jax.Array, axis_name: AxisName) -> None:
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    # Where shard_map does not track this (check_vma=False), not even an axis index varies.
    checked = _varying(jax.lax.axis_index(axis_name))
    if names & checked and not names <= _varying(g):
        raise ValueError(
            f"average_gradients: the gradients are the same on all devices of {axis_name!r}, since JAX "
            "sums gradients with respect to replicated params; for each device's own, differentiate with "
            f"respect to jax.lax.pcast(params, {axis_name!r}, to='varying')"
        )


def _varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes along whose devices ``x`` differs."""
    return jax.typeof(x).manual_axis_type.varying


def _mean(
    g: jax.Array,
    error: jax.Array | None,
    axis_name: AxisName,
    bits: int,
    stream: int,
    count: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array | None]:
    devices, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    x = g.astype(jnp.float32)
    if error is not None:
        x += error[0]
    flat = x.reshape(-1)
    length = -(-flat.size // (devices * _BLOCK)) * _BLOCK
    parts = jnp.pad(flat, (0, devices * length - flat.size)).reshape(devices, length)

    def encode(x: jax.Array, stage: int) -> CompandedArray:
        if error is not None:
            return compand(x, (-1, _BLOCK), bits, keep_nan=True, rows=False)
        # Noise that is independent between leaves, stages and devices.
        number = (2 * stream + stage) * devices + device
        draws = noise(x, stream_of(number), count)
        return compand(x, (-1, _BLOCK), bits, draws, keep_nan=True, rows=False)

    sent = encode(parts, 0)
    received = jax.tree.map(
        lambda a: jax.lax.all_to_all(a, axis_name, split_axis=0, concat_axis=0, tiled=True),
        _pack(sent),
    )
    own = jnp.mean(_unpack(received).decode(), axis=0, keepdims=True)
    kept = encode(own, 1)
    gathered = jax.tree.map(
        lambda a: jax.lax.all_gather(a, axis_name, tiled=True, to="invarying"), _pack(kept)
    )
    mean = _unpack(gathered).decode().reshape(-1)[: flat.size].reshape(g.shape).astype(g.dtype)
    if error is None:
        return mean, None
    is_own = jnp.arange(devices)[:, None] == device
    left = parts - sent.decode() + jnp.where(is_own, devices * (own - kept.decode()), 0)
    left = jnp.where(jnp.isfinite(left), left, 0)
    return mean, left.reshape(-1)[: flat.size].reshape(1, *g.shape)


def _pack(x: CompandedArray) -> CompandedArray:
    """Packs two 4-bit codes into a byte, since XLA's CPU backend sends an int4 array as bytes."""
    if x.bits == 8:
        return x
    low, high = jnp.split(x.codes.astype(jnp.int8), 2, axis=-1)
    return dataclasses.replace(x, codes=(low & 15) | (high << 4))


def _unpack(x: CompandedArray) -> CompandedArray:
    if x.bits == 8:
        return x
    codes = jnp.concatenate([(x.codes << 4) >> 4, x.codes >> 4], axis=-1)
    return dataclasses.replace(x, codes=codes.astype(jnp.int4))
