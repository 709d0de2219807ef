"""Abstract evaluation of a jaxpr on the origins of its values, in place of the values."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from optax_clipquant.analysis import primitives, views
from optax_clipquant.analysis.primitives import Equation, Shaping
from optax_clipquant.analysis.record import Product, Record, Value, join
from optax_clipquant.analysis.views import Role, View

Values = Sequence[Value]


class Walk:
    """Evaluates jaxprs abstractly, and records the uses of weights."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def closed(self, closed: core.ClosedJaxpr, args: Values) -> list[Value]:
        # Closed-over integers count as data, such as tokens; floats may be a mask.
        consts = [
            Value(data=np.size(x) > 1 and jnp.issubdtype(jnp.result_type(x), jnp.integer))
            for x in closed.consts
        ]
        return self._run(closed.jaxpr, consts, args)

    def _run(self, jaxpr: core.Jaxpr, consts: Values, args: Values) -> list[Value]:
        env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= zip(jaxpr.invars, args, strict=True)

        def read(var: Any) -> Value:
            return Value() if isinstance(var, core.Literal) else env[var]

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [read(var) for var in eqn.invars])
            env |= zip(eqn.outvars, outputs, strict=True)
        return [read(var) for var in jaxpr.outvars]

    def _equation(self, eqn: Equation, args: Values) -> Values:
        name = eqn.primitive.name
        if name in primitives.SAME:
            return args[: len(eqn.outvars)]
        if name in primitives.ELEMENTWISE:
            return [self._elementwise(eqn, args)]
        if name in primitives.SHAPING:
            return [_shaped(eqn, args[0], primitives.SHAPING[name])]
        if name in _HANDLERS:
            return _HANDLERS[name](self, eqn, args)
        inner = primitives.inner_jaxpr(eqn)
        if isinstance(inner, core.ClosedJaxpr):
            return self.closed(inner, args)
        if inner is not None:
            return self._run(inner, [Value()] * len(inner.constvars), args)
        reduces = name in primitives.REDUCTIONS
        for arg in args:
            self._record.spend(arg, "elementwise" if reduces else "unknown")
        # An unknown operation may turn weights into anything.
        data = any(arg.data or (arg.views and not reduces) for arg in args)
        return [Value(data=bool(data)) for _ in eqn.outvars]

    def _elementwise(self, eqn: Equation, args: Values) -> Value:
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        data = any(arg.data for arg in args)
        operands, atoms = list(args), list(eqn.invars)
        if name == "select_n":
            self._record.spend(operands.pop(0))
            atoms.pop(0)
        masks = data and not any(arg.data for arg in operands)
        kept: list[View] = []
        for i, arg in enumerate(operands):
            others = [
                (other, atom)
                for j, (other, atom) in enumerate(zip(operands, atoms, strict=True))
                if j != i
            ]
            meets_data = any(other.data for other, _ in others)
            alone = all(other.is_constant and atom.aval.size == 1 for other, atom in others)
            for view in arg.views:
                spread = view.repeats or view.shape != shape
                if not (meets_data or name in primitives.COMPARISONS or (spread and not alone)):
                    kept.append(views.softened(view) if masks else view)
                elif meets_data and spread and name in ("mul", "div"):
                    # A gain, such as a rotary table: rows of an embedding are not repeated before a product.
                    self._record.note(view, "elementwise")
                else:
                    self._record.spend(Value((view,)))
        products: tuple[Product, ...] = ()
        if name in ("add", "add_any", "sub"):
            products = self._record.add(args[0], args[1])
        elif name in ("mul", "div", "neg"):
            scaled = [arg for arg in args if arg.products]
            if len(scaled) == 1 and not any(arg.data for arg in args if arg is not scaled[0]):
                products = scaled[0].products
        return Value(tuple(dict.fromkeys(kept)), data, products)

    def _dot(self, eqn: Equation, args: Values) -> Values:
        return [self._product(args, "dot", primitives.dot_roles(eqn))]

    def _conv(self, eqn: Equation, args: Values) -> Values:
        # Windows slide over the left operand, so no axis of it is simply contracted.
        left, right = args
        self._record.spend(left, "elementwise" if right.views else "unknown")
        return [self._product([Value(data=True), right], "conv", primitives.conv_roles(eqn))]

    def _product(
        self, args: Values, kind: Literal["dot", "conv"], roles: list[list[Role]]
    ) -> Value:
        """The value of a dot or convolution of the first two of ``args``."""
        weights: list[list[str]] = [[], []]
        for side in (0, 1):
            for view in args[side].views:
                summed = any("contracted" in of for of in view.roles(roles[side]).values())
                if summed and _is_weight(view, args[1 - side]):
                    self._record.note(view, kind, roles[side])
                    weights[side].append(view.leaf)
                else:
                    self._record.spend(Value((view,)))
        for arg in args[2:]:
            self._record.spend(arg)
        left, right = (tuple(dict.fromkeys(leaves)) for leaves in weights)
        if left and right:
            data = any(arg.data for arg in args)
            return Value(data=data, products=(Product(None, left + right),))
        products = ()
        if left or right:
            data = args[1] if left else args[0]
            before = (p for p in data.products if p.data is not None and len(p.leaves) == 1)
            products = (
                Product(data.token, left + right),
                *(Product(p.data, p.leaves + left + right) for p in before),
            )
        return Value(data=True, products=products)

    def _split(self, eqn: Equation, args: Values) -> Values:
        starts = itertools.accumulate((int(n) for n in eqn.params["sizes"]), initial=0)
        return [
            _shaped(eqn, args[0], primitives.piece(eqn.params["axis"], start), i)
            for i, start in zip(range(len(eqn.outvars)), starts, strict=False)
        ]

    def _unstack(self, eqn: Equation, args: Values) -> Values:
        return [_shaped(eqn, args[0], primitives.unstack(i), i) for i in range(len(eqn.outvars))]

    def _concatenate(self, eqn: Equation, args: Values) -> Values:
        shaping = primitives.stack if eqn.primitive.name == "stack" else primitives.resize
        return [join(self._record, [_shaped(eqn, arg, shaping) for arg in args])]

    def _dynamic_slice(self, eqn: Equation, args: Values) -> Values:
        by_data = any(arg.data for arg in args[1:])
        for arg in args[1:]:
            self._record.spend(arg)
        if not args[0].views:
            return [Value(data=args[0].data or by_data)]
        return [
            _shaped(
                eqn, args[0], lambda view, _, shape: views.resized(view, shape, by_data=by_data)
            )
        ]

    def _gather(self, eqn: Equation, args: Values) -> Values:
        operand, indices = args
        self._record.spend(indices)
        if not operand.views:
            return [Value(data=operand.data or indices.data)]

        def rows(view: View, params: Mapping[str, Any], shape: Sequence[int]) -> View:
            numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
            return views.gathered(view, numbers, sizes, shape, by_data=indices.data)

        return [_shaped(eqn, operand, rows)]

    def _all_gather(self, eqn: Equation, args: Values) -> Values:
        if eqn.params["tiled"] or not args[0].views:
            return [_shaped(eqn, args[0], primitives.resize)]
        self._record.spend(args[0], "unknown")
        return [Value(data=True)]

    def _scan(self, eqn: Equation, args: Values) -> Values:
        start = eqn.params["num_consts"]
        end = start + eqn.params["num_carry"]
        one = [_reviewed(x, lambda view: views.indexed(view, [0])) for x in args[end:]]

        def body(carry: Values) -> list[Value]:
            return self.closed(eqn.params["jaxpr"], [*args[:start], *carry, *one])

        carry, outputs = self._loop(args[start:end], body)
        length = eqn.params["length"]

        def stacked(view: View) -> View:
            shape = (length, *view.shape)
            return views.repeated(view, shape, range(1, len(shape)))

        return [*carry, *(_reviewed(y, stacked) for y in outputs)]

    def _while(self, eqn: Equation, args: Values) -> Values:
        start = eqn.params["cond_nconsts"]
        end = start + eqn.params["body_nconsts"]

        def body(carry: Values) -> list[Value]:
            self.closed(eqn.params["cond_jaxpr"], [*args[:start], *carry])
            return self.closed(eqn.params["body_jaxpr"], [*args[start:end], *carry])

        return self._loop(args[end:], body)[0]

    def _loop(
        self, carry: Values, body: Callable[[Values], list[Value]]
    ) -> tuple[list[Value], list[Value]]:
        """The carry after a loop of unknown length, and the other outputs of its body."""
        first, paused = carry, self._record.paused
        self._record.paused = True
        for _ in range(_ROUNDS):
            before, carry = carry, self._joined(carry, body(carry))
            if before == carry:
                break
        else:
            carry = [Value(data=True)] * len(carry)
        self._record.paused = paused
        for old, new in zip(first, carry, strict=True):
            lost = tuple(view for view in old.views if view not in new.views)
            self._record.spend(Value(lost))
        outputs = body(carry)
        return self._joined(carry, outputs[: len(carry)]), outputs[len(carry) :]

    def _joined(self, *rows: Values) -> list[Value]:
        return [join(self._record, values) for values in zip(*rows, strict=False)]

    def _cond(self, eqn: Equation, args: Values) -> Values:
        self._record.spend(args[0])
        return self._joined(*(self.closed(branch, args[1:]) for branch in eqn.params["branches"]))

    def _shard_map(self, eqn: Equation, args: Values) -> Values:
        jaxpr = eqn.params["jaxpr"]
        local = [
            _reviewed(
                arg, lambda view, shape=var.aval.shape: views.resized(view, shape, [0] * len(shape))
            )
            for arg, var in zip(args, jaxpr.invars, strict=True)
        ]
        outputs = self._run(jaxpr, [Value()] * len(jaxpr.constvars), local)
        return [_shaped(eqn, y, primitives.resize, i) for i, y in enumerate(outputs)]


