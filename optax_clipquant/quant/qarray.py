"""An array of integer codes on a grid, which behaves like its dequantized array."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant.lowering.sharding import repeat_axis
from optax_clipquant.quant.drop_in import DropIn, refuse_in_lax
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.restore import check_restored


@functools.partial(jax.tree_util.register_dataclass, data_fields=("qvalue", "grid"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class QArray(DropIn):
    """A quantized array: codes, and the grid whose levels they index.

    Invariants:
      * ``dequantize() == grid.decode(qvalue)``.
      * ``qvalue`` has the logical shape. Its dtype is int8, or after ``narrow`` int4 or int2.

    It can replace an array in a tree of params: Flax's layers, ``jnp`` functions, methods, operators and
    comparisons dequantize it on use, which inside ``jax.jit`` fuses into the operation that reads it.
    ``optax_clipquant.quant.drop_in`` lists what works; ``jax.lax`` needs ``dequantize()``.

    ``jax.vmap``, ``jax.lax.scan`` (``nn.scan``, ``nnx.scan``) and ``q[i]`` split a stack of layers into one
    ``QArray`` per layer, if each layer has separate scales. Quantizing with ``uses=`` ensures that, and
    ``expand_scale`` fixes it afterwards. Indices that cut groups return an array, and so do lookups
    ``q[tokens]``, which decode only the rows they take. Put it on a mesh with ``jax.device_put(qparams,
    shardings_for(qparams, shardings))``.

    ``flax.serialization`` and orbax refuse to restore into a tree with other levels: the former stores them,
    and the latter finds no array under the key of the scale, in which ``jax.tree_util`` sees the levels.

    Examples:
      >>> grid = Grid(scale=jnp.full((1, 1), 0.5), bits=4, lower=-8, upper=7)
      >>> w = QArray(jnp.array([[1, -8]], jnp.int8), grid)
      >>> jnp.ones((1, 2)) @ w.T
      Array([[-3.5]], dtype=float32)
      >>> w.shape, w.dtype, w.nbytes_packed
      ((1, 2), dtype('float32'), 3)
    """

    qvalue: jax.Array
    grid: Grid

    @property
    def scale(self) -> jax.Array:
        return self.grid.scale

    @property
    def zero_point(self) -> jax.Array | None:
        return self.grid.zero_point

    @property
    def bits(self) -> float:
        return self.grid.bits

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    @property
    def size(self) -> int:
        return self.qvalue.size

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the dequantized array."""
        return self.grid.dtype

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """The sharding of the codes."""
        return self.qvalue.sharding

    @property
    def nbytes_packed(self) -> int:
        """Bytes on disk: codes packed at ``bits`` each, scales at 2 bytes, zero points in their dtype."""
        zero_point = self.grid.zero_point
        return (
            self.grid.packed_size(self.size)
            + 2 * self.grid.scale.size
            + (0 if zero_point is None else zero_point.size * zero_point.dtype.itemsize)
        )

    def dequantize(self) -> jax.Array:
        """The array of levels that the codes index."""
        return self.grid.decode(self.qvalue)

    def expand_scale(self, axis: int) -> "QArray":
        """Returns the same array, with a scale for each index along ``axis``.

        ``jax.vmap``, ``jax.lax.scan`` and indexing can then split an axis along which scales were shared.
        ``quantize_params(..., uses=trace_weights(...))`` gives each stacked layer and expert separate scales
        from the start, which is also more accurate.

        Args:
          axis: one of the array's axes.

        Raises:
          ValueError: the array has no such axis.

        Examples:
          >>> grid = Grid(scale=jnp.full((1, 1, 1), 0.5), bits=4, lower=-8, upper=7)
          >>> stack = QArray(jnp.ones((3, 2, 2), jnp.int8), grid).expand_scale(0)
          >>> stack.scale.shape
          (3, 1, 1)
          >>> jax.vmap(lambda w: w @ jnp.ones(2))(stack).shape
          (3, 2)
        """
        if not -self.ndim <= axis < self.ndim:
            raise ValueError(
                f"expand_scale: axis {axis} is out of range for an array with {self.ndim} axes"
            )
        axis %= self.ndim
        group, length = self.grid.group, self.shape[axis]
        grouped = group is not None and axis == group[0] + self.ndim
        times = group[1] if group is not None and grouped else length

        def expand(scale: jax.Array) -> jax.Array:
            return scale if scale.shape[axis] == length else repeat_axis(scale, axis, times, length)

        arrays = {name: expand(x) for name, x in self.grid.arrays.items() if x is not None}
        return QArray(
            self.qvalue,
            dataclasses.replace(self.grid, group=None if grouped else group, **arrays),
        )

    def __getitem__(self, index: Any) -> Any:
        """``dequantize()[index]``; as a ``QArray`` if it has only integers, slices and None, and cuts no group."""
        entries = index if isinstance(index, tuple) else (index,)
        if not any(entry is Ellipsis for entry in entries):
            entries = (*entries, Ellipsis)
        at = next(i for i, entry in enumerate(entries) if entry is Ellipsis)
        named = sum(entry is not None for entry in entries) - 1
        if named <= self.ndim and all(
            entry is None or isinstance(entry, slice) or _is_scalar(entry)
            for i, entry in enumerate(entries)
            if i != at
        ):
            full = (slice(None),) * (self.ndim - named)
            part = self._part((*entries[:at], *full, *entries[at + 1 :]))
            if part is not None:
                return part
        elif _are_rows(index) and self.ndim and not self._is_grouped(0):
            # A lookup decodes only the rows that it takes.
            arrays = {
                name: x[index] if x.shape[0] > 1 else x[jnp.zeros_like(index)]
                for name, x in self.grid.arrays.items()
                if x is not None
            }
            return dataclasses.replace(self.grid, **arrays).decode(self.qvalue[index])
        return self.dequantize()[index]

    def _part(self, entries: tuple[Any, ...]) -> "QArray | None":
        """The part at an index of integers, slices and None; None if the index cuts groups."""
        of_scales, behind, axis = [], 0, 0
        for entry in entries:
            if entry is None:
                of_scales.append(entry)
                behind += 1
                continue
            length = self.shape[axis]
            whole = isinstance(entry, slice) and entry.indices(length) == (0, length, 1)
            if self._is_grouped(axis):
                if not whole:
                    return None
                behind = 0  # counts the axes after the grouped one
            elif isinstance(entry, slice):
                behind += 1
            if self.grid.scale.shape[axis] == 1:
                entry = slice(None) if isinstance(entry, slice) else 0
            of_scales.append(slice(None) if whole else entry)
            axis += 1
        group = None if self.grid.group is None else (-1 - behind, self.grid.group[1])
        arrays = {
            name: x[tuple(of_scales)] for name, x in self.grid.arrays.items() if x is not None
        }
        grid = dataclasses.replace(self.grid, group=group, **arrays)
        return QArray(self.qvalue[entries], grid)

    def _is_grouped(self, axis: int) -> bool:
        return self.grid.group is not None and axis == self.grid.group[0] + self.ndim

    def __len__(self) -> int:
        return len(self.qvalue)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def _is_scalar(entry: Any) -> bool:
    """Whether ``entry`` of an index is an integer, which picks one place along an axis and drops the axis."""
    if isinstance(entry, (bool, np.bool_)):
        return False
    if isinstance(entry, (int, np.integer)):
        return True
    return (
        isinstance(entry, (jax.Array, np.ndarray, Tracer))
        and entry.ndim == 0
        and np.issubdtype(entry.dtype, np.integer)
    )


