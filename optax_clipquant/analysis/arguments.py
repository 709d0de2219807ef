"""A function of params and a batch: its arrays are traced, other leaves are passed to it unchanged."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

from optax_clipquant._tree import PyTree, flatten_with_path, path_of, refuse_abstract
from optax_clipquant.quant.qarray import is_qarray


class Batch:
    """The arrays of a batch, and what must be equal for batches to share a jaxpr.

    Attributes:
      arrays: its arrays and numbers.
      kind: its structure, the shapes and dtypes of its arrays, and its other leaves.
    """

    def __init__(self, what: str, batch: Any) -> None:
        found, self._treedef = jax.tree_util.tree_flatten_with_path(batch)
        self._leaves = [x for _, x in found]
        self._traced = {
            i: _concrete(f"{what} leaf {path_of(path)!r}" if path else what, x)
            for i, (path, x) in enumerate(found)
            if is_array(x) or (isinstance(x, (int, float, complex)) and not isinstance(x, bool))
        }
        self.arrays = list(self._traced.values())
        self.shapes = tuple((x.shape, x.dtype) for x in self.arrays)
        self.others = tuple(x for i, x in enumerate(self._leaves) if i not in self._traced)
        self.kind = self._treedef, tuple(self._traced), self.shapes, self.others

    def with_arrays(self, arrays: list[Any]) -> Any:
        """The batch with ``arrays`` in place of its own."""
        return _replaced(self._treedef, self._leaves, self._traced, arrays)

    def __str__(self) -> str:
        text = f"arrays {list(self.shapes)} in {self._treedef}"
        return text + (f" and {list(self.others)}" if self.others else "")


class Function:
    """A function, and the params that it is evaluated with.

    Args:
      name: the public function that asks, for messages.
      fn: the function.
      params: its params.

    Attributes:
      flat: the path and value of each leaf.
      treedef: the structure of the params.
      paths: the paths of the arrays.
      arrays: the arrays among the leaves, as JAX arrays.

    Raises:
      TypeError: an array has no value.
    """

    def __init__(self, name: str, fn: Callable[[PyTree, Any], Any], params: PyTree) -> None:
        self._name, self._fn = name, fn
        found, self.treedef = flatten_with_path(params, is_leaf=is_qarray)
        self.flat = [(path_of(path), leaf) for path, leaf in found]
        self._traced = {
            i: _concrete(f"{name}: params leaf {path!r}", x)
            for i, (path, x) in enumerate(self.flat)
            if is_array(x)
        }
        self.paths = [self.flat[i][0] for i in self._traced]
        self.arrays = list(self._traced.values())
        self.params = self._with_arrays(self.arrays)

    def _with_arrays(self, arrays: list[Any]) -> PyTree:
        return _replaced(self.treedef, [x for _, x in self.flat], self._traced, arrays)

    def batches(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Batch]]:
        """Each of the batches as it is, and its arrays."""
        check_batches(self._name, batches)
        for i, batch in enumerate(batches):
            yield batch, Batch(f"{self._name}: batches[{i}]", batch)

    def jaxpr(self, batch: Batch) -> ClosedJaxpr:
        """The jaxpr, which takes the arrays of the params and of the batch."""

        def call(params: list[Any], arrays: list[Any]) -> list[Any]:
            found = self._fn(self._with_arrays(params), batch.with_arrays(arrays))
            return [x for x in jax.tree.leaves(found) if is_array(x)]

        return jax.make_jaxpr(call)(self.arrays, batch.arrays)


def _replaced(treedef: Any, leaves: list[Any], numbers: Iterable[int], arrays: list[Any]) -> Any:
    """The tree with ``arrays`` in place of the leaves with these numbers."""
    new = dict(zip(numbers, arrays, strict=True))
    return treedef.unflatten([new.get(i, x) for i, x in enumerate(leaves)])


def check_batches(name: str, batches: Any) -> None:
    """Raises ``TypeError`` for a single batch in place of several."""
    if isinstance(batches, (Mapping, str, bytes)) or not hasattr(batches, "__iter__"):
        raise TypeError(
            f"{name}: batches must be a list or another iterable of batches, got "
            f"{type(batches).__name__}; a single batch is given as [batch]"
        )


def is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _concrete(what: str, x: Any) -> jax.Array:
    refuse_abstract(what, x)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x)):
        raise TypeError(f"{what} is traced, so its values are unknown; call it outside jax.jit")
    return jnp.asarray(x)