_ROUNDS = 8  # iterations; a carry that has not converged by then grows without bound
_HANDLERS: Mapping[str, Callable[[Walk, Equation, Values], Values]] = {
    "dot_general": Walk._dot,
    "ragged_dot_general": Walk._dot,
    "conv_general_dilated": Walk._conv,
    "split": Walk._split,
    "unstack": Walk._unstack,
    "concatenate": Walk._concatenate,
    "stack": Walk._concatenate,
    "dynamic_slice": Walk._dynamic_slice,
    "gather": Walk._gather,
    **dict.fromkeys(("all_gather", "all_gather_invariant"), Walk._all_gather),
    "scan": Walk._scan,
    "while": Walk._while,
    "cond": Walk._cond,
    "shard_map": Walk._shard_map,
}


def _is_weight(view: View, other: Value) -> bool:
    """Whether ``view`` acts as the weight of a product with ``other``, rather than as its data."""
    if view.soft:
        return view.rank >= 2 and not other.views
    matrix = any(not x.soft and not x.repeats and x.rank >= 2 for x in other.views)
    return not (matrix and (view.repeats or view.rank < 2))


def _shaped(eqn: Equation, value: Value, shaping: Shaping, output: int = 0) -> Value:
    """``value`` as the equation's output."""
    shape = eqn.outvars[output].aval.shape
    return _reviewed(value, lambda view: shaping(view, eqn.params, shape))


def _reviewed(value: Value, shaping: Callable[[View], View]) -> Value:
    """``value`` with its views transformed by ``shaping``. Views that data picked become data."""
    if not value.views:
        return value
    found = tuple(map(shaping, value.views))
    return Value(found, value.data or any(view.is_lookup for view in found), value.products)
