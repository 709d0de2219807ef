"""Finds how often weights meet data, and chooses a method for each leaf."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from optax_clipquant.analysis.arguments import Batch, Function
from optax_clipquant.analysis.compensation.interpret import Finished, Interpreter
from optax_clipquant.analysis.compensation.meetings import (
    Inputs,
    inputs_of,
    matrix,
    merged,
    second_moments,
    squares,
)
from optax_clipquant.analysis.compensation.moves import Value, View
from optax_clipquant.analysis.compensation.streams import Segments, Stream

LARGEST = 16_384  # the most contracted weights for which second moments are kept

COMPENSATED = "compensated"
POOLED = "compensated, pooled"
SEARCH = "weighted search"
LEAST_SQUARES = "least squares"


@dataclasses.dataclass(frozen=True)
class Part:
    """The weights of one leaf in a meeting.

    Attributes:
      leaf: the number of the leaf.
      index: the index of each weight in the leaf, ``[batch, K, N]``.
      columns: the columns of the meeting that hold them.
      key: equal when the same weights meet data again in the same order.
    """

    leaf: int
    index: np.ndarray
    columns: np.ndarray
    key: tuple


class Leaves:
    """The leaves that are followed, and the numbering of their weights.

    Args:
      leaves: the leaves by path.
    """

    def __init__(self, leaves: dict[str, jax.Array]) -> None:
        self.paths = list(leaves)
        self.values = list(leaves.values())
        sizes = [x.size for x in self.values]
        self.first = np.concatenate([[0], np.cumsum(sizes)])
        if self.first[-1] > np.iinfo(np.int32).max:
            raise ValueError(
                f"{self.first[-1]} weights are selected, more than the {np.iinfo(np.int32).max} that can be "
                "followed at once; select fewer with `where`, and quantize the rest in another call"
            )

    def view(self, number: int) -> View:
        value, start = self.values[number], self.first[number]
        index = jnp.arange(start, start + value.size, dtype=jnp.int32).reshape(value.shape)
        return View(index, value, frozenset((number,)))

    def parts(self, eqn: JaxprEqn, side: int, view: View) -> tuple[Inputs | None, list[Part]]:
        """How the data of a meeting is laid out, and the weights of each leaf; none for an unknown form."""
        inputs = inputs_of(eqn, side)
        if inputs is None:
            return None, []
        inputs, index = merged(inputs, np.asarray(matrix(eqn, side, view.index)))
        if index.size == 0 or index.min() < 0:
            return inputs, []
        # In fused weights (queries, keys and values), each column belongs to one leaf.
        owner = np.searchsorted(self.first, index[0, 0], side="right") - 1
        parts = []
        for leaf in np.unique(owner):
            columns = np.flatnonzero(owner == leaf)
            own = index if len(columns) == len(owner) else index[:, :, columns]
            local = own - self.first[leaf]
            if local.min() < 0 or local.max() >= self.values[leaf].size:
                return inputs, []
            key = (own.shape, int(local.flat[0]), hash(np.ascontiguousarray(local).tobytes()))
            parts.append(Part(int(leaf), local, columns, key))
        return inputs, parts


@dataclasses.dataclass
class Meetings:
    """The meetings of one leaf with data.

    Attributes:
      times: how often each part meets data, by the part's key.
      repeats: whether a part has a weight twice, or two parts share weights in another order.
      changed: whether arithmetic changes the leaf before it meets data.
      largest: the largest number of contracted weights.
      seen: which weights have met data.
    """

    times: dict[tuple, int]
    repeats: bool
    changed: bool
    largest: int
    seen: np.ndarray

    @property
    def method(self) -> str:
        if not self.times:
            return LEAST_SQUARES
        if self.repeats or self.changed or self.largest > LARGEST:
            return SEARCH
        return COMPENSATED if max(self.times.values()) == 1 else POOLED

    @property
    def steps(self) -> int:
        """The number of parts in which the leaf is quantized."""
        return len(self.times) if self.method in (COMPENSATED, POOLED) else 1


class Follower:
    """A handler (see ``interpret.Handler``) that follows all weights through the float stream only."""

    def __init__(self, leaves: Leaves) -> None:
        self.leaves = leaves
        self.left: int | None = None  # the number of meetings to wait for, if known

    def wants(self, leaf: int) -> bool:
        """Whether meetings of this leaf matter."""
        return True

    def meet(self, eqn: JaxprEqn, side: int, view: View, x: Stream) -> None:
        inputs, parts = self.leaves.parts(eqn, side, view)
        values = x.float if x.batched else (x.float,)
        for part in parts:
            self.add(part, inputs, values)
        self._count()

    def _count(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Finished

    def add(self, part: Part, inputs: Any, values: Sequence[jax.Array]) -> None:
        raise NotImplementedError

    def settled(self, view: View) -> Stream | None:
        return None

    def resolve(self, view: View) -> Stream:
        return Stream(view.value)


class Planner(Follower):
    """Counts how often weights meet data.

    Attributes:
      found: the meetings of each leaf.
      order: the leaves of each meeting, in program order.
    """

    def __init__(self, leaves: Leaves) -> None:
        super().__init__(leaves)
        self.found = [
            Meetings({}, False, False, 0, np.zeros(value.size, bool)) for value in leaves.values
        ]
        self.order: list[frozenset[int]] = []

    def meet(self, eqn: JaxprEqn, side: int, view: View, x: Stream) -> None:
        self.order.append(view.leaves)
        for part in self.leaves.parts(eqn, side, view)[1]:
            found = self.found[part.leaf]
            found.largest = max(found.largest, part.index.shape[1])
            found.changed |= view.changed
            if part.key not in found.times:
                before = np.count_nonzero(found.seen)
                found.seen[part.index] = True
                added = np.count_nonzero(found.seen) - before
                found.repeats |= bool(added < part.index.size)
            found.times[part.key] = found.times.get(part.key, 0) + 1


class Moments(Follower):
    """Collects input moments for the leaves that are not simply compensated.

    Attributes:
      pooled: second moments and tokens for each part that meets data more than once.
      importance: for leaves with searched scales, the sum of squares of each weight's inputs.
    """

    def __init__(self, leaves: Leaves, methods: list[str]) -> None:
        super().__init__(leaves)
        self.methods = methods
        self.pooled: dict[tuple, tuple[jax.Array, jax.Array]] = {}
        self.importance: dict[int, np.ndarray] = {}

    def wants(self, leaf: int) -> bool:
        return self.methods[leaf] in (POOLED, SEARCH)

    def settled(self, view: View) -> Stream | None:
        return None if any(map(self.wants, view.leaves)) else self.resolve(view)

    def add(self, part: Part, inputs: Any, values: Sequence[jax.Array]) -> None:
        if self.methods[part.leaf] == POOLED:
            name = part.leaf, part.key
            for value in values:
                h, _, tokens = second_moments(inputs, value, None)
                total, count = self.pooled.get(name, (0.0, 0))
                self.pooled[name] = total + h, count + tokens
        elif self.methods[part.leaf] == SEARCH:
            square = np.sum([np.asarray(squares(inputs, value)[0]) for value in values], axis=0)
            size = self.leaves.values[part.leaf].size
            kept = self.importance.setdefault(part.leaf, np.zeros(size))
            np.add.at(kept, part.index, np.broadcast_to(square[:, :, None], part.index.shape))


class Program:
    """A function's jaxpr, and the params that it is evaluated with.

    Args:
      function: the function, with its params.
      batch: a batch to trace it with.
      leaves: the leaves that are followed.
      segments: the compiled programs.
    """

    def __init__(
        self, function: Function, batch: Batch, leaves: Leaves, segments: Segments
    ) -> None:
        self.jaxpr, self.leaves, self.segments = function.jaxpr(batch), leaves, segments
        numbers = {path: i for i, path in enumerate(leaves.paths)}
        arrays = zip(function.paths, function.arrays, strict=True)
        self.params = [(numbers.get(path), x) for path, x in arrays]
        self.order: list[frozenset[int]] | None = None

    def plan(self, batches: Sequence[Sequence[jax.Array]]) -> Planner:
        """Finds the meetings of the leaves from shapes alone."""
        planner = Planner(self.leaves)
        shapes = [Stream((jax.ShapeDtypeStruct(x.shape, x.dtype),)) for x in batches[0]]
        interpreter = Interpreter(planner, self.segments, abstract=True)
        interpreter.run(self.jaxpr, [*self._params(), *shapes], 1)
        # If data decides how often a loop runs, the last meeting is unknown.
        self.order = None if interpreter.endless else planner.order
        return planner

    def run(self, batches: Sequence[Sequence[jax.Array]], handler: Follower) -> None:
        """Evaluates the program, up to the last meeting that the handler wants."""
        handler.left = None
        if self.order is not None:
            handler.left = sum(any(map(handler.wants, leaves)) for leaves in self.order)
        if handler.left == 0:
            return
        data = [Stream(column) for column in zip(*batches, strict=True)]
        with contextlib.suppress(Finished):
            Interpreter(handler, self.segments).run(
                self.jaxpr, [*self._params(), *data], len(batches)
            )

    def _params(self) -> list[Value]:
        return [Stream(x) if i is None else self.leaves.view(i) for i, x in self.params]
