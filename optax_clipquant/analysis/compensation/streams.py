"""Evaluates equations in two streams: with the float weights, and with those quantized so far.

Values that are not floating (predicates, indices, the expert of a token) come from the float stream in
both. Otherwise a token of one stream could be compared with a different one of the other.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

Pair = tuple[
    Any, Any
]  # the values in the float and the quantized stream; None where both are equal

# Primitives that only call a jaxpr, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_lin": "call_jaxpr",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A value that is not a view of weights.

    Attributes:
      float: a value for each batch, or a single one if it does not depend on the batch.
      quantized: like ``float``; None if the streams do not differ.
    """

    float: Any
    quantized: Any = None

    @property
    def batched(self) -> bool:
        return isinstance(self.float, tuple)

    def pair(self, batch: int) -> Pair:
        if not self.batched:
            return self.float, self.quantized
        return self.float[batch], None if self.quantized is None else self.quantized[batch]

    def take(self, batches: Sequence[int]) -> "Stream":
        """The stream of some of the batches."""
        if not self.batched:
            return self
        return stream_of([self.pair(b) for b in batches])


def stream_of(pairs: Sequence[Pair]) -> Stream:
    """The stream with one value for each batch."""
    floats = tuple(f for f, _ in pairs)
    if all(q is None for _, q in pairs):
        return Stream(floats)
    return Stream(floats, tuple(f if q is None else q for f, q in pairs))


def opened(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, list[Any]]:
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def called(eqn: JaxprEqn) -> Jaxpr | ClosedJaxpr | None:
    """The jaxpr that an equation calls, or None."""
    name = CALLS.get(eqn.primitive.name)
    return None if name is None else eqn.params.get(name)


def is_floating(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def evaluate(eqns: Iterable[JaxprEqn], env: dict[Var, Pair]) -> None:
    """Adds the results of ``eqns`` to ``env``."""

    def read(atom: Any) -> Pair:
        return (atom.val, None) if isinstance(atom, Literal) else env[atom]

    for eqn in eqns:
        outs = evaluate_one(eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))


def evaluate_one(eqn: JaxprEqn, ins: list[Pair]) -> list[Pair]:
    if inner := called(eqn):
        return evaluate_jaxpr(inner, ins)
    floats = [f for f, _ in ins]
    if all(q is None for _, q in ins):
        return [(x, None) for x in bind(eqn, floats)]
    if two := _STRUCTURED.get(eqn.primitive.name):
        return two(eqn, ins)
    both = bind(eqn, floats), bind(eqn, [f if q is None else q for f, q in ins])
    return [
        (f, q if is_floating(var) else None) for var, f, q in zip(eqn.outvars, *both, strict=True)
    ]


def evaluate_jaxpr(jaxpr: Jaxpr | ClosedJaxpr, ins: Sequence[Pair]) -> list[Pair]:
    jaxpr, consts = opened(jaxpr)
    env = dict(zip(jaxpr.constvars, ((c, None) for c in consts), strict=True))
    env |= dict(zip(jaxpr.invars, ins, strict=True))
    evaluate(jaxpr.eqns, env)
    return [(v.val, None) if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # in older versions
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*functions, *values, **params)
    return list(found) if eqn.primitive.multiple_results else [found]


def _full(ins: Iterable[Pair], variables: Iterable[Any]) -> list[Pair]:
    """``ins`` with both values of each floating variable, so that a loop's carry keeps its structure."""
    return [
        ((f, f if q is None else q) if is_floating(var) else (f, None))
        for (f, q), var in zip(ins, variables, strict=True)
    ]


