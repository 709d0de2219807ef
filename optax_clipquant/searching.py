"""What the command needs JAX for: scales that are searched for, and bits under a budget.

It is imported where it is needed, for JAX takes several times as long to start as the rest of the command.
"""

import concurrent.futures
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.allocation import allocate
from optax_clipquant.container import Reader, nbytes
from optax_clipquant.conversion import WIDTHS, Progress, Rule
from optax_clipquant.files import leaf_of, parts_of
from optax_clipquant.host import Read, Threads
from optax_clipquant.layout import Leaf
from optax_clipquant.qarray import QArray
from optax_clipquant.quantizers import Uniform
from optax_clipquant.saved import Parts

_quantize = jax.jit(lambda quantizer, w: quantizer.quantize(w))


class Search:
    """Quantizes tensors of a file by rules whose scales are searched for.

    Entered, it compiles in threads; and quantizes a tensor in a thread while the one before is packed and
    written, so that memory holds two of them.

    Attributes:
      coders: what quantizes each. They must be used in the order of the file.
    """

    def __init__(self, source: Reader, rules: Mapping[str, Rule]) -> None:
        _check_platform()
        self._source = source
        self._rules = {name: _uniform(rule, rule.bits or 8) for name, rule in rules.items()}
        self._names = [name for name in source.specs if name in rules]
        self._programs: dict[Any, jax.stages.Lowered] = {}
        self.coders = {}
        for name in self._names:
            key = self._key(name)
            if key not in self._programs:
                self._programs[key] = _quantize.lower(self._rules[name], _abstract(source, name))
            self.coders[name] = _Searched(leaf_of(self._programs[key].out_info, name), self, name)

    def parts(self, name: str) -> Parts:
        leaf = self._ahead.result()
        self._start_next()
        return parts_of(leaf, name)

    def __enter__(self) -> Self:
        self._compiling = concurrent.futures.ThreadPoolExecutor(2)
        self._running = concurrent.futures.ThreadPoolExecutor(1)
        self._compiled = {
            key: self._compiling.submit(program.compile) for key, program in self._programs.items()
        }
        self._buffer = _buffer(self._source, self._names)
        self._left = iter(self._names)
        self._start_next()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._compiling.shutdown(cancel_futures=True)
        self._running.shutdown(cancel_futures=True)

    def _start_next(self) -> None:
        name = next(self._left, None)
        if name is not None:
            self._ahead = self._running.submit(self._run, name)

    def _run(self, name: str) -> QArray:
        quantize = self._compiled[self._key(name)].result()
        w = _on_device(self._source.read(name, self._buffer))
        return jax.block_until_ready(quantize(self._rules[name], w))  # the next takes the buffer

    def _key(self, name: str) -> Any:
        return self._rules[name], self._source.specs[name]


class _Searched(NamedTuple):
    leaf: Leaf
    search: Search
    name: str

    def encode(self, read: Read, threads: Threads) -> Parts:
        del read, threads  # it has its own
        return self.search.parts(self.name)


def allocate_rules(
    source: Reader, rules: Mapping[str, Rule], budget: float, progress: Progress
) -> dict[str, Rule]:
    """``rules`` with the bits of the least squared error within a budget, where they leave them open."""
    _check_platform()
    buffer = _buffer(source, rules)
    choices = {
        name: [_uniform(rule, rule.bits or bits) for bits in WIDTHS] for name, rule in rules.items()
    }

    def read(name: str) -> tuple[jax.Array, jax.Array]:
        w = _on_device(source.read(name, buffer))
        progress(nbytes(*source.specs[name]))
        return w, jnp.ones((1,) * w.ndim)

    specs = {name: _abstract(source, name) for name in rules}
    chosen = allocate(specs, choices, read, budget)
    return {name: rule._replace(bits=chosen[name].bits) for name, rule in rules.items()}


def _check_platform() -> None:
    """Raises where ``JAX_PLATFORMS`` names one that is not here, of which JAX itself says little."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(
            f"JAX cannot start on {os.environ.get('JAX_PLATFORMS')!r}: set JAX_PLATFORMS=cpu, or unset it"
        ) from error


def _uniform(rule: Rule, bits: int) -> Uniform:
    return Uniform(
        bits,
        channel_axis=rule.channel_axis,
        group_size=rule.group_size,
        scale_rule=rule.scale_rule,
    )


def _abstract(source: Reader, name: str) -> jax.ShapeDtypeStruct:
    dtype, shape = source.specs[name]
    return jax.ShapeDtypeStruct(shape, dtype)


def _buffer(source: Reader, names: Iterable[str]) -> np.ndarray:
    """Room for the largest of these tensors, at an address from which jax need not copy."""
    size = max(nbytes(*source.specs[name]) for name in names)
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size]


def _on_device(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, may_alias=True)
