"""Leaves as tensors in the files of other libraries: their names, and their layout as rows.

Those files hold a weight as rows along the contracted axis, cut into blocks with a scale each. A leaf may
have its contracted axis elsewhere, several contracted axes, or the layers of a model stacked.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from optax_clipquant.formats.leaves import Leaf
from optax_clipquant.quant.grid import Grid

Transpose = bool | tuple[int, ...] | None
Target = str | tuple[str, bool | tuple[int, ...]] | None
Names = Mapping[str, Target] | Callable[[str], Target]


@dataclasses.dataclass(frozen=True)
class Rows:
    """A leaf, or a layer of a stacked one, as the rows of a tensor.

    Attributes:
      leaf: the leaf.
      layer: the index along its leading axis, or None.
      axes: the order of its axes (without the layers') in the tensor.
      shape: the shape of the tensor, each axis of which is one or several of these axes.
      order: None, or for each row of the tensor the index of the leaf's row.
    """

    leaf: Leaf
    layer: int | None
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    order: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """The size of the dequantized values, in bytes."""
        return math.prod(self.shape) * self.leaf.dtype.itemsize

    def checked(self, codes: np.ndarray) -> np.ndarray:
        """``codes``, after a check that all are in the grid's range. Only a ``QArray`` made by hand can fail it."""
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
        """How many neighbours in a row share a scale; 1 if none do, or if the last run is shorter."""
        length = self.shape[-1]
        changes = np.flatnonzero(np.diff(self._row_index)) + 1
        run = length if changes.size == 0 else int(changes[0])
        even = length % run == 0 and np.array_equal(changes, np.arange(run, length, run))
        return run if even else 1

    def scales(self, size: int, part: str = "scale") -> np.ndarray:
        """The scale, or another array of the grid, of each block of ``size``, which divides ``run``.

        It has the tensor's shape, except along rows.
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

    @property
    def channel_argument(self) -> str:
        """The argument with which a quantizer's groups run along the rows; empty where the default does."""
        ndim = len(self.leaf.shape)
        along = {axis + ndim - len(self.axes) for axis in self.axes[-self._tail :]}
        if ndim - 1 not in along:
            return ""
        channels = tuple(axis for axis in range(ndim) if axis not in along)
        return f", channel_axis={channels[0] if len(channels) == 1 else channels}"

    @functools.cached_property
    def _tail(self) -> int:
        """How many of the leaf's axes make up a row of the tensor."""
        extents = self._extents
        return next(n for n in range(1, len(extents) + 1) if math.prod(extents[-n:]) == self.shape[-1])  # fmt: skip

    @property
    def _extents(self) -> tuple[int, ...]:
        shape = self.leaf.shape if self.layer is None else self.leaf.shape[1:]
        return tuple(shape[axis] for axis in self.axes)

    @functools.cached_property
    def _indices(self) -> list[np.ndarray]:
        """For each axis, the index of the scale of each index along it."""
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
        """The index of the scale, among those of its row, of each element of a row."""
        tail = self._part("scale").shape[-self._tail :]
        parts = np.ix_(*self._indices[-self._tail :])
        return np.ravel_multi_index(np.broadcast_arrays(*parts), tail).ravel()


def integer_range(grid: Grid) -> tuple[int, int]:
    """The smallest and the largest level of ``grid`` as integers, in units that make all levels integers.

    Half steps ``(k + 1/2) s`` are written as ``(2 k + 1) s/2``.
    """
    return (2 * grid.lower + 1, 2 * grid.upper + 1) if grid.offset else (grid.lower, grid.upper)


def place(
    leaves: Mapping[str, Leaf],
    shapes: Mapping[str, tuple[int, ...]],
    names: Names | None,
    default: Callable[[str], str],
    where: str,
) -> dict[str, Rows]:
    """Assigns leaves to tensors: the rows for each tensor that comes from a leaf, by the tensor's name.

    The file ``where`` has tensors of ``shapes``; ``default`` gives the name for a path that ``names`` lacks.
    """
    placed: dict[str, Rows] = {}
    for path, leaf in leaves.items():
        if callable(names):
            target = names(path)
        else:
            target = names[path] if names is not None and path in names else default(path)
        for name, layer, transpose in _targets(leaf, target, shapes):
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
            rows = rows_of(leaf, layer, transpose, shapes[name])
            if rows is None:
                raise ValueError(_misfit(leaf, layer, transpose, name, shapes[name], where))
            placed[name] = rows
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


def _misfit(
    leaf: Leaf,
    layer: int | None,
    transpose: Transpose,
    name: str,
    shape: tuple[int, ...],
    where: str,
) -> str:
    """The message for a leaf that ``rows_of`` cannot lay out."""
    own, stacked = (leaf.shape, "") if layer is None else (leaf.shape[1:], " without the leading axis")  # fmt: skip
    given = "" if transpose is None else f", with transpose {transpose}"
    way_out = "`like` must be the same model, and `names` may give another tensor"
    if math.prod(own) == math.prod(shape):
        way_out = "give `names` (name, transpose) for it, with transpose True, False or the order of its axes"
    return (
        f"leaf {leaf.path!r} has shape {own}{stacked}{given}, but tensor {name!r} in {where} has {shape}; "
        f"{way_out}"
    )


def rows_of(
    leaf: Leaf, layer: int | None, transpose: Transpose, shape: tuple[int, ...]
) -> Rows | None:
    """Lays out ``leaf`` as the rows of a tensor of this ``shape``; None if it does not fit.

    ``transpose`` says whether to swap the leaf's last two axes, or gives the order of all, after which
    neighbours may be merged. With None, the shape, the grid or the name decides.
    """
    stacked = "" if layer is None else " without the leading axis"
    own = leaf.shape if layer is None else leaf.shape[1:]
    ndim = len(own)
    plain, swapped = tuple(range(ndim)), (*range(ndim - 2), ndim - 1, ndim - 2)
    if isinstance(transpose, tuple):
        if sorted(transpose) != [*plain]:
            raise ValueError(
                f"names: leaf {leaf.path!r} has transpose {transpose}, which is not an order of the axes of "
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
        return None
    found = [Rows(leaf, layer, axes, shape) for axes in fitting]
    if len(found) > 1 and leaf.grid is not None:
        found = [rows for rows in found if rows.run > 1] or found[:1]
    if len(found) > 1:
        last = leaf.path.replace(".", "/").rpartition("/")[2]
        if last not in ("kernel", "weight", "embedding"):
            raise ValueError(
                f"leaf {leaf.path!r} of shape {own}: cannot tell whether its rows or its columns are "
                "contracted; give `names` (name, transpose) for it"
            )
        return found[last == "kernel"]
    return found[0]


def _targets(
    leaf: Leaf, target: Target, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int | None, Transpose]]:
    """The name, layer and transposition of each tensor that ``leaf`` becomes."""
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
    layers = leaf.shape[0]
    if (following := name.replace("{}", str(layers))) in shapes:
        raise ValueError(
            f"leaf {leaf.path!r} is a stack of {layers}, but `like` has {following!r} too; the stack of "
            f"{name!r} must have all layers"
        )
    for layer in range(layers):
        yield name.replace("{}", str(layer)), layer, transpose
