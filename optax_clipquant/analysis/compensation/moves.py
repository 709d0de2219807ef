"""Views of weights, and operations that move, slice and stack values."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from optax_clipquant.analysis.compensation.streams import Stream, bind, stream_of

# Primitives that move elements and change none, except for casts.
MOVES = frozenset(
    [
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "slice",
        "dynamic_slice",
        "rev",
        "gather",
        "concatenate",
        "stack",
        "unstack",
        "tile",
        "pad",
        "split",
        "select_n",
        "copy",
        "copy_p",
        "convert_element_type",
        "reduce_precision",
        "optimization_barrier",
        "sharding_constraint",
        "reshard",
        "mesh_cast",
        "stop_gradient",
    ]
)
_SAME = frozenset(
    [
        "convert_element_type",
        "reduce_precision",
        "copy",
        "copy_p",
        "optimization_barrier",
        "sharding_constraint",
        "mesh_cast",
        "stop_gradient",
    ]
)
CHANGES = frozenset(["add", "sub", "mul", "div", "neg", "add_any"])


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """An array of weights.

    Attributes:
      index: the int32 number of each element's weight, counted through all leaves; negative if it is not
        a weight.
      value: the elements in the function.
      leaves: the numbers of the leaves that they belong to.
      changed: whether arithmetic has changed them.
    """

    index: jax.Array
    value: jax.Array
    leaves: frozenset[int]
    changed: bool = False


Value = Stream | View


def keeps_shape(eqn: JaxprEqn, view: View) -> bool:
    aval: Any = eqn.outvars[0].aval
    return aval.shape == view.index.shape


def moved(eqn: JaxprEqn, ins: Sequence[Any]) -> list[Value]:
    views = [x for x in ins if isinstance(x, View)]
    leaves = frozenset().union(*(x.leaves for x in views))
    changed = any(x.changed for x in views)
    values = bind(eqn, [x.value if isinstance(x, View) else x.float for x in ins])
    if eqn.primitive.name in _SAME:
        pairs = zip(ins, values, strict=True)
        return [
            dataclasses.replace(x, value=v) if isinstance(x, View) else Stream(v) for x, v in pairs
        ]

    def index_of(x: Value) -> jax.Array:
        if isinstance(x, View):
            return x.index
        # Elements between weights are not weights.
        is_data = jnp.issubdtype(x.float.dtype, jnp.floating)
        return jnp.full(x.float.shape, -1, jnp.int32) if is_data else x.float

    params = eqn.params
    if params.get("fill_value") is not None:
        params = params | {"fill_value": -1}
    indices = eqn.primitive.bind(*map(index_of, ins), **params)
    indices = indices if eqn.primitive.multiple_results else [indices]
    return [View(i, v, leaves, changed) for i, v in zip(indices, values, strict=True)]


def at(value: Value, t: int) -> Value:
    """The value at index ``t`` of the first axis."""

    def pick(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return jax.lax.dynamic_index_in_dim(x, np.int32(t), 0, keepdims=False)

    if isinstance(value, View):
        return dataclasses.replace(value, index=pick(value.index), value=pick(value.value))
    return Stream(*jax.tree.map(pick, (value.float, value.quantized)))


def stacked(column: Sequence[Stream]) -> Stream:
    def stack(*xs: Any) -> Any:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in xs):
            return jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype)
        return jnp.stack(xs)

    batches = max((len(x.float) for x in column if x.batched), default=0)
    pairs = []
    for batch in range(max(batches, 1)):
        each = [x.pair(batch) for x in column]
        differ = any(q is not None for _, q in each)
        floats = stack(*(f for f, _ in each))
        pairs.append((floats, stack(*(f if q is None else q for f, q in each)) if differ else None))
    return stream_of(pairs) if batches else Stream(*pairs[0])


def taken(values: Sequence[Value], batches: Sequence[int]) -> list[Value]:
    return [x.take(batches) if isinstance(x, Stream) else x for x in values]
