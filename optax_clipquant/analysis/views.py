"""Views: arrays that hold only weights of one leaf, with the leaf's axes tracked through shape changes.

Only shapes are computed. A reshape, a transpose or a slice of a view is a view.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Role = Literal["contracted", "batch", "output", "stacked", "lookup"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an axis of a view, which runs along axes of the leaf.

    The parts of one axis are in row-major order: merging axes joins their parts, and splitting an
    axis distributes them again.

    Attributes:
      axes: the leaf's axes: several if a reshape cuts across them, none if it repeats weights.
      size: its extent.
      by_data: whether only one index is left, which data picked.
    """

    axes: frozenset[int]
    size: int
    by_data: bool = False


Dim = tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """An array of weights of one leaf.

    Attributes:
      leaf: the path of the leaf.
      dims: the parts of each axis of the view.
      gone: the leaf's axes that were indexed: ``stacked``, or ``lookup`` if data picked the index.
      soft: whether data picked or masked the weights.
    """

    leaf: str
    dims: tuple[Dim, ...]
    gone: frozenset[tuple[int, Role]] = frozenset()
    soft: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(_extent(dim) for dim in self.dims)

    @property
    def is_lookup(self) -> bool:
        return any(role == "lookup" for _, role in self.gone)

    @property
    def repeats(self) -> bool:
        """Whether a weight appears in several places."""
        return any(not part.axes and part.size > 1 for dim in self.dims for part in dim)

    @property
    def rank(self) -> int:
        """The number of the leaf's axes in it, without those along which data picks."""
        looked_up = {axis for axis, role in self.gone if role == "lookup"}
        return len(axes_of(part for dim in self.dims for part in dim if part.size > 1) - looked_up)

    def roles(self, of_dims: Sequence[Role]) -> dict[int, set[Role]]:
        """The roles of each axis of the leaf, given the roles ``of_dims`` of the view's axes."""
        found: dict[int, set[Role]] = {}
        for axis, role in self.gone:
            found.setdefault(axis, set()).add(role)
        for dim, role in zip(self.dims, of_dims, strict=True):
            for axis in axes_of(dim):
                found.setdefault(axis, set()).add(role)
        return found


def whole(leaf: str, shape: Sequence[int]) -> View:
    return View(leaf, tuple((Part(frozenset({axis}), size),) for axis, size in enumerate(shape)))


def transposed(view: View, order: Sequence[int]) -> View:
    return dataclasses.replace(view, dims=tuple(view.dims[i] for i in order))


def repeated(view: View, shape: Sequence[int], places: Sequence[int]) -> View:
    """Broadcasts the view: axis ``i`` becomes axis ``places[i]`` of ``shape``; new axes repeat."""
    dims: list[Dim] = [(Part(frozenset(), size),) if size != 1 else () for size in shape]
    for dim, place in zip(view.dims, places, strict=True):
        if _extent(dim) == shape[place]:
            dims[place] = dim
    return dataclasses.replace(view, dims=tuple(dims))


def indexed(view: View, dropped: Iterable[int], role: Role = "stacked") -> View:
    """The view without the axes ``dropped``, along which one index is left or taken at a time."""
    dropped = set(dropped)
    gone: set[tuple[int, Role]] = {
        (axis, "lookup" if part.by_data else role)
        for i in dropped
        for part in view.dims[i]
        for axis in part.axes
    }
    return View(
        view.leaf,
        tuple(dim for i, dim in enumerate(view.dims) if i not in dropped),
        view.gone | gone,
        view.soft or any(role == "lookup" for _, role in gone),
    )


def resized(
    view: View,
    shape: Sequence[int],
    starts: Sequence[int | None] | None = None,
    *,
    by_data: bool = False,
) -> View:
    """A part of the view, or an extension of it, as slicing, padding and concatenation make.

    Args:
      view: the view.
      shape: the new extents.
      starts: where the part begins along each axis; None where unknown.
      by_data: whether data determines the start.
    """
    dims, gone = [], set(view.gone)
    for i, (dim, size) in enumerate(zip(view.dims, shape, strict=True)):
        if _extent(dim) != size:
            dim, taken = _cut(dim, None if starts is None else starts[i], size, by_data)
            gone |= {(axis, "stacked") for axis in taken}
        dims.append(dim)
    return View(view.leaf, tuple(dims), frozenset(gone), view.soft)


