"""An array of integer codes on a grid, which behaves as the array that it stands for."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.levels import check_restored


@functools.partial(jax.tree_util.register_dataclass, data_fields=("qvalue", "grid"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class QArray:
    """A quantized array: codes, and the grid whose levels they name.

    Invariants:
      * ``dequantize() == grid.decode(qvalue)``.
      * ``qvalue`` has the logical shape. Its dtype is int8, or after ``narrow`` int4 or int2.

    It can stand in a tree of params where an array stood: Flax's layers, ``jnp`` functions, arithmetic
    and comparisons dequantize it where they touch it, inside ``jax.jit`` as a part of the operation that
    reads it.

    ``flax.serialization`` keeps which levels there are, and refuses to restore into a tree on other
    levels. Orbax keeps arrays alone and cannot tell: save ``flax.serialization.to_state_dict(tree)``
    with it, and give what it restores to ``flax.serialization.from_state_dict(tree, restored)``.

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

    # As jax.Array, whose comparisons are elementwise too.
    __hash__: ClassVar[None] = None  # pyright: ignore[reportIncompatibleMethodOverride]

    # Binary operators of jax.Array then leave the work to the ones below.
    __array_priority__ = 200

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
    def nbytes_packed(self) -> int:
        """Bytes on disk: codes packed at ``bits`` each, scales of 2 bytes, zero points as they are."""
        zero_point = self.grid.zero_point
        return (
            self.grid.packed_size(self.size)
            + 2 * self.grid.scale.size
            + (0 if zero_point is None else zero_point.size * zero_point.dtype.itemsize)
        )

    def dequantize(self) -> jax.Array:
        """The array that the codes stand for."""
        return self.grid.decode(self.qvalue)

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                "a QArray has no array of its values: it cannot be given without a copy"
            )
        return np.asarray(self.dequantize(), dtype=dtype)

    def __getitem__(self, index: Any) -> jax.Array:
        return self.dequantize()[index]

    def __len__(self) -> int:
        return len(self.qvalue)

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.dequantize())

    def astype(self, dtype: Any) -> jax.Array:
        return self.dequantize().astype(dtype)

    @property
    def T(self) -> jax.Array:
        return self.dequantize().T

    def __neg__(self) -> jax.Array:
        return -self.dequantize()

    def __abs__(self) -> jax.Array:
        return abs(self.dequantize())

    def __eq__(self, other: Any) -> Any:
        return self.dequantize() == other

    def __ne__(self, other: Any) -> Any:
        return self.dequantize() != other

    def __lt__(self, other: Any) -> jax.Array:
        return self.dequantize() < other

    def __le__(self, other: Any) -> jax.Array:
        return self.dequantize() <= other

    def __gt__(self, other: Any) -> jax.Array:
        return self.dequantize() > other

    def __ge__(self, other: Any) -> jax.Array:
        return self.dequantize() >= other

    def __add__(self, other: Any) -> jax.Array:
        return self.dequantize() + other

    def __radd__(self, other: Any) -> jax.Array:
        return other + self.dequantize()

    def __sub__(self, other: Any) -> jax.Array:
        return self.dequantize() - other

    def __rsub__(self, other: Any) -> jax.Array:
        return other - self.dequantize()

    def __mul__(self, other: Any) -> jax.Array:
        return self.dequantize() * other

    def __rmul__(self, other: Any) -> jax.Array:
        return other * self.dequantize()

    def __truediv__(self, other: Any) -> jax.Array:
        return self.dequantize() / other

    def __rtruediv__(self, other: Any) -> jax.Array:
        return other / self.dequantize()

    def __pow__(self, other: Any) -> jax.Array:
        return self.dequantize() ** other

    def __rpow__(self, other: Any) -> jax.Array:
        return other ** self.dequantize()

    def __matmul__(self, other: Any) -> jax.Array:
        return self.dequantize() @ other

    def __rmatmul__(self, other: Any) -> jax.Array:
        return other @ self.dequantize()


def is_qarray(leaf: Any) -> bool:
    return isinstance(leaf, QArray)


def narrow(qparams: Any) -> Any:
    """``qparams`` with the codes as int4 or int2, and the scales as bfloat16, where they fit.

    For accelerators, whose compilers keep such codes packed in memory: a 4-bit weight is then read
    as half a byte. XLA's CPU backend gives each a byte all the same and is slow at writing them, so
    int8 is the default. No value changes: scales that bfloat16 does not hold, as those of a file of
    llama.cpp, stay as they are. Inside ``jax.jit``, where nothing can be compared, they become
    bfloat16 all the same.

    Args:
      qparams: a tree with ``QArray`` leaves; other leaves are left alone.

    Examples:
      >>> grid = Grid(scale=jnp.full((1, 1), 0.5), bits=4, lower=-8, upper=7)
      >>> narrow(QArray(jnp.array([[1, -8]], jnp.int8), grid)).qvalue.dtype
      dtype(int4)
    """

    def narrow_leaf(leaf: Any) -> Any:
        if not is_qarray(leaf):
            return leaf
        grid = leaf.grid
        dtype = next(
            (t for t in (jnp.int2, jnp.int4) if jnp.iinfo(t).min <= grid.lower and grid.upper <= jnp.iinfo(t).max),
            leaf.qvalue.dtype,
        )  # fmt: skip
        # Fractional zero points mark a z-score grid, whose one scale may have all of float32's bits.
        if grid.zero_point is None or jnp.issubdtype(grid.zero_point.dtype, jnp.integer):
            short = grid.scale.astype(jnp.bfloat16)
            same = jnp.array_equal(
                short.astype(jnp.float32), grid.scale.astype(jnp.float32), equal_nan=True
            )
            if isinstance(same, Tracer) or same:
                grid = dataclasses.replace(grid, scale=short)
        return QArray(leaf.qvalue.astype(dtype), grid)

    return jax.tree.map(narrow_leaf, qparams, is_leaf=is_qarray)


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
                "it by the rule that the checkpoint was saved with"
            )
    return QArray(_as(getattr(array.qvalue, "dtype", codes.dtype), codes), grid)


flax.serialization.register_serialization_state(QArray, _to_state_dict, _from_state_dict)
