"""The state of a leaf that is quantized part by part."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.analysis.compensation.rounding import BLOCK
from optax_clipquant.quant.devices import shardings_for
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.quant.quantizers.base import Quantizer
from optax_clipquant.quant.quantizers.uniform import Uniform
from optax_clipquant.quant.uses import Use


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the weights ``[batch, K, N]`` of a matrix product share scales.

    Attributes:
      rows: the rows of each group, padded with K to ``size`` each.
      size: the number of rows of a group.
      each: the index of each weight's scale in the flat scales, ``[batch, K, N]``.
      own: the index of the scale of each group and column, ``[batch, groups, N]``; None if other weights
        share these scales too.
    """

    rows: np.ndarray
    size: int
    each: np.ndarray
    own: np.ndarray | None


class RoundedLeaf:
    """The codes and scales of one leaf, initially those on ``grid``.

    Args:
      value: the leaf.
      grid: the initial grid.
    """

    def __init__(self, value: jax.Array, grid: Grid) -> None:
        self.grid, self.shape, self.sharding = grid, value.shape, value.sharding
        codes = grid.encode(value)
        # Copies, since NumPy views of JAX arrays are read-only.
        self.codes = np.array(codes).reshape(-1)
        self.decoded = np.array(grid.decode(codes)).reshape(-1)
        self.scale = np.array(grid.scale).reshape(-1)
        zero = grid.zero_point
        self.zero_point = None if zero is None else np.array(zero).reshape(-1)
        self.left = value.size
        group = {} if grid.group is None else {grid.group[0] % value.ndim: grid.group[1]}
        # The index of the scale along each axis.
        self.scale_of = [
            np.arange(n) // group[axis] if axis in group else np.arange(n) * (extent > 1)
            for axis, (n, extent) in enumerate(zip(value.shape, grid.scale.shape, strict=True))
        ]

    @property
    def zero_points(self) -> bool:
        """Whether each scale has an integer zero point."""
        return self.zero_point is not None and np.issubdtype(self.zero_point.dtype, np.integer)

    def layout(self, index: np.ndarray) -> Layout:
        """The layout of the weights ``[batch, K, N]`` at ``index`` in the leaf."""
        coordinates = np.unravel_index(index, self.shape)
        each = np.ravel_multi_index(
            tuple(of[x] for of, x in zip(self.scale_of, coordinates, strict=True)),
            self.grid.scale.shape,
        )
        length = index.shape[1]
        _, first, label = np.unique(each[0, :, 0], return_index=True, return_inverse=True)
        scales = each[:, first]
        times = np.bincount(label)
        own = (
            self.grid.max_code is None
            and (self.zero_point is None or self.zero_points)
            and (each == scales[:, label]).all()
            and self._differ(scales)
            and (self._weights_of(scales) == times[None, :, None]).all()
        )
        if not own:
            size = -(-length // BLOCK) * BLOCK if length > 2 * BLOCK else length
            rows = np.concatenate([np.arange(length), np.full(size - length, length)])
            return Layout(rows, size, each, None)
        size = times.max()
        size = -(-size // BLOCK) * BLOCK if size > 2 * BLOCK else size
        rows = np.full((len(first), size), length)
        for group, row in enumerate(rows):
            members = np.flatnonzero(label == group)
            row[: len(members)] = members
        return Layout(rows.reshape(-1), int(size), each, scales)

    def _differ(self, scales: np.ndarray) -> bool:
        taken = np.zeros(self.scale.size, bool)
        taken[scales] = True
        return np.count_nonzero(taken) == scales.size

    def _weights_of(self, scales: np.ndarray) -> np.ndarray:
        """The number of weights that use each of ``scales``."""
        counts = np.ones((), np.int64)
        for of, extent in zip(self.scale_of, self.grid.scale.shape, strict=True):
            counts = np.multiply.outer(counts, np.bincount(of, minlength=extent))
        return counts.reshape(-1)[scales]

    def put(
        self, index: np.ndarray, layout: Layout, codes: np.ndarray, scale: Any, zero_point: Any
    ) -> None:
        """Stores codes ``[batch, K, N]``, and the scales and zero points if no other weights share them."""
        self.codes[index] = codes
        if layout.own is not None:
            self.scale[layout.own] = scale
            if self.zero_point is not None:
                self.zero_point[layout.own] = zero_point
        level = codes + np.float32(self.grid.offset)
        if self.grid.codebook is not None:
            book = np.asarray(self.grid.codebook, np.float32)
            level = book[codes.astype(int) - self.grid.lower]
        if self.zero_point is not None:
            level = level - self.zero_point[layout.each].astype(np.float32)
        self.decoded[index] = level * self.scale[layout.each]
        self.left -= index.size

    def quantized(self) -> QArray:
        zero = self.zero_point
        shape = self.grid.scale.shape
        grid = dataclasses.replace(
            self.grid,
            scale=jnp.asarray(self.scale.reshape(shape)),
            zero_point=None if zero is None else jnp.asarray(zero.reshape(shape)),
        )
        qarray = QArray(jnp.asarray(self.codes.reshape(self.shape)), grid)
        if self.sharding.num_devices == 1:
            return qarray
        return jax.device_put(qarray, shardings_for(qarray, self.sharding))


def fitted(
    quantizer: Quantizer, w: jax.Array, use: Use | None, importance: jax.Array | None = None
) -> Grid:
    """The grid of least squared error, weighted by ``importance`` if given."""
    if isinstance(quantizer, Uniform) and quantizer.scale_rule is None:
        quantizer = dataclasses.replace(quantizer, scale_rule="mse")
    if importance is None:
        return quantizer.fit(w, use=use)
    return quantizer.fit(w, use=use, importance=importance)
