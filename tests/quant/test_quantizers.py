import dataclasses
import math

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CORE, FORMULAS, NAMES, QUANTIZERS, case_rows, cases, squared_error, weights

from optax_clipquant import Binary, Grid, NormalFloat, Ternary, Uniform, ZScore

KINDS = ["normal", "laplace", "student3", "heavy", "uniform", "skewed"]


def best_ternary_error(w: np.ndarray) -> np.ndarray:
    """The least error of three levels along the first axis, from trying every number of non-zero weights."""
    magnitude = -np.sort(-np.abs(w.astype(np.float64)), axis=0)
    sums = np.cumsum(magnitude, axis=0)
    count = np.arange(1, len(w) + 1).reshape(-1, *([1] * (w.ndim - 1)))
    return np.sum(magnitude**2, axis=0) - np.max(sums**2 / count, axis=0)


def best_uniform_error(w: np.ndarray, bits: int) -> np.ndarray:
    """The least error along the first axis over 3,000 scales of either sign, each refit by least squares."""
    w = w.astype(np.float64)
    lower, upper = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    offset = 0.5 if bits <= 2 else 0.0
    top = np.abs(w).max(0) / (upper + offset)
    best = np.full(w.shape[1:], np.inf)
    for factor in np.geomspace(0.01, 2, 1500):
        for sign in (1, -1):
            level = np.clip(np.round(w / (sign * factor * top) - offset), lower, upper) + offset
            scale = np.sum(w * level, 0) / np.maximum(np.sum(level**2, 0), 1e-30)
            best = np.minimum(best, np.sum((w - scale * level) ** 2, axis=0))
    return best


@pytest.mark.parametrize("kind", cases(KINDS, ["normal", "heavy"]))
@pytest.mark.parametrize("n", [4, 32, 512, 4096])
def test_binary_is_optimal(kind, n):
    w = weights((n, 20), kind)
    w64 = w.astype(np.float64)
    # Two levels +-s: the least squares s is mean(|w|), whatever the weights.
    expected = np.sum(w64**2, 0) - n * np.mean(np.abs(w64), 0) ** 2
    # The scale has 8 bits; its rounding adds at most (2**-8)**2 of the energy.
    slack = 2.0**-16 * np.sum(w64**2, 0)
    assert np.all(squared_error(Binary(), w, axis=0) <= expected + slack + 1e-6 * expected)


@pytest.mark.parametrize("kind", cases(KINDS, ["normal", "heavy"]))
@pytest.mark.parametrize("n", [4, 32, 512, 4096])
def test_ternary_is_within_2_percent_of_brute_force(kind, n):
    w = weights((n, 200 if n < 4096 else 40), kind)
    error, best = squared_error(Ternary(), w, axis=0), best_ternary_error(w)
    assert np.sum(error) <= 1.02 * np.sum(best)
    # No channel is far off. (A single start is up to 5 times off on heavy tails.)
    assert np.all(error <= 1.15 * best + 2.0**-16 * np.sum(w**2, 0))


@pytest.mark.parametrize(
    ("kind", "n"),
    case_rows(
        [*((kind, 32) for kind in KINDS), ("normal", 512), ("heavy", 512)],
        [("normal", 32), ("heavy", 32)],
    ),
)
@pytest.mark.parametrize(("bits", "limit"), [(2, 1.02), (3, 1.10), (4, 1.12)])
def test_mse_is_close_to_brute_force_and_never_worse_than_absmax(kind, bits, limit, n):
    w = weights((n, 60), kind)
    mse = squared_error(Uniform(bits=bits, scale_rule="mse"), w, axis=0)
    absmax = squared_error(Uniform(bits=bits, scale_rule="absmax"), w, axis=0)
    assert np.sum(mse) <= limit * np.sum(best_uniform_error(w, bits))
    assert np.all(mse <= absmax * (1 + 1e-6))


@pytest.mark.slow
@hypothesis.settings(max_examples=25)  # most shapes compile anew
@hypothesis.given(
    w=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(1, 3)),
        elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
    ),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_mse_is_never_worse_than_absmax(w, bits, symmetric):
    w = np.where(np.abs(w) < 2.0**-60, 0, w).astype(np.float32)
    mse = squared_error(Uniform(bits=bits, symmetric=symmetric, scale_rule="mse"), w, axis=0)
    absmax = squared_error(Uniform(bits=bits, symmetric=symmetric, scale_rule="absmax"), w, axis=0)
    # Gains are compared in float32.
    assert np.all(mse <= absmax + 1e-6 * np.sum(w.astype(np.float64) ** 2, axis=0))


