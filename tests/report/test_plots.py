"""Plots show the numbers they are given."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from helpers import FORMULAS, QUANTIZERS, weights

from optax_clipquant import QArray, Uniform, plots, quantize_params, summarize


def draw(figure) -> None:
    """Renders the figure, which raises if its parts are inconsistent."""
    figure.canvas.draw()


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("name", [*FORMULAS, "binary", "normalfloat3-groups"])
def test_weight_histogram_counts_all_weights(name):
    w = weights((40, 12))
    q = QUANTIZERS[name].quantize(jnp.asarray(w))
    figure, (axes,) = plots.subplots()
    plots.weight_histogram(axes, w, q)
    draw(figure)
    bars = sum(patch.get_height() * patch.get_width() for patch in axes.patches)
    np.testing.assert_allclose(bars, w.size, rtol=1e-5)
    (stems,) = axes.get_lines()
    levels, counts = stems.get_data()
    # Channels may be mirrored, or have their zero points at other codes.
    assert 1 < len(levels) <= 2 * (q.grid.upper - q.grid.lower) + 1
    if q.grid.codebook is None:
        assert counts.sum() == w.size
        # Levels are one step apart, since the unit is the step.
        np.testing.assert_allclose(np.mod(np.diff(levels) + 0.5, 1), 0.5, atol=2e-3)
    assert axes.get_xlabel() == "weight, in steps of its grid"


def test_weight_histogram_leaves_out_weights_that_are_not_finite():
    w = weights((40, 12))
    q = Uniform(bits=4).quantize(jnp.asarray(w))
    w[3, 4], w[5, 6] = np.nan, np.inf
    _, (axes,) = plots.subplots()
    plots.weight_histogram(axes, w, q)
    bars = sum(patch.get_height() * patch.get_width() for patch in axes.patches)
    np.testing.assert_allclose(bars, w.size - 2, rtol=1e-5)


def test_weight_histogram_of_channels_without_a_step():
    w = np.zeros((4, 3), np.float32)
    w[:, 1] = np.nan
    figure, (axes,) = plots.subplots()
    plots.weight_histogram(axes, w, Uniform(bits=4).quantize(jnp.asarray(w)))
    draw(figure)
    with pytest.raises(ValueError, match="before has shape"):
        plots.weight_histogram(axes, w[:2], Uniform(bits=4).quantize(jnp.asarray(w)))


POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@hypothesis.given(POINTS)
def test_pareto_front_matches_brute_force(points):
    front = [points[i] for i in plots.pareto_front(points)]
    undominated = {
        (cost, value)
        for cost, value in points
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
    }
    assert front == sorted(undominated)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_against_bits_draws_all_points_and_the_pareto_line(mode):
    sign = 1 if mode == "max" else -1
    series = {
        "ours": [(4, sign * 8.0), (2, sign * 5.0)],
        "failed": [(1, math.nan), (3.5, sign * math.inf)],
        "peer": [(3, sign * 6.0), (4.5, sign * 7.0)],
    }
    figure, (axes,) = plots.subplots()
    plots.against_bits(axes, series, ylabel="accuracy (%)", reference=sign * 9.0, mode=mode)
    draw(figure)
    front, ours, _, peer, reference = axes.get_lines()
    np.testing.assert_array_equal(front.get_data(), [[2, 3, 4], [sign * x for x in (5, 6, 8)]])
    np.testing.assert_array_equal(ours.get_data(), [[2, 4], [sign * 5, sign * 8]])
    np.testing.assert_array_equal(peer.get_data(), [[3, 4.5], [sign * 6, sign * 7]])
    assert set(reference.get_ydata()) == {sign * 9.0}
    assert texts(axes) == ["Pareto line", "ours", "failed", "peer", "float"]
    assert axes.get_ylabel() == "accuracy (%)"


def test_leaf_bars_show_the_rows_of_the_summary():
    params = {f"layer_{i}": {"kernel": jnp.asarray(weights((16, 8 + i)))} for i in range(6)}
    params["bias"] = jnp.zeros(3)
    qparams = quantize_params(params, Uniform(bits=4))
    summary = summarize(params, qparams)
    figure, axes = plots.subplots(2)
    plots.leaf_bars(axes, summary)
    draw(figure)
    before, after = axes[0].containers
    assert [bar.get_width() for bar in before] == [row.bytes_before for row in summary.rows]
    assert [bar.get_width() for bar in after] == [row.bytes_after for row in summary.rows]
    ratios = [bar.get_width() for bar in axes[1].containers[0]]
    assert ratios == [row.snr_db for row in summary.rows if math.isfinite(row.snr_db)]
    assert axes[0].get_yticklabels()[0].get_text() == "bias (32)"
    for name in ("most", "max_leaves"):
        figure, axes = plots.subplots(2)
        plots.leaf_bars(axes, summary, **{name: 2})
        assert [label.get_text() for label in axes[0].get_yticklabels()] == [
            *("layer_4/kernel (4)", "layer_5/kernel (4)", "5 smaller leaves"),
        ]
    total = sum(bar.get_width() for bar in axes[0].containers[0])
    assert total == summary.bytes_before
    with pytest.raises(ValueError, match="two axes"):
        plots.leaf_bars(axes[:1], summary)


def test_leaf_bars_show_odd_names_and_infinite_ratios():
    long = "model/" + "layer/" * 20 + "kernel"
    w = jnp.asarray(weights((16, 8)))
    params = {"a$b$c$_": w, long: w, "nan": w.at[0, 0].set(jnp.nan), "none": jnp.zeros((0, 4))}
    summary = summarize(params, quantize_params(params, Uniform(bits=4)))
    figure, axes = plots.subplots(2)
    plots.leaf_bars(axes, summary)
    draw(figure)  # $...$ must not be parsed as mathematics
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert "a$b$c$_ (4)" in labels
    assert max(map(len, labels)) <= 48 + len(" (4)")
    assert [text.get_text() for text in axes[1].texts] == [" lost", " exact"]
    assert 0 < axes[0].get_xlim()[0] < min(r.bytes_after for r in summary.rows if r.bytes_after)


def test_clipping_draws_fractions_and_bounds():
    figure, (axes,) = plots.subplots()
    plots.clipping(axes, [0.5, 0.1], [1.0, 3.0])
    draw(figure)
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [50, 10])
    right = figure.axes[1]
    np.testing.assert_array_equal(right.get_lines()[0].get_ydata(), [1, 3])
    assert texts(axes) == ["clip fraction", "bound"]


@pytest.mark.parametrize(("mode", "best"), [("max", (2, 1)), ("min", (0, 0))])
def test_heat_map_frames_the_best_cell_and_hatches_failures(mode, best):
    rows = [
        {"c": c, "R": R, "accuracy": None if c == 1 and R == 1 else i * 2.0 + j}
        for i, R in enumerate((1, 4, 7))
        for j, c in enumerate((0.1, 1.0))
    ]
    figure, (axes,) = plots.subplots()
    plots.heat_map(axes, rows[::-1], "c", "R", "accuracy", mode=mode)
    draw(figure)
    shown = axes.images[0].get_array()
    np.testing.assert_array_equal(shown.filled(np.nan), [[0, np.nan], [2, 3], [4, 5]])
    frame = next(p for p in axes.patches if p.get_linewidth() == 3)
    assert (frame.get_y() + 0.5, frame.get_x() + 0.5) == best
    assert sum(p.get_hatch() is not None for p in axes.patches) == 1
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("c", "R")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "1"]
    for bad, message in (
        ([], "no rows"),
        ([{"c": 1, "R": 1}], "rows have no 'accuracy'; choose from c, R"),
        ([rows[0], rows[0]], "two rows have c 0.1 and R 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.heat_map(axes, bad, "c", "R", "accuracy")
    failed = [{"c": 1, "R": 1, "accuracy": math.nan}]
    figure, (axes,) = plots.subplots()
    plots.heat_map(axes, failed, "c", "R", "accuracy")
    draw(figure)


def test_curves_draws_a_line_for_each_run():
    figure, (axes,) = plots.subplots()
    plots.curves(axes, {"a": [[1, 2, 3], [2, 3, 4]], "b": [5, 6, 7]}, ylabel="loss (nats)")
    draw(figure)
    lines = axes.get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[1, 2, 3], [2, 3, 4], [5, 6, 7]]
    assert [line.get_color() for line in lines[:2]] == [lines[0].get_color()] * 2
    assert texts(axes) == ["a", "b"]


def test_styles_can_be_told_apart_without_colour():
    colors, lines, markers = zip(*plots.STYLES, strict=True)
    assert len(set(colors)) == len(set(map(str, lines))) == len(set(markers)) == len(colors)


def test_fourteen_series_can_be_told_apart_by_their_markers():
    _, (axes,) = plots.subplots()
    series = {f"{i}": [(2.0, 1.0), (3.0, 2.0)] for i in range(14)}
    plots.against_bits(axes, series, ylabel="accuracy", mode="max")
    markers = [line.get_marker() for line in axes.get_lines() if line.get_label() in series]
    assert len(set(markers)) == 14


def test_matplotlib_settings_are_unchanged():
    before = dict(matplotlib.rcParams)
    figure, axes = plots.subplots(2, 2)
    assert len(axes) == 4
    draw(figure)
    assert dict(matplotlib.rcParams) == before


def test_unknown_mode_is_refused():
    _, (axes,) = plots.subplots(1)
    with pytest.raises(ValueError, match="mode must be 'max' or 'min', got 'higher'"):
        plots.against_bits(axes, {"a": [(2, 0.5)]}, ylabel="", mode="higher")  # pyright: ignore


@pytest.mark.parametrize("bits", [4, 8])
def test_histogram_of_half_precision_has_a_stem_for_each_level(bits):
    q = Uniform(bits=bits).quantize(jnp.asarray(weights((512, 16)), jnp.bfloat16))
    counts = []
    for dtype in (jnp.bfloat16, jnp.float32):
        _, (axes,) = plots.subplots(1)
        grid = dataclasses.replace(q.grid, dtype=np.dtype(dtype))
        plots.weight_histogram(axes, weights((512, 16)), QArray(q.qvalue, grid))
        counts.append(len(axes.get_lines()[0].get_xdata()))
    assert counts[0] == counts[1]
    assert counts[0] <= 2**bits + 1  # a scale may be negative: -8 to 7 and -7 to 8
