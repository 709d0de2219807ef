"""Quantizing a tree of params, and the rules that choose the quantizer of each leaf."""

import collections
import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant._tree import PyTree, flatten_with_path, path_of
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.qarray import QArray, is_qarray
from optax_clipquant.quant.quantizers import Quantizer, Uniform
from optax_clipquant.quant.uses import Calibration, Use, Uses, names_a_weight

Rules = Quantizer | Mapping[str, Quantizer | None]
Where = Callable[[str, Any], bool]


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

    Raises:
      ValueError: no leaf is selected, an expression matches no path, a leaf lacks an axis that its
        quantizer names, another leaf has the path of a selected one, or ``uses`` belongs to other
        params.
      TypeError: a selected leaf is not a real floating array.

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
    moments: Mapping[str, Any] = {}
    if calibration is not None:
        uses = calibration.uses if uses is None else uses
        moments = calibration.moments
    if importance is not None:
        moments = {path_of(path): leaf for path, leaf in flatten_with_path(importance)[0]}
    chosen = select(params, quantizer, where, uses)

    def quantize_leaf(index: int, leaf: Any, path: str) -> Any:
        if path not in chosen:
            return leaf
        leaf_key = None if key is None else jax.random.fold_in(key, index)
        with naming(path):
            return chosen[path].quantize(
                leaf, key=leaf_key, use=use_of(uses, path), importance=moments.get(path)
            )

    return treedef.unflatten(
        quantize_leaf(index, leaf, path_of(path)) for index, (path, leaf) in enumerate(leaves)
    )


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


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Adds the leaf's path to a ``ValueError`` raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"params leaf {path!r}: {error}") from error


def select(
    params: PyTree, quantizer: Rules, where: Where | None, uses: Uses | None = None
) -> dict[str, Quantizer]:
    """The quantizer of each selected leaf, by path; raises as ``quantize_params`` does."""
    check_rules(quantizer)
    leaves = [
        (path_of(path), leaf)
        for path, leaf in flatten_with_path(params, is_leaf=is_qarray)[0]
        if not is_qarray(leaf)
    ]
    if uses is not None:
        _check_traced(uses, leaves)
        where = where or (lambda path, leaf: _is_float(leaf) and uses[path].is_weight)
    eligible = [(path, leaf) for path, leaf in leaves if (where or is_weight)(path, leaf)]
    if not isinstance(quantizer, Quantizer):
        _check_found(quantizer, [path for path, _ in leaves], [path for path, _ in eligible])
    chosen = {}
    times = collections.Counter(path for path, _ in leaves)
    for path, leaf in eligible:
        rule = rule_for(path, quantizer)
        if rule is None:
            continue
        if times[path] > 1:
            raise ValueError(
                f"params have two leaves with the path {path!r}, as {{'a': {{'b': ...}}, 'a/b': ...}} "
                "would; rename one"
            )
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params leaf {path!r} was selected, but has dtype {dtype}; only real floating "
                "leaves can be quantized: exclude it with `where`"
            )
        chosen[path] = rule
    if not chosen:
        shown = ", ".join(f"{path} {getattr(leaf, 'shape', '')}" for path, leaf in leaves[:8])
        raise ValueError(
            "no leaf of params is selected for quantization. By default these are "
            + (
                "floating leaves with at least 2 axes not named bias or scale"
                if uses is None
                else "those in a dot, a convolution or a lookup, which print(uses) shows"
            )
            + "; choose others with `where`. "
            f"The leaves: {shown or 'none'}"
        )
    return chosen


def rule_for(path: str, rules: Rules) -> Quantizer | None:
    """The quantizer of the first rule that matches ``path``, or None."""
    if isinstance(rules, Quantizer):
        return rules
    return next((rule for pattern, rule in rules.items() if re.search(pattern, path)), None)


def is_weight(path: str, leaf: Any) -> bool:
    """Whether a leaf is quantized by default, where neither ``where`` nor ``uses`` is given."""
    return _is_float(leaf) and leaf.ndim >= 2 and names_a_weight(path)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", jnp.int32), jnp.floating)


def use_of(uses: Uses | None, path: str) -> Use | None:
    """The ``Use`` to fit a leaf with: None unless it is in a dot, a convolution or a lookup."""
    use = None if uses is None else uses[path]
    return use if use is not None and use.kinds & {"dot", "conv", "lookup"} else None


def _check_traced(uses: Uses, leaves: list[tuple[str, Any]]) -> None:
    """Raises if ``uses`` was traced with other params."""
    for path, leaf in leaves:
        if path not in uses and _is_float(leaf):
            nearest = difflib.get_close_matches(path, list(uses), n=3, cutoff=0)
            raise ValueError(
                f"uses has no leaf {path!r}, which params have (the nearest: {', '.join(nearest)}); "
                "give trace_weights the same tree"
            )
        traced = uses.shapes.get(path)
        if traced is not None and traced != np.shape(leaf):
            raise ValueError(
                f"params leaf {path!r} has shape {np.shape(leaf)}, and was traced with {traced}; trace "
                "the function with params of the same shapes"
            )


def check_rules(quantizer: Any) -> None:
    """Raises if ``quantizer`` is neither a quantizer nor a mapping to quantizers."""
    if isinstance(quantizer, Quantizer):
        return
    if not isinstance(quantizer, Mapping):
        raise TypeError(
            f"quantizer must be a Quantizer or a mapping from regular expressions to Quantizers, got {quantizer!r}"
        )
    for pattern, rule in quantizer.items():
        if not (rule is None or isinstance(rule, Quantizer)):
            raise TypeError(f"quantizer[{pattern!r}] must be a Quantizer or None, got {rule!r}")
        if not isinstance(pattern, str):
            raise TypeError(f"quantizer has the key {pattern!r}; give a regular expression as text")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def _check_found(
    rules: Mapping[str, Quantizer | None], paths: list[str], eligible: list[str]
) -> None:
    for pattern, rule in rules.items():
        found = [path for path in paths if re.search(pattern, path)]
        if not found:
            nearest = difflib.get_close_matches(pattern, paths, n=5, cutoff=0) or ["none"]
            raise ValueError(
                f"the expression {pattern!r} matches no path of params; the nearest paths: "
                + ", ".join(nearest)
            )
        if rule is not None and not any(path in eligible for path in found):
            raise ValueError(
                f"the expression {pattern!r} matches only leaves that are not to be quantized "
                f"({', '.join(found[:5])}); select them with `where`"
            )
