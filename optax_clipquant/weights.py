"""Training on the grid: transforms after which the params stand on levels, and what they ship."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.core import Tracer

from optax_clipquant.clipping import Bound, clip_by_value
from optax_clipquant.grids import Grid
from optax_clipquant.params import PyTree, Rules, Where, naming, path_of, rule_for, select
from optax_clipquant.qarray import QArray
from optax_clipquant.quantizers import Uniform


class QuantizeWeightsState(NamedTuple):
    """State of ``quantize_weights``.

    Attributes:
      count: the number of updates so far.
      latent: a tree with the float32 latent weights of each quantized leaf, None at others.
      grid: a tree with the ``Grid`` that each quantized leaf stands on, None at others.
    """

    count: jax.typing.ArrayLike
    latent: PyTree
    grid: PyTree


class RoundWeightsState(NamedTuple):
    """State of ``round_weights``.

    Attributes:
      count: the number of updates so far.
      grid: a tree with the ``Grid`` that each quantized leaf stands on, None at others.
      key: the PRNG key of stochastic rounding, or None.
    """

    count: jax.typing.ArrayLike
    grid: PyTree
    key: jax.Array | None


def quantize_weights(
    quantizer: Rules, *, where: Where | None = None
) -> optax.GradientTransformation:
    """Keeps the params on a quantization grid; put it last in the chain.

    A float copy of the weights, the latent weights ``v``, takes the updates ``u``; the params are
    the nearest levels, and gradients are taken there (straight-through)::

        v <- v + u
        grid <- quantizer.fit(v)
        emitted update = grid.decode(grid.encode(v)) - params

    After each ``optax.apply_updates`` the float32 params equal the levels exactly: from the first
    step where training starts from projected params, ``dequantize_params(quantize_params(params,
    quantizer))``, else from about the third. bfloat16 and float16 params equal the levels rounded to
    their dtype. ``export_params`` turns them into codes, with no conversion that could lose
    accuracy.

    Updates are emitted in float32 for params of any dtype, so a wrapper that needs one dtype goes
    around the optimizer alone: ``optax.chain(optax.apply_if_finite(optimizer, n),
    quantize_weights(quantizer))``.

    Args:
      quantizer: the quantizer, or a mapping from regular expressions on paths to quantizers, as in
        ``quantize_params``.
      where: which leaves may be quantized, as in ``quantize_params``.

    Returns:
      A ``GradientTransformation`` with a ``QuantizeWeightsState``. It keeps 4 bytes a quantized
      weight. The updates of other leaves pass.

    Raises:
      ValueError: in ``init``, no leaf is selected or an expression is found in no path; in
        ``update``, no params are given.

    References:
      Courbariaux et al., BinaryConnect, 2015 (arXiv:1511.00363).

    Examples:
      >>> tx = optax.chain(optax.sgd(0.1), quantize_weights(Uniform(bits=4)))
      >>> params = {"kernel": jnp.array([[1.0, -0.3], [0.4, 0.2]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> export_params(params, state)["kernel"].qvalue
      Array([[-8, -8],
             [-3,  2]], dtype=int8)
    """

    def init(params: PyTree) -> PyTree:
        grid = _init_grids(params, quantizer, where)
        paths = dict(_leaves(grid))
        latent = jax.tree_util.tree_map_with_path(
            # A copy: params and state can then be donated together.
            lambda path, p: (
                jnp.array(p, jnp.float32, copy=True) if path_of(path) in paths else None
            ),
            _unboxed(params),
        )
        return QuantizeWeightsState(jnp.zeros((), jnp.int32), latent, grid)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        latents = dict(_leaves(state.latent))

        def step(path: str, u: jax.Array, p: jax.Array, grid: Grid) -> tuple[Any, Any, Any]:
            latent = latents[path] + u.astype(jnp.float32)
            grid = _refit(quantizer, path, latent, grid)
            return _move(p, grid, grid.encode(latent)), grid, latent

        updates, grid, latent = _map_quantized(
            step, updates, params, state.grid, "quantize_weights"
        )
        return updates, QuantizeWeightsState(optax.safe_increment(state.count), latent, grid)

    return optax.GradientTransformation(init, update)


def round_weights(
    quantizer: Rules, *, stochastic: bool = False, seed: int = 0, where: Where | None = None
) -> optax.GradientTransformation:
    """Rounds the params onto the grid after every step; put it last in the chain.

    There is no latent copy, so an update that is smaller than half a step of the grid is rounded
    away, and with rounding to the nearest level training stalls: this is the plain form of the
    method, kept to show that. ``quantize_weights`` does not stall. Stochastic rounding keeps small
    updates on the average, and trains.

    Args:
      quantizer: as for ``quantize_weights``.
      stochastic: round to one of the two levels around each weight, right on the average.
      seed: of the stochastic rounding.
      where: as for ``quantize_weights``.

    Returns:
      A ``GradientTransformation`` with a ``RoundWeightsState``.

    Raises:
      ValueError: as for ``quantize_weights``.

    Examples:
      >>> tx = optax.chain(optax.sgd(0.1), round_weights(Uniform(bits=4)))
      >>> params = {"kernel": jnp.array([[1.0], [0.5]])}
      >>> updates, _ = tx.update({"kernel": jnp.array([[0.0], [0.1]])}, tx.init(params), params)
      >>> updates["kernel"]  # the step of -0.01 is lost
      Array([[0.],
             [0.]], dtype=float32)
    """

    def init(params: PyTree) -> PyTree:
        grid = _init_grids(params, quantizer, where)
        key = jax.random.key(seed) if stochastic else None
        return RoundWeightsState(jnp.zeros((), jnp.int32), grid, key)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        index = {path: i for i, (path, _) in enumerate(_leaves(state.grid))}

        def step(path: str, u: jax.Array, p: jax.Array, grid: Grid) -> tuple[Any, Any]:
            w = p.astype(jnp.float32) + u.astype(jnp.float32)
            grid = _refit(quantizer, path, w, grid)
            key = None
            if state.key is not None:
                key = jax.random.fold_in(jax.random.fold_in(state.key, state.count), index[path])
            return _move(p, grid, grid.encode(w, key=key)), grid

        updates, grid = _map_quantized(step, updates, params, state.grid, "round_weights")
        return updates, RoundWeightsState(optax.safe_increment(state.count), grid, state.key)

    return optax.GradientTransformation(init, update)


def clipquant(
    optimizer: optax.GradientTransformation,
    *,
    c: Bound = 1.0,
    quantizer: Rules = Uniform(bits=4),  # noqa: B008 (immutable)
) -> optax.GradientTransformation:
    """Clipped gradients, an optimizer, and weights on a grid, in one chain.

    Args:
      optimizer: any optax optimizer.
      c: the bound on each gradient, as for ``clip_by_value``.
      quantizer: as for ``quantize_weights``.

    Examples:
      >>> tx = clipquant(optax.adam(1e-3), c=1.0, quantizer=Uniform(bits=4))
    """
    return optax.chain(clip_by_value(c), optimizer, quantize_weights(quantizer))


def export_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """``params`` with ``QArray`` leaves: the very codes that they stand on.

    Args:
      params: the params after the last ``optax.apply_updates``.
      opt_state: the optimizer's state, or an ``nnx.Optimizer``. The state of ``quantize_weights`` or
        ``round_weights`` is found inside chains and wrappers.

    Returns:
      The tree with ``QArray`` leaves on the grids of the state, so that ``dequantize_params`` of it
      equals ``params``.

    Raises:
      ValueError: ``opt_state`` holds no such state, or one of other params.

    Warns:
      UserWarning: some weights are not on the grid, and change to the nearest level. Not under
        ``jax.jit``.
    """
    grids = dict(_find(opt_state, "grid"))
    total, off_grid = 0, 0

    def export(path: str, p: jax.Array) -> QArray:
        nonlocal total, off_grid
        grid = grids[path]
        q = QArray(grid.encode(p), grid)
        # NaN is on no level, but it is exported as NaN.
        off = jnp.sum((q.dequantize() != p) & ~jnp.isnan(p))
        if not isinstance(off, Tracer):
            total, off_grid = total + p.size, off_grid + int(off)
        return q

    exported = _map_paths(export, params, grids)
    if off_grid:
        warnings.warn(
            f"{off_grid} of {total} weights are off the grid and were moved to the nearest level; "
            "export the params as the last update left them",
            stacklevel=2,
        )
    return exported


def latent_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """``params`` with the float32 latent weights in place of the quantized ones.

    Args:
      params: the params after the last ``optax.apply_updates``.
      opt_state: as for ``export_params``.

    Raises:
      ValueError: ``opt_state`` holds no state of ``quantize_weights``, or one of other params.
    """
    latents = dict(_find(opt_state, "latent"))
    return _map_paths(lambda path, p: latents[path], params, latents)


def _is_grid(x: Any) -> bool:
    return isinstance(x, Grid)


def _unboxed(tree: PyTree) -> PyTree:
    """``tree`` with the arrays in place of NNX's variables.

    ``nnx.Optimizer`` shows the variables to ``init`` alone, and cannot hold a ``Grid`` in one.
    """
    return nnx.as_pure(tree)


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_grid)[0]:
        yield path_of(path), leaf


def _init_grids(params: PyTree, quantizer: Rules, where: Where | None) -> PyTree:
    params = _unboxed(params)
    chosen = select(params, quantizer, where)

    def fit(path: str, p: jax.Array) -> Grid | None:
        if path not in chosen:
            return None
        with naming(path):
            return chosen[path].fit(p)

    return jax.tree_util.tree_map_with_path(lambda path, p: fit(path_of(path), p), params)


def _refit(quantizer: Rules, path: str, w: jax.Array, grid: Grid) -> Grid:
    rule = rule_for(path, quantizer)
    assert rule is not None  # init selected the leaf by this rule
    return dataclasses.replace(rule.fit(w, start=grid), dtype=grid.dtype)


def _move(p: jax.Array, grid: Grid, codes: jax.Array) -> jax.Array:
    """The update that takes ``p`` to the levels of ``codes``."""
    return grid.decode(codes).astype(jnp.float32) - p.astype(jnp.float32)


def _map_quantized(
    step: Any, updates: PyTree, params: PyTree | None, grid: PyTree, name: str
) -> tuple[PyTree, ...]:
    """``step(path, update, param, grid)`` at each quantized leaf; a tree for each of its results."""
    if params is None:
        raise ValueError(
            f"{name} needs the params: call update(updates, state, params) with the current ones"
        )
    update_of, param_of = dict(_leaves(updates)), dict(_leaves(params))
    outputs = {}
    for path, leaf_grid in _leaves(grid):
        for what, leaves in (("updates", update_of), ("params", param_of)):
            if path not in leaves:
                raise ValueError(f"{name}: {what} have no leaf {path!r}, which init quantized")
        outputs[path] = step(path, update_of[path], param_of[path], leaf_grid)

    def result(index: int, tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: outputs[path_of(path)][index] if path_of(path) in outputs else leaf,
            tree,
            is_leaf=_is_grid,
        )

    count = len(next(iter(outputs.values())))
    return result(0, updates), *(result(index, grid) for index in range(1, count))


def _find(opt_state: PyTree, field: str) -> Iterator[tuple[str, Any]]:
    """Path and value of each leaf in ``field`` of the weight transforms' states."""
    if isinstance(opt_state, nnx.Optimizer):
        opt_state = opt_state.opt_state
    kinds = (QuantizeWeightsState, RoundWeightsState)
    states = [
        state
        for state in jax.tree.leaves(_unboxed(opt_state), is_leaf=lambda x: isinstance(x, kinds))
        if isinstance(state, kinds) and hasattr(state, field)
    ]
    if not states:
        raise ValueError(
            f"opt_state holds no state of quantize_weights with a {field}; give the state of an "
            "optimizer that has quantize_weights in its chain"
        )
    for state in states:
        yield from _leaves(getattr(state, field))


def _map_paths(fn: Any, params: PyTree, chosen: dict[str, Any]) -> PyTree:
    """``params`` with ``fn(path, leaf)`` at the leaves that ``chosen`` names, all of which must be."""
    shapes = {path: jnp.shape(leaf) for path, leaf in _leaves(params)}
    for path, value in chosen.items():
        if path not in shapes:
            raise ValueError(
                f"params have no leaf {path!r}, which opt_state quantizes: they are not of one run"
            )
        rank = (value.scale if _is_grid(value) else value).ndim
        if rank != len(shapes[path]):
            raise ValueError(
                f"params leaf {path!r} has shape {shapes[path]}, but opt_state quantizes an array "
                f"with {rank} axes: they are not of one run"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, p: fn(path_of(path), p) if path_of(path) in chosen else p, params
    )
