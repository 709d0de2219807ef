"""Searched scales, for which the command needs JAX.

It is imported only where needed, since importing JAX takes several times as long as the rest of the command.
"""

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_clipquant.cli.numpy_grid import Coder, Read, Threads
from optax_clipquant.cli.rules import FLOAT8, Rule
from optax_clipquant.formats.checkpoint import Checkpoint
from optax_clipquant.formats.dtypes import nbytes
from optax_clipquant.formats.native.description import LeafSpec
from optax_clipquant.formats.native.file import Parts
from optax_clipquant.formats.native.trees import leaf_of, parts_of
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.quant.quantizers.base import Quantizer
from optax_clipquant.quant.quantizers.normal_float import NormalFloat
from optax_clipquant.quant.quantizers.ternary import Ternary
from optax_clipquant.quant.quantizers.uniform import Uniform

_quantize = jax.jit(lambda quantizer, w: quantizer.quantize(w))


class _Searched(NamedTuple):
    """The coder of a tensor whose scales are searched."""

    leaf: LeafSpec
    parts: Callable[[], Parts]

    def encode(self, read: Read, threads: Threads) -> Parts:
        del read, threads  # `searching` has its own
        return self.parts()


@contextlib.contextmanager
def searching(source: Checkpoint, rules: Mapping[str, Rule]) -> Iterator[dict[str, Coder]]:
    """The coders by name for the tensors of a file whose rules search for scales.

    They must be used in file order: a tensor is quantized in a thread while the one before it is packed and
    written, so that memory holds two tensors. Other threads compile meanwhile.
    """
    check_platform()
    quantizers = {name: quantizer_of(rule, rule.width) for name, rule in rules.items()}
    keys = {name: (quantizers[name], source.specs[name]) for name in source.specs if name in rules}
    buffer, left = buffer_for(source, keys), iter(keys)
    with contextlib.ExitStack() as stack:

        def threads(count: int) -> Threads:
            pool = Threads(count)
            stack.callback(pool.shutdown, cancel_futures=True)
            return pool

        runner, compiler = threads(1), threads(2)
        programs: dict[Any, jax.stages.Lowered] = {}
        compiled: dict[Any, concurrent.futures.Future[jax.stages.Compiled]] = {}
        for name, key in keys.items():
            if key not in programs:
                # One is compiled while the next is traced, which with many shapes takes seconds.
                programs[key] = _quantize.lower(quantizers[name], _abstract(source, name))
                compiled[key] = compiler.submit(programs[key].compile)

        def run() -> QArray | None:
            """The next tensor, None after the last."""
            if (name := next(left, None)) is None:
                return None
            w = _on_device(source.read(name, buffer))
            # The next tensor overwrites the buffer.
            return jax.block_until_ready(compiled[keys[name]].result()(quantizers[name], w))

        ahead = [runner.submit(run)]

        def parts(name: str) -> Parts:
            leaf = ahead.pop().result()
            ahead.append(runner.submit(run))
            return parts_of(leaf, name)

        yield {
            name: _Searched(leaf_of(programs[key].out_info, name), functools.partial(parts, name))
            for name, key in keys.items()
        }


def check_platform() -> None:
    """Raises if ``JAX_PLATFORMS`` names a missing platform, for which JAX's own error says little."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(
            f"JAX cannot start on {os.environ.get('JAX_PLATFORMS')!r}: set JAX_PLATFORMS=cpu, or unset it"
        ) from error


def quantizer_of(rule: Rule, bits: int) -> Quantizer:
    where = {"channel_axis": rule.channel_axis, "group_size": rule.group_size}
    if rule.quantizer == "ternary":
        return Ternary(**where, scale_rule=rule.scale_rule or "mse")
    if rule.quantizer == "normal-float":
        return NormalFloat(bits, **where)
    return Uniform(bits, **where, symmetric=rule.quantizer == "uniform", scale_rule=rule.scale_rule)


def _abstract(source: Checkpoint, name: str) -> jax.ShapeDtypeStruct:
    dtype, shape = source.specs[name]
    return jax.ShapeDtypeStruct(shape, np.float32 if dtype in FLOAT8 else dtype)


def buffer_for(source: Checkpoint, names: Iterable[str]) -> np.ndarray:
    """A buffer for the largest of these tensors, aligned so that jax need not copy it."""
    size = max(nbytes(*source.specs[name]) for name in names)
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size]


def _on_device(array: np.ndarray) -> jax.Array:
    if array.dtype in FLOAT8:
        array = array.astype(np.float32)
    return jax.device_put(array, may_alias=True)
