"""A bit width for each leaf, so that a tree fits a size and loses least."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.quant.params import PyTree, Where, leaves_of, naming, select
from optax_clipquant.quant.quantizers import Quantizer, Uniform

Q = TypeVar("Q", bound=Quantizer)


def allocate_bits(
    params: PyTree,
    sensitivity: PyTree,
    *,
    bits_per_param: float,
    choices: Sequence[int] = (2, 3, 4, 6, 8),
    quantizer: Callable[..., Quantizer] = Uniform,
    where: Where | None = None,
) -> dict[str, Quantizer]:
    """The bit width of each leaf that minimises the weighted error of the tree under a size.

    Each leaf ``l`` gets one of ``choices``. Among the assignments whose packed codes, scales and zero points
    take at most ``bits_per_param`` bits for each quantized weight, this finds the one that minimises::

        sum over l of sum(sensitivity_l * (w_l - dequantized_l)**2)

    The solution is exact: the knapsack is solved as an integer program (HiGHS).

    Args:
      params: a tree of arrays.
      sensitivity: the same tree, with the weight of each squared error: an array that broadcasts to
        the leaf, not negative and finite. ``squared_gradients`` estimates it. 1 everywhere makes it
        the plain squared error.
      bits_per_param: the budget, on the average over the weights that are quantized.
      choices: the widths to choose from.
      quantizer: called with ``bits=...``: a class, or ``functools.partial(Uniform, group_size=32)``.
      where: which leaves, as in ``quantize_params``.

    Returns:
      The rules, from the path of each leaf (as a regular expression) to its quantizer, for
      ``quantize_params``, ``quantize_weights`` and all that take rules.

    Raises:
      ValueError: the budget is below the smallest size; ``choices`` is empty or has duplicates; a leaf
        of ``sensitivity`` is missing, of another shape, negative or not finite; a leaf of ``params``
        is not finite; or as ``quantize_params`` does.

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
        raise ValueError(f"choices must be widths, each once, got {tuple(choices)}")
    if not 0 < bits_per_param < float("inf"):
        raise ValueError(f"bits_per_param must be a positive number, got {bits_per_param}")
    rules = [quantizer(bits=bits) for bits in choices]
    leaves = dict(leaves_of(params))
    paths = list(select(params, rules[0], where))
    weights = _sensitivities(sensitivity, {path: leaves[path] for path in paths})
    chosen = allocate(
        {path: leaves[path] for path in paths},
        dict.fromkeys(paths, rules),
        lambda path: (leaves[path], weights[path]),
        bits_per_param,
    )
    return {f"^{re.escape(path)}$": rule for path, rule in chosen.items()}


def allocate(
    specs: Mapping[str, Any],
    rules: Mapping[str, Sequence[Q]],
    read: Callable[[str], tuple[Any, jax.Array]],
    bits_per_param: float,
) -> dict[str, Q]:
    """``allocate_bits`` for leaves that are read one at a time and not kept.

    Args:
      specs: by path the leaves, or what has their shape and dtype.
      rules: by path the quantizers to choose from, as many for each leaf.
      read: gives a leaf and the weight of its squared errors.
      bits_per_param: as for ``allocate_bits``.

    Returns:
      The quantizer of each leaf, by path.

    Raises:
      ValueError: the budget is below the smallest size, which shows before anything is read; or a leaf
        is not finite.
    """

    sizes = []
    for path, choices in rules.items():
        # The same quantizer again is a leaf without a choice.
        with naming(path):
            size = {
                rule: jax.eval_shape(rule.quantize, specs[path]).nbytes_packed
                for rule in dict.fromkeys(choices)
            }
        sizes.append([size[rule] for rule in choices])
    sizes = np.array(sizes)
    count = sum(math.prod(specs[path].shape) for path in rules)
    budget = int(bits_per_param * count // 8)
    least = int(sizes.min(1).sum())
    if least > budget:
        raise ValueError(
            f"bits_per_param is {bits_per_param}, but with the scales the smallest choices take "
            f"{8 * least / max(count, 1):.3f}; raise it, or let more weights share a scale (group_size)"
        )
    errors = []
    for path, choices in rules.items():
        leaf, weight = read(path)
        error = {rule: _error(rule, leaf, weight) for rule in dict.fromkeys(choices)}
        if not np.all(np.isfinite(list(error.values()))):
            raise ValueError(f"params leaf {path!r}: its error is not finite, nor are its weights")
        errors.append([error[rule] for rule in choices])
    chosen = _knapsack(sizes, np.array(errors, np.float64), budget)
    return {
        path: choices[index] for (path, choices), index in zip(rules.items(), chosen, strict=True)
    }


def _sensitivities(sensitivity: PyTree, leaves: dict[str, Any]) -> dict[str, jax.Array]:
    found = dict(leaves_of(sensitivity))
    weights = {}
    for path, leaf in leaves.items():
        if path not in found:
            raise ValueError(f"sensitivity has no leaf {path!r}, which is to be quantized")
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


def _error(rule: Quantizer, w: jax.Array, weight: jax.Array) -> float:
    error, unit, weight_unit = map(float, _relative_error(rule, w, weight))
    return error * unit**2 * weight_unit


@jax.jit
def _relative_error(
    rule: Quantizer, w: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted error in units of the largest weight and sensitivity, which float32 has room for."""

    def unit_of(x: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.abs(x), initial=0)
        return jnp.where(largest == 0, 1, largest)

    error = rule.quantize(w).dequantize().astype(jnp.float32) - w.astype(jnp.float32)
    unit, weight_unit = unit_of(w.astype(jnp.float32)), unit_of(weight)
    relative = jnp.broadcast_to(weight / weight_unit, w.shape) * jnp.square(error / unit)
    return jnp.sum(relative), unit, weight_unit


def _knapsack(sizes: np.ndarray, errors: np.ndarray, budget: int) -> np.ndarray:
    """For each row a column, so that the sizes sum to at most ``budget`` and the errors to the least."""
    import scipy.optimize  # it takes as long to load as half of jax, and only this needs it
    import scipy.sparse

    rows, columns = sizes.shape
    constraints = [
        scipy.optimize.LinearConstraint(
            scipy.sparse.kron(scipy.sparse.eye(rows), np.ones((1, columns))), 1, 1
        ),
        scipy.optimize.LinearConstraint(sizes.reshape(1, -1), -np.inf, budget),
    ]
    # The solver stops at an absolute gap of 1e-6.
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
        # Of billions of bytes, the solver's tolerance lets a few pass: all but this choice, then.
        here = np.eye(columns)[chosen].reshape(1, -1)
        constraints.append(scipy.optimize.LinearConstraint(here, -np.inf, rows - 1))
