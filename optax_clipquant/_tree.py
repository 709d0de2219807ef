"""Leaves, and names for them, whatever boxes they come in."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

PyTree = Any


def path_of(path: jax.tree_util.KeyPath) -> str:
    """A path as text, such as ``"Dense_0/kernel"``.

    Boxes around a param (Flax NNX's variables, linen's ``Partitioned``) add a last part ``value``
    in some places and not in others, so it is dropped. It is an attribute: a key of a dict stays.
    """
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_float0(x: Any) -> bool:
    """Whether ``x`` is the gradient of an integer param, which holds nothing."""
    return getattr(x, "dtype", None) == jax.dtypes.float0


def unboxed(tree: Any) -> Any:
    """``tree`` with the arrays in place of NNX's variables.

    ``nnx.Optimizer`` shows the variables to ``init`` alone, and cannot hold a ``Grid`` in one.
    """
    # Who has variables has imported this; for others it would only lengthen the start.
    nnx = sys.modules.get("flax.nnx")
    return tree if nnx is None else nnx.as_pure(tree)


def on_shapes(init: Callable[..., Any]) -> Callable[..., Any]:
    """``init``, which of ``jax.ShapeDtypeStruct`` leaves gives a state of them, as ``jax.eval_shape``.

    Raises:
      TypeError: in ``optax.tree_map_params``, whose way of telling which parts of a state are like the
        params does not find them here.
    """

    @functools.wraps(init)
    def wrapped(params: Any) -> Any:
        # The class is private to optax.
        if type(params).__name__ == "_ParamsPlaceholder":
            raise TypeError(
                f"{init.__qualname__.split('.')[0]}: optax.tree_map_params cannot map this state, which "
                "holds more for a leaf of params than an array of its shape. To shard it, put the params "
                "on the mesh: state = tx.init(params) is sharded as they are, and "
                "jax.tree.map(lambda x: x.sharding, state) tells how"
            )
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(unboxed(params))):
            return jax.eval_shape(init, params)
        return init(params)

    return wrapped


def check_unchanged(
    transform: str, what: str, path: str, leaf: Any, shape: tuple[int, ...], dtype: Any = None
) -> None:
    """Raises where a leaf has not the ``shape``, or not the ``dtype`` if given, that it had in ``init``.

    Args:
      transform: the name of the function to call, for the message.
      what: ``"params"`` or ``"updates"``.
      path: of the leaf.
      leaf: an array.
      shape: the shape in ``init``. Shapes that broadcast would pass unseen.
      dtype: the dtype in ``init``.

    Raises:
      ValueError: another shape.
      TypeError: another dtype. ``p + u`` of half precision and float32 gives float32.
    """
    if np.shape(leaf) != tuple(shape):
        raise ValueError(
            f"{transform}: {what} leaf {path!r} has shape {np.shape(leaf)}, but had {tuple(shape)} in "
            "init; call tx.init again for params of other shapes"
        )
    if dtype is not None and leaf.dtype != dtype:
        raise TypeError(
            f"{transform}: {what} leaf {path!r} is {leaf.dtype}, but was {np.dtype(dtype)} in init. "
            "Apply updates with optax.apply_updates(params, updates), which keeps the dtype of params; "
            "p + u, or eqx.apply_updates, does not. Params cast on purpose need a new tx.init"
        )


def check_known(transform: str, paths: Iterable[str], known: Iterable[str]) -> None:
    """Raises where ``paths`` of the params are not all ``known`` from ``init``."""
    if new := sorted(set(paths) - set(known)):
        raise ValueError(
            f"{transform}: params have a leaf {new[0]!r} that they had not in init"
            + (f", and {len(new) - 1} more" if len(new) > 1 else "")
            + "; call tx.init again, or leave it out with optax.masked in both"
        )