def test_errors_on_normal_weights_stay_at_the_design_figures():
    """Squared errors on N(0, 1) with channels of 512, which the design was chosen by."""
    w = weights((512, 2000))
    n = w.size
    assert squared_error(Uniform(bits=1), w) / n < 0.369
    assert squared_error(Ternary(), w) / n < 0.196
    assert squared_error(Uniform(bits=2), w) / n < 0.122
    assert squared_error(Uniform(bits=3), w) / n < 0.0400
    assert squared_error(Uniform(bits=4, scale_rule="mse"), w) / n < 0.0116


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("side", [1, -1])
def test_the_extra_level_is_on_the_side_of_the_largest_weight(bits, side):
    w = jnp.array([[side * 1.0], [-side * 0.5], [0.1]])
    q = Uniform(bits=bits, scale_rule="absmax").quantize(w)
    assert int(q.qvalue[0, 0]) == -(2 ** (bits - 1))
    assert float(q.dequantize()[0, 0]) == side
    assert np.sign(q.scale[0, 0]) == -side


@hypothesis.given(
    w=hnp.arrays(np.float32, (9, 2), elements=st.floats(-100, 100, width=32)),
    bits=st.integers(3, 8),
)
def test_affine_levels_span_the_weights_and_include_zero(w, bits):
    w = np.where(np.abs(w) < 2.0**-60, 0, w).astype(np.float32)
    q = Uniform(bits=bits, symmetric=False, scale_rule="absmax").quantize(jnp.asarray(w))
    chex.assert_type(q.zero_point, jnp.int8)
    assert np.all((q.zero_point >= q.grid.lower) & (q.zero_point <= q.grid.upper))
    step = np.asarray(q.scale)
    assert np.all(np.abs(np.asarray(q) - w) <= 0.5 * step * (1 + 1e-4))
    zero = q.grid.decode(q.grid.encode(jnp.zeros((9, 2))))
    np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda t: t.__name__
)
@pytest.mark.parametrize("bits", cases(range(1, 9), [1, 4, 8]))
def test_affine_levels_stay_finite_for_weights_over_the_whole_range(bits, dtype):
    """Such weights span twice the largest number of the dtype."""
    largest = float(jnp.finfo(dtype).max)
    w = jnp.asarray([largest, -largest, largest / 3, 0], dtype)
    q = Uniform(bits=bits, symmetric=False, channel_axis=None, scale_rule="absmax").quantize(w)
    found = np.asarray(q.dequantize(), np.float64)
    assert np.isfinite(found).all()
    assert found[3] == 0
    if bits >= 4 or dtype == jnp.float16:  # else scales are below 2**126
        error = np.abs(found - np.asarray(w, np.float64))
        assert error.max() <= (0.5 + 2.0**-7) * float(q.scale[0])
    again = q.grid.encode(q.dequantize())
    np.testing.assert_array_equal(q.grid.decode(again), q.dequantize())


@pytest.mark.parametrize(("R", "resolution"), [(1, 1.0), (3, 1.0), (7, 2.5), (127, 40.0)])
@pytest.mark.parametrize("shape", [(50,), (20, 30), (3, 3, 8, 4)])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_zscore_matches_the_article_in_float64(R, resolution, shape, shift):
    if R == 127 and shift:
        pytest.skip("the scale's 8 bits are too few to know the code of weights 200 steps from 0")
    w = weights(shape, "skewed") + np.float32(shift)
    q = ZScore(R=R, resolution=resolution).quantize(jnp.asarray(w))
    w64 = w.astype(np.float64)
    z = (w64 - w64.mean()) / w64.std()
    codes = np.clip(np.round(resolution * z), -R, R)
    # A code differs only where the rounding of the mean, to a multiple of 1/64 step, or of the scale,
    # to 8 bits, moves a weight across the midpoint between two levels.
    position = resolution * z
    near = (
        np.abs(np.abs(position - np.round(position)) - 0.5)
        < 1 / 64 + (np.abs(position) + abs(w64.mean()) / w64.std() * resolution) * 2.0**-8
    )
    np.testing.assert_array_equal(np.asarray(q.qvalue)[~near], codes[~near])
    assert np.mean(near) < 0.75
    back = codes * w64.std() / resolution + w64.mean()
    step = w64.std() / resolution
    tolerance = step / 64 + np.abs(codes * step) * 2.0**-8
    assert np.all(
        np.abs(np.asarray(q, np.float64) - back)[~near]
        <= tolerance[~near] + 1e-6 * np.abs(back)[~near]
    )


