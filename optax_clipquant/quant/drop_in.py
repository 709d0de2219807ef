"""A base class for objects that stand in for an array, so that a model's code can use them like one.

The following return what they return for the array itself, traced or not:

* attributes and methods: ``T``, ``mT``, ``itemsize``, ``at``, ``astype``, ``reshape``, ``transpose``,
  ``swapaxes``, ``ravel``, ``flatten``, ``squeeze``, ``sum``, ``mean``, ``max``, ``dot``, ``take``, and
  all others of ``jax.Array``, except those that concern buffers;
* operators and comparisons, ``len``, iteration, indexing, ``float`` of one element;
* functions: ``jnp.dot``, ``jnp.matmul``, ``jnp.einsum``, ``jnp.tensordot``, ``jnp.take``, ``jnp.where``,
  ``jnp.concatenate``, ``jnp.stack``, ``jnp.reshape``, ``jnp.swapaxes``, ``jnp.sum``, ``jnp.asarray``,
  ``jax.nn.relu``, and all others of ``jnp`` and ``jax.nn``; and Flax's layers;
* transformations: ``jax.jit``, ``jax.vmap``, ``lax.scan``, ``lax.cond``, ``jax.checkpoint``, ``jax.export``.

``jax.lax`` only accepts arrays. Its functions raise an error that names ``dequantize``:
``lax.dot``, ``lax.dot_general``, ``lax.conv_general_dilated``, ``lax.ragged_dot``, ``lax.dynamic_slice``,
``lax.dynamic_index_in_dim``, ``lax.reshape``, ``lax.transpose``, ``lax.add``, and all others.
"""

import contextlib
import importlib
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np

# They concern buffers, which a dequantized array does not have.
_BUFFERS = {
    *("addressable_data", "addressable_shards", "committed", "copy_to_host_async", "device"),
    *("global_shards", "is_fully_addressable", "is_fully_replicated", "sharding", "to_device"),
}
_METHODS = {name for name in dir(jax.Array) if not name.startswith("_")} - _BUFFERS


def _binary(fn: Callable[[Any, Any], Any]) -> Any:
    return lambda self, other: fn(self.dequantize(), other)


def _reflected(fn: Callable[[Any, Any], Any]) -> Any:
    return lambda self, other: fn(other, self.dequantize())


class DropIn:
    """The operators, methods and conversions of ``jax.Array``, applied to ``dequantize()``.

    Inside ``jax.jit``, dequantization fuses into the operation that reads it. The functions of
    ``jax.lax`` only accept arrays, and refuse with an error that names ``dequantize``.
    """

    # Like jax.Array, whose comparisons are elementwise too.
    __hash__: ClassVar[None] = None  # pyright: ignore[reportIncompatibleMethodOverride]

    # Makes binary operators of jax.Array defer to the ones below.
    __array_priority__ = 200

    def dequantize(self) -> jax.Array:
        """The array that this object stands in for."""
        raise NotImplementedError

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                f"a {type(self).__name__} has no array of its values: it cannot be given without a copy"
            )
        return np.asarray(self.dequantize(), dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        # The other attributes of arrays: reshape, swapaxes, mT, sum, at, itemsize and more.
        if name not in _METHODS:
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}; .dequantize() returns the array that it "
                "stands for",
                name=name,
                obj=self,
            )
        return getattr(self.dequantize(), name)

    def astype(self, dtype: Any, **options: Any) -> jax.Array:
        return self.dequantize().astype(dtype, **options)

    def __float__(self) -> float:
        return float(self.dequantize())

    def __int__(self) -> int:
        return int(self.dequantize())

    def __bool__(self) -> bool:
        return bool(self.dequantize())

    def __neg__(self) -> jax.Array:
        return -self.dequantize()

    def __pos__(self) -> jax.Array:
        return self.dequantize()

    def __abs__(self) -> jax.Array:
        return abs(self.dequantize())

    def __round__(self, *digits: int) -> jax.Array:
        return round(self.dequantize(), *digits)

    __eq__ = _binary(operator.eq)
    __ne__ = _binary(operator.ne)
    __lt__ = _binary(operator.lt)
    __le__ = _binary(operator.le)
    __gt__ = _binary(operator.gt)
    __ge__ = _binary(operator.ge)
    __add__ = _binary(operator.add)
    __radd__ = _reflected(operator.add)
    __sub__ = _binary(operator.sub)
    __rsub__ = _reflected(operator.sub)
    __mul__ = _binary(operator.mul)
    __rmul__ = _reflected(operator.mul)
    __truediv__ = _binary(operator.truediv)
    __rtruediv__ = _reflected(operator.truediv)
    __floordiv__ = _binary(operator.floordiv)
    __rfloordiv__ = _reflected(operator.floordiv)
    __divmod__ = _binary(divmod)
    __rdivmod__ = _reflected(divmod)
    __mod__ = _binary(operator.mod)
    __rmod__ = _reflected(operator.mod)
    __pow__ = _binary(operator.pow)
    __rpow__ = _reflected(operator.pow)
    __matmul__ = _binary(operator.matmul)
    __rmatmul__ = _reflected(operator.matmul)


def refuse_in_lax(cls: type[DropIn]) -> None:
    """Makes the functions of ``jax.lax`` refuse a ``cls`` with a message that names ``dequantize``.

    They look up how to read an operand by its type, in tables that JAX does not make public. If a table
    no longer exists, JAX's own message remains, which names ``jax.numpy.array``.
    """

    def refuse(x: DropIn) -> Any:
        # Not a TypeError, which JAX would wrap in a message that hides this one.
        raise ValueError(
            f"jax.lax takes arrays, not a {cls.__name__} of shape {np.shape(x)}; give it "
            "w.dequantize(), which inside jax.jit fuses into the operation that reads it"
        )

    for module, table in (("core", "pytype_aval_mappings"), ("dtypes", "canonicalize_value_handlers")):  # fmt: skip
        with contextlib.suppress(ImportError, AttributeError):
            getattr(importlib.import_module(f"jax._src.{module}"), table)[cls] = refuse
