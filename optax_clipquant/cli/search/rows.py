"""Tensors as rows of weights that share a scale, so that few compiled programs serve all shapes.

Compilation would take most of the time with many shapes. Programs take blocks of rows that zeros extend to
one of a few lengths. It needs JAX, and is imported only where needed.
"""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.cli.rules import FLOAT8, Rule, scale_layout
from optax_clipquant.formats.dtypes import Spec
from optax_clipquant.quant.quantizers.base import ChannelwiseQuantizer
from optax_clipquant.quant.quantizers.normal_float import NormalFloat
from optax_clipquant.quant.quantizers.ternary import Ternary
from optax_clipquant.quant.quantizers.uniform import Uniform
from optax_clipquant.quant.scales.least_squares import FEW

# Weights that can be measured in the time it takes to compile the programs for one length.
_COMPILATION = 10**8
# Rows are extended to no more weights, which would take the memory of another tensor.
_LONG = 2**22

Quantizers = tuple[ChannelwiseQuantizer, ...]
Place = tuple[str, int]
"""The name of a tensor, and the index of one of its parts."""


class Key(NamedTuple):
    """What a program is compiled for: quantizers, and blocks of rows of a dtype."""

    quantizers: Quantizers
    dtype: np.dtype
    rows: int
    length: int

    def lower(self, program: Any) -> jax.stages.Lowered:
        """Traces ``program(quantizers, rows, count)``, where rows begin with ``count`` weights."""
        rows = jax.ShapeDtypeStruct((self.rows, self.length), self.dtype)
        return program.lower(self.quantizers, rows, jax.ShapeDtypeStruct((), np.int32))

    def block(self, rows: np.ndarray) -> np.ndarray:
        """The block that begins with ``rows``; the rest is 0."""
        if rows.shape == (self.rows, self.length) and rows.dtype == self.dtype:
            return rows
        block = np.zeros((self.rows, self.length), self.dtype)
        block[: len(rows), : rows.shape[1]] = rows
        return block


def valid_of(rows: jax.Array, count: jax.Array) -> jax.Array:
    """1 for the ``count`` weights that rows begin with, and 0 for padding."""
    return (jnp.arange(rows.shape[1]) < count).astype(jnp.float32)[None]


