"""Leaves of a tree on their way to and from the files of other libraries."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant._tree import PyTree, refuse_abstract
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.params import dequantize_params, leaves_of
from optax_clipquant.quant.qarray import QArray, is_qarray


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a tree, whose content may still be in a file.

    Attributes:
      path: its keys, joined by slashes.
      shape: its logical shape.
      dtype: its dtype when dequantized.
      grid: the grid of a ``QArray``, None for an array.
      read: returns the codes, or the array.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    grid: Grid | None
    read: Callable[[], np.ndarray]

    def whole(self) -> Any:
        """The leaf as a ``QArray`` or an array."""
        return self.read() if self.grid is None else QArray(jnp.asarray(self.read()), self.grid)

    def values(self) -> np.ndarray:
        """The leaf as an array, dequantized."""
        return np.asarray(dequantize_params(self.whole()))


class Written(NamedTuple):
    """A tensor of a file, the leaf it came from, and its type there."""

    leaf: Leaf
    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int


def leaves_in(tree: PyTree) -> dict[str, Leaf]:
    """The leaves of ``tree`` by path."""
    found: dict[str, Leaf] = {}
    for path, leaf in leaves_of(tree):
        if not hasattr(leaf, "dtype") or isinstance(leaf, Grid):
            raise TypeError(f"leaf {path!r} is a {type(leaf).__name__}, not an array")
        array = leaf.qvalue if is_qarray(leaf) else leaf
        if isinstance(array, Tracer):
            raise TypeError(f"leaf {path!r} is traced; write files outside jax.jit")
        refuse_abstract(f"leaf {path!r}", leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"leaf {path!r} is a {leaf.dtype}, not a weight; give only the parameters, such as "
                "nnx.state(model, nnx.Param)"
            )
        if path in found:
            raise ValueError(f"two leaves have the path {path!r}; rename one")
        found[path] = Leaf(
            path,
            tuple(leaf.shape),
            np.dtype(leaf.dtype),
            leaf.grid if is_qarray(leaf) else None,
            functools.partial(_read, leaf),
        )
    return found


def _read(leaf: Any) -> np.ndarray:
    if is_qarray(leaf):
        return np.asarray(leaf.qvalue).astype(np.int8, copy=False)
    return np.asarray(leaf)


def dotted(path: str) -> str:
    """Translates a path to PyTorch's naming: ``mlp/up_proj/kernel`` to ``mlp.up_proj.weight``."""
    name = path.replace("/", ".")
    module, _, last = name.rpartition(".")
    return f"{module}.weight" if module and last in ("kernel", "embedding", "scale") else name
