"""How a function uses its weights, derived from its jaxpr."""

from collections.abc import Callable
from typing import Any

import jax

from optax_clipquant._tree import PyTree, flatten_with_path, path_of
from optax_clipquant.analysis.arguments import is_array
from optax_clipquant.analysis.record import Record, Value
from optax_clipquant.analysis.views import whole
from optax_clipquant.analysis.walk import Walk
from optax_clipquant.quant.qarray import is_qarray
from optax_clipquant.quant.uses import Uses


def trace_weights(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> Uses:
    """Finds how ``fn(params, *args, **kwargs)`` uses each leaf of ``params``, and the role of each axis.

    Like ``jax.eval_shape``, it computes nothing. It walks the jaxpr of the function through ``jit``,
    ``scan``, ``while``, ``cond``, ``remat``, custom derivatives, ``vmap`` and ``shard_map``, and follows
    weights through transposes, reshapes, slices, gathers, casts and elementwise functions.

    Leaves that are multiplied with data and summed over are weights, whatever their name or rank. Biases,
    norm scales, position tables that are added and rotary tables that are multiplied are not.

    Args:
      fn: a forward function or a loss, with or without its gradients.
      params: a tree of arrays or ``jax.ShapeDtypeStruct``; a ``QArray`` counts as the array that it
        represents.
      *args: further arguments. Arrays and ``jax.ShapeDtypeStruct`` are traced; others are passed to ``fn``
        unchanged.
      **kwargs: further arguments, like ``args``.

    Returns:
      The ``Use`` of each leaf by path.

    Raises:
      ValueError: two leaves have the same path.

    Examples:
      >>> def loss(params, x):
      ...     hidden = jax.nn.relu(x @ params["in"] + params["bias"])
      ...     return jax.numpy.sum(hidden @ params["out"].T)
      >>> shapes = {"in": (4, 8), "bias": (1, 8), "out": (3, 8)}
      >>> params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
      >>> print(trace_weights(loss, params, jax.numpy.ones((2, 4))))
      leaf  shape  use          contracted  batch  stacked  lookup
      ────────────────────────────────────────────────────────────
      bias  1x8    elementwise
      in    4x8    dot          0
      out   3x8    dot          1
    """
    found, treedef = flatten_with_path(params, is_leaf=is_qarray)
    leaves = [leaf for _, leaf in found]
    rest, rest_def = jax.tree.flatten((args, kwargs))
    traced = {i: _spec(leaf) for i, leaf in enumerate(leaves) if is_array(leaf)}
    fed = {i: _spec(leaf) for i, leaf in enumerate(rest) if is_array(leaf)}
    names = {i: path_of(found[i][0]) for i in traced}
    if len(set(names.values())) < len(names):
        twice = sorted(name for name in names.values() if list(names.values()).count(name) > 1)
        raise ValueError(f"params have two leaves with the path {twice[0]!r}; rename one")

    def call(weights: dict[int, Any], data: dict[int, Any]) -> Any:
        params = treedef.unflatten(weights.get(i, leaf) for i, leaf in enumerate(leaves))
        args, kwargs = rest_def.unflatten(data.get(i, leaf) for i, leaf in enumerate(rest))
        # The jaxpr can only return arrays.
        return [x for x in jax.tree.leaves(fn(params, *args, **kwargs)) if is_array(x)]

    shapes = {names[i]: spec.shape for i, spec in traced.items()}
    record = Record(shapes)
    weights = [Value((whole(path, shape),)) for path, shape in shapes.items()]
    data = [Value(data=True) for _ in fed]
    outputs = Walk(record).closed(jax.make_jaxpr(call)(traced, fed), [*weights, *data])
    for output in outputs:
        record.spend_lookups(output)
    return Uses(record.uses(), shapes)


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
