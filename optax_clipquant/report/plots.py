"""Plots of weights on their grids, leaf sizes, clipping and sweeps (needs the extra ``plot``).

Each function draws into the axes it is given, so that plots can be combined, and leaves matplotlib's
settings alone. ``subplots`` makes axes in the common style. The colours, Okabe and Ito's palette and
cividis, are distinguishable to colour-blind readers; line styles and markers differ too, so that
plots can be read in greyscale.

Examples:
  >>> import jax
  >>> from optax_clipquant import Uniform, plots, quantize_params, summarize
  >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
  >>> qparams = quantize_params(params, Uniform(bits=4))
  >>> figure, (left, *right) = plots.subplots(3)
  >>> plots.weight_histogram(left, params["kernel"], qparams["kernel"])
  >>> plots.leaf_bars(right, summarize(params, qparams))
  >>> figure.savefig("kernel.png")  # doctest: +SKIP
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

try:
    import matplotlib.patches
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError(
        "optax_clipquant.plots needs matplotlib: pip install 'optax-clipquant[plot]'",
        name="matplotlib",
    ) from error

from optax_clipquant.report.style import BLUE, GREY, ORANGE, STYLES, Mode, sign_of, styled, subplots
from optax_clipquant.report.weight_plots import leaf_bars, weight_histogram
from optax_clipquant.tuning.sweep import pareto_front

__all__ = [
    "BLUE",
    "STYLES",
    "against_bits",
    "clipping",
    "curves",
    "heat_map",
    "leaf_bars",
    "pareto_front",
    "subplots",
    "weight_histogram",
]


def against_bits(
    axes: Axes,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    ylabel: str,
    reference: float | None = None,
    mode: Mode = "max",
) -> None:
    """Plots accuracy, signal-to-noise ratio or another metric against bits per weight, with the Pareto line.

    The Pareto line joins the points of all series that no other point beats in both size and value.

    Args:
      axes: the axes to draw into.
      series: for each name, pairs of bits per weight and value.
      ylabel: the label of the values, with their unit.
      reference: the value of the float model, drawn as a horizontal line.
      mode: ``"max"`` if larger values are better, ``"min"`` if smaller ones are.
    """
    everything = [p for points in series.values() for p in points if all(map(math.isfinite, p))]
    sign = sign_of(mode)
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
    for (name, points), (color, line, marker) in styled(series):
        at, values = np.array(sorted(points), float).reshape(-1, 2).T
        axes.plot(at, values, linestyle=line, marker=marker, color=color, linewidth=2, label=name)
    if reference is not None:
        axes.axhline(reference, color=GREY, linestyle=":", linewidth=1.5, label="float")
    axes.set(xlabel="bits per weight, scales included", ylabel=ylabel)
    axes.legend(fontsize=9)


def clipping(
    axes: Axes,
    fractions: Sequence[float] | np.ndarray,
    thresholds: Sequence[float] | np.ndarray | None = None,
) -> None:
    """Plots the fraction of elements that each step clamped, and the bound.

    Args:
      axes: the axes to draw into.
      fractions: the clip fraction of each step.
      thresholds: the bound of each step, on a second axis to the right.
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
    # Above the axes, where the legend hides no line.
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
    """Draws a metric over two hyperparameters, such as ``sweep(...).rows``, and frames the best cell.

    Cells whose value is missing or not finite are hatched.

    Args:
      axes: the axes to draw into.
      rows: dicts with the keys ``x``, ``y`` and ``value``.
      x: the hyperparameter along the horizontal axis.
      y: the hyperparameter along the vertical axis.
      value: the metric.
      mode: ``"max"`` if larger values are better, ``"min"`` if smaller ones are.

    Raises:
      ValueError: there are no rows, a key is missing, or two rows have the same ``x`` and ``y``.
    """
    sign = sign_of(mode)
    if not rows:
        raise ValueError("heat_map: there are no rows")
    for key in (x, y, value):
        if key not in rows[0]:
            raise ValueError(f"heat_map: rows have no {key!r}; choose from {', '.join(rows[0])}")
    across, up = (sorted({row[key] for row in rows}) for key in (x, y))
    cells = np.full((len(up), len(across)), np.nan)
    taken = set()
    for row in rows:
        place = up.index(row[y]), across.index(row[x])
        if place in taken:
            raise ValueError(
                f"heat_map: two rows have {x} {row[x]} and {y} {row[y]}; filter on the other columns first"
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
    for (i, j), cell in np.ndenumerate(cells):
        if np.isnan(cell):
            axes.add_patch(_cell(i, j, fill=False, hatch="xx", edgecolor=GREY, linewidth=0))
        else:
            color = "black" if np.greater(image.norm(cell), 0.5) else "white"
            axes.text(j, i, f"{cell:.3g}", ha="center", va="center", color=color)
    if not np.isnan(cells).all():
        best = np.nanargmax(sign * cells)
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
    """Plots values over training steps.

    Args:
      axes: the axes to draw into.
      series: for each name the values, or an array ``[runs, values]`` for several runs.
      ylabel: the label of the values, with their unit.
      x: the positions of the values; 1, 2, ... by default.
      xlabel: the label of ``x``.
    """
    for (name, values), (color, line, _) in styled(series):
        for i, run in enumerate(np.atleast_2d(np.asarray(values, float))):
            at = np.arange(1, len(run) + 1) if x is None else x
            label = name if i == 0 else None
            axes.plot(at, run, linestyle=line, color=color, linewidth=1.6, alpha=0.85, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize=9)


def _tick(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(i: int, j: int, **style: Any) -> Any:
    return matplotlib.patches.Rectangle((j - 0.5, i - 0.5), 1, 1, **style)
