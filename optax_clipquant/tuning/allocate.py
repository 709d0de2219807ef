"""Bit widths that minimise the error of a tree within a size budget."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant._tree import refuse_abstract
from optax_clipquant.quant.params import PyTree, leaves_of, quantize_params
from optax_clipquant.quant.quantizers.base import Quantizer
from optax_clipquant.quant.quantizers.uniform import Uniform
from optax_clipquant.quant.selection import Where, naming, select, use_of
from optax_clipquant.quant.uses import Calibration, Use, Uses


def allocate_bits(
    params: PyTree,
    sensitivity: PyTree | Calibration,
    *,
    bits_per_param: float,
    choices: Sequence[int] = (2, 3, 4, 6, 8),
    quantizer: Callable[..., Quantizer] = Uniform,
    where: Where | None = None,
    uses: Uses | None = None,
    evaluate: Callable[[PyTree], float] | None = None,
) -> dict[str, Quantizer]:
    """Chooses the bit width of each leaf, to minimise the weighted error of the tree within a size budget.

    Each leaf ``l`` gets one of ``choices``. Among the assignments whose packed codes, scales and zero points
    take at most ``bits_per_param`` bits per quantized weight, this finds the one that minimises::

        sum over l of sum(sensitivity_l * (w_l - dequantized_l)**2)

    The solution is exact: the knapsack is solved as an integer program (HiGHS).

    The sum of errors is only a proxy for the loss, and unweighted a poor one for language models. There,
    ``squared_gradients`` of the log-likelihood of tokens drawn from the model's own distribution tells best
    which leaves matter (``tests/benchmarks/allocation.py``: rank correlation with the KL of single leaves .94; the
    plain sum .42, a ``Calibration`` .29).

    With ``evaluate``, a uniform width and four allocations are tried, and the best by its measure is
    returned. The allocations minimise the sum of ``error**t * typical**(1 - t)`` for ``t`` from 1/4 to 1, where
    ``typical`` is what the leaf's error would be with the geometric mean over all leaves of the error per weight.

    Args:
      params: a tree of arrays.
      sensitivity: the weights of the squared errors, in a tree like ``params``: non-negative, finite
        arrays that broadcast to the leaves. ``squared_gradients`` estimates them; ones give the plain
        squared error. Or a ``Calibration``: its moments weight the errors, and the search of the
        scales too, so give it to ``quantize_params(..., calibration=)`` as well.
      bits_per_param: the budget, averaged over the quantized weights.
      choices: the widths to choose from.
      quantizer: called with ``bits=...``: a class, or ``functools.partial(Uniform, group_size=32)``.
      where: which leaves, as in ``quantize_params``.
      uses: how the function uses the leaves, as in ``quantize_params``; by default taken from the
        calibration, if ``sensitivity`` is one.
      evaluate: returns a number to minimise for a tree of quantized params, such as the loss on
        held-out data. It is called for the largest width that all leaves can have, and for up to four
        allocations; by its measure, the result is never worse than that width.

    Returns:
      Rules that map each leaf's path (as a regular expression) to its quantizer, for
      ``quantize_params``, ``quantize_weights`` and every other function that takes rules.

    Raises:
      ValueError: the budget is below the smallest size; ``choices`` is empty or has duplicates; a leaf
        of ``sensitivity`` is missing, does not broadcast, or is negative or not finite somewhere; a leaf of
        ``params`` is not finite; ``evaluate`` returns no finite number for any allocation; or as
        ``quantize_params`` does.
      TypeError: a leaf of ``params`` has no values, or ``evaluate`` returns no number.

    References:
      Dong et al., HAWQ-V2, 2020 (arXiv:1911.03852), for the weighted error.

    Examples:
      >>> params = {"first": jnp.linspace(-1, 1, 256).reshape(16, 16)}
      >>> params["second"] = 1e-3 * params["first"]
      >>> ones = jax.tree.map(jnp.ones_like, params)
      >>> rules = allocate_bits(params, ones, bits_per_param=6)  # scales take 1 bit a weight here
      >>> {path: rule.bits for path, rule in rules.items()}
      {'^first$': 8, '^second$': 2}
    """
    if not choices or len(set(choices)) < len(choices):
        raise ValueError(f"choices must be distinct bit widths, got {tuple(choices)}")
    if not 0 < bits_per_param < float("inf"):
        raise ValueError(f"bits_per_param must be a positive number, got {bits_per_param}")
    rules = [quantizer(bits=bits) for bits in choices]
    leaves = dict(leaves_of(params))
    calibration = sensitivity if isinstance(sensitivity, Calibration) else None
    if calibration is not None:
        uses = calibration.uses if uses is None else uses
    # Leaves that the largest width would not make smaller stay float under all.
    paths = list(select(params, rules[int(np.argmax(choices))], where, uses))
    for path in paths:
        refuse_abstract(f"params leaf {path!r}", leaves[path])
        if isinstance(leaves[path], Tracer):
            raise TypeError(f"params leaf {path!r} is traced; call allocate_bits outside jax.jit")
    weights = _sensitivities(sensitivity, {path: leaves[path] for path in paths})
    table = _measure(
        {path: leaves[path] for path in paths},
        rules,
        weights,
        bits_per_param,
        uses,
        searched=calibration is not None,
    )

    def rules_of(chosen: np.ndarray) -> dict[str, Quantizer]:
        return {f"^{re.escape(path)}$": rules[i] for path, i in zip(paths, chosen, strict=True)}

    if evaluate is None:
        return rules_of(table.solve())
    tried = {}
    for chosen in (table.uniform(), *(table.solve(t) for t in (0.25, 0.5, 0.75, 1.0))):
        if chosen is not None and tuple(chosen) not in tried:
            qparams = quantize_params(
                params, rules_of(chosen), where=where, uses=uses, calibration=calibration
            )
            loss = _number(evaluate(qparams))
            tried[tuple(chosen)] = loss if math.isfinite(loss) else math.inf
    best = min(tried, key=tried.__getitem__)
    if tried[best] == math.inf:
        raise ValueError("evaluate returned no finite number for any allocation")
    return rules_of(np.array(best))


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate must return a number, got {str(found)[:80]!r}") from error


@dataclasses.dataclass(frozen=True)
class Table:
    """The size and error of each leaf (row) under each choice (column).

    Attributes:
      sizes: in bytes.
      errors: weighted squared errors.
      counts: the number of weights of each leaf.
      budget: the largest total size, in bytes.
    """

    sizes: np.ndarray
    errors: np.ndarray
    counts: np.ndarray
    budget: int

    def uniform(self) -> np.ndarray | None:
        """The largest choice that all leaves can have within the budget, or None."""
        total = self.sizes.sum(0)
        fits = np.flatnonzero(total <= self.budget)
        if not len(fits):
            return None
        return np.full(len(self.sizes), fits[total[fits].argmax()])

    def solve(self, t: float = 1.0) -> np.ndarray:
        """The choices of least total error; with ``t`` below 1, as if leaves differed less."""
        if t == 1:
            return _knapsack(self.sizes, self.errors, self.budget)
        # The error per weight at each choice, as the geometric mean over the leaves.
        positive = np.maximum(self.errors, np.finfo(np.float64).tiny)
        alike = np.exp(np.log(positive / self.counts[:, None]).mean(0))
        errors = positive**t * (self.counts[:, None] * alike) ** (1 - t)
        return _knapsack(self.sizes, errors, self.budget)


def budget_of(sizes: np.ndarray, weights: float, bits_per_param: float) -> int:
    """The bytes that ``weights`` may take.

    Raises:
      ValueError: the least of ``sizes``, a row for each leaf, exceed it.
    """
    # A decimal such as 2.312 may be just below the fraction that it stands for.
    budget = int(bits_per_param * weights / 8 * (1 + 1e-12))
    least = int(sizes.min(1).sum())
    if least > budget:
        raise ValueError(
            f"a budget of {bits_per_param} bits per weight is too small: with the scales, the smallest choices "
            f"take {math.ceil(8000 * least / max(weights, 1)) / 1000:.3f}; raise it, or let more weights share a scale"
        )
    return budget


def _measure(
    leaves: Mapping[str, Any],
    rules: Sequence[Quantizer],
    weights: Mapping[str, jax.Array],
    bits_per_param: float,
    uses: Uses | None,
    searched: bool,
) -> Table:
    """Sizes and errors of each rule for each leaf, whose scales are ``searched`` by ``weights`` or by the rule.

    Raises as ``allocate_bits`` does.
    """
    sizes = []
    for path, leaf in leaves.items():
        with naming(path):
            use = use_of(uses, path)
            sizes.append(
                [
                    jax.eval_shape(functools.partial(rule.quantize, use=use), leaf).nbytes_packed
                    for rule in rules
                ]
            )
    sizes = np.array(sizes)
    counts = np.array([math.prod(np.shape(leaf)) for leaf in leaves.values()], np.float64)
    budget = budget_of(sizes, counts.sum(), bits_per_param)
    errors = []
    for path, leaf in leaves.items():
        error = [_error(rule, leaf, weights[path], use_of(uses, path), searched) for rule in rules]
        if not np.all(np.isfinite(error)):
            raise ValueError(
                f"params leaf {path!r}: its error is not finite, since its weights are not"
            )
        errors.append(error)
    return Table(sizes, np.array(errors, np.float64), counts, budget)


def _sensitivities(
    sensitivity: PyTree | Calibration, leaves: dict[str, Any]
) -> dict[str, jax.Array]:
    found = (
        sensitivity.moments
        if isinstance(sensitivity, Calibration)
        else dict(leaves_of(sensitivity))
    )
    weights = {}
    for path, leaf in leaves.items():
        if path not in found:
            why = (
                ": a Calibration has moments of leaves in a dot or a convolution, which this one is not, or its "
                "inputs were not finite; leave it out with `where`, or give squared_gradients"
                if isinstance(sensitivity, Calibration)
                else ""
            )
            raise ValueError(f"sensitivity has no leaf {path!r}, which is to be quantized{why}")
        weight = jnp.asarray(found[path], jnp.float32)
        try:
            fits = np.broadcast_shapes(weight.shape, np.shape(leaf)) == np.shape(leaf)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"sensitivity leaf {path!r} has shape {weight.shape}, which does not broadcast to "
                f"{np.shape(leaf)}"
            )
        if not bool(jnp.all((weight >= 0) & jnp.isfinite(weight))):
            raise ValueError(f"sensitivity leaf {path!r} is negative or not finite somewhere")
        weights[path] = weight
    return weights


def _error(
    rule: Quantizer, w: jax.Array, weight: jax.Array, use: Use | None, searched: bool
) -> float:
    error, unit, weight_unit = map(float, _relative_error(rule, w, weight, use, searched))
    return error * unit**2 * weight_unit


@functools.partial(jax.jit, static_argnames=("use", "searched"))
def _relative_error(
    rule: Quantizer, w: jax.Array, weight: jax.Array, use: Use | None, searched: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted error in units of the largest weight and sensitivity, so that it fits float32; and these units."""

    def unit_of(x: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.abs(x), initial=0)
        return jnp.where(largest == 0, 1, largest)

    q = rule.quantize(w, use=use, importance=weight if searched else None)
    error = q.dequantize().astype(jnp.float32) - w.astype(jnp.float32)
    unit, weight_unit = unit_of(w.astype(jnp.float32)), unit_of(weight)
    relative = jnp.broadcast_to(weight / weight_unit, w.shape) * jnp.square(error / unit)
    return jnp.sum(relative), unit, weight_unit