def keys_of(
    needed: Mapping[Place, tuple[Quantizers, np.dtype, int, int]], size: int
) -> dict[Place, Key]:
    """The key of each part of a tensor.

    Args:
      needed: quantizers, the dtype, the number of rows and their length, for each part.
      size: weights of a block, if rows are no longer.
    """
    weights: dict[Any, dict[int, int]] = collections.defaultdict(collections.Counter)
    for quantizers, dtype, rows, length in needed.values():
        weights[quantizers, dtype][length] += rows * length
    common = {kind: common_lengths(counts) for kind, counts in weights.items()}
    most: dict[Any, int] = collections.Counter()
    for quantizers, dtype, rows, length in needed.values():
        shared = quantizers, dtype, common[quantizers, dtype][length]
        most[shared] = max(most[shared], rows, 1)
    found = {}
    for place, (quantizers, dtype, _, length) in needed.items():
        extended = common[quantizers, dtype][length]
        rows = min(max(size // extended, 1), most[quantizers, dtype, extended])
        found[place] = Key(quantizers, dtype, rows, extended)
    return found


def common_lengths(weights: Mapping[int, int]) -> dict[int, int]:
    """The length to extend rows of each length to, for the least time of compilation and measurement.

    ``weights`` counts the weights in rows of each length. Rows of fewer than ``FEW`` weights stay so.
    """
    lengths = sorted(weights)
    # For each number of shortest lengths: the least cost, and how many come before the last common length.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for last, common in enumerate(lengths, 1):
        costs = []
        cost = float(_COMPILATION)
        for first in range(last - 1, -1, -1):
            extends = lengths[first] < common
            if extends and (lengths[first] < FEW <= common or common > _LONG):
                break
            cost += weights[lengths[first]] * common / lengths[first]
            costs.append((best[first][0] + cost, first))
        best.append(min(costs))
    found, last = {}, len(lengths)
    while last:
        first = best[last][1]
        found |= dict.fromkeys(lengths[first:last], lengths[last - 1])
        last = first
    return found


class Part(NamedTuple):
    """The whole groups of a tensor, or its last groups if they are shorter; without groups, all of it.

    Attributes:
      weights, scales: its place in the tensor and in the scales.
      split: its shape with groups as a separate axis.
      kept, shared: the axes of ``split`` that differ in their scale, and those that share one.
    """

    weights: tuple[slice, ...]
    scales: tuple[slice, ...]
    split: tuple[int, ...]
    kept: tuple[int, ...]
    shared: tuple[int, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.split[axis] for axis in self.kept)

    @property
    def length(self) -> int:
        """The number of weights that share a scale; at least 1, since zeros stand for an empty row."""
        return max(math.prod(self.split[axis] for axis in self.shared), 1)

    def view(self, w: np.ndarray) -> np.ndarray:
        """A view of this part of ``w``, with the axes that share a scale last."""
        return w[self.weights].reshape(self.split).transpose(*self.kept, *self.shared)

    def blocks(self, w: np.ndarray, most: int) -> Iterator[np.ndarray]:
        """Views of at most ``most`` rows each, in order, with the axes that share a scale last."""
        return _blocks(self.view(w), len(self.kept), most)

    def matrix(self, view: np.ndarray) -> np.ndarray:
        """``view``, or one of the blocks, as ``[rows, weights that share a scale]``."""
        kept = view.ndim - len(self.shared)
        return view.reshape(math.prod(view.shape[:kept]), math.prod(view.shape[kept:]))


def _blocks(view: np.ndarray, kept: int, most: int) -> Iterator[np.ndarray]:
    rest = math.prod(view.shape[1:kept])
    if not kept:
        yield view
    elif rest > most:
        for part in view:
            yield from _blocks(part, kept - 1, most)
    else:
        step = most // max(rest, 1)
        for first in range(0, len(view), step):
            yield view[first : first + step]


def parts_of(shape: tuple[int, ...], rule: Rule) -> list[Part]:
    """The parts of a tensor, in the order of its scales."""
    shared, _, group = scale_layout(shape, rule.channel_axis, rule.group_size)
    if group is None:
        kept = tuple(axis for axis in range(len(shape)) if axis not in shared)
        return [Part((), (), shape, kept, shared)]
    axis, size = group[0] + len(shape), group[1]
    before = (slice(None),) * axis
    shared = (*(a + (a > axis) for a in shared), axis + 1)
    kept = tuple(a for a in range(len(shape) + 1) if a not in shared)
    count, rest = divmod(shape[axis], size)
    return [
        Part(
            (*before, weights), (*before, scales), (*shape[:axis], *split, *shape[axis + 1 :]), kept, shared
        )
        for weights, scales, split in (
            (slice(count * size), slice(count), (count, size)),
            (slice(count * size, None), slice(count, None), (1, rest)),
        )
        if math.prod(split)
    ]  # fmt: skip


def dtype_of(spec: Spec) -> np.dtype:
    """The dtype in which a tensor is quantized."""
    dtype, _ = spec
    assert isinstance(dtype, np.dtype)
    return np.dtype(np.float32) if dtype in FLOAT8 else dtype


def quantizer_of(rule: Rule, bits: int) -> ChannelwiseQuantizer:
    """The quantizer of rows."""
    if rule.quantizer == "ternary":
        return Ternary(scale_rule=rule.scale_rule or "mse")
    if rule.quantizer == "normal-float":
        return NormalFloat(bits)
    return Uniform(bits, symmetric=rule.quantizer == "uniform", scale_rule=rule.scale_rule)
