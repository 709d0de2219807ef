"""Trees of params: quantized, and dequantized."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optax_clipquant._tree import (
    NUMBERS,
    PyTree,
    flatten_with_path,
    listed,
    path_of,
    refuse_abstract,
)
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.qarray import QArray, is_qarray
from optax_clipquant.quant.quantizers.uniform import Uniform
from optax_clipquant.quant.selection import Rules, Where, naming, select, use_of
from optax_clipquant.quant.uses import Calibration, Uses


def quantize_params(
    params: PyTree,
    quantizer: Rules = Uniform(bits=8),  # noqa: B008 (immutable)
    *,
    where: Where | None = None,
    uses: Uses | None = None,
    calibration: Calibration | None = None,
    importance: PyTree | None = None,
    key: jax.Array | None = None,
) -> PyTree:
    """Quantizes a tree: returns ``params`` with a ``QArray`` in place of each selected leaf.

    Pure: works under ``jax.jit``, ``jax.vmap`` and ``jax.lax.scan``. Call it under ``jax.jit`` for
    speed.

    Args:
      params: a tree of arrays. Leaves that are ``None`` or a ``QArray`` pass through.
      quantizer: a quantizer for all selected leaves; or a mapping from regular expressions to
        quantizers, or to None for leaves to leave alone. An expression is searched for
        (``re.search``) in the leaf's path, such as ``"Dense_0/kernel"``; the first that matches
        decides, and a leaf that none matches is left alone.
      where: which leaves may be quantized, a function of path and leaf. By default those that
        ``uses`` says are weights; without it, floating leaves with at least 2 axes, unless the last
        part of the path is ``bias`` or ``scale``.
      uses: how the function uses the params, from ``trace_weights``. It selects the leaves that
        are in a dot, a convolution or a lookup (and are not adapters) under any name, and says which
        axes share a scale where the quantizer's ``channel_axis`` does not.
      calibration: from ``calibrate``: the default of ``uses`` and, through its moments, of
        ``importance``.
      importance: a tree like the params, or a part of it, of arrays that broadcast to the leaves, such
        as ``squared_gradients`` returns. The scales, and their signs, are searched to minimise
        ``sum(importance * (w - w_hat)**2)``. Leaves that it lacks are fitted without it.
      key: a PRNG key, for stochastic rounding. Each leaf gets a key derived from it.

    Returns:
      The tree with ``QArray`` leaves, of the same shapes and dtypes.

    Warns:
      UserWarning: a selected leaf stays unquantized, because it would not become smaller, or because its
        dtype (float4, float6, float8_e8m0fnu) holds codes or scales already. Also, outside ``jax.jit`` and
        without ``uses``, if all weights of a slice along the first axis become zero.

    Raises:
      ValueError: no leaf is selected, an expression matches no path, a leaf lacks an axis that its
        quantizer names, another leaf has the path of a selected one, or ``uses`` belongs to other
        params.
      TypeError: a selected leaf is not a real floating array, or has no values.

    Examples:
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> qparams = quantize_params(params, Uniform(bits=4))
      >>> qparams["dense"]["kernel"].qvalue
      Array([[-8, -8],
             [-8, -8],
             [-8, -8]], dtype=int8)
      >>> qparams["dense"]["bias"]
      Array([1., 1.], dtype=float32)

      A weight that the function transposes gets its scales along the other axis:

      >>> from optax_clipquant import trace_weights
      >>> weight = {"w": jnp.ones((3, 2))}
      >>> uses = trace_weights(lambda params, x: x @ params["w"].T, weight, jnp.ones((4, 2)))
      >>> quantize_params(weight, Uniform(bits=4), uses=uses)["w"].scale.shape
      (3, 1)
    """
    leaves, treedef = flatten_with_path(params, is_leaf=is_qarray)
    uses, weighting = weighting_of(uses, calibration, importance)
    chosen = select(params, quantizer, where, uses)
    check_weighting(weighting, chosen, importance is None)

    def quantize_leaf(index: int, leaf: Any, path: str) -> Any:
        if path not in chosen:
            return leaf
        refuse_abstract(
            f"params leaf {path!r}", leaf, "give arrays, or call it within jax.eval_shape"
        )
        leaf_key = None if key is None else jax.random.fold_in(key, index)
        with naming(path):
            return chosen[path].quantize(
                leaf, key=leaf_key, use=use_of(uses, path), importance=weighting.get(path)
            )

    quantized = [
        quantize_leaf(index, leaf, path_of(path)) for index, (path, leaf) in enumerate(leaves)
    ]
    if uses is None:
        warn_of_lost_slices(
            {
                path_of(path): (leaf, q)
                for (path, leaf), q in zip(leaves, quantized, strict=True)
                if path_of(path) in chosen
            }
        )
    return treedef.unflatten(quantized)


def warn_of_lost_slices(leaves: Mapping[str, tuple[Any, QArray | Grid]]) -> None:
    """Warns of slices along the first axis, such as layers, that become zero because they share scales.

    Only outside ``jax.jit`` and on one host, where values are known. Rows with few weights are skipped, since some round to
    zero in any net.

    Args:
      leaves: each leaf by path, and what it is quantized to, or the grid that it will be rounded to.
    """
    lost = {}
    for path, (w, q) in leaves.items():
        slices = w.shape[0] if w.ndim else 0
        shared = w.ndim and q.scale.shape[0] < slices
        many = w.ndim >= 3 or (w.ndim == 2 and w.shape[1] >= 32)
        known = not isinstance(q.scale, Tracer) and q.scale.is_fully_addressable
        if shared and many and known:
            lost[path] = _lost_slices(w, q), slices
    found = {path: (int(count), slices) for path, (count, slices) in lost.items() if count}
    if found:
        warnings.warn(
            "all weights become zero in "
            + ", ".join(f"{count} of {n} slices of {path!r}" for path, (count, n) in found.items())
            + " along its first axis, because slices share scales with far larger ones. If they are layers, "
            "experts or rows of an embedding, uses=trace_weights(fn, params, *args) gives each separate scales",
            stacklevel=3,
        )


@jax.jit
def _lost_slices(w: jax.Array, q: QArray | Grid) -> jax.Array:
    """The number of slices along the first axis in which ``q`` is all zero and ``w`` is not."""
    axes = tuple(range(1, w.ndim))
    level = q.dequantize() if isinstance(q, QArray) else q.decode(q.encode(w))
    return jnp.sum(jnp.any(w != 0, axes) & ~jnp.any(level != 0, axes))


def weighting_of(
    uses: Uses | None, calibration: Calibration | None, importance: PyTree | None
) -> tuple[Uses | None, Mapping[str, Any]]:
    """The uses, and the importance of the weights by the path of the leaf, if known."""
    weighting: Mapping[str, Any] = {}
    if calibration is not None:
        if not isinstance(calibration, Calibration):
            raise TypeError(
                f"calibration must be a Calibration, as calibrate returns, got {type(calibration).__name__}; a "
                "tree of weights of the squared errors is given as importance="
            )
        uses = calibration.uses if uses is None else uses
        weighting = calibration.moments
    if importance is not None:
        if isinstance(importance, Calibration):
            raise TypeError("importance is a Calibration; give it as calibration=")
        weighting = {path_of(path): leaf for path, leaf in flatten_with_path(importance)[0]}
        for path, leaf in weighting.items():
            if not isinstance(leaf, NUMBERS):
                raise TypeError(f"importance leaf {path!r} must be an array, got {leaf!r:.80}")
            if not _is_known_to_fit(leaf):
                raise ValueError(f"importance leaf {path!r} is negative or not finite somewhere")
    return uses, weighting


def check_weighting(weighting: Mapping[str, Any], chosen: Iterable[str], calibrated: bool) -> None:
    """Raises if an importance is given, but for none of the ``chosen`` leaves."""
    if weighting and not calibrated and not any(path in weighting for path in chosen):
        raise ValueError(
            f"importance has no leaf that is to be quantized: it has {listed(weighting)}, and these are to be "
            f"quantized: {listed(chosen)}; give a tree like the params, or a part of it"
        )


def _is_known_to_fit(importance: Any) -> bool:
    """Whether an importance is non-negative and finite; traced ones are taken on trust."""
    if isinstance(importance, Tracer):
        return True
    x = jnp.asarray(importance)
    return bool(jnp.all((x >= 0) & jnp.isfinite(x)))


def dequantize_params(qparams: PyTree, dtype: Any = None) -> PyTree:
    """Dequantizes a tree: returns ``qparams`` with an array in place of each ``QArray``.

    Args:
      qparams: a tree with ``QArray`` leaves; other leaves are left alone.
      dtype: the dtype of the dequantized leaves, by default that of the original array.

    Examples:
      >>> qparams = quantize_params({"kernel": jnp.ones((3, 2))})
      >>> dequantize_params(qparams)["kernel"].sum()
      Array(6., dtype=float32)
    """

    def dequantize(leaf: Any) -> Any:
        if not is_qarray(leaf):
            return leaf
        return leaf.dequantize() if dtype is None else leaf.astype(dtype)

    return jax.tree.map(dequantize, qparams, is_leaf=is_qarray)


def leaves_of(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """The path and value of each leaf; a ``QArray`` or a ``Grid`` counts as a leaf."""
    for path, leaf in flatten_with_path(tree, is_leaf=is_quantized)[0]:
        yield path_of(path), leaf


def is_quantized(x: Any) -> bool:
    return isinstance(x, (Grid, QArray))
