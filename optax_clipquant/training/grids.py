"""The grids of the leaves of a tree of params, in training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optax_clipquant._tree import PyTree, path_of, unboxed
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.params import (
    Rules,
    Where,
    is_quantized,
    leaves_of,
    naming,
    rule_for,
    select,
)


def init_grids(params: PyTree, quantizer: Rules, where: Where | None) -> PyTree:
    params = unboxed(params)
    chosen = select(params, quantizer, where)

    def fit(path: str, p: jax.Array) -> Grid | None:
        if path not in chosen:
            return None
        with naming(path):
            return chosen[path].fit(p)

    return jax.tree_util.tree_map_with_path(lambda path, p: fit(path_of(path), p), params)


def refit(quantizer: Rules, path: str, w: jax.Array, grid: Grid) -> Grid:
    rule = rule_for(path, quantizer)
    assert rule is not None  # init selected the leaf by this rule
    return dataclasses.replace(rule.fit(w, start=grid), dtype=grid.dtype)


def level_of(grid: Grid, w: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The level of each of ``w``, in float32, in which the difference of two is exact."""
    return grid.decode(grid.encode(w, key=key)).astype(jnp.float32)


def difference(target: jax.Array, p: jax.Array) -> jax.Array:
    """``target - p``, at least in float32, in which the difference of two levels is exact."""
    wide = p.dtype if p.dtype.itemsize > 4 else jnp.float32
    return target.astype(wide) - p.astype(wide)


def map_quantized(
    step: Any, updates: PyTree, params: PyTree | None, grid: PyTree, name: str
) -> tuple[PyTree, ...]:
    """``step(path, update, param, grid)`` at each quantized leaf; a tree for each of its results."""
    if params is None:
        raise ValueError(
            f"{name} needs the params: call update(updates, state, params) with the current ones"
        )
    update_of, param_of = dict(leaves_of(updates)), dict(leaves_of(params))
    outputs = {}
    for path, leaf_grid in leaves_of(grid):
        for what, leaves in (("updates", update_of), ("params", param_of)):
            if path not in leaves:
                raise ValueError(f"{name}: {what} have no leaf {path!r}, which init quantized")
        outputs[path] = step(path, update_of[path], param_of[path], leaf_grid)

    def result(index: int, tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: outputs[path_of(path)][index] if path_of(path) in outputs else leaf,
            tree,
            is_leaf=is_quantized,
        )

    count = len(next(iter(outputs.values())))
    return result(0, updates), *(result(index, grid) for index in range(1, count))
