"""Exports the result of training on a grid: the codes of the params, or their latent weights."""

import difflib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant._tree import map_with_path, path_of
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.params import PyTree, leaves_of
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.training.grids import fits
from optax_clipquant.training.latent import recall
from optax_clipquant.training.weights import weight_states


def export_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """Exports trained ``params`` as ``QArray`` leaves, with exactly the codes whose levels they are.

    Args:
      params: the params after the last ``optax.apply_updates``.
      opt_state: the optimizer's state, or an ``nnx.Optimizer``. The state of ``quantize_weights`` or
        ``round_weights`` is found inside chains and wrappers.

    Returns:
      The tree with ``QArray`` leaves on the grids of the state; ``dequantize_params`` of it equals
      ``params``.

    Raises:
      ValueError: ``opt_state`` holds no such state, or one of other params.

    Warns:
      UserWarning: some weights are not on the grid, and are moved to the nearest level. Not raised under
        ``jax.jit``.

    Examples:
      >>> import optax
      >>> from optax_clipquant import Uniform, dequantize_params, quantize_weights
      >>> tx = quantize_weights(Uniform(bits=4))
      >>> params = {"kernel": jnp.array([[1.0, -0.3], [0.4, 0.2]])}
      >>> updates, state = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> qparams = export_params(params, state)
      >>> bool((dequantize_params(qparams)["kernel"] == params["kernel"]).all())
      True

      An Equinox module takes the floats back, or the ``QArray`` leaves themselves:

      >>> import equinox as eqx
      >>> from optax_clipquant import QArray
      >>> linear = eqx.nn.Linear(8, 4, key=jax.random.key(0))
      >>> params, static = eqx.partition(linear, eqx.is_inexact_array)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> qparams = export_params(optax.apply_updates(params, updates), state)
      >>> served = eqx.combine(dequantize_params(qparams), static)
      >>> quantized = eqx.combine(qparams, static, is_leaf=lambda x: isinstance(x, QArray))
      >>> bool(jnp.allclose(quantized(jnp.ones(8)), served(jnp.ones(8))))
      True
    """
    grids = dict(_find(opt_state, "grid"))
    total, off_grid = 0, 0

    def export(path: str, p: jax.Array) -> QArray:
        nonlocal total, off_grid
        grid = grids[path]
        q = QArray(grid.encode(p), grid)
        # NaN equals no level, but is exported as NaN.
        off = jnp.sum((q.dequantize() != p) & ~jnp.isnan(p))
        if not isinstance(off, Tracer):
            total, off_grid = total + p.size, off_grid + int(off)
        return q

    latents = {
        path: leaf
        for state in weight_states(opt_state)
        for path, leaf in leaves_of(getattr(state, "latent", None))
    }
    exported = _map_paths(export, params, grids, latents)
    if off_grid:
        warnings.warn(
            f"{off_grid} of {total} weights are off the grid and were moved to the nearest level; "
            "put quantize_weights last in the chain, and export the params as the last update left them",
            stacklevel=2,
        )
    return exported


def latent_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """Returns ``params`` with float32 latent weights in place of the quantized ones.

    Args:
      params: the params after the last ``optax.apply_updates``.
      opt_state: as for ``export_params``.

    Raises:
      ValueError: ``opt_state`` holds no state of ``quantize_weights``, or one of other params.

    Examples:
      >>> import optax
      >>> from optax_clipquant import Uniform, quantize_weights
      >>> tx = quantize_weights(Uniform(bits=2))
      >>> params = {"kernel": jnp.array([[1.0], [0.3]])}
      >>> updates, state = tx.update({"kernel": jnp.zeros((2, 1))}, tx.init(params), params)
      >>> latent_params(optax.apply_updates(params, updates), state)["kernel"]
      Array([[1. ],
             [0.3]], dtype=float32)
    """
    latents = dict(_find(opt_state, "latent"))
    grids = {path: grid for path, grid in _find(opt_state, "grid") if path in latents}
    return _map_paths(
        lambda path, p: recall(p, grids[path], latents[path])[1], params, grids, latents
    )


def _find(opt_state: PyTree, field: str) -> Iterator[tuple[str, Any]]:
    """The path and value of each leaf in ``field`` of the states of weight transforms."""
    states = [state for state in weight_states(opt_state) if hasattr(state, field)]
    if not states:
        transforms = "quantize_weights" + (" or round_weights" if field == "grid" else "")
        raise ValueError(
            f"opt_state holds no state of {transforms}; give params and opt_state, in this order, of an "
            f"optimizer that has {transforms} in its chain"
        )
    for state in states:
        yield from leaves_of(getattr(state, field))


def _map_paths(fn: Any, params: PyTree, grids: dict[str, Grid], latents: dict[str, Any]) -> PyTree:
    """Replaces each leaf of ``params`` that has a grid by ``fn(path, leaf)``.

    Raises ``ValueError`` if such a leaf is missing, differs in shape from its latent weights, if there are
    any, or does not fit its grid.
    """
    # Leaves may be anything, such as the functions in an Equinox module.
    shapes = {path: np.shape(leaf) for path, leaf in leaves_of(params)}
    for path, grid in grids.items():
        if path not in shapes:
            nearest = difflib.get_close_matches(path, list(shapes), n=3, cutoff=0)
            raise ValueError(
                f"params have no leaf {path!r}, which opt_state quantizes (the nearest: "
                f"{', '.join(nearest) or 'none'}); give the tree that is passed to tx.update, of the same run"
            )
        kept = latents[path].shape if path in latents else shapes[path]
        if kept != shapes[path] or not fits(grid, kept):
            raise ValueError(
                f"params leaf {path!r} has shape {shapes[path]}, but opt_state quantizes an array "
                + (f"of shape {kept}" if path in latents else f"with scales of {grid.scale.shape}")
                + ": they are not of one run"
            )
    return map_with_path(
        lambda path, p: fn(path_of(path), p) if path_of(path) in grids else p, params
    )
