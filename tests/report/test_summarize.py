import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from helpers import mlp_params, weights

from optax_clipquant import (
    Binary,
    NormalFloat,
    Ternary,
    Uniform,
    ZScore,
    bits_per_param,
    quantize_params,
    summarize,
)


def test_rows_match_float64():
    params = mlp_params()
    qparams = quantize_params(params, {"Dense_0": Uniform(bits=4), "Dense_1": Ternary()})
    summary = summarize(params, qparams)
    rows = {row.path: row for row in summary.rows}
    assert list(rows) == ["Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel"]
    for path in ("Dense_0", "Dense_1"):
        w = np.asarray(params[path]["kernel"], np.float64)
        error = w - np.asarray(qparams[path]["kernel"], np.float64)
        row = rows[f"{path}/kernel"]
        assert row.shape == w.shape
        assert row.bytes_before == w.size * 4
        np.testing.assert_allclose(row.max_error, np.abs(error).max(), rtol=1e-6)
        np.testing.assert_allclose(
            row.snr_db, 10 * np.log10((w**2).sum() / (error**2).sum()), rtol=1e-4
        )
    assert rows["Dense_0/kernel"].bytes_after == 12 * 10 / 2 + 2 * 10
    assert rows["Dense_1/kernel"].bytes_after == 10 * 4 / 5 + 2 * 4
    assert rows["Dense_1/kernel"].bits == math.log2(3)
    assert (rows["Dense_0/bias"].max_error, rows["Dense_0/bias"].snr_db) == (0, math.inf)
    assert summary.bytes_before == 4 * (120 + 10 + 40 + 4)
    assert summary.bytes_after == 60 + 20 + 8 + 8 + 4 * 14
    np.testing.assert_allclose(summary.ratio, summary.bytes_before / summary.bytes_after)


@pytest.mark.parametrize(
    ("quantizer", "kind", "count"),
    [
        (Uniform(bits=4, group_size=16), "uniform", 16),
        (Uniform(bits=4, symmetric=False), "affine", 40),
        (Uniform(bits=8, channel_axis=None), "uniform", 320),
        (Ternary(group_size=64), "ternary", 40),
        (Binary(), "binary", 40),
        (NormalFloat(bits=3, group_size=16), "codebook", 16),
        (ZScore(3), "z-score", 320),
    ],
)
def test_rows_tell_the_kind_of_grid_and_how_many_weights_share_a_scale(quantizer, kind, count):
    params = {"w": jnp.asarray(weights((40, 8))), "b": jnp.ones(8)}
    b, w = summarize(params, quantize_params(params, quantizer)).rows
    assert (w.grid, w.weights_per_scale) == (kind, count)
    assert (b.grid, b.weights_per_scale) == (None, None)


def test_summary_prints_as_a_table():
    params = mlp_params()
    summary = summarize(params, quantize_params(params, Uniform(bits=4)))
    text = str(summary)
    assert "Dense_1/kernel" in text
    assert "SNR" in text
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(summary)
    assert console.export_text().strip() == text.strip()


def test_huge_and_zero_weights_have_defined_ratios():
    params = {"w": jnp.full((4, 4), 1e30), "z": jnp.zeros((4, 4))}
    rows = summarize(params, quantize_params(params, Uniform(bits=4))).rows
    assert math.isfinite(rows[0].snr_db)
    assert rows[1].snr_db == math.inf


def test_different_leaves_or_shapes_are_refused():
    params = {"w": jnp.asarray(weights((4, 4)))}
    with pytest.raises(ValueError, match=r"different leaves: .*'v'"):
        summarize(params, {"v": params["w"]})
    with pytest.raises(ValueError, match="leaf 'w' has shape"):
        summarize(params, {"w": jnp.ones((4, 3))})


def test_leaves_without_values_and_quantized_originals_are_refused():
    params = {"w": jnp.asarray(weights((4, 4)))}
    qparams = quantize_params(params, Uniform(bits=4))
    shapes = jax.eval_shape(lambda: params)
    for args in ((shapes, qparams), (params, shapes), (params, jax.eval_shape(lambda: qparams))):
        with pytest.raises(TypeError, match="leaf 'w' is a ShapeDtypeStruct"):
            summarize(*args)
    with pytest.raises(TypeError, match="params leaf 'w' is a QArray; give the float params first"):
        summarize(qparams, params)


def test_nan_in_a_leaf_is_reported():
    """In a large array XLA's CPU backend drops NaN from a maximum."""
    w = weights((192, 256))
    w[7, 255] = np.nan
    params = {"kernel": jnp.asarray(w)}
    (row,) = summarize(params, quantize_params(params, Uniform(bits=8))).rows
    assert math.isnan(row.max_error)
    assert row.snr_db == -math.inf


def test_integers_and_float64_are_compared_exactly():
    big = np.array([2**62 + 1, -(2**62), 5])
    params = {
        "int": big, "far": np.array([-(2**62)]), "double": np.array([1.0, 2.0]),
        "tiny": np.array([1e-300]), "inf": np.array([np.inf, 1], np.float32), "complex": np.array([3 + 4j]), "bool": np.array([True]),
    }  # fmt: skip
    found = params | {
        "int": big - np.array([1, 0, 0]), "far": np.array([2**62]),
        "tiny": np.array([1.0]), "double": np.array([1.0, 2.0 + 1e-12]), "complex": np.array([0j]), "bool": np.array([False]),
    }  # fmt: skip
    rows = {row.path: row for row in summarize(params, found).rows}
    assert rows["int"].max_error == 1
    assert rows["far"].max_error == 2.0**63
    assert rows["double"].max_error == pytest.approx(1e-12, rel=1e-3)
    assert rows["double"].snr_db == pytest.approx(10 * math.log10(5e24), abs=0.01)
    assert (rows["inf"].max_error, rows["inf"].snr_db) == (0, math.inf)
    assert (rows["complex"].max_error, rows["complex"].snr_db) == (5, 0)
    assert rows["bool"].max_error == 1
    assert (rows["tiny"].max_error, rows["tiny"].snr_db) == (1, -math.inf)


def test_leaves_may_be_python_numbers():
    (row,) = summarize({"x": 3.0}, {"x": 2.5}).rows
    assert (row.shape, row.max_error) == ((), 0.5)
    assert bits_per_param({"x": 3.0}) == 64


def test_names_are_not_parsed_as_markup():
    tree = {name: jnp.ones((3, 2)) for name in ("x[red]y", "z[/z]", "a:key:b")}
    text = str(summarize(tree, quantize_params(tree)))
    assert all(name in text for name in tree)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "層/[red]/" + 9 * "kernel"]
)
def test_long_names_break_after_separators(name):
    tree = {name: jnp.ones((8, 8))}
    buffer = io.StringIO()
    rich.console.Console(file=buffer, width=60).print(summarize(tree, tree))
    lines = [line.split("  ")[0].strip() for line in buffer.getvalue().splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith(name[:2]))
    parts = lines[start : lines.index("", start)]
    assert len(parts) > 1
    assert "".join(parts) == name
    assert parts[0].endswith((".", "/", "_"))