def _scan(eqn: JaxprEqn, ins: list[Pair]) -> list[Pair]:
    jaxpr, params = eqn.params["jaxpr"], eqn.params
    constants, carried = params["num_consts"], params["num_carry"]
    variables = jaxpr.jaxpr.invars
    consts, rest = ins[:constants], ins[constants:]
    start = _full(rest[:carried], variables[constants : constants + carried])

    def body(carry: list[Pair], xs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
        outs = evaluate_jaxpr(jaxpr, [*consts, *carry, *xs])
        outs = _full(outs, jaxpr.jaxpr.outvars)
        return outs[:carried], outs[carried:]

    last, ys = jax.lax.scan(
        body,
        start,
        rest[carried:],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*last, *ys]


def _while(eqn: JaxprEqn, ins: list[Pair]) -> list[Pair]:
    params = eqn.params
    body, condition = params["body_jaxpr"], params["cond_jaxpr"]
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    before, inside = ins[:of_cond], ins[of_cond : of_cond + of_body]
    start = _full(ins[of_cond + of_body :], body.jaxpr.outvars)

    def goes_on(carry: list[Pair]) -> jax.Array:
        return evaluate_jaxpr(condition, [(f, None) for f, _ in [*before, *carry]])[0][0]

    def step(carry: list[Pair]) -> list[Pair]:
        return _full(evaluate_jaxpr(body, [*inside, *carry]), body.jaxpr.outvars)

    return jax.lax.while_loop(goes_on, step, start)


def _cond(eqn: JaxprEqn, ins: list[Pair]) -> list[Pair]:
    (index, _), *operands = ins

    def branch(jaxpr: ClosedJaxpr) -> Any:
        return lambda operands: _full(evaluate_jaxpr(jaxpr, operands), jaxpr.jaxpr.outvars)

    return jax.lax.switch(index, [branch(x) for x in eqn.params["branches"]], operands)


_STRUCTURED = {"scan": _scan, "while": _while, "cond": _cond}


class Segments:
    """Compiles runs of equations once per structure, so that equal layers share a program."""

    def __init__(self) -> None:
        self._programs: dict[Hashable, Any] = {}
        self._kept: list[Any] = []  # objects whose ids are part of keys

    def run(
        self, eqns: Sequence[JaxprEqn], outvars: Sequence[Var], env: dict[Var, Stream], count: int
    ) -> dict[Var, Stream]:
        """Computes ``outvars`` with ``eqns`` from ``env``, for each of ``count`` batches."""
        inner = {var for eqn in eqns for var in eqn.outvars}
        used = (v for eqn in eqns for v in eqn.invars if not isinstance(v, Literal))
        invars = list(dict.fromkeys(v for v in used if v not in inner))
        dual = tuple(env[v].quantized is not None for v in invars)
        key = dual, self._key(eqns, invars, outvars)
        if key not in self._programs:

            def program(floats: list[Any], quantized: list[Any]) -> list[Pair]:
                values = dict(zip(invars, zip(floats, quantized, strict=True), strict=True))
                evaluate(eqns, values)
                return [values[v] for v in outvars]

            self._programs[key] = jax.jit(program)
        program = self._programs[key]
        found = []
        for batch in range(count):
            pairs = [env[v].pair(batch) for v in invars]
            found.append(program([f for f, _ in pairs], [q for _, q in pairs]))
        return {var: stream_of(pairs) for var, *pairs in zip(outvars, *found, strict=True)}

    def _key(self, eqns: Any, invars: Any, outvars: Any) -> Hashable:
        """A key that is equal for equations that only differ in the names of variables."""
        numbers: dict[Var, int] = {}

        def atom(v: Any) -> Hashable:
            if isinstance(v, Literal):
                return str(v.aval), np.asarray(v.val).tobytes()
            return numbers.setdefault(v, len(numbers)), str(v.aval), v.aval.weak_type

        def param(x: Any) -> Hashable:
            if isinstance(x, (Jaxpr, ClosedJaxpr)):
                jaxpr, consts = opened(x)
                self._kept += consts
                return (
                    self._key(jaxpr.eqns, [*jaxpr.constvars, *jaxpr.invars], jaxpr.outvars),
                    tuple(map(id, consts)),
                )
            if isinstance(x, (tuple, list)):
                return tuple(map(param, x))
            if isinstance(x, dict):
                return tuple((k, param(v)) for k, v in x.items())
            if callable(x) and not isinstance(x, (type, np.dtype)):
                self._kept.append(x)
                return id(x)
            return type(x), x

        inputs = tuple(map(atom, invars))
        body = []
        for eqn in eqns:
            inside = called(eqn)
            params = (
                param(inside) if inside else tuple((k, param(v)) for k, v in eqn.params.items())
            )
            ins = tuple(map(atom, eqn.invars))
            body.append((eqn.primitive, params, ins, tuple(map(atom, eqn.outvars))))
        return inputs, tuple(body), tuple(map(atom, outvars))
