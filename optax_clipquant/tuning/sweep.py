"""Grid search over hyperparameters: every point is trained and validated in one compiled program."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
import rich.text

from optax_clipquant._print import Printed, compact_table, progress_bar
from optax_clipquant.tuning.sweep_file import FAILED, Row, read, write


@dataclasses.dataclass(frozen=True)
class Sweep(Printed):
    """The result of ``sweep``: ``rows`` is plain data, and ``print`` shows a table.

    Attributes:
      rows: a dict of Python numbers for each point of the grid, in the order of ``itertools.product``:
        the value of each column, then each metric, then ``failed``, whether any metric is not finite.

    Examples:
      >>> from optax_clipquant import sweep
      >>> result = sweep(lambda c: {"loss": (c - 1) ** 2}, {"c": [0.0, 1.0]})
      >>> result.rows[1]
      {'c': 1.0, 'loss': 0.0, 'failed': False}
    """

    rows: tuple[Row, ...]

    def best(self, metric: str, mode: Literal["max", "min"] = "max") -> Row:
        """The row with the largest (or smallest) ``metric``; of equal rows, the first in the grid.

        Raises:
          ValueError: ``metric`` or ``mode`` is unknown, or all runs failed.
        """
        sign = self._check("best", mode, metric)
        rows = self._finished()
        if not rows:
            raise ValueError(
                f"best: all {len(self.rows)} runs failed, each with a metric that is not finite; sweep "
                "other values, such as a smaller learning rate"
            )
        return max(rows, key=lambda row: sign * row[metric])

    def pareto(self, cost: str, metric: str, mode: Literal["max", "min"] = "max") -> list[Row]:
        """The rows on the Pareto front of ``cost`` and ``metric``, sorted by cost.

        A row is on it if it did not fail, and no other row is as good in both and better in one. Rows with
        equal cost and metric are on it together, or not at all.

        Args:
          cost: a column or metric; less is better.
          metric: a column or metric.
          mode: ``"max"`` if more of ``metric`` is better, ``"min"`` if less.

        Raises:
          ValueError: a name or ``mode`` is unknown.
        """
        sign = self._check("pareto", mode, cost, metric)
        rows = self._finished()
        points = [(row[cost], sign * row[metric]) for row in rows]
        front = {points[i] for i in pareto_front(points)}
        kept = [row for row, point in zip(rows, points, strict=True) if point in front]
        return sorted(kept, key=lambda row: row[cost])

    def _finished(self) -> list[Row]:
        return [row for row in self.rows if not row[FAILED]]

    def _check(self, caller: str, mode: str, *names: str) -> int:
        """1 for "max", -1 for "min"."""
        known = [name for name in self.rows[0] if name != FAILED]
        for name in names:
            if name not in known:
                raise ValueError(f"{caller}: there is no {name!r}; choose from {known}")
        if mode not in ("max", "min"):
            raise ValueError(f'{caller}: mode must be "max" or "min", got {mode!r}')
        return 1 if mode == "max" else -1

    def __rich__(self) -> rich.table.Table:
        table = compact_table()
        some_failed = len(self._finished()) < len(self.rows)
        for name in self.rows[0]:
            if name != FAILED or some_failed:
                header = rich.text.Text(
                    "" if name == FAILED else name
                )  # text is not parsed as markup
                table.add_column(header, justify="right", overflow="fold")
        for row in self.rows:
            values = (value for name, value in row.items() if name != FAILED)
            table.add_row(
                *(f"{value:.5g}" if isinstance(value, float) else f"{value}" for value in values),
                *(["failed" if row[FAILED] else ""] if some_failed else []),
            )
        return table


def sweep(
    evaluate: Callable[..., Mapping[str, Any]],
    grid: Mapping[str, Sequence[Any] | np.ndarray | jax.Array],
    *,
    batch_size: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sweep:
    """Trains and validates at every point of a grid, in one vmapped and jitted program.

    The program is traced and compiled once. A loop over the points would compile once for each, which takes
    most of the time for a small model. The runs of a batch advance together, and all hold memory at once.

    The values are traced, so they cannot determine shapes or Python control flow: ``c``, ``R``,
    ``resolution``, learning rates and seeds may be in a grid; for ``bits``, call ``sweep`` once per value.

    A batch computes sums in a different order from a single run, so that a weight halfway between two levels
    can go either way. Long training on a quantization grid therefore ends slightly differently, as it does with
    another seed.

    Args:
      evaluate: called as ``evaluate(c=..., R=...)`` with a scalar for each column, int32 if the whole
        column consists of integers and float32 otherwise; it trains, and returns a dict of scalar metrics.
        Draw batches and initial values from fixed keys inside it, or close over them.
      grid: a mapping from the name of each column to its values; the points are their product.
      batch_size: how many points run together; all of them by default. On a CPU, small batches may be
        faster (5 rather than 25, with 300,000 weights). A short last batch is padded by repeating a point,
        so that the same program runs it.
      path: a JSON file for the grid and its rows, written after each batch. If the file exists and has the
        same grid and metrics, only the missing points are run. The file does not record what ``evaluate``
        does: delete it when that changes.
      progress: whether to show a progress bar.

    Returns:
      A ``Sweep``.

    Raises:
      ValueError: ``grid`` is empty, a column is empty or holds something other than numbers, or ``batch_size``
        is less than 1; ``evaluate`` returns something other than a dict of scalars, or a metric with the
        name of a column; the file belongs to another grid, has other metrics, or was not written by ``sweep``.
      FileNotFoundError: the folder of ``path`` does not exist.

    Examples:
      >>> def evaluate(lr, steps):
      ...     w = jax.lax.fori_loop(0, steps, lambda _, w: w - lr * 2 * (w - 3), jnp.zeros(()))
      ...     return {"loss": (w - 3) ** 2}
      >>> result = sweep(evaluate, {"lr": [0.1, 0.5, 1e20], "steps": [1, 2]}, progress=False)
      >>> result.best("loss", mode="min")
      {'lr': 0.5, 'steps': 1, 'loss': 0.0, 'failed': False}
      >>> [row["failed"] for row in result.rows]
      [False, False, False, False, True, True]
      >>> print(result)  # doctest: +SKIP
    """
    columns = _columns(grid)
    if batch_size is not None and not (
        isinstance(batch_size, (int, np.integer)) and batch_size >= 1
    ):
        raise ValueError(
            f"sweep: batch_size must be an integer of at least 1, or None for all, got {batch_size}"
        )
    points = [
        dict(zip(columns, values, strict=True)) for values in itertools.product(*columns.values())
    ]
    rows = [] if path is None else read(path, columns, points)
    size = max(1, min(batch_size or len(points), len(points) - len(rows)))

    def batch() -> dict[str, np.ndarray]:
        """The next points, padded with the last one."""
        index = np.minimum(np.arange(len(rows), len(rows) + size), len(points) - 1)
        return {
            name: np.array([points[i][name] for i in index], _dtype(values))
            for name, values in columns.items()
        }

    def run(point: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return _metrics(evaluate(**point), columns)

    with progress_bar(shown=progress) as bar:
        task = bar.add_task("compiling", total=len(points), completed=len(rows))
        traced = jax.jit(jax.vmap(run)).trace(batch())
        names = {*columns, *traced.out_info, FAILED}
        for row in rows:
            if row.keys() != names:
                raise ValueError(
                    f"{path}: its rows have {sorted(row)}, but those of this sweep {sorted(names)}; "
                    "give another path, or delete the file"
                )
        if len(rows) == len(points):
            return Sweep(tuple(rows))
        if path is not None:
            write(path, columns, rows)  # fails before the work if the file cannot be written
        compiled = traced.lower().compile()
        bar.update(task, description="sweep")
        while len(rows) < len(points):
            metrics = {k: v.tolist() for k, v in jax.device_get(compiled(batch())).items()}
            # A padded batch has more values than there are points left.
            for point, *found in zip(points[len(rows) :], *metrics.values(), strict=False):
                failed = not all(map(math.isfinite, found))
                rows.append({**point, **dict(zip(metrics, found, strict=True)), FAILED: failed})
            if path is not None:
                write(path, columns, rows)
            bar.update(task, completed=len(rows))
    return Sweep(tuple(rows))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal ``(cost, value)`` points, by rising cost; of equal points, the first."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _columns(grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each column as Python numbers, all integers or all floats."""
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(
            f'sweep: grid must map names to values, as in {{"c": [0.1, 1.0]}}, got {grid!r}'
        )
    columns = {}
    for name, values in grid.items():
        if name == FAILED:
            raise ValueError(f"sweep: grid has a column {name!r}, which is reserved; rename it")
        try:
            column = np.asarray(values)
        except ValueError:  # sequences of different lengths
            column = np.empty((), object)
        number = jnp.isdtype(column.dtype, ("integral", "real floating"))
        if column.ndim != 1 or (column.size and not number):
            raise ValueError(
                f"sweep: grid[{name!r}] must be a sequence of real numbers, got {values!r}"
            )
        if column.size == 0:
            raise ValueError(f"sweep: grid[{name!r}] is empty; give values, or leave it out")
        columns[name] = column.tolist()
        dtype = _dtype(columns[name])
        if dtype == np.int32:
            least, largest = 1, int(jnp.iinfo(dtype).max)
        else:
            least, largest = (float(x) for x in (jnp.finfo(dtype).tiny, jnp.finfo(dtype).max))
        for value in columns[name]:
            if not (value == 0 or least <= abs(value) <= largest or abs(value) == math.inf):
                raise ValueError(
                    f"sweep: grid[{name!r}] has {value}, which {dtype.__name__} cannot represent; leave it out"
                )
    return columns


def _dtype(column: Sequence[Any]) -> type[np.number]:
    return np.int32 if isinstance(column[0], int) else np.float32


def _metrics(found: Any, columns: Mapping[str, Any]) -> dict[str, jax.Array]:
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"sweep: evaluate returned {found!r}; it must return a dict of scalars, as in "
            '{"accuracy": ...}'
        )
    metrics = {}
    for name, value in found.items():
        if not isinstance(name, str) or name in columns or name == FAILED:
            raise ValueError(
                f"sweep: evaluate returned a metric {name!r}, which is the name of a column, or not "
                "a string; rename it"
            )
        array = isinstance(value, (bool, int, float, np.generic, np.ndarray, jax.Array))
        real = array and jnp.isdtype(jnp.result_type(value), ("bool", "integral", "real floating"))
        if not real or np.shape(value) != ():
            raise ValueError(
                f"sweep: evaluate returned {name!r} as "
                + (f"{jnp.result_type(value)}{np.shape(value)}" if array else f"{value!r}")
                + "; it must be a real scalar, such as a mean"
            )
        metrics[name] = jnp.asarray(value)
    return metrics
