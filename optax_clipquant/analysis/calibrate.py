"""Calibrated quantization of any JAX function, from the activations that its weights are multiplied by."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

import jax.numpy as jnp

from optax_clipquant._print import Name, Printed, compact_table, progress_bar
from optax_clipquant._tree import PyTree, listed
from optax_clipquant.analysis.arguments import Function
from optax_clipquant.analysis.compensation.plan import Leaves, Moments, Program
from optax_clipquant.analysis.compensation.quantizing import Quantizing
from optax_clipquant.analysis.compensation.squares import InputSquares
from optax_clipquant.analysis.compensation.streams import Segments
from optax_clipquant.analysis.trace import trace_weights
from optax_clipquant.quant.selection import Rules, Where, select
from optax_clipquant.quant.uses import KINDS, Calibration, Use, Uses

if TYPE_CHECKING:
    import rich.table

Fn = Callable[[PyTree, Any], Any]


def calibrate(
    fn: Fn, params: PyTree, batches: Iterable[Any], *, progress: bool = True
) -> Calibration:
    """Measures the mean squares of the activations that the weights of ``fn`` are multiplied by.

    The jaxpr of ``fn`` is evaluated on each batch. Wherever a weight meets data in a dot or a convolution,
    also inside loops and scanned layers, the squares of the data are summed for each contracted index.
    Memory holds one batch at a time, and the sums.

    An error ``d`` in a weight with inputs ``x`` adds ``E[x**2] d**2`` to the squared error of the output.
    Given the result, ``quantize_params(..., calibration=)`` therefore searches the scales, and their
    signs, that minimise ``sum(E[x**2] (w - w_hat)**2)``.

    Args:
      fn: a function of the params and a batch, such as a model's forward pass. Its result is not used.
      params: its params.
      batches: the data; a few thousand tokens (rows, pixels) suffice. Batches may differ in shape; ``fn``
        is traced for each shape.
      progress: whether to show a progress bar on stderr.

    Returns:
      A ``Calibration``: for each contracted index of each leaf the mean square of its inputs, and the
      uses of the leaves. Leaves that meet no data have no moments.

    Warns:
      UserWarning: the inputs of a leaf are not finite; it has no moments.

    Raises:
      ValueError: there are no batches.
      TypeError: ``params`` or ``batches`` have no values, or ``batches`` are no iterable of batches.

    Examples:
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> batches = [jnp.array([[1.0, 2.0], [3.0, 0.0]])]
      >>> calibrate(fn, params, batches, progress=False).moments["kernel"]
      Array([[5.],
             [2.]], dtype=float32)
    """
    function = Function("calibrate", fn, params)
    uses, segments = None, Segments()
    programs: dict[Any, tuple[Program, list]] = {}
    handler = None
    with progress_bar(transient=True, shown=progress) as bar:
        task = bar.add_task("batches", total=None)
        for given, batch in function.batches(batches):
            if uses is None or handler is None:
                uses = trace_weights(fn, function.params, given)
                arrays = zip(function.paths, function.arrays, strict=True)
                leaves = {path: x for path, x in arrays if uses[path].contracted}
                handler = InputSquares(Leaves(leaves), [uses[path] for path in leaves])
            if batch.kind not in programs:
                program = Program(function, batch, handler.leaves, segments)
                program.plan([batch.arrays])
                programs[batch.kind] = program, []
            program, met = programs[batch.kind]
            # Where data decides how often loops run, meetings differ from batch to batch.
            handler.begin([] if program.order is None else met)
            program.run([batch.arrays], handler)
            bar.advance(task)
    if uses is None or handler is None:
        raise ValueError("calibrate: batches is empty; give at least one")
    moments = handler.means()
    lost = [path for path, x in moments.items() if not jnp.isfinite(x).all()]
    _warn_of_inputs(lost, "they have no moments")
    return Calibration(uses, {path: x for path, x in moments.items() if path not in lost})


@dataclasses.dataclass(frozen=True)
class CalibratedLeaf:
    """How ``quantize_calibrated`` quantized a leaf.

    Attributes:
      path: the leaf's path.
      use: how the function uses it.
      method: ``"compensated"``; ``"compensated, pooled"``, if it meets data more than once;
        ``"weighted search"``, if only its scales depend on the data; or ``"least squares"``.
      tokens: the number of tokens that it met, for experts the smallest. None if unknown.
      before: the relative root mean square error of its output with least-squares scales and nearest
        levels, on the inputs that it gets in the quantized model. None if unknown.
      after: the same error with the calibrated weights.

    Examples:
      >>> leaf = CalibratedLeaf("w", "dot", "compensated", tokens=256, before=0.2, after=0.1)
      >>> leaf.after / leaf.before
      0.5
    """

    path: str
    use: str
    method: str
    tokens: int | None
    before: float | None
    after: float | None


@dataclasses.dataclass(frozen=True)
class CalibrationReport(Printed):
    """How ``quantize_calibrated`` quantized each leaf; ``print`` shows a table.

    Examples:
      >>> leaf = CalibratedLeaf("w", "dot", "compensated", tokens=256, before=0.2, after=0.1)
      >>> print(CalibrationReport((leaf,)))
      leaf  use  method       tokens  error before   after
      ────────────────────────────────────────────────────
      w     dot  compensated     256        0.2000  0.1000
    """

    rows: tuple[CalibratedLeaf, ...]

    def __rich__(self) -> "rich.table.Table":
        table = compact_table()
        for name in ("leaf", "use", "method"):
            table.add_column(name, overflow="fold")
        for name in ("tokens", "error before", "after"):
            table.add_column(name, justify="right")
        for row in self.rows:
            errors = ("" if x is None else f"{x:.4f}" for x in (row.before, row.after))
            tokens = "" if row.tokens is None else f"{row.tokens:,}"
            table.add_row(Name(row.path), row.use, row.method, tokens, *errors)
        return table


@overload
def quantize_calibrated(
    fn: Fn,
    params: PyTree,
    batches: Iterable[Any],
    quantizer: Rules,
    *,
    where: Where | None = None,
    uses: Uses | None = None,
    progress: bool = True,
    return_report: Literal[False] = False,
) -> PyTree: ...


@overload
def quantize_calibrated(
    fn: Fn,
    params: PyTree,
    batches: Iterable[Any],
    quantizer: Rules,
    *,
    where: Where | None = None,
    uses: Uses | None = None,
    progress: bool = True,
    return_report: Literal[True],
) -> tuple[PyTree, CalibrationReport]: ...


def quantize_calibrated(
    fn: Fn,
    params: PyTree,
    batches: Iterable[Any],
    quantizer: Rules,
    *,
    where: Where | None = None,
    uses: Uses | None = None,
    progress: bool = True,
    return_report: bool = False,
) -> Any:
    """Quantizes ``params`` so that the outputs of ``fn``, rather than the weights, change little.

    The jaxpr of ``fn`` is evaluated on the batches in two streams, with the float weights and with those
    quantized so far. Where a weight ``w`` meets inputs ``x`` (``xq`` in the quantized stream) in a dot or
    convolution, it is quantized before the evaluation goes on:

    1. ``H = E[xq xq.T]``, its off-diagonals times 0.8, and 1% of the mean diagonal added.
    2. The target is ``w + 0.5 H^-1 E[xq (x - xq).T] w``, which compensates half of the error of the
       inputs.
    3. Groups of weights that share a scale are rounded in order of their inputs' power, one weight after
       the other; later weights compensate the errors of earlier ones. Each group's scale, of either sign,
       is searched along the way.

    It works through ``jit``, ``scan``, ``while``, ``cond``, ``remat``, custom derivatives and ``vmap``;
    each scanned layer, each expert and each group of a convolution has a separate ``H``. Weights that
    meet data more than once (shared, or in each step of a loop) are rounded with the mean of their ``H``.
    Weights that the function changes before they meet data, that are contracted along different axes, or
    of which more than 16,384 are contracted, get the scales that ``calibrate`` would give them; weights
    that meet no data get least-squares scales. Scales that a rule shares among layers or channels stay at
    least squares. The report tells which was done. Other leaves are left alone.

    Deterministic. Memory holds all batches, with their activations in one layer.

    Args:
      fn: a function of the params and a batch, such as a model's forward pass. It is traced once, and its
        result is not used. Dropout and the like should be off.
      params: its params, any tree of arrays.
      batches: the data, all of one shape; about 8,000 tokens (rows, pixels) in total.
      quantizer: as for ``quantize_params``.
      where: which leaves may be quantized, a function of path and leaf. By default those that are in a
        dot, a convolution or a lookup.
      uses: from ``trace_weights``; by default traced with the first batch.
      progress: whether to show a progress bar on stderr.
      return_report: whether to return a report too.

    Returns:
      ``params`` with ``QArray`` leaves; with ``return_report`` also a ``CalibrationReport``.

    Warns:
      UserWarning: the inputs of a leaf are not finite; it gets least-squares scales, as do those before
        which all data is 0.

    Raises:
      ValueError: there are no batches, they differ in shape, or what ``quantize_params`` raises.
      TypeError: ``params`` or ``batches`` have no values, or ``batches`` are no iterable of batches.

    References:
      Frantar et al., GPTQ, 2022 (arXiv:2210.17323). Arai and Ichikawa, QEP, 2025 (arXiv:2504.09629).

    Examples:
      >>> import jax
      >>> from optax_clipquant import Uniform
      >>> params = {"in": jnp.eye(4) * 0.8, "out": jnp.ones((4, 2))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
      >>> batches = [jax.random.normal(jax.random.key(0), (64, 4))]
      >>> qparams = quantize_calibrated(fn, params, batches, Uniform(bits=4), progress=False)
      >>> qparams["out"].bits
      4
    """
    function = Function("quantize_calibrated", fn, params)
    given = list(function.batches(batches))
    if not given:
        raise ValueError("quantize_calibrated: batches is empty; give at least one")
    (first, batch), *_ = given
    for i, (_, other) in enumerate(given):
        if other.kind != batch.kind:
            raise ValueError(
                f"quantize_calibrated: batches[{i}] has {other}, batches[0] has {batch}; all must be alike: "
                "drop or pad the last, smaller one"
            )
    data = [batch.arrays for _, batch in given]
    if uses is None:
        uses = trace_weights(fn, function.params, first)
    known = uses
    chosen = select(
        params,
        quantizer,
        where or (lambda path, _: path in known and known[path].is_weight),
        known,
    )
    arrays = zip(function.paths, function.arrays, strict=True)
    leaves = Leaves({path: x for path, x in arrays if path in chosen})
    program = Program(function, batch, leaves, Segments())
    planner = program.plan(data)
    moments = Moments(leaves, [found.method for found in planner.found])
    program.run(data, moments)
    with progress_bar(transient=True, shown=progress) as bar:
        task = bar.add_task("quantizing", total=sum(found.steps for found in planner.found))

        def done(number: int) -> None:
            bar.update(task, advance=1, description=leaves.paths[number])

        handler = Quantizing(
            leaves,
            [chosen[path] for path in leaves.paths],
            [uses.get(path) for path in leaves.paths],
            planner,
            moments,
            done,
        )
        program.run(data, handler)
        found = {path: handler.leaf(i).quantized() for i, path in enumerate(leaves.paths)}
    _warn_of_inputs(
        [leaves.paths[i] for i in sorted(handler.lost)], "they get least-squares scales"
    )
    qparams = function.treedef.unflatten([found.get(path, x) for path, x in function.flat])
    if not return_report:
        return qparams
    rows = (
        CalibratedLeaf(path, _name(uses.get(path)), *handler.outcome(i).relative())
        for i, path in enumerate(leaves.paths)
    )
    return qparams, CalibrationReport(tuple(rows))


def _warn_of_inputs(paths: list[str], effect: str) -> None:
    """Warns of leaves whose inputs are not finite."""
    if paths:
        warnings.warn(
            f"on these batches, the squares of the inputs of {listed(paths)} are not finite "
            f"in float32, so {effect}; look for NaN, inf or huge values in batches and params",
            stacklevel=3,
        )


def _name(use: Use | None) -> str:
    return "" if use is None else ", ".join(kind for kind in KINDS if kind in use.kinds)