def _knapsack(sizes: np.ndarray, errors: np.ndarray, budget: int) -> np.ndarray:
    """The column to take in each row, for the least sum of errors with sizes that sum to at most ``budget``."""
    import scipy.optimize  # here alone, since it takes half as long to import as jax
    import scipy.sparse

    rows, columns = sizes.shape
    constraints = [
        scipy.optimize.LinearConstraint(
            scipy.sparse.kron(scipy.sparse.eye(rows), np.ones((1, columns))), 1, 1
        ),
        scipy.optimize.LinearConstraint(sizes.reshape(1, -1), -np.inf, budget),
    ]
    # Errors are scaled, since the solver stops at an absolute gap of 1e-6.
    unit = errors.max(initial=0) or 1.0
    while True:
        result = scipy.optimize.milp(
            1e6 * (errors / unit).ravel(),
            constraints=constraints,
            integrality=np.ones(rows * columns),
            bounds=scipy.optimize.Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        if result.x is None:
            raise RuntimeError(f"the integer program was not solved: {result.message}")
        chosen = result.x.reshape(rows, columns).argmax(1)
        if sizes[np.arange(rows), chosen].sum() <= budget:
            return chosen
        # The solver's tolerance lets a few bytes in billions pass: forbid this choice and solve again.
        here = np.eye(columns)[chosen].reshape(1, -1)
        constraints.append(scipy.optimize.LinearConstraint(here, -np.inf, rows - 1))
