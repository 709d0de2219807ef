import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUANTIZERS, cases, weights

from optax_clipquant.lowering.reduce import Span, extremes, furthest


@pytest.fixture(params=[1, 8])
def devices(request, monkeypatch):
    """Sets the number of devices that a reduction assumes: parts that devices would share are reduced whole.

    Tests must compile fresh functions, or a program compiled for the other number would be reused.
    """
    monkeypatch.setattr(jax, "device_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(3, 5), (192, 256), (8, 64, 256)])
@pytest.mark.parametrize("axes", [None, (0,), (1,), (-1,)])
@pytest.mark.parametrize(("place", "nan"), [(0, np.nan), (7, -np.nan), (-1, np.nan)])
def test_extremes_keep_nan(devices, shape, axes, place, nan):
    """XLA's CPU backend drops NaN from a plain maximum of a large array."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x.reshape(-1)[place] = nan
    high, low = jax.jit(lambda x: extremes(x, Span(axes)))(jnp.asarray(x))
    expected = np.maximum(x, 0).max(axis=axes, keepdims=True)
    np.testing.assert_array_equal(high, expected)
    np.testing.assert_array_equal(low, np.minimum(x, 0).min(axis=axes, keepdims=True))
    assert np.isnan(expected).any()


def test_extremes_include_zero_and_keep_infinities():
    x = jnp.array([[1.0, 2.0], [-1.0, -2.0], [np.inf, 1.0]])
    high, low = extremes(x, Span((1,)))
    np.testing.assert_array_equal(high, [[2], [0], [np.inf]])
    np.testing.assert_array_equal(low, [[0], [-2], [0]])
    assert extremes(jnp.zeros((0, 3)), Span((0,)))[0].shape == (1, 3)


@pytest.mark.parametrize("axes", [(), (0,), (0, 1)])
def test_extremes_of_one_element_include_zero(devices, axes):
    """XLA drops the initial value of a reduction of one element."""
    for x in (-1.0, 2.0):
        found = jax.jit(lambda x: extremes(x, Span(axes)))(jnp.full((1, 1), x))
        assert tuple(found) == (max(x, 0), min(x, 0))


def test_extremes_are_exact_at_the_limits_of_the_range(devices):
    huge = np.float32(np.finfo(np.float32).max)
    x = np.full((192, 256), huge)
    x[::2] = -huge
    high, low = jax.jit(lambda x: extremes(x))(jnp.asarray(x))
    assert (high, low) == (huge, -huge)  # not NaN, though both sums overflow
    x = np.zeros((192, 256), np.float32)
    x[0, 0], x[1, 1] = 1e-30, -0.0
    high, low = jax.jit(lambda x: extremes(x))(jnp.asarray(x))
    assert (high, low) == (np.float32(1e-30), 0)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_extremes_and_sums_share_one_loop(devices, dtype, axes):
    x = jnp.asarray(weights((192, 256)), dtype)
    found = jax.jit(lambda x: extremes(x, Span(axes), jnp.square(x), x))(x.astype(jnp.float32))
    wide, whole = np.asarray(x, np.float64), {"axis": axes, "keepdims": True}
    np.testing.assert_array_equal(found[0], np.maximum(wide, 0).max(**whole))
    np.testing.assert_array_equal(found[1], np.minimum(wide, 0).min(**whole))
    np.testing.assert_array_equal(extremes(x, Span(axes)), found[:2])
    np.testing.assert_allclose(found[2], np.square(wide).sum(**whole), rtol=1e-5)
    error = np.abs(found[3] - wide.sum(**whole)) / np.abs(wide).sum(**whole)
    assert error.max() < 1e-6


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_the_furthest_element_keeps_its_sign(devices, axes):
    x = np.round(4 * weights((192, 256))).astype(
        np.float32
    )  # ties, of which the negative one counts
    x[:, 3], x[5, 9], x[7, 64], x[100] = -0.0, np.nan, -np.inf, -np.abs(x[100])
    found, total = jax.jit(lambda x: furthest(x, Span(axes), jnp.square(x)))(jnp.asarray(x))
    high, low = x.max(axes, keepdims=True), x.min(axes, keepdims=True)
    np.testing.assert_array_equal(found, np.where(high > -low, high, low))
    np.testing.assert_allclose(total, np.square(x).sum(axes, keepdims=True), rtol=1e-6)


def results(x: jax.Array, span: Span) -> list[jax.Array]:
    """Reduces computed arrays that share a subexpression."""

    shared = jnp.tanh(x)
    return span.reduce(("max", "max", "sum", "sum"), [x, -x, shared, jnp.square(shared)])


# Lengths that runs of 16, of fewer, or none divide; the last axis alone; three axes with a long middle one;
# groups along the last axis; several lengths that nothing divides.
SHAPES_AND_AXES = [
    ((192, 256), (0,)),
    ((192, 256), (0, 1)),
    ((130, 64), (0,)),
    ((131, 64), (0,)),
    ((24, 512), (1,)),
    ((24, 509), (1,)),
    ((8, 64, 256), (1,)),
    ((3, 128, 40), (0, 1)),
    ((2, 3, 1024), (0, 1, 2)),
    ((8192,), (0,)),
    ((40, 8, 32), (2,)),
    ((40, 8, 33), (2,)),
    ((331, 7, 33), (0, 2)),
]


@pytest.mark.parametrize(("shape", "axes"), SHAPES_AND_AXES, ids=str)
def test_reductions_match_float64(devices, shape, axes):
    x = weights(shape)
    found = jax.jit(lambda x: results(x, Span(axes)))(jnp.asarray(x))
    wide = x.astype(np.float64)
    shared = np.tanh(wide)
    whole = {"axis": axes, "keepdims": True}
    np.testing.assert_array_equal(found[0], np.maximum(x, 0).max(**whole))
    np.testing.assert_array_equal(found[1], np.maximum(-x, 0).max(**whole))
    # In units of the sum of magnitudes: the terms of a sum may cancel.
    for sums, terms in ((found[2], shared), (found[3], shared**2)):
        error = np.abs(sums - terms.sum(**whole)) / np.abs(terms).sum(**whole)
        assert error.max() < 1e-6


@pytest.mark.parametrize(("shape", "axes"), SHAPES_AND_AXES[::4], ids=str)
def test_reductions_work_under_vmap_and_grad(devices, shape, axes):
    x = jnp.asarray(weights(shape))
    several = jax.jit(jax.vmap(lambda x: results(x, Span(axes))))(x[None])
    for one, many in zip(results(x, Span(axes)), several, strict=True):
        np.testing.assert_allclose(many[0], one, rtol=1e-5, atol=1e-4)
    found = jax.jit(jax.grad(lambda x: jnp.sum(results(x, Span(axes))[3])))(x)
    shared = np.tanh(np.asarray(x, np.float64))
    np.testing.assert_allclose(found, 2 * shared * (1 - shared**2), atol=1e-6)


def test_integers_keep_their_dtype_under_x64(devices):
    """JAX widens their sums, and a program for several platforms needs one dtype."""
    with jax.enable_x64(True):
        x = jnp.ones((192, 256), jnp.int32)
        (found,) = jax.jit(lambda x: Span().reduce(["sum"], [x]))(x)
    assert found.dtype == jnp.int32
    assert found == x.size


def test_runs_share_their_reduction(devices):
    """Pieces in runs of 3, the last run of 1, and an axis within each piece that is reduced."""
    x = weights((4, 16, 256))
    found = results(jnp.asarray(x), Span((1,), 0, 3))
    each = np.tanh(x.astype(np.float64)).sum(axis=1, keepdims=True)
    expected = np.stack([*[each[:3].sum(0)] * 3, each[3]])
    np.testing.assert_allclose(found[2], expected, atol=1e-4)
    high = np.maximum(x, 0).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(found[0], np.stack([*[high[:3].max(0)] * 3, high[3]]))


def reduced_at_once(x: jax.Array, axes: tuple[int, ...], platform: str) -> int:
    """The largest number of arrays in one reduction of the program for a platform."""
    lowered = (
        jax.jit(lambda x: results(x, Span(axes))).trace(x).lower(lowering_platforms=(platform,))
    )
    return max(len(re.findall("init:", line)) for line in lowered.as_text().splitlines())


def test_cpu_reduces_arrays_together_where_no_device_shares_a_run(devices):
    x = jnp.zeros((128, 64))
    assert reduced_at_once(x, (0,), "cpu") == 4
    assert reduced_at_once(x, (0,), "tpu") == reduced_at_once(x, (0,), "cuda") == 1
    assert reduced_at_once(jnp.zeros((64, 256)), (1,), "cpu") == (4 if devices == 1 else 1)
    assert reduced_at_once(jnp.zeros((20, 256)), (0,), "cpu") == (4 if devices == 1 else 1)
    assert reduced_at_once(jnp.zeros((32, 64)), (0,), "cpu") == 1  # too small to be worth it


@pytest.mark.xdist_group("clears caches")  # see test_blocks.py
@pytest.mark.parametrize("axis", cases([0, -1], [0]))
@pytest.mark.parametrize(
    "name",
    cases(
        ["binary", "ternary", "uniform2", "uniform4", "uniform2-asymmetric"],
        ["ternary", "uniform4"],
    ),
)
def test_fits_hardly_depend_on_the_device_count(monkeypatch, name, axis):
    """One device, where most arrays are reduced together, against many, where none are."""
    quantizer = QUANTIZERS[name]
    quantizer = dataclasses.replace(quantizer, channel_axis=axis)
    w = jnp.asarray(weights((256, 128), "student3"))
    found = {}
    for many in (1, 1024):
        jax.clear_caches()
        monkeypatch.setattr(jax, "device_count", lambda many=many: many)
        grid = quantizer.fit(w)
        found[many] = grid, quantizer.fit(w * 1.01, start=grid)
    jax.clear_caches()
    for one, many in zip(found[1], found[1024], strict=True):
        # Sums in another order may round a scale the other way.
        np.testing.assert_allclose(one.scale, many.scale, rtol=2.0**-7)
        assert np.mean(one.scale == many.scale) > 0.9
        same = np.square(one.decode(one.encode(w)) - w).sum()
        np.testing.assert_allclose(
            same, np.square(many.decode(many.encode(w)) - w).sum(), rtol=1e-3
        )