@pytest.mark.parametrize("value", [0.0, 0.3, -7.7e-5, 1e30, -3.4e38])
def test_zscore_keeps_constants(value):
    q = ZScore().quantize(jnp.full((5, 4), value))
    np.testing.assert_array_equal(q.qvalue, 0)
    np.testing.assert_array_equal(q.dequantize(), np.float32(value))


def test_zscore_with_traced_R_compiles_once():
    w = jnp.asarray(weights((20, 10)))

    @jax.jit
    @chex.assert_max_traces(1)
    def quantize(R, resolution):
        return ZScore(R=R, resolution=resolution).quantize(w)

    for R in (1, 3, 127):
        q = quantize(R, 2.0)
        chex.assert_trees_all_equal(
            q.dequantize(), ZScore(R=R, resolution=2.0).quantize(w).dequantize()
        )
        assert int(jnp.max(jnp.abs(q.qvalue))) <= R
    assert np.all(np.isnan(quantize(0, 2.0).dequantize()))
    assert np.all(np.isnan(quantize(128, 2.0).dequantize()))
    swept = jax.vmap(lambda R: ZScore(R=R).quantize(w).dequantize())(jnp.array([1, 3]))
    chex.assert_trees_all_equal(swept[1], ZScore(R=3).quantize(w).dequantize())


@pytest.mark.parametrize(
    ("kwargs", "shape", "scale"),
    [
        ({}, (6, 5), (1, 5)),
        ({"channel_axis": 0}, (6, 5), (6, 1)),
        ({"channel_axis": None}, (6, 5), (1, 1)),
        ({"channel_axis": (0, -1)}, (6, 3, 5), (6, 1, 5)),
        ({"group_size": 4}, (6, 5), (2, 5)),
        ({"group_size": 100}, (6, 5), (1, 5)),
        ({"group_size": 32}, (3, 3, 64, 8), (3, 3, 2, 8)),
        ({"group_size": 4, "channel_axis": None}, (6, 9), (6, 3)),
        ({}, (7,), (7,)),
        ({}, (), ()),
        ({"group_size": 2}, (7,), (4,)),
    ],
)
@pytest.mark.parametrize("make", cases([Uniform, Binary, Ternary], [Uniform]))
def test_scale_shape_follows_channel_axis_and_group_size(make, kwargs, shape, scale):
    grid = make(**kwargs).fit(jnp.asarray(weights(shape)))
    chex.assert_shape(grid.scale, scale)


NASTY = {
    "zeros": np.zeros((6, 4)),
    "constant": np.full((6, 4), 0.7),
    "negative": np.full((6, 4), -0.7),
    "one": np.array([[3.0]]),
    "denormal": np.full((6, 4), 1e-40),
    "tiny": np.full((6, 4), 2e-38) * np.arange(24).reshape(6, 4),
    "huge": np.full((6, 4), np.finfo(np.float32).max),
    "both huge": np.where(np.arange(24).reshape(6, 4) % 2, 1, -1) * np.finfo(np.float32).max,
    "mixed": np.tile([[1e-30, 1e30], [1, -1], [-1e-30, -1e30]], (2, 2)),
    "outlier": np.concatenate([np.ones((5, 4)), np.full((1, 4), 1e6)]),
    "empty": np.zeros((0, 4)),
    "no channel": np.zeros((4, 0)),
    "scalar": np.array(-2.5),
}


# One of each kind of grid; in half precision one of each formula, and values nasty for its range.
NASTY_CASES = [
    *((name, case, jnp.float32) for name in CORE for case in NASTY),
    *(
        (name, case, dtype)
        for name in FORMULAS
        for case in ("denormal", "tiny", "both huge", "mixed")
        for dtype in (jnp.bfloat16, jnp.float16)
    ),
]


