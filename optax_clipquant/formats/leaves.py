"""The leaves of a tree for the files of other libraries: their names there, and their rows.

Those files hold a weight as rows along the contracted axis, cut into blocks with a scale each. A leaf
may have its contracted axes elsewhere, several of them, or the layers of a model stacked.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant._tree import PyTree
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.params import dequantize_params, leaves_of
from optax_clipquant.quant.qarray import QArray, is_qarray

Transpose = bool | tuple[int, ...] | None
Target = str | tuple[str, bool | tuple[int, ...]] | None
Names = Mapping[str, Target] | Callable[[str], Target]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a tree, whose content may lie in a file.

    Attributes:
      path: its keys, joined by slashes.
      shape: of what it stands for.
      dtype: of what it stands for.
      grid: of a ``QArray``, None for an array.
      read: gives the codes, or the array.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    grid: Grid | None
    read: Callable[[], np.ndarray]

    def whole(self) -> Any:
        """The leaf as it stands in a tree."""
        return self.read() if self.grid is None else QArray(jnp.asarray(self.read()), self.grid)

    def values(self) -> np.ndarray:
        """The array that it stands for."""
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
        if isinstance(leaf.qvalue if is_qarray(leaf) else leaf, Tracer):
            raise TypeError(f"leaf {path!r} is traced; write files outside jax.jit")
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


@dataclasses.dataclass(frozen=True)
class Rows:
    """A leaf, or a layer of a stacked one, as the rows of a tensor.

    Attributes:
      leaf: the leaf.
      layer: the index along its leading axis, or None.
      axes: the order in which its axes (but the layer's) stand in the tensor.
      shape: of the tensor, each of whose axes is one or several of these.
      order: None, or which of its rows each row of the tensor is.
    """

    leaf: Leaf
    layer: int | None
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    order: np.ndarray | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def checked(self, codes: np.ndarray) -> np.ndarray:
        """``codes``, of which the grid has a level for each. Only those made by hand may have others."""
        grid = self.leaf.grid
        assert grid is not None
        if codes.size and not (grid.lower <= codes.min() and codes.max() <= grid.upper):
            raise ValueError(
                f"leaf {self.leaf.path!r}: codes from {codes.min()} to {codes.max()} are not all in its "
                f"grid's {grid.lower} to {grid.upper}"
            )
        return codes

    def codes(self) -> np.ndarray:
        """The codes, or the elements, in the order of the tensor; a view where that is possible."""
        return self._placed(self.leaf.read())

    def values(self) -> np.ndarray:
        """The elements in the order of the tensor."""
        return self._placed(self.leaf.values())

    def _placed(self, x: np.ndarray) -> np.ndarray:
        x = x if self.layer is None else x[self.layer]
        x = x.transpose(self.axes).reshape(self.shape)
        return x if self.order is None else x[self.order]

    @functools.cached_property
    def run(self) -> int:
        """How many neighbours in a row share a scale; 1 where they do not, or the last run is shorter."""
        length = self.shape[-1]
        changes = np.flatnonzero(np.diff(self._row_index)) + 1
        run = length if changes.size == 0 else int(changes[0])
        even = length % run == 0 and np.array_equal(changes, np.arange(run, length, run))
        return run if even else 1

    def scales(self, size: int, part: str = "scale") -> np.ndarray:
        """The scale, or another part of the grid, of each block of ``size``, which divides ``run``.

        Of the tensor's shape, but along rows.
        """
        x = self._part(part)
        lead = len(self.axes) - self._tail
        x = x.reshape(*x.shape[:lead], -1)[..., self._row_index[::size]]
        for axis, index in enumerate(self._indices[:lead]):
            x = x.take(index, axis)
        x = x.reshape(*self.shape[:-1], -1)
        return x if self.order is None else x[self.order]

    def _part(self, name: str) -> np.ndarray:
        x = np.asarray(getattr(self.leaf.grid, name))
        x = x if self.layer is None else x[self.layer if x.shape[0] > 1 else 0]
        return x.transpose(self.axes)

    @functools.cached_property
    def _tail(self) -> int:
        """How many of the leaf's axes are a row of the tensor."""
        extents = self._extents
        return next(n for n in range(1, len(extents) + 1) if math.prod(extents[-n:]) == self.shape[-1])  # fmt: skip

    @property
    def _extents(self) -> tuple[int, ...]:
        shape = self.leaf.shape if self.layer is None else self.leaf.shape[1:]
        return tuple(shape[axis] for axis in self.axes)

    @functools.cached_property
    def _indices(self) -> list[np.ndarray]:
        """Which scale each index along an axis has."""
        grid = self.leaf.grid
        assert grid is not None
        scales = self._part("scale").shape
        found = []
        for axis, length, extent in zip(self.axes, self._extents, scales, strict=True):
            index = np.arange(length)
            if extent == 1:
                index = np.zeros_like(index)
            elif grid.group is not None and grid.group[0] == axis - len(self.axes):
                index //= grid.group[1]
            found.append(index)
        return found

    @functools.cached_property
    def _row_index(self) -> np.ndarray:
        """Which scale, of those of its row, each element of a row has."""
        tail = self._part("scale").shape[-self._tail :]
        parts = np.ix_(*self._indices[-self._tail :])
        return np.ravel_multi_index(np.broadcast_arrays(*parts), tail).ravel()


def integer_range(grid: Grid) -> tuple[int, int]:
    """The least and the largest integer of which levels are multiples.

    Half steps ``(k + 1/2) s`` are ``(2 k + 1) s/2``.
    """
    return (2 * grid.lower + 1, 2 * grid.upper + 1) if grid.offset else (grid.lower, grid.upper)


def place(
    leaves: Mapping[str, Leaf],
    shapes: Mapping[str, tuple[int, ...]],
    names: Names | None,
    default: Callable[[str], str],
    where: str,
) -> dict[str, Rows]:
    """The rows of each tensor of the file ``where`` that come from a leaf.

    Its tensors have ``shapes``; ``default`` gives the name of a path that ``names`` lacks.
    """
    placed: dict[str, Rows] = {}
    for path, leaf in leaves.items():
        if callable(names):
            target = names(path)
        else:
            target = names[path] if names is not None and path in names else default(path)
        for name, layer, transpose in _targets(leaf, target):
            if name not in shapes:
                nearest = difflib.get_close_matches(name, shapes, n=3, cutoff=0)
                raise ValueError(
                    f"leaf {path!r}: {where} has no tensor {name!r}; the nearest are {nearest}; give its "
                    "name by `names`, or None to leave it out"
                )
            if name in placed:
                raise ValueError(
                    f"leaves {placed[name].leaf.path!r} and {path!r} are both tensor {name!r}"
                )
            placed[name] = rows_of(leaf, layer, transpose, shapes[name])
    return placed


def _merges(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether ``target`` is ``shape`` with neighbouring axes merged."""
    rest = list(shape)
    for extent in target:
        size = 1
        while rest and (size < extent or (size == extent and rest[0] == 1)):
            size *= rest.pop(0)
        if size != extent:
            return False
    return not rest


def rows_of(leaf: Leaf, layer: int | None, transpose: Transpose, shape: tuple[int, ...]) -> Rows:
    """``leaf`` as rows of a tensor of this ``shape``.

    ``transpose`` tells whether its last two axes change places, or is the order of all, after which
    neighbours may be merged; None: as its shape, its grid or its name tell.
    """
    stacked = "" if layer is None else " without the leading axis"
    own = leaf.shape if layer is None else leaf.shape[1:]
    ndim = len(own)
    plain, swapped = tuple(range(ndim)), (*range(ndim - 2), ndim - 1, ndim - 2)
    if isinstance(transpose, tuple):
        if sorted(transpose) != [*plain]:
            raise ValueError(
                f"names: leaf {leaf.path!r} has transpose {transpose}, which is no order of the axes of "
                f"{own}{stacked}"
            )
        orders = [transpose]
    elif ndim < 2:
        orders = [plain]
    else:
        orders = [plain, swapped] if transpose is None else [swapped if transpose else plain]
    laid = {axes: tuple(own[axis] for axis in axes) for axes in orders}
    fitting = [axes for axes in orders if laid[axes] == shape]
    if transpose is not None:
        fitting = fitting or [axes for axes in orders if _merges(laid[axes], shape)]
    if not fitting:
        raise ValueError(
            f"leaf {leaf.path!r} has shape {own}{stacked}, but {shape} in `like`; give `names` "
            "(name, transpose) for it, with transpose True or the order of its axes"
        )
    found = [Rows(leaf, layer, axes, shape) for axes in fitting]
    if len(found) > 1 and leaf.grid is not None:
        found = [rows for rows in found if rows.run > 1] or found[:1]
    if len(found) > 1:
        last = leaf.path.replace(".", "/").rpartition("/")[2]
        if last not in ("kernel", "weight", "embedding"):
            raise ValueError(
                f"leaf {leaf.path!r} of shape {own}: nothing tells whether its rows or its columns are "
                "contracted; give `names` (name, transpose) for it"
            )
        return found[last == "kernel"]
    return found[0]


def _targets(leaf: Leaf, target: Target) -> Iterator[tuple[str, int | None, Transpose]]:
    """Name, layer and transposition of each tensor that ``leaf`` becomes."""
    name, transpose = target if isinstance(target, tuple | list) else (target, None)
    if name is None:
        return
    if isinstance(transpose, list):
        transpose = tuple(transpose)
    if not isinstance(name, str) or not isinstance(transpose, bool | tuple | None):
        raise TypeError(
            f"names: leaf {leaf.path!r} has {target!r}; give a name, (name, transpose), or None to "
            "leave it out"
        )
    if "{}" not in name:
        yield name, None, transpose
        return
    if not leaf.shape:
        raise ValueError(f"leaf {leaf.path!r} has no leading axis for the layers of {name!r}")
    for layer in range(leaf.shape[0]):
        yield name.replace("{}", str(layer)), layer, transpose


def dotted(path: str) -> str:
    """A path as PyTorch's modules have it: ``mlp/up_proj/kernel`` as ``mlp.up_proj.weight``."""
    name = path.replace("/", ".")
    module, _, last = name.rpartition(".")
    return f"{module}.weight" if module and last in ("kernel", "embedding", "scale") else name
