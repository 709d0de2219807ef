"""What the leaves of an optimizer's initial state are: iterates, zeros, or neither."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import Literal

from optax_clipquant._tree import PyTree, unboxed

# States that hold iterates, gradients and their differences, from which the next step is computed.
_EXACT = (
    optax.ScaleByLBFGSState,
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
)


def check_optimizer(transform: str, optimizer: Any) -> None:
    """Raises if ``optimizer`` is none, such as ``optax.adam`` that was not called."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{transform}: optimizer must be an optax optimizer, such as optax.adam(1e-3), got {optimizer!r}"
        )


def origins_of(
    optimizer: optax.GradientTransformation, params: PyTree, state: PyTree
) -> tuple[PyTree, PyTree]:
    """For each leaf of the initial ``state``, whether it holds iterates, and whether it is zero.

    It holds iterates if the program of ``init`` computes it from the values of the params, which is
    independent of their values and works under tracing; or if it belongs to L-BFGS or a line search, which
    start at zero.
    """
    traced = jax.make_jaxpr(optimizer.init)(unboxed(params)).jaxpr
    given = len(traced.invars)
    depends = _marks(traced, [True] * given, lambda value: False, lambda name, marks: any(marks))
    zeros = _marks(
        traced,
        [False] * given,
        lambda value: np.ndim(value) == 0 and value == 0,
        lambda name, marks: name == "broadcast_in_dim" and all(marks),
    )

    def is_exact(x: Any) -> bool:
        return isinstance(x, _EXACT)

    memory = [
        is_exact(node)
        for node in jax.tree.leaves(state, is_leaf=is_exact)
        for _ in jax.tree.leaves(node)
    ]
    iterates = [a or b for a, b in zip(depends, memory, strict=True)]
    unflatten = jax.tree.structure(state).unflatten
    return unflatten(iterates), unflatten(zeros)


def _marks(
    jaxpr: Any,
    inputs: list[bool],
    of_literal: Callable[[Any], bool],
    of_result: Callable[[str, list[bool]], bool],
) -> list[bool]:
    """Marks the outputs of ``jaxpr``: literals, and the results of a primitive by the marks of its operands."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(variables: Any) -> list[bool]:
        return [
            bool(of_literal(v.val)) if isinstance(v, Literal) else known.get(v, False)
            for v in variables
        ]

    for eqn in jaxpr.eqns:
        given = of(eqn.invars)
        inner = eqn.params.get("jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        if eqn.primitive.name in ("jit", "pjit") and inner is not None:
            found = _marks(inner, given, of_literal, of_result)
        else:
            found = [of_result(eqn.primitive.name, given)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, found, strict=True))
    return of(jaxpr.outvars)