@pytest.mark.parametrize(("name", "case", "dtype"), NASTY_CASES)
def test_nasty_values_have_defined_results(name, case, dtype):
    largest = float(jnp.finfo(dtype).max)
    w = np.clip(NASTY[case], -largest, largest)
    w = jnp.asarray(w, jnp.float32).astype(dtype)
    q = QUANTIZERS[name].quantize(w)
    chex.assert_shape(q.qvalue, w.shape)
    dequantized = np.asarray(q, np.float64)
    assert np.all(np.isfinite(dequantized))
    assert np.all((q.qvalue >= q.grid.lower) & (q.qvalue <= q.grid.upper))
    w64 = np.asarray(w, np.float64)
    assert np.all(np.abs(dequantized) <= 2.1 * np.max(np.abs(w64), initial=0))
    if case in ("zeros", "denormal"):
        np.testing.assert_array_equal(dequantized, 0)
    if case in ("constant", "negative", "one", "scalar") and "asymmetric" not in name:
        # Its outer levels lie at two thirds of the largest magnitude.
        w64 = w64 / 1.5 if name == "ternary-absmax" else w64
        np.testing.assert_allclose(dequantized, w64, rtol=2.0**-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_weights_never_become_finite_in_large_arrays(name, bad):
    """XLA's CPU backend drops NaN from a plain maximum of a large array."""
    w = weights((192, 256))
    places = (np.array([0, 7, 100, 191]), np.array([0, 255, 31, 254]))
    w[places] = bad
    dequantized = np.asarray(QUANTIZERS[name].quantize(jnp.asarray(w)))
    assert not np.any(np.isfinite(dequantized[places]))


def test_constant_with_nan_is_not_treated_as_constant():
    w = np.ones((192, 256), np.float32)
    w[7, 255] = np.nan
    assert not np.isfinite(ZScore().quantize(jnp.asarray(w)).dequantize()[7, 255])


@pytest.mark.parametrize("name", NAMES)
def test_jit_and_warm_start_keep_the_structure(name):
    w = jnp.asarray(weights((9, 4)))
    quantizer = QUANTIZERS[name]
    grid = quantizer.fit(w)
    warm = jax.jit(lambda w, start: quantizer.fit(w, start=start))(w, grid)
    chex.assert_trees_all_equal_shapes_and_dtypes(warm, grid)
    assert jax.tree.structure(warm) == jax.tree.structure(grid)
    cold = squared_error(quantizer, np.asarray(w))
    error = np.sum(
        (np.asarray(warm.decode(warm.encode(w)), np.float64) - np.asarray(w, np.float64)) ** 2
    )
    assert error <= cold * (1 + 1e-5)


@pytest.mark.parametrize(
    "quantizer", [Uniform(bits=3), Ternary(), Uniform(bits=2, symmetric=False)], ids=str
)
def test_warm_starts_recover_from_any_scale(quantizer):
    w = jnp.asarray(weights((256, 8), "laplace"))
    cold = squared_error(quantizer, np.asarray(w))
    for factor in (0.0, 1e-20, 1e-3, 30.0, np.inf, np.nan):
        grid = quantizer.fit(w)
        grid = dataclasses.replace(grid, scale=grid.scale * jnp.float32(factor))
        for _ in range(60):
            grid = quantizer.fit(w, start=grid)
        error = np.sum((np.asarray(grid.decode(grid.encode(w))) - np.asarray(w)) ** 2)
        assert error <= 1.35 * cold


@pytest.mark.parametrize("axis", cases([0, -1], [0]))
@pytest.mark.parametrize(
    "quantizer",
    [Uniform(bits=2), Uniform(bits=3), Ternary(), Uniform(bits=2, symmetric=False)],
    ids=str,
)
def test_warm_start_is_one_round_of_least_squares(quantizer, axis):
    """In float64: the nearest levels at the starting scale, then the scale of least squared error for them."""
    quantizer = dataclasses.replace(quantizer, channel_axis=axis)
    w = weights((192, 160), "student3")
    fitted = quantizer.fit(jnp.asarray(w))
    for factor in (0.6, 1.3, -1.0 if fitted.zero_point is None else 2.0):
        start = dataclasses.replace(fitted, scale=fitted.scale * np.float32(factor))
        grid = jax.jit(lambda w, start: quantizer.fit(w, start=start))(jnp.asarray(w), start)
        steps = w.astype(np.float64) / np.asarray(start.scale, np.float64)
        zero = start.offset - np.asarray(0 if start.zero_point is None else start.zero_point, float)
        levels = np.clip(np.round(steps - zero), start.lower, start.upper) + zero
        reduced = 1 + axis if axis else 1
        expected = np.sum(w * levels, reduced, keepdims=True) / np.sum(
            levels**2, reduced, keepdims=True
        )
        # The scale has 8 bits.
        np.testing.assert_allclose(grid.scale, expected, rtol=2.0**-8)


def test_warm_start_from_a_zero_scale_takes_the_absmax_scale():
    w = jnp.asarray(weights((64, 4)))
    for quantizer in (Uniform(bits=3), Ternary(), Uniform(bits=3, symmetric=False)):
        absmax = dataclasses.replace(quantizer, scale_rule="absmax").fit(w)
        start = quantizer.fit(jnp.zeros_like(w))
        assert not start.scale.any()
        found = quantizer.fit(w, start=start)
        # Ternary's absmax scale is two thirds of the one that spans the weights.
        factor = 1.5 if isinstance(quantizer, Ternary) else 1
        np.testing.assert_allclose(jnp.abs(found.scale), factor * jnp.abs(absmax.scale), rtol=0.01)


# Table 5 of the QLoRA paper's appendix E.
NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]