def _are_rows(index: Any) -> TypeGuard[jax.Array]:
    return (
        isinstance(index, (jax.Array, np.ndarray))
        and index.ndim > 0
        and jnp.issubdtype(index.dtype, jnp.integer)
    )


refuse_in_lax(QArray)


def is_qarray(leaf: Any) -> bool:
    return isinstance(leaf, QArray)


def _as(dtype: Any, codes: Any) -> Any:
    return codes if getattr(codes, "dtype", dtype) == dtype else codes.astype(dtype)


def _to_state_dict(array: QArray) -> dict[str, Any]:
    return {
        # msgpack has no int4.
        "qvalue": _as(jnp.int8, array.qvalue),
        "grid": flax.serialization.to_state_dict(array.grid),
    }


def _from_state_dict(array: QArray, state: Mapping[str, Any]) -> QArray:
    grid: Any = flax.serialization.from_state_dict(array.grid, state["grid"], name="grid")
    path, codes = flax.serialization.current_path(), state["qvalue"]
    check_restored(path, {}, None, {"qvalue": array.qvalue}, {"qvalue": codes})
    if "levels" not in state["grid"] and not isinstance(codes, Tracer) and codes.size:
        least, largest = int(codes.min()), int(codes.max())
        if least < grid.lower or largest > grid.upper:
            raise ValueError(
                f"{path.removeprefix('./')}: the checkpoint holds codes from {least} to {largest}, and the "
                f"tree to restore into a grid with codes from {grid.lower} to {grid.upper}; quantize "
                "it with the quantizer that the checkpoint was saved with"
            )
    return QArray(_as(getattr(array.qvalue, "dtype", codes.dtype), codes), grid)


flax.serialization.register_serialization_state(QArray, _to_state_dict, _from_state_dict)
jax.export.register_pytree_node_serialization(
    QArray,
    serialized_name="optax_clipquant.QArray",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)
