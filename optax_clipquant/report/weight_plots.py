"""Plots of weights on their grids, and of the size and error of each leaf."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from optax_clipquant.quant.qarray import QArray
from optax_clipquant.report.rows import Row, Summary
from optax_clipquant.report.style import BLUE, GREEN, ORANGE, SKY


def weight_histogram(axes: Axes, before: jax.typing.ArrayLike, after: QArray) -> None:
    """Plots a histogram of weights before quantization, with stems at the levels they moved to.

    Each weight is divided by the step of its channel's or group's grid, so that all weights fit one plot.
    Bars and stems are both densities per step: a stem holds the weights of the bars around it, moved onto one level.

    Args:
      axes: the axes to draw into.
      before: the weights, such as a leaf of ``latent_params``.
      after: the quantized weights.

    Raises:
      ValueError: the shapes differ.
    """
    weights = np.asarray(before, np.float32)
    if weights.shape != after.shape:
        raise ValueError(f"before has shape {weights.shape}, after {after.shape}")
    # In float32, since levels rounded to half precision are not evenly spaced.
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
    if grid.codebook is not None and levels.size > 1:
        counts = counts / np.gradient(levels)  # the levels of a codebook are not one step apart
    bars = 4  # per step
    if position.size:
        first, last = math.floor(position.min()) - 0.5, math.ceil(position.max()) + 0.5
        # Capped, since some weights may be thousands of steps away.
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
    axes.set(xlabel="weight, in steps of its grid", ylabel="weights per step")
    axes.set_ylim(bottom=0)
    axes.legend()


def leaf_bars(
    axes: Sequence[Axes], summary: Summary, *, max_leaves: int = 40, most: int | None = None
) -> None:
    """Plots the size and signal-to-noise ratio of each leaf.

    Args:
      axes: two axes, for sizes and for ratios.
      summary: the result of ``summarize``.
      max_leaves: how many leaves to show; the smaller ones share one bar.
      most: the old name of ``max_leaves``.

    Raises:
      ValueError: ``axes`` does not hold exactly two axes.
    """
    if len(axes) != 2:
        raise ValueError(f"leaf_bars needs two axes, for sizes and ratios, got {len(axes)}")
    left, right = axes
    rows = summary.rows
    by_size = sorted(rows, key=lambda row: -row.bytes_before)
    large = {row.path for row in by_size[: max_leaves if most is None else most]}
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
        xlabel=f"bytes; total {summary.bytes_before:,} to {summary.bytes_after:,}",
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


def _shortened(path: str) -> str:
    """The end of ``path``, which is where leaves differ."""
    return path if len(path) <= 48 else f"\N{HORIZONTAL ELLIPSIS}{path[-47:]}"
