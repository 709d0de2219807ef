"""The grids of a tree of params during training."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant._tree import (
    PyTree,
    check_known,
    check_unchanged,
    flatten_with_path,
    listed,
    map_with_path,
    path_of,
    unboxed,
)
from optax_clipquant.lowering.sharding import sharding_of_scales
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.groups import groups_of
from optax_clipquant.quant.params import is_quantized, leaves_of, warn_of_lost_slices
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.quant.quantizers.base import Quantizer
from optax_clipquant.quant.selection import (
    Rules,
    Where,
    is_selected,
    naming,
    rule_for,
    select,
    use_of,
)
from optax_clipquant.quant.uses import Use, Uses


def init_grids(
    params: PyTree,
    quantizer: Rules,
    where: Where | None,
    uses: Uses | None = None,
    importance: Mapping[str, jax.Array] | None = None,
    start: Mapping[str, Grid] | None = None,
) -> PyTree:
    """The grid of each selected leaf, None at others: from ``start``, or fitted."""
    params = unboxed(params)
    chosen = select(params, quantizer, where, uses)
    if not chosen:
        raise ValueError(
            "no leaf of params would become smaller by this quantizer; give it fewer bits or larger groups"
        )
    importance, start = importance or {}, start or {}
    unknown = [path for path in start if path not in chosen]
    if unknown:
        raise ValueError(
            f"start has QArrays where no leaf of params is selected: {listed(unknown)}; the leaves selected "
            f"are {listed(chosen)}"
        )
    fresh = [path for path in chosen if path not in start]
    if start and fresh:
        warnings.warn(
            f"start has no QArray for {listed(fresh)}, which the rules select: training rounds them to new "
            "grids; to leave them float, exclude them with where= or a rule of None",
            stacklevel=4,
        )

    def fit(path: str, p: jax.Array) -> Grid | None:
        if path not in chosen:
            return None
        if path in start:
            if not fits(start[path], p.shape):
                raise ValueError(
                    f"start has scales of {start[path].scale.shape} for leaf {path!r}, which has shape "
                    f"{p.shape}"
                )
            # A copy, so that the state can be donated.
            grid = jax.tree.map(
                lambda x: jnp.array(x, copy=True), dataclasses.replace(start[path], dtype=p.dtype)
            )
            if isinstance(p, Tracer) or len(p.sharding.device_set) == 1:
                return grid
            return jax.tree.map(
                lambda x: jax.device_put(x, sharding_of_scales(p.sharding, x.shape, p.shape)), grid
            )
        with naming(path):
            return chosen[path].fit(p, use=use_of(uses, path), importance=importance.get(path))

    grids = map_with_path(lambda path, p: fit(path_of(path), p), params)
    if uses is None:
        fitted = {path: grid for path, grid in leaves_of(grids) if path not in start}
        leaves = dict(leaves_of(params))
        warn_of_lost_slices({path: (leaves[path], grid) for path, grid in fitted.items()})
    return grids


def start_grids(
    start: PyTree, quantizer: Rules, uses: Uses | None, importance: Mapping[str, jax.Array]
) -> dict[str, Grid]:
    """The grids of the ``QArray`` leaves of ``start``, by path.

    Raises:
      ValueError: the quantizer makes other grids, or its scales would move although no weight does.
      TypeError: ``start`` has no ``QArray``.
    """
    grids = {}
    for path, q in leaves_of(unboxed(start)):
        if not isinstance(q, QArray):
            continue
        w, rule = q.dequantize(), rule_for(path, quantizer)
        # In the dtype that fits give, since `narrow` keeps bfloat16.
        grid = dataclasses.replace(q.grid, scale=q.grid.scale.astype(jnp.float32))
        if rule is None:
            raise ValueError(
                f"start: leaf {path!r} is a QArray, but no rule of the quantizer matches it; add one, or "
                "dequantize it in start"
            )
        try:
            found = fit_again(rule, w, grid, use_of(uses, path), importance.get(path))
        except _OtherGridError as error:
            raise ValueError(
                f"start: leaf {path!r} is on another grid than the quantizer makes: {error}. Give the quantizer "
                "that start was made with, and uses=trace_weights(fn, params, *args), which tells its axes"
            ) from error
        # Codes may be int4, which JAX does not promote.
        moved = jnp.any(found.encode(w) != q.qvalue.astype(jnp.int8))
        if not isinstance(moved, Tracer) and moved:
            raise ValueError(
                f"start: the quantizer of leaf {path!r} does not keep the codes, since it takes scales or zero "
                "points from the extremes of the weights; give importance=, with which scales follow the "
                "weights by least squares, or a symmetric quantizer with scale_rule='mse'"
            )
        grids[path] = grid
    if not grids:
        raise TypeError("start must be a tree with QArrays, as quantize_calibrated returns")
    return grids


def known_rule(transform: str, quantizer: Rules, path: str) -> Quantizer:
    """The rule for a leaf that is on a grid."""
    rule = rule_for(path, quantizer)
    if rule is None:
        raise ValueError(
            f"{transform}: leaf {path!r} is on a grid in the state, but no rule of the quantizer matches "
            "it; give the rules that the state was made with, or call tx.init again"
        )
    return rule


@contextlib.contextmanager
def naming_leaf(transform: str, path: str) -> Iterator[None]:
    """Adds the transform and the leaf's path to a ``ValueError`` of ``fit_again``, which knows neither.

    So equal leaves share one trace.
    """
    try:
        yield
    except _OtherGridError as error:
        raise ValueError(
            f"{transform}: leaf {path!r} is on another grid in the state than the quantizer makes: {error}. "
            "Give the quantizer that the state was made with; or to go on with another one, "
            f"{start_anew(transform)}"
        ) from error


class _OtherGridError(ValueError):
    """Its text is the grid that is there, and the one that the quantizer makes."""


def fit_again(
    rule: Quantizer, w: jax.Array, grid: Grid, use: Use | None, importance: jax.Array | None
) -> Grid:
    """Fits the grid of the next step, without derivatives; call it within ``naming_leaf``."""
    w = jax.lax.stop_gradient(w)
    try:
        found = rule.fit(w, start=grid, use=use, importance=importance)
    except (TypeError, ValueError):  # a start with other shapes cannot be used
        _check_same_grid(jax.eval_shape(lambda w: rule.fit(w, use=use), w), grid)
        raise
    found = dataclasses.replace(found, dtype=grid.dtype)
    _check_same_grid(found, grid)
    return found


def _check_same_grid(found: Grid, grid: Grid) -> None:
    """Raises if the quantizer does not make the kind of grid that is in the state."""
    if _text(found) != _text(grid):
        raise _OtherGridError(f"{_text(grid)}, and {_text(found)}")


def start_anew(transform: str) -> str:
    """How to go on from what was trained with another state, for a message."""
    trained = "" if transform == "round_weights" else "params = latent_params(params, state); "
    return f"start anew: {trained}state = tx.init(params)"


def _text(grid: Grid) -> str:
    kept = dataclasses.replace(grid.levels, dtype=np.dtype(np.float32))
    names = [name for name, x in grid.arrays.items() if x is not None]
    return f"{kept} with {' and '.join(names)} of {grid.scale.shape}"


def level_of(grid: Grid, w: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The level of each weight, in float32, where the difference of two levels is exact."""
    return grid.decode(grid.encode(w, key=key)).astype(jnp.float32)


