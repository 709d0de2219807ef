"""Leaves, and names for them, whatever boxes they come in."""

import sys
from typing import Any

import jax

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
