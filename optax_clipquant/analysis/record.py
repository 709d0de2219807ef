"""The origin of each value of a jaxpr, and a record of what happens to the weights in it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from optax_clipquant.analysis.views import Role, View
from optax_clipquant.quant.uses import Kind, Use


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of data with one or several weights in turn; of weights only, if ``data`` is None."""

    data: object | None
    leaves: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """The origin of an array. With neither views nor data, it consists of constants or sums of weights.

    Attributes:
      views: the weights that it may hold, of several leaves if it is assembled from them.
      data: whether an argument of the function contributes to it.
      products: the relevant products that it is the sum of.
      token: distinguishes data from other data.
    """

    views: tuple[View, ...] = ()
    data: bool = False
    products: tuple[Product, ...] = dataclasses.field(default=(), compare=False)
    token: object = dataclasses.field(default_factory=object, compare=False)

    @property
    def is_constant(self) -> bool:
        return not self.views and not self.data


@dataclasses.dataclass(frozen=True)
class _Event:
    kinds: frozenset[Kind]
    roles: tuple[tuple[int, Role], ...]  # the roles of the leaf's axes
    splits: bool  # whether an axis is contracted in part

    def axes(self, role: Role) -> frozenset[int]:
        return frozenset(axis for axis, found in self.roles if found == role)


# Where an axis has several roles, the first of these is the one that matters for scales.
_PRECEDENCE: tuple[Role, ...] = ("lookup", "batch", "output", "stacked", "contracted")


class Record:
    """The uses of each leaf so far, in program order.

    Args:
      shapes: the shape of each leaf by path.

    Attributes:
      paused: whether uses are ignored, since they will be seen again.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.paused = False
        self._shapes = shapes
        self._events: dict[str, list[_Event]] = {path: [] for path in shapes}
        self._adapters: set[str] = set()

    def note(self, view: View, kind: Kind, roles: Sequence[Role] | None = None) -> None:
        """Records a use of ``view`` in which its axes have ``roles``; by default all are output axes."""
        stay: list[Role] = ["output"] * len(view.dims)
        found = view.roles(roles or stay)
        kinds: set[Kind] = {kind, "lookup"} if kind == "dot" and view.is_lookup else {kind}
        # Picked rows may be weighted and summed; each index has a scale anyway.
        splits = any(
            "contracted" in of_axis and len(of_axis) > 1 and "lookup" not in of_axis
            for of_axis in found.values()
        )
        settled: dict[int, Role] = {
            a: next(r for r in _PRECEDENCE if r in of_axis) for a, of_axis in found.items()
        }
        event = _Event(frozenset(kinds), tuple(sorted(settled.items())), splits)
        if not self.paused and event not in self._events[view.leaf]:
            self._events[view.leaf].append(event)

    def spend(self, value: Value, kind: Kind = "elementwise") -> None:
        """Records a use of the weights in ``value`` that is not a product with data.

        Rows that data picked are already data, through the lookup.
        """
        for view in value.views:
            self.note(view, "lookup" if view.is_lookup and view.rank else kind)

    def spend_lookups(self, output: Value) -> None:
        """Records lookups in ``output``, a result of the function. Weights returned unchanged are not uses."""
        self.spend(Value(tuple(view for view in output.views if view.is_lookup)))

    def add(self, a: Value, b: Value) -> tuple[Product, ...]:
        """The products that ``a + b`` is the sum of. A product of two weights beside another one is an adapter."""
        weights = [Product(None, (view.leaf,)) for view in (*a.views, *b.views) if not view.repeats]
        every = dict.fromkeys([*a.products, *b.products])
        plain = {p.data for p in [*every, *weights] if len(p.leaves) == 1}
        if not self.paused:
            for product in every:
                if len(product.leaves) == 2 and product.data in plain:
                    self._adapters.update(product.leaves)
        return tuple(every)

    def uses(self) -> dict[str, Use]:
        return {path: self._use(path, events) for path, events in self._events.items()}

    def _use(self, path: str, events: list[_Event]) -> Use:
        products = [event for event in events if event.kinds & {"dot", "conv"}]
        kinds: set[Kind] = {kind for event in events for kind in event.kinds}
        if products and products[0].splits:
            kinds.add("unknown")
        contracted = [e.axes("contracted") for e in products if e is products[0] or not e.splits]
        contracted = contracted or [frozenset()]
        stacked = [event.axes("stacked") for event in products[:1] or events]
        extents = self._shapes[path]
        return Use(
            kinds,
            contracted=contracted[0],
            batch=products[0].axes("batch") if products else (),
            # Dropping an axis of extent 1 does not pick an index.
            stacked={axis for axes in stacked for axis in axes if extents[axis] > 1},
            lookup={axis for event in events for axis in event.axes("lookup")},
            others=[axes for axes in dict.fromkeys(contracted) if axes != contracted[0]],
            adapter=path in self._adapters,
        )


def join(record: Record, values: Iterable[Value]) -> Value:
    """The value that may be any of ``values``. If some are data, the weights among them count as data."""
    values = list(values)
    views = tuple(dict.fromkeys(view for value in values for view in value.views))
    data = any(value.data for value in values)
    for value in values:
        if data and not value.data:
            record.spend(value)
            views = tuple(view for view in views if view not in value.views)
    if all(value == values[0] for value in values):
        return values[0]
    return Value(views, data)