def _cut(dim: Dim, start: int | None, size: int, by_data: bool) -> tuple[Dim, frozenset[int]]:
    """The slice of ``dim`` with ``size`` elements from ``start``, and the leaf's axes reduced to one index."""
    if len(dim) == 1:
        return (Part(dim[0].axes, size, by_data and size == 1),), frozenset()
    if dim and start is not None and 0 < size < _extent(dim):
        inner = _extent(dim[1:])
        if start % inner == 0 and size % inner == 0 and size > inner:
            return (Part(dim[0].axes, size // inner), *dim[1:]), frozenset()
        if start // inner == (start + size - 1) // inner:
            left, gone = dim[1:], frozenset()
            if size < inner:
                left, gone = _cut(dim[1:], start % inner, size, by_data)
            return left, gone | (dim[0].axes if dim[0].size > 1 else frozenset())
    return (Part(axes_of(dim), size, by_data and size == 1),), frozenset()


def softened(view: View) -> View:
    return dataclasses.replace(view, soft=True)


def tiled(view: View, times: Sequence[int]) -> View:
    """The view repeated ``times[i]`` times along each axis ``i``."""
    dims = tuple(
        (Part(frozenset(), n), *dim) if n != 1 else dim
        for n, dim in zip(times, view.dims, strict=True)
    )
    return dataclasses.replace(view, dims=dims)


def gathered(
    view: View, numbers: Any, sizes: Sequence[int], shape: Sequence[int], *, by_data: bool
) -> View:
    """The result of ``lax.gather`` on the view.

    Args:
      view: the view.
      numbers: the dimension numbers of the gather.
      sizes: its slice sizes.
      shape: the shape of its result.
      by_data: whether data determines the indices.
    """
    beside = dict(
        zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    sizes = [
        n if i in beside.values() else size
        for i, (n, size) in enumerate(zip(view.shape, sizes, strict=True))
    ]
    view = resized(view, sizes, by_data=by_data)
    picked = tuple(part for i in numbers.collapsed_slice_dims for part in view.dims[i])
    rows = [
        dim
        for i, dim in enumerate(view.dims)
        if i not in numbers.collapsed_slice_dims and i not in beside.values()
    ]
    dims = dict(zip(numbers.offset_dims, rows, strict=True))
    places = [i for i in range(len(shape)) if i not in dims]
    for k, i in enumerate(places):
        along = (Part(axes_of(picked), shape[i]),) if shape[i] != 1 else ()
        dims[i] = view.dims[beside[k]] if k in beside else along
    gone, soft = view.gone, view.soft
    if by_data or all(shape[i] == 1 for k, i in enumerate(places) if k not in beside):
        # Otherwise the program fixes the selection, as with a longer slice.
        one = indexed(View(view.leaf, (picked,), gone, soft), [0])
        gone, soft = one.gone, one.soft
    return View(view.leaf, tuple(dims[i] for i in range(len(shape))), gone, soft)


def reshaped(view: View, shape: Sequence[int]) -> View:
    """The view in another shape. Dropping an axis of extent 1 counts as taking an index."""
    if 0 in shape:
        every = axes_of(part for dim in view.dims for part in dim)
        return dataclasses.replace(view, dims=tuple((Part(every, size),) for size in shape))
    parts = [part for dim in view.dims for part in dim]
    dims: list[Dim] = []
    lost: list[Part] = []
    while len(dims) < len(shape):
        size, taken = shape[len(dims)], []
        if size == 1 and parts and parts[0].size == 1:
            taken.append(parts.pop(0))
        while size > 1:
            part = parts.pop(0)
            if part.size == 1:
                lost.append(part)
            elif size % part.size == 0:
                taken.append(part)
                size //= part.size
            elif part.size % size == 0:
                taken.append(dataclasses.replace(part, size=size))
                parts.insert(0, dataclasses.replace(part, size=part.size // size))
                size = 1
            else:
                dims += _scrambled([*taken, part], parts, shape[len(dims) :])
                break
        else:
            dims.append(tuple(taken))
    ones = View(view.leaf, ((*lost, *(part for part in parts if part.size == 1)),))
    gone = view.gone | indexed(ones, [0]).gone
    soft = view.soft or any(role == "lookup" for _, role in gone)
    return View(view.leaf, tuple(dims), gone, soft)


def _scrambled(taken: list[Part], parts: list[Part], shape: Sequence[int]) -> list[Dim]:
    """New axes that cut across parts: each runs along all leaf axes up to where the bounds align again.

    Removes the parts that it takes from ``parts``.
    """
    size, count = shape[0], 1
    while size != _extent(taken):
        if size < _extent(taken):
            size *= shape[count]
            count += 1
        else:
            taken.append(parts.pop(0))
    return [(Part(axes_of(taken), extent),) for extent in shape[:count]]


def _extent(dim: Iterable[Part]) -> int:
    return math.prod(part.size for part in dim)


def axes_of(parts: Iterable[Part]) -> frozenset[int]:
    return frozenset(axis for part in parts for axis in part.axes)