def exact_level_of(grid: Grid, w: jax.Array) -> jax.Array:
    """The level of each weight, not rounded to the dtype of the params."""
    return level_of(dataclasses.replace(grid, dtype=np.dtype(np.float32)), w)


def difference(target: jax.Array, p: jax.Array) -> jax.Array:
    """``target - p``, at least in float32, where the difference of two levels is exact."""
    wide = p.dtype if p.dtype.itemsize > 4 else jnp.float32
    return target.astype(wide) - p.astype(wide)


def map_quantized(
    step: Any,
    updates: PyTree,
    params: PyTree | None,
    grid: PyTree,
    name: str,
    latents: Mapping[str, Any] | None = None,
) -> tuple[PyTree, ...]:
    """Applies ``step(path, update, param, grid)`` to each quantized leaf; returns a tree for each result.

    Args:
      step: the function.
      updates: the updates.
      params: the params.
      grid: the tree of grids in the state.
      name: the name of the transform, for messages.
      latents: the latent weights by path, which have the shapes that params had in ``init``.

    Raises:
      ValueError: params are missing, or leaves or shapes differ from those in ``init``.
      TypeError: a dtype differs from that in ``init``.
    """
    if params is None:
        raise ValueError(
            f"{name} needs the params: call update(updates, state, params) with the current ones"
        )
    update_of, param_of = dict(leaves_of(updates)), dict(leaves_of(params))
    known = flatten_with_path(grid, is_leaf=lambda x: x is None or is_quantized(x))[0]
    check_known(name, param_of, (path_of(path) for path, _ in known))
    outputs = {}
    for path, leaf_grid in leaves_of(grid):
        for what, leaves in (("updates", update_of), ("params", param_of)):
            if path not in leaves:
                raise ValueError(
                    f"{name}: {what} have no leaf {path!r}, which init quantized; give all of them, or call "
                    "tx.init again"
                )
        p, u = param_of[path], jnp.asarray(update_of[path])
        shape = p.shape if latents is None else latents[path].shape
        check_unchanged(name, "params", path, p, shape, leaf_grid.dtype)
        if not fits(leaf_grid, p.shape):
            raise ValueError(
                f"{name}: params leaf {path!r} has shape {p.shape}, but its grid in the state has scales "
                f"of {leaf_grid.scale.shape}; call tx.init again for params of other shapes"
            )
        check_unchanged(name, "updates", path, u, shape)
        outputs[path] = step(path, u.astype(jnp.float32), p, leaf_grid)

    def result(index: int, tree: PyTree) -> PyTree:
        return map_with_path(
            lambda path, leaf: outputs[path_of(path)][index] if path_of(path) in outputs else leaf,
            tree,
            is_leaf=is_quantized,
        )

    count = len(next(iter(outputs.values())))
    return result(0, updates), *(result(index, grid) for index in range(1, count))


def check_selection(
    transform: str,
    params: PyTree,
    grid: PyTree,
    quantizer: Rules,
    where: Where | None,
    uses: Uses | None,
) -> None:
    """Raises if rules or ``uses`` now select a leaf that has no grid in the state.

    A user's ``where`` is not asked: it may look at values, which do not exist under ``jax.jit``.
    """
    if where is not None:
        return
    grids = dict(leaves_of(grid))
    for path, leaf in leaves_of(params):
        if path not in grids and is_selected(path, leaf, quantizer, uses):
            raise ValueError(
                f"{transform}: leaf {path!r} is not on a grid in the state, but {rule_for(path, quantizer)} is "
                "to quantize it; give the rules and uses that the state was made with, or to quantize it "
                f"too, {start_anew(transform)}"
            )


def fits(grid: Grid, shape: tuple[int, ...]) -> bool:
    """Whether ``grid`` can belong to an array of this shape, as far as its scales tell."""
    try:
        groups_of(shape, grid.scale.shape, grid.group)
    except ValueError:
        return False
    return True
