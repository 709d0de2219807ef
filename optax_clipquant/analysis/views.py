"""Arrays that are made of one leaf's weights alone, and where the leaf's axes run in them.

Only shapes are computed with. A reshape, a transpose or a slice of a view is a view.
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
      axes: the leaf's axes. Several where a reshape cuts across them; none where it repeats.
      size: its extent.
      by_data: whether it has one index left, which data picked.
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
      gone: the leaf's axes that were indexed: ``stacked``, or where data picks, ``lookup``.
      soft: whether data has a part in it, for it picked or masked the weights.
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
        """Whether the same weight stands in several places."""
        return any(not part.axes and part.size > 1 for dim in self.dims for part in dim)

    @property
    def rank(self) -> int:
        """How many axes of the leaf run in it, those along which data picks aside."""
        looked_up = {axis for axis, role in self.gone if role == "lookup"}
        return len(axes_of(part for dim in self.dims for part in dim if part.size > 1) - looked_up)

    def roles(self, of_dims: Sequence[Role]) -> dict[int, set[Role]]:
        """What becomes of each axis of the leaf where the view's axes have the roles ``of_dims``."""
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
    """Axis ``i`` of the view becomes axis ``places[i]`` of ``shape``; what is new repeats."""
    dims: list[Dim] = [(Part(frozenset(), size),) if size != 1 else () for size in shape]
    for dim, place in zip(view.dims, places, strict=True):
        if _extent(dim) == shape[place]:
            dims[place] = dim
    return dataclasses.replace(view, dims=tuple(dims))


def indexed(view: View, dropped: Iterable[int], role: Role = "stacked") -> View:
    """Without the axes ``dropped``, of which one index is left or is taken at a time."""
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
    """Some of the view, or more than it, as padding and concatenation make.

    Args:
      shape: the extents left.
      starts: where they begin in the view, as far as that is known.
      by_data: whether data says where.
    """
    dims, gone = [], set(view.gone)
    for i, (dim, size) in enumerate(zip(view.dims, shape, strict=True)):
        if _extent(dim) != size:
            dim, taken = _cut(dim, None if starts is None else starts[i], size, by_data)
            gone |= {(axis, "stacked") for axis in taken}
        dims.append(dim)
    return View(view.leaf, tuple(dims), frozenset(gone), view.soft)


def _cut(dim: Dim, start: int | None, size: int, by_data: bool) -> tuple[Dim, frozenset[int]]:
    """``size`` of ``dim`` from ``start`` on, and the axes of the leaf that it takes one index of."""
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
    """The view ``times[i]`` times along each axis ``i``."""
    dims = tuple(
        (Part(frozenset(), n), *dim) if n != 1 else dim
        for n, dim in zip(times, view.dims, strict=True)
    )
    return dataclasses.replace(view, dims=dims)


def gathered(
    view: View, numbers: Any, sizes: Sequence[int], shape: Sequence[int], *, by_data: bool
) -> View:
    """Rows or windows of the view for each index, as ``lax.gather`` takes them.

    Args:
      numbers: its dimension numbers.
      sizes: its slice sizes.
      shape: of its result.
      by_data: whether data says which.
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
        # Else it is a selection that the program fixes, as a longer slice is.
        one = indexed(View(view.leaf, (picked,), gone, soft), [0])
        gone, soft = one.gone, one.soft
    return View(view.leaf, tuple(dims[i] for i in range(len(shape))), gone, soft)


def reshaped(view: View, shape: Sequence[int]) -> View:
    """The view in another shape. An axis of extent 1 that it loses is an index taken."""
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
    """Axes whose bounds meet none of the parts': all run along all, up to where bounds meet again.

    Removes from ``parts`` those that it takes.
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