def test_normal_float_has_the_published_levels():
    book = NormalFloat().fit(jnp.ones((8, 2))).codebook
    np.testing.assert_allclose(book, NF4, atol=2.0**-11)
    for bits in (2, 3, 4):
        book = np.array(NormalFloat(bits=bits).fit(jnp.ones((8, 2))).codebook)
        assert len(book) == 2**bits
        assert np.all(np.diff(book) > 0)
        assert book[0] == -1
        assert book[-1] == 1
        assert book[2 ** (bits - 1) - 1] == 0
        np.testing.assert_array_equal(book * 1024, np.round(book * 1024))


def test_normal_float_beats_uniform_absmax_on_normal_weights():
    w = weights((64, 512))
    assert (
        squared_error(NormalFloat(), w).sum()
        < 0.95 * squared_error(Uniform(bits=4, group_size=64, scale_rule="absmax"), w).sum()
    )


@pytest.mark.parametrize("bits", [0, 1, 5, 8, 2.5, "4", True, None])
def test_normal_float_refuses_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="NormalFloat: bits must be an integer from 2 to 4, got"):
        NormalFloat(bits=bits)


def test_only_the_first_argument_may_be_positional():
    assert Uniform(4) == Uniform(bits=4)
    assert NormalFloat(3) == NormalFloat(bits=3)
    assert ZScore(5) == ZScore(R=5)
    for make, args in (
        (Uniform, (4, True)),
        (NormalFloat, (4, 64)),
        (ZScore, (5, 1.0)),
        (Ternary, (-1,)),
    ):
        with pytest.raises(TypeError):
            make(*args)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, "4", True, None])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=r"Uniform: bits must be an integer from 1 to 8, got"):
        Uniform(bits=bits)


@pytest.mark.parametrize("R", [0, 128, -3, 2.5, math.nan])
def test_R_out_of_range_is_refused(R):
    with pytest.raises(ValueError, match="ZScore: R must be an integer from 1 to 127, got"):
        ZScore(R=R)


@pytest.mark.parametrize("resolution", [0.0, -1.0, math.nan, math.inf])
def test_resolution_out_of_range_is_refused(resolution):
    with pytest.raises(ValueError, match="resolution must be positive"):
        ZScore(resolution=resolution)


@pytest.mark.parametrize("make", [Uniform, Binary, Ternary, NormalFloat])
def test_bad_channel_axis_or_group_size_is_refused(make):
    for group_size in (0, -1, 2.5):
        with pytest.raises(ValueError, match="group_size must be an integer of at least 1"):
            make(group_size=group_size)
    with pytest.raises(ValueError, match="channel_axis must be"):
        make(channel_axis="last")
    with pytest.raises(ValueError, match="channel_axis must be"):
        make(channel_axis=(0, None))
    for axis in (2, -3, (0, 5)):
        with pytest.raises(ValueError, match="out of range for an array with 2 axes"):
            make(channel_axis=axis).fit(jnp.ones((2, 3)))


def test_ternary_absmax_spans_the_weights_with_three_equal_cells():
    w = weights((300, 5), "heavy")
    q = Ternary(scale_rule="absmax").quantize(jnp.asarray(w))
    np.testing.assert_allclose(np.abs(q.scale), np.abs(w).max(0, keepdims=True) / 1.5, rtol=2.0**-8)
    error = np.abs(np.asarray(q) - w) / np.asarray(q.scale)
    assert error.max() <= 0.5 + 2.0**-7
    assert squared_error(Ternary(), w).sum() < squared_error(Ternary(scale_rule="absmax"), w).sum()


