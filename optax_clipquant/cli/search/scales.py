"""Searched scales, for which the command needs JAX.

It is imported only where needed, since importing JAX takes several times as long as the rest of the command.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_clipquant.cli.numpy_grid import Coder, Read, Threads, in_turn, threads
from optax_clipquant.cli.rules import Rule, scale_layout
from optax_clipquant.cli.search.rows import (
    Key,
    Part,
    Quantizers,
    dtype_of,
    keys_of,
    parts_of,
    quantizer_of,
    valid_of,
)
from optax_clipquant.formats.checkpoint import Checkpoint
from optax_clipquant.formats.dtypes import nbytes
from optax_clipquant.formats.native import trees
from optax_clipquant.formats.native.description import LeafSpec
from optax_clipquant.formats.native.file import Parts
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.quant.quantizers.base import quantize_rows

_BLOCK = 2**19  # weights; with fewer in a call, the calls take up to half of the time


@jax.jit
def _quantize(quantizers: Quantizers, rows: jax.Array, count: jax.Array) -> QArray:
    (quantizer,) = quantizers
    return quantize_rows(quantizer, rows, valid_of(rows, count))


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
    names = [name for name in source.specs if name in rules]
    parts = {name: parts_of(source.specs[name][1], rules[name]) for name in names}
    keys = keys_of(
        {
            (name, i): (
                (quantizer_of(rules[name], rules[name].width),),
                dtype_of(source.specs[name]),
                part.rows,
                part.length,
            )
            for name in names
            for i, part in enumerate(parts[name])
        },
        _BLOCK,
    )
    buffer, left = buffer_for(source, names), iter(names)
    with threads(1) as ahead, threads(2) as runner, threads(2) as compiler:
        lowered = {key: key.lower(_quantize) for key in dict.fromkeys(keys.values())}
        compiled = {key: compiler.submit(lowered[key].compile) for key in lowered}

        def empty(name: str, zeros: Callable[..., Any]) -> QArray:
            """A tensor's ``QArray`` to fill, or abstract."""
            _, shape = source.specs[name]
            _, scales, group = scale_layout(shape, rules[name].channel_axis, rules[name].group_size)
            grid = lowered[keys[name, 0]].out_info.grid
            arrays = {
                kind: zeros(scales, x.dtype) for kind, x in grid.arrays.items() if x is not None
            }
            return QArray(zeros(shape, np.int8), dataclasses.replace(grid, group=group, **arrays))

        def run() -> QArray | None:
            """The next tensor, None after the last."""
            if (name := next(left, None)) is None:
                return None
            # The next tensor overwrites the buffer.
            w, q = source.read(name, buffer), empty(name, np.zeros)
            for i, part in enumerate(parts[name]):
                key = keys[name, i]
                _fill(q, w, part, key, compiled[key].result(), runner)
            return q

        done = [ahead.submit(run)]

        def parts_for(name: str) -> Parts:
            leaf = done.pop().result()
            done.append(ahead.submit(run))
            return trees.parts_of(leaf, name)

        yield {
            name: _Searched(
                trees.leaf_of(empty(name, jax.ShapeDtypeStruct), name),
                functools.partial(parts_for, name),
            )
            for name in names
        }


def _fill(
    q: QArray, w: np.ndarray, part: Part, key: Key, program: jax.stages.Compiled, threads: Threads
) -> None:
    """Quantizes a part of ``w`` into ``q``, which holds NumPy arrays."""

    def fill_block(block: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        """Fills in the codes, and returns the grid's arrays."""
        rows, codes = part.matrix(block[0]), block[1]
        found = program(key.quantizers, key.block(rows), np.int32(part.length))
        count, length = rows.shape
        codes[...] = np.asarray(found.qvalue)[:count, :length].reshape(codes.shape)
        return {
            kind: np.asarray(x)[:count] for kind, x in found.grid.arrays.items() if x is not None
        }

    codes: Any = q.qvalue
    blocks = zip(part.blocks(w, key.rows), part.blocks(codes, key.rows), strict=True)
    found = list(in_turn(threads, fill_block, blocks))
    for kind, array in q.grid.arrays.items():
        if array is not None and found:
            target: Any = array[part.scales]
            target[...] = np.concatenate([x[kind] for x in found]).reshape(target.shape)


def check_platform() -> None:
    """Raises if ``JAX_PLATFORMS`` names a missing platform, for which JAX's own error says little."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(
            f"JAX cannot start on {os.environ.get('JAX_PLATFORMS')!r}: set JAX_PLATFORMS=cpu, or unset it"
        ) from error


def buffer_for(source: Checkpoint, names: Iterable[str]) -> np.ndarray:
    """A buffer for the largest of these tensors, aligned so that jax need not copy it."""
    size = max(nbytes(*source.specs[name]) for name in names)
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size]
