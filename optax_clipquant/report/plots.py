"""Pictures of weights on their grids, of sizes, clipping and sweeps (needs the extra ``plot``).

Each function draws into axes that it is given, so that pictures can be put together, and changes none of
matplotlib's settings. ``subplots`` makes axes in the common style. The colours are Okabe and Ito's, which
colour-blind people can tell apart, and cividis; each has a line style and a marker of its own, so that
pictures can be read in grey too.

Examples:
  >>> from optax_clipquant import Uniform, plots, quantize_params, summarize
  >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
  >>> qparams = quantize_params(params, Uniform(bits=4))
  >>> figure, (left, *right) = plots.subplots(3)
  >>> plots.weight_histogram(left, params["kernel"], qparams["kernel"])
  >>> plots.leaf_bars(right, summarize(params, qparams))
  >>> figure.savefig("kernel.png")  # doctest: +SKIP
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

try:
    import matplotlib.figure
    import matplotlib.patches
    import matplotlib.patheffects
    import matplotlib.ticker
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError(
        "optax_clipquant.plots needs matplotlib: pip install 'optax-clipquant[plot]'",
        name="matplotlib",
    ) from error

from optax_clipquant.quant.qarray import QArray
from optax_clipquant.report.rows import Row, Summary
from optax_clipquant.tuning.sweep import pareto_front

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
)
GREY = "#666666"
STYLES = (
    *((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PINK, ":", "D")),
    *((YELLOW, (0, (5, 1)), "v"), (SKY, (0, (3, 1, 1, 1)), "P"), (GREY, (0, (1, 1)), "X")),
)
"""Colour, line and marker of the first series, the second, ..."""

Mode = Literal["max", "min"]


def subplots(
    columns: int = 1, rows: int = 1, *, width: float = 5.2, height: float = 4.0
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """A figure with axes in the common style.

    Args:
      columns: of axes.
      rows: of axes.
      width: of each, in inches.
      height: of each, in inches.

    Returns:
      The figure, which ``figure.savefig(path)`` writes with no window or backend, and its axes.
    """
    size = (width * columns, height * rows)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained", dpi=120)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for each in axes:
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    return figure, axes


def weight_histogram(axes: Axes, before: jax.typing.ArrayLike, after: QArray) -> None:
    """Weights before and after quantization, counted along their grid.

    Both are in steps of the grid of their own channel or group, and counted for each step, so that all
    weights share one picture and the heights compare: a stem has the weights that the bars around
    it have, moved onto one level.

    Args:
      axes: to draw into.
      before: the weights, such as those of ``latent_params``.
      after: what became of them.

    Raises:
      ValueError: the shapes differ.
    """
    weights = np.asarray(before, np.float32)
    if weights.shape != after.shape:
        raise ValueError(f"before has shape {weights.shape}, after {after.shape}")
    # In float32: rounded to half precision, levels would not lie evenly.
    after = QArray(after.qvalue, dataclasses.replace(after.grid, dtype=np.dtype(np.float32)))
    grid = after.grid
    ends = [grid.decode(jnp.full(after.shape, k, jnp.int8)) for k in (grid.lower, grid.upper)]
    low, high = (np.asarray(end, np.float32) for end in ends)
    step = np.abs(high - low) / (grid.upper - grid.lower)
    shown = np.isfinite(step) & (step > 0) & np.isfinite(weights)
    position = weights[shown] / step[shown]
    levels, counts = np.unique(
        np.round(np.asarray(after.dequantize(), np.float32)[shown] / step[shown], 3),
        return_counts=True,
    )
    if grid.code_book is not None and levels.size > 1:
        counts = counts / np.gradient(levels)  # its levels are nearer than a step, or farther
    bars = 4  # a step
    if position.size:
        first, last = math.floor(position.min()) - 0.5, math.ceil(position.max()) + 0.5
        # Some weights may be thousands of steps away.
        edges = np.linspace(first, last, min(round(bars * (last - first)), 400) + 1)
        axes.hist(
            position,
            edges,
            weights=np.full(position.shape, 1 / (edges[1] - edges[0])),
            color=SKY,
            label="before",
        )
    axes.vlines(levels, 0, counts, color=ORANGE, linewidth=1.5)
    axes.plot(levels, counts, "o", color=ORANGE, markersize=5, label="after, on levels")
    axes.set(xlabel="weight, in steps of its grid", ylabel="weights a step")
    axes.set_ylim(bottom=0)
    axes.legend()


def against_bits(
    axes: Axes,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    ylabel: str,
    reference: float | None = None,
    mode: Mode = "max",
) -> None:
    """Accuracy, signal-to-noise ratio or the like against bits a weight, with the Pareto line.

    The Pareto line joins the points, of any series, than which no other is both smaller and better.

    Args:
      axes: to draw into.
      series: for each name, pairs of bits a weight and value.
      ylabel: what the values are, with their unit.
      reference: the value in float.
      mode: whether more is better, or less.
    """
    everything = [p for points in series.values() for p in points if all(map(math.isfinite, p))]
    _check_mode(mode)
    sign = 1 if mode == "max" else -1
    front = pareto_front([(bits, sign * value) for bits, value in everything])
    if front:
        at, values = np.array([everything[i] for i in front], float).T
        axes.plot(
            at,
            values,
            "-",
            color="#000000",
            alpha=0.15,
            linewidth=8,
            solid_capstyle="round",
            label="Pareto line",
        )
    for (name, points), (color, line, marker) in _styled(series):
        at, values = np.array(sorted(points), float).reshape(-1, 2).T
        axes.plot(at, values, linestyle=line, marker=marker, color=color, linewidth=2, label=name)
    if reference is not None:
        axes.axhline(reference, color=GREY, linestyle=":", linewidth=1.5, label="float")
    axes.set(xlabel="bits a weight, scales included", ylabel=ylabel)
    axes.legend(fontsize=9)


def leaf_bars(axes: Sequence[Axes], summary: Summary, *, most: int = 40) -> None:
    """Size and signal-to-noise ratio of each leaf.

    Args:
      axes: two, for sizes and for ratios.
      summary: what ``summarize`` found.
      most: leaves to be shown, the largest; the others are summed in one bar.

    Raises:
      ValueError: ``axes`` are not two.
    """
    if len(axes) != 2:
        raise ValueError(f"leaf_bars needs two axes, for sizes and ratios, got {len(axes)}")
    left, right = axes
    rows = summary.rows
    by_size = sorted(rows, key=lambda row: -row.bytes_before)
    large = {row.path for row in by_size[:most]}
    names = [f"{_shortened(row.path)} ({row.bits:.3g})" for row in rows if row.path in large]
    shown = [row for row in rows if row.path in large]
    if rest := [row for row in rows if row.path not in large]:
        before, after = (
            sum(getattr(row, f"bytes_{when}") for row in rest) for when in ("before", "after")
        )
        names.append(f"{len(rest)} smaller leaves")
        shown.append(Row("", (), math.nan, before, after))
    at = np.arange(len(shown))
    left.barh(at - 0.2, [row.bytes_before for row in shown], 0.4, color=SKY, label="before")
    left.barh(
        at + 0.2, [row.bytes_after for row in shown], 0.4, color=BLUE, hatch="//", label="after"
    )
    left.set_xscale("log")
    sizes = [size for row in shown for size in (row.bytes_before, row.bytes_after) if size]
    left.set_xlim(left=min(sizes, default=2) / 2)
    left.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter("B"))
    left.set_yticks(at, names, parse_math=False)
    left.set(
        xlabel=f"bytes; in all {summary.bytes_before:,} to {summary.bytes_after:,}",
        ylabel="leaf (bits)",
    )
    left.legend(fontsize=9)
    right.set_yticks(at, [""] * len(at))
    ratios = [row.snr_db for row in shown]
    finite = [(i, x) for i, x in zip(at, ratios, strict=True) if x is not None and math.isfinite(x)]
    if finite:
        where, lengths = zip(*finite, strict=True)
        right.barh(where, lengths, 0.6, color=GREEN)
    for i, x in enumerate(ratios):
        if x is not None and not math.isfinite(x):
            text = "exact" if x == math.inf else "lost"
            right.text(0.0, i, f" {text}", va="center", fontsize=9)
    right.set(xlabel="signal-to-noise ratio (dB)")
    for each in axes:
        each.set_ylim(len(shown) - 0.4, -0.6)


def clipping(
    axes: Axes,
    fractions: Sequence[float] | np.ndarray,
    thresholds: Sequence[float] | np.ndarray | None = None,
) -> None:
    """The share of clamped elements in each step, and the bound.

    Args:
      axes: to draw into.
      fractions: the clip fraction of each step.
      thresholds: the bound of each step, on an axis of its own to the right.
    """
    color, line, _ = STYLES[0]
    steps = np.arange(1, len(fractions) + 1)
    axes.plot(
        steps, 100 * np.asarray(fractions), linestyle=line, color=color, label="clip fraction"
    )
    axes.set(xlabel="step", ylabel="clamped elements (%)")
    axes.set_ylim(bottom=0)
    handles = list(axes.get_lines())
    if thresholds is not None:
        color, line, _ = STYLES[1]
        right = axes.twinx()
        right.plot(steps, np.asarray(thresholds), linestyle=line, color=color, label="bound")
        right.set_yscale("log")
        right.set_ylabel("bound")
        handles += right.get_lines()
    # Above the axes, where no line passes.
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def heat_map(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    value: str,
    *,
    mode: Mode = "max",
) -> None:
    """A metric over two hyperparameters, as of ``sweep(...).rows``; the best cell has a frame.

    Cells whose value is missing or not finite are hatched.

    Args:
      axes: to draw into.
      rows: with the keys ``x``, ``y`` and ``value``.
      x: the hyperparameter along the horizontal axis.
      y: along the vertical one.
      value: the metric.
      mode: whether more is better, or less.

    Raises:
      ValueError: there are no rows, a key is missing, or two rows have the same ``x`` and ``y``.
    """
    _check_mode(mode)
    if not rows:
        raise ValueError("heat_map: there are no rows")
    for key in (x, y, value):
        if key not in rows[0]:
            raise ValueError(f"heat_map: rows have no {key!r}, but {', '.join(rows[0])}")
    across, up = (sorted({row[key] for row in rows}) for key in (x, y))
    cells = np.full((len(up), len(across)), np.nan)
    taken = set()
    for row in rows:
        place = up.index(row[y]), across.index(row[x])
        if place in taken:
            raise ValueError(
                f"heat_map: two rows have {x} {row[x]} and {y} {row[y]}; choose among the others first"
            )
        taken.add(place)
        cells[place] = np.nan if row[value] is None else row[value]
    cells[~np.isfinite(cells)] = np.nan
    axes.set_facecolor("white")
    image = axes.imshow(np.ma.masked_invalid(cells), cmap="cividis", origin="lower", aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(across)), map(_tick, across))
    axes.set_yticks(range(len(up)), map(_tick, up))
    axes.set(xlabel=x, ylabel=y)
    outline: list[matplotlib.patheffects.AbstractPathEffect] = [
        matplotlib.patheffects.withStroke(linewidth=2, foreground="black")
    ]
    for (i, j), cell in np.ndenumerate(cells):
        if np.isnan(cell):
            axes.add_patch(_cell(i, j, fill=False, hatch="xx", edgecolor=GREY, linewidth=0))
        else:
            text = axes.text(j, i, f"{cell:.3g}", ha="center", va="center", color="white")
            text.set_path_effects(outline)
    if not np.isnan(cells).all():
        best = np.nanargmax(cells) if mode == "max" else np.nanargmin(cells)
        i, j = divmod(int(best), len(across))
        axes.add_patch(_cell(i, j, fill=False, edgecolor=ORANGE, linewidth=3))
        figure = axes.get_figure()
        assert figure is not None
        figure.colorbar(image, ax=axes, label=value)


def curves(
    axes: Axes,
    series: Mapping[str, Any],
    *,
    ylabel: str,
    x: Sequence[float] | np.ndarray | None = None,
    xlabel: str = "step",
) -> None:
    """Lines over the steps of training.

    Args:
      axes: to draw into.
      series: for each name the values, or an array of several runs by values.
      ylabel: what the values are, with their unit.
      x: where the values are; from 1 on by default.
      xlabel: what ``x`` is.
    """
    for (name, values), (color, line, _) in _styled(series):
        for i, run in enumerate(np.atleast_2d(np.asarray(values, float))):
            at = np.arange(1, len(run) + 1) if x is None else x
            label = name if i == 0 else None
            axes.plot(at, run, linestyle=line, color=color, linewidth=1.6, alpha=0.85, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize=9)


def _styled(series: Mapping[str, Any]) -> Any:
    """The series with the styles in turn."""
    return ((item, STYLES[i % len(STYLES)]) for i, item in enumerate(series.items()))


def _shortened(path: str) -> str:
    """The end tells leaves apart."""
    return path if len(path) <= 48 else f"\N{HORIZONTAL ELLIPSIS}{path[-47:]}"


def _tick(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(i: int, j: int, **style: Any) -> Any:
    return matplotlib.patches.Rectangle((j - 0.5, i - 0.5), 1, 1, **style)


def _check_mode(mode: str) -> None:
    if mode not in ("max", "min"):
        raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
