"""Interprets a function's equations, and follows each weight to the dot or convolution where it meets data.

Views of weights carry the index of each element's weight through reshapes, transposes, slices,
concatenations and loops. The equations between two weights are compiled together (see
``streams.Segments``).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, gensym

from optax_clipquant.analysis.compensation.moves import (
    CHANGES,
    MOVES,
    Value,
    View,
    at,
    keeps_shape,
    moved,
    stacked,
    taken,
)
from optax_clipquant.analysis.compensation.streams import (
    Pair,
    Segments,
    Stream,
    bind,
    called,
    evaluate_one,
    opened,
    stream_of,
)

_new_var = gensym()
MEETINGS = frozenset(("dot_general", "conv_general_dilated"))


class Handler(Protocol):
    """Callbacks for the weights that the interpreter comes across."""

    def settled(self, view: View) -> Stream | None:
        """The values of a view whose weights are all finished, which need not be followed; else None."""
        ...

    def resolve(self, view: View) -> Stream:
        """The current values of a view."""
        ...

    def meet(self, eqn: JaxprEqn, side: int, view: View, x: Stream) -> None:
        """Called when operand ``side`` of a dot or convolution is a view, and the other one data."""


class Finished(Exception):
    """Raised by a handler that needs no further equations."""


class Interpreter:
    """Evaluates jaxprs on several batches at once.

    Args:
      handler: the callbacks for weights.
      segments: the compiled programs.
      abstract: whether data consists of shapes only. All branches are then taken, and loops whose length
        depends on data run once.
    """

    def __init__(self, handler: Handler, segments: Segments, *, abstract: bool = False) -> None:
        self.handler, self.segments, self.abstract = handler, segments, abstract
        self.endless = False  # whether the length of a loop depends on data

    def run(self, jaxpr: Jaxpr | ClosedJaxpr, args: Sequence[Value], batches: int) -> list[Value]:
        return _Frame(self, jaxpr, args, batches).run()


class _Frame:
    """One jaxpr, and the values of its variables."""

    def __init__(
        self,
        interpreter: Interpreter,
        jaxpr: Jaxpr | ClosedJaxpr,
        args: Sequence[Value],
        batches: int,
    ) -> None:
        self.interpreter, self.handler, self.batches = interpreter, interpreter.handler, batches
        self.jaxpr, consts = opened(jaxpr)
        self.env: dict[Var, Any] = dict(zip(self.jaxpr.constvars, map(Stream, consts), strict=True))
        self.env.update(zip(self.jaxpr.invars, args, strict=True))
        self.waiting: list[JaxprEqn] = []
        self.awaited: set[Var] = set()
        eqns = self.jaxpr.eqns
        uses = [(v, i) for i, eqn in enumerate(eqns) for v in eqn.invars]
        uses += [(v, len(eqns)) for v in self.jaxpr.outvars]
        self.last = {v: i for v, i in uses if not isinstance(v, Literal)}

    def run(self) -> list[Value]:
        for i, eqn in enumerate(self.jaxpr.eqns):
            self._step(i, eqn)
            if not self.waiting:
                self._forget(i + 1)
        self._flush(len(self.jaxpr.eqns))
        return [self._read(v) for v in self.jaxpr.outvars]

    def _step(self, position: int, eqn: JaxprEqn) -> None:
        ins = [self._known(atom) for atom in eqn.invars]
        views = [i for i, x in enumerate(ins) if isinstance(x, View)]
        rest = [x for x in ins if not isinstance(x, View)]
        constant = all(x is not None and not x.batched for x in rest)
        name, inner = eqn.primitive.name, called(eqn)
        if not views:
            if constant:
                self._put(eqn, _constants(eqn, ins))
            else:
                self._wait(eqn)
        elif inner or name in ("scan", "while", "cond"):
            self._flush(position)
            args = [self._read(atom) for atom in eqn.invars]
            if inner:
                self._put(eqn, self.interpreter.run(inner, args, self.batches))
            else:
                self._put(eqn, getattr(self, f"_{name}")(eqn, args))
        elif constant and name in MOVES:
            self._put(eqn, moved(eqn, ins))
        elif constant and name in CHANGES and len(views) == 1 and keeps_shape(eqn, ins[views[0]]):
            view = ins[views[0]]
            values = [x.value if isinstance(x, View) else x.float for x in ins]
            self._put(eqn, [View(view.index, bind(eqn, values)[0], view.leaves, True)])
        else:
            if name in MEETINGS and len(views) == 1:
                self._flush(position)
                (side,) = views
                self.handler.meet(eqn, side, ins[side], self._read(eqn.invars[1 - side]))
            # The equation gets the current values; the view itself is still followed.
            invars: list[Any] = list(eqn.invars)
            for i in views:
                invars[i] = _new_var(eqn.invars[i].aval)
                self.env[invars[i]] = self.handler.resolve(ins[i])
            eqn = eqn.replace(invars=invars)
            if constant:
                self._put(eqn, _constants(eqn, [self._read(v) for v in invars]))
            else:
                self._wait(eqn)

    def _read(self, atom: Any) -> Any:  # a `Value`
        return Stream(atom.val) if isinstance(atom, Literal) else self.env[atom]

    def _known(self, atom: Any) -> Any:
        """The `Value` of an atom, or None if it is not computed yet."""
        if isinstance(atom, Literal):
            return Stream(atom.val)
        if atom in self.awaited:
            return None
        value = self.env[atom]
        if isinstance(value, View) and (settled := self.handler.settled(value)):
            value = self.env[atom] = settled
        return value

    def _put(self, eqn: JaxprEqn, values: Sequence[Value]) -> None:
        self.env.update(zip(eqn.outvars, values, strict=True))

    def _wait(self, eqn: JaxprEqn) -> None:
        self.waiting.append(eqn)
        self.awaited.update(eqn.outvars)

    def _flush(self, position: int) -> None:
        """Computes the equations that wait."""
        eqns, self.waiting, self.awaited = self.waiting, [], set()
        outvars = [v for eqn in eqns for v in eqn.outvars if self.last.get(v, -1) >= position]
        if self.interpreter.abstract:
            avals: list[Any] = [v.aval for v in outvars]
            shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals)
            self.env.update(zip(outvars, (Stream((x,)) for x in shapes), strict=True))
        elif outvars:
            run = self.interpreter.segments.run
            self.env.update(run(eqns, outvars, self.env, self.batches))
        self._forget(position)

    def _forget(self, position: int) -> None:
        """Frees the values that no equation from ``position`` on reads."""
        for var in [v for v in self.env if self.last.get(v, -1) < position]:
            del self.env[var]

    def _scan(self, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
        params = eqn.params
        first, count = params["num_consts"], params["num_carry"]
        carry, xs = args[first : first + count], args[first + count :]
        steps = range(params["length"])
        stacks = []
        for t in reversed(steps) if params["reverse"] else steps:
            now = [*args[:first], *carry, *(at(x, t) for x in xs)]
            outs = self.interpreter.run(params["jaxpr"], now, self.batches)
            carry = outs[:count]
            stacks.append([self._plain(x) for x in outs[count:]])
        if params["reverse"]:
            stacks.reverse()
        if not stacks:
            avals: list[Any] = [v.aval for v in eqn.outvars[count:]]
            return [*carry, *(Stream(jnp.zeros(a.shape, a.dtype)) for a in avals)]
        return [*carry, *(stacked(column) for column in zip(*stacks, strict=True))]

    def _while(self, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
        params, run = eqn.params, self.interpreter.run
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        before, inside = args[:of_cond], args[of_cond : of_cond + of_body]
        carry = args[of_cond + of_body :]
        while True:
            (going,) = run(params["cond_jaxpr"], [*before, *carry], self.batches)
            going = self._plain(going)
            if not going.batched:
                if not bool(going.float):
                    return carry
                carry = run(params["body_jaxpr"], [*inside, *carry], self.batches)
                continue
            self.interpreter.endless = True
            if self.interpreter.abstract:
                return run(params["body_jaxpr"], [*inside, *carry], self.batches)
            groups = [[], []]
            for batch, goes_on in enumerate(going.float):
                groups[bool(goes_on)].append(batch)
            ended, active = groups
            if not active:
                return carry
            carry = self._merged(
                [
                    (ended, taken(carry, ended)),
                    (
                        active,
                        run(params["body_jaxpr"], taken([*inside, *carry], active), len(active)),
                    ),
                ]
            )

    def _cond(self, eqn: JaxprEqn, args: list[Value]) -> list[Value]:
        index, operands = self._plain(args[0]), args[1:]
        branches, run = eqn.params["branches"], self.interpreter.run
        if not index.batched:
            return run(branches[int(index.float)], operands, self.batches)
        if self.interpreter.abstract:
            self.interpreter.endless = True
            return [run(branch, operands, self.batches) for branch in branches][-1]
        found = []
        for i, branch in enumerate(branches):
            batches = [b for b, x in enumerate(index.float) if int(x) == i]
            if batches:
                found.append((batches, run(branch, taken(operands, batches), len(batches))))
        return self._merged(found)

    def _plain(self, value: Value) -> Stream:
        return self.handler.resolve(value) if isinstance(value, View) else value

    def _merged(self, groups: list[tuple[list[int], list[Value]]]) -> list[Value]:
        """Values for all batches, from ``groups`` that hold those of some batches each."""
        groups = [(batches, values) for batches, values in groups if batches]
        if len(groups) == 1:
            return groups[0][1]
        found: list[Value] = []
        for i, value in enumerate(groups[0][1]):
            if isinstance(value, View) and all(values[i] is value for _, values in groups):
                found.append(value)
                continue
            pairs: list[Pair] = [(None, None)] * self.batches
            for batches, values in groups:
                stream = self._plain(values[i])
                for position, batch in enumerate(batches):
                    pairs[batch] = stream.pair(position)
            found.append(stream_of(pairs))
        return found


def _constants(eqn: JaxprEqn, ins: Sequence[Any]) -> list[Value]:
    return [Stream(*pair) for pair in evaluate_one(eqn, [x.pair(0) for x in ins])]