def test_bad_scale_rule_is_refused():
    for make in (Uniform, Ternary):
        with pytest.raises(ValueError, match=r"scale_rule must be .* got 'max'"):
            make(scale_rule="max")


@pytest.mark.parametrize("w", [jnp.arange(3), jnp.ones(3, jnp.complex64), jnp.ones(3, bool)])
@pytest.mark.parametrize("quantizer", [Uniform(), ZScore(), Ternary()], ids=str)
def test_only_real_floating_arrays_are_accepted(w, quantizer):
    with pytest.raises(TypeError, match="only real floating arrays"):
        quantizer.quantize(w)


@hypothesis.given(
    w=hnp.arrays(
        np.float32,
        st.sampled_from([(), (5,), (3, 1), (7, 2), (2, 3, 4)]),
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
    ),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    name=st.sampled_from(sorted(set(QUANTIZERS) - {"uniform8-first"})),
)
def test_codes_are_in_range_and_only_finite_weights_decode_to_finite_values(w, dtype, name):
    w = jnp.asarray(w).astype(dtype)
    q = QUANTIZERS[name].quantize(w)
    chex.assert_shape(q.qvalue, w.shape)
    chex.assert_type(q.dequantize(), dtype)
    assert np.all((q.qvalue >= q.grid.lower) & (q.qvalue <= q.grid.upper))
    finite = np.isfinite(np.asarray(w, np.float32))
    dequantized = np.asarray(q.dequantize(), np.float32)
    assert not np.any(np.isfinite(dequantized[~finite]))
    if np.all(finite):
        assert np.all(np.isfinite(dequantized))
    again = q.grid.encode(q.dequantize())
    if np.all(finite) and (q.zero_point is None or dtype == jnp.float32):
        np.testing.assert_array_equal(np.asarray(q.grid.decode(again)), np.asarray(q.dequantize()))


@pytest.mark.parametrize("quantizer", [Uniform(bits=4, group_size=16), NormalFloat(group_size=16)])
def test_group_size_applies_where_no_axis_is_reduced(quantizer):
    w = jnp.asarray(weights((40,)))
    q = quantizer.quantize(w)
    assert q.scale.shape == (3,)
    expected = dataclasses.replace(quantizer, channel_axis=None).quantize(w)
    np.testing.assert_array_equal(q.dequantize(), expected.dequantize())


def test_zscore_works_under_vmap_over_its_hyperparameters():
    w = jnp.asarray(weights((8, 5)))
    stacked = jax.vmap(lambda R: ZScore(R=R, resolution=2.0))(jnp.arange(1, 4))
    found = jax.vmap(lambda w, rule: rule.quantize(w), (None, 0))(w, stacked)
    joined = jax.tree.map(lambda *x: jnp.stack(x), ZScore(R=1), ZScore(R=2))
    np.testing.assert_array_equal(joined.R, [1, 2])
    for i, R in enumerate((1, 2, 3)):
        expected = ZScore(R=R, resolution=2.0).quantize(w)
        np.testing.assert_array_equal(found.qvalue[i], expected.qvalue)
    # A grid stacked by vmap also works outside of it, whatever the shapes.
    three = jnp.asarray(weights((3, 8, 3)))
    grids = jax.vmap(lambda w, R: ZScore(R=R).fit(w))(three, jnp.arange(1, 4))
    np.testing.assert_array_equal(
        grids.encode(three), jax.vmap(lambda grid, w: grid.encode(w))(grids, three)
    )


def test_R_as_text_is_refused():
    with pytest.raises(TypeError, match="R must be an integer, got '7'"):
        ZScore(R="7").quantize(jnp.ones((2, 2)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_weights_make_their_whole_group_non_finite(name, bad):
    """Weights of other groups stay finite."""
    w = weights((15, 6))
    w[7, 2] = bad
    q = QUANTIZERS[name].quantize(jnp.asarray(w))
    # A grid that decodes code 1 to the index of its scale.
    marked = Grid(jnp.arange(1.0, 1 + q.scale.size).reshape(q.scale.shape), group=q.grid.group)
    owner = np.asarray(marked.decode(jnp.ones_like(q.qvalue)))
    np.testing.assert_array_equal(np.isfinite(q.dequantize()), owner != owner[7, 2])
