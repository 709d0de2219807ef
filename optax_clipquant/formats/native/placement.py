"""Places the leaves of a file into the structure and onto the devices of a given tree."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant._tree import PyTree, flatten_with_path, path_of
from optax_clipquant.lowering.sharding import sharding_of_scales
from optax_clipquant.quant.qarray import QArray, is_qarray


def fill(like: PyTree, tree: PyTree, file: str) -> PyTree:
    """``like`` with the leaves of ``tree``, matched by path."""
    expected, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_qarray)
    found = {
        _parts(key): leaf
        for key, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qarray)[0]
    }
    paths = [path_of(key) for key, _ in flatten_with_path(like, is_qarray)[0]]
    leaves = []
    for path, (key, leaf) in zip(paths, expected, strict=True):
        parts = _parts(key)
        if parts not in found and callable(leaf):
            raise ValueError(
                f"{file}: leaf {path!r} of `like` is a function; of an Equinox module, give "
                "eqx.filter(module, eqx.is_array)"
            )
        if parts not in found:
            raise ValueError(
                f"{file}: no leaf {path!r}, which `like` has; left to match are {_some(found)}"
            )
        shape = np.shape(found[parts])
        if shape != np.shape(leaf):
            raise ValueError(
                f"{file}: leaf {path!r} has shape {shape}, but {np.shape(leaf)} in `like`"
            )
        leaves.append(place(found.pop(parts), leaf))
    if found:
        raise ValueError(f"{file}: has leaves that `like` lacks: {_some(found)}")
    return treedef.unflatten(leaves)


def place(leaf: Any, like: Any = None) -> Any:
    """Converts the NumPy arrays of ``leaf`` to ``jax.Array``s, sharded like those of ``like``."""
    if not is_qarray(leaf):
        return _on_devices(leaf, getattr(like, "qvalue", like))
    codes = getattr(like, "qvalue", like)
    grid = {np.shape(x): x for x in jax.tree.leaves(like.grid)} if is_qarray(like) else {}
    return QArray(
        _on_devices(leaf.qvalue, codes),
        jax.tree.map(lambda x: _on_devices(x, grid.get(x.shape, codes)), leaf.grid),
    )


def _on_devices(array: np.ndarray, like: Any) -> Any:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array  # jax would truncate it
    sharding = getattr(like, "sharding", None)
    if not isinstance(sharding, jax.sharding.Sharding) or not getattr(like, "committed", True):
        return jnp.asarray(array)
    if array.shape != np.shape(like):
        sharding = sharding_of_scales(sharding, array.shape, np.shape(like))
    # Each process reads the file, and uses the parts for its devices.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _parts(key: jax.tree_util.KeyPath) -> tuple[str, ...]:
    """The keys of a path as text, without a box's ``value``, which a file does not mark.

    They are not joined, since Haiku's keys contain slashes: ``{"a/b": x}`` is not ``{"a": {"b": x}}``.
    """
    parts = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in key)
    return parts[:-1] if parts[-1:] == ("value",) else parts


def _some(found: Mapping[tuple[str, ...], Any]) -> list[str]:
    return ["/".join(parts) for parts in list(found)[:8]]
