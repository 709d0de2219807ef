"""What the values of a jaxpr are made of, and the notes of what became of the weights in them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from optax_clipquant.analysis.views import Role, View
from optax_clipquant.quant.uses import Kind, Use


@dataclasses.dataclass(frozen=True)
class Product:
    """Data times one weight or several, one after the other; or only weights, where ``data`` is None."""

    data: object | None
    leaves: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """What an array is made of. Where it has neither views nor data, of constants or sums of weights.

    Attributes:
      views: the weights that it may be, of several leaves where it is put together from them.
      data: whether an argument of the function has a part in it.
      products: what it is the sum of, as far as that is of interest.
      token: tells data from other data.
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
    roles: tuple[tuple[int, Role], ...]  # of the leaf's axes
    splits: bool  # whether an axis is contracted in part

    def axes(self, role: Role) -> frozenset[int]:
        return frozenset(axis for axis, found in self.roles if found == role)


# Where an axis is split among several roles, the first of these says what scales need to know.
_PRECEDENCE: tuple[Role, ...] = ("lookup", "batch", "output", "stacked", "contracted")


class Record:
    """What is known of each leaf so far, in program order.

    Args:
      shapes: by path, the shape of each leaf.

    Attributes:
      paused: whether nothing is noted, for it will be seen again.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.paused = False
        self._shapes = shapes
        self._events: dict[str, list[_Event]] = {path: [] for path in shapes}
        self._adapters: set[str] = set()

    def note(self, view: View, kind: Kind, roles: Sequence[Role] | None = None) -> None:
        """A use of ``view`` in which its axes have ``roles``. By default they stay."""
        stay: list[Role] = ["output"] * len(view.dims)
        found = view.roles(roles or stay)
        kinds: set[Kind] = {kind, "lookup"} if kind == "dot" and view.is_lookup else {kind}
        splits = any("contracted" in of_axis and len(of_axis) > 1 for of_axis in found.values())
        settled: dict[int, Role] = {
            a: next(r for r in _PRECEDENCE if r in of_axis) for a, of_axis in found.items()
        }
        event = _Event(frozenset(kinds), tuple(sorted(settled.items())), splits)
        if not self.paused and event not in self._events[view.leaf]:
            self._events[view.leaf].append(event)

    def spend(self, value: Value, kind: Kind = "elementwise") -> None:
        """The weights in ``value`` end here, and not in a product with data.

        Rows that data picked have become data before, by the lookup.
        """
        for view in value.views:
            self.note(view, "lookup" if view.is_lookup and view.rank else kind)

    def spend_lookups(self, output: Value) -> None:
        """The function returns ``output``. Weights that it returns as they are, it does not use."""
        self.spend(Value(tuple(view for view in output.views if view.is_lookup)))

    def add(self, a: Value, b: Value) -> tuple[Product, ...]:
        """The products that ``a + b`` is a sum of. A product of two weights beside one is an adapter."""
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
            # Who drops an axis of extent 1 picks no index of it.
            stacked={axis for axes in stacked for axis in axes if extents[axis] > 1},
            lookup={axis for event in events for axis in event.axes("lookup")},
            others=[axes for axes in dict.fromkeys(contracted) if axes != contracted[0]],
            adapter=path in self._adapters,
        )


def join(record: Record, values: Iterable[Value]) -> Value:
    """A value that may be any of ``values``. Weights beside data are data."""
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
