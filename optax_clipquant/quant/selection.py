"""Selection of the leaves of a tree of params to quantize, and of their quantizers."""

import collections
import contextlib
import difflib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from optax_clipquant._tree import PyTree, flatten_with_path, path_of
from optax_clipquant.quant.qarray import is_qarray
from optax_clipquant.quant.quantizers.base import Quantizer
from optax_clipquant.quant.uses import Calibration, Use, Uses, names_a_weight

Rules = Quantizer | Mapping[str, Quantizer | None]
Where = Callable[[str, Any], bool]


def select(
    params: PyTree, quantizer: Rules, where: Where | None, uses: Uses | None = None
) -> dict[str, Quantizer]:
    """The quantizer of each selected leaf, by path; raises as ``quantize_params`` does.

    Leaves that would not become smaller, and leaves of dtypes that hold codes or scales already (float4,
    float6, float8_e8m0fnu), are left out, with a warning.
    """
    check_rules(quantizer, where, uses)
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
        chosen[path] = rule, leaf
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
    kept, why = {}, []
    for path, (rule, leaf) in chosen.items():
        with naming(path):
            reason = _why_left(rule, leaf, use_of(uses, path))
        if reason is None:
            kept[path] = rule
        else:
            why.append(f"{path!r} {reason}")
    if why:
        more = f", and {len(why) - 8} more" if len(why) > 8 else ""
        warnings.warn(
            f"these leaves stay unquantized: {'; '.join(why[:8])}{more}. To silence this, exclude them "
            "with `where`, or with None as their rule",
            stacklevel=4,
        )
    return kept


def _why_left(rule: Quantizer, leaf: Any, use: Use | None) -> str | None:
    """The reason why a selected leaf is not quantized, or None."""
    info = ml_dtypes.finfo(leaf.dtype)
    if info.bits < 8 or info.nmant == 0:
        return f"({leaf.dtype}: codes or scales already)"
    w = jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype))
    quantized = jax.eval_shape(lambda w: rule.quantize(w, use=use), w).nbytes_packed
    if w.size == 0 or quantized < w.size * w.dtype.itemsize:
        return None
    bits = 8 * quantized / w.size
    return f"({'x'.join(map(str, w.shape))} {w.dtype}: quantized it would take {bits:.3g} bits per weight)"


def is_selected(path: str, leaf: Any, quantizer: Rules, uses: Uses | None) -> bool:
    """Whether ``select`` selects a leaf, where no ``where`` is given."""
    weight = is_weight(path, leaf) if uses is None else _is_float(leaf) and uses[path].is_weight
    rule = rule_for(path, quantizer) if weight else None
    return rule is not None and _why_left(rule, leaf, use_of(uses, path)) is None


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


def check_where(where: Any) -> None:
    """Raises if ``where`` cannot be called, such as a tree of booleans."""
    if where is not None and not callable(where):
        raise TypeError(
            f"where must be a function of path and leaf, got {where!r:.80}; for example, "
            "where=lambda path, leaf: 'kernel' in path"
        )


def check_rules(quantizer: Any, where: Any = None, uses: Any = None) -> None:
    """Raises if ``quantizer`` is neither a quantizer nor a mapping to quantizers, or the others have other types."""
    check_where(where)
    if isinstance(uses, Calibration):
        raise TypeError("uses is a Calibration; give it as calibration=, or its uses")
    if uses is not None and not isinstance(uses, Uses):
        raise TypeError(
            f"uses must be what trace_weights(fn, params, *args) returns, got {uses!r:.80}"
        )
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


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Adds the leaf's path to a ``ValueError`` raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"params leaf {path!r}: {error}") from error
