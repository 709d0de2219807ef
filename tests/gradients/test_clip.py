import math

import chex
import flax.core
import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import cases

from optax_clipquant import (
    ClipByValueState,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    clip_fractions,
)

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


def update(c, grads, **kwargs):
    tx = clip_by_value(c, **kwargs)
    return tx.update(grads, tx.init(grads))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", cases([(), (0,), (3,), (4, 5), (2, 3, 4)], [(), (0,), (4, 5)]))
def test_keeps_shape_and_dtype_and_bounds_the_range(platform, variant, dtype, shape):
    grads = {"w": 3 * jax.random.normal(jax.random.key(0), shape, dtype)}
    tx = clip_by_value(1.0)
    clipped, state = variant(tx.update)(grads, tx.init(grads))
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, grads)
    chex.assert_shape(state.clip_fraction, ())
    chex.assert_type(state.clip_fraction, jnp.float32)
    assert np.all(np.abs(np.asarray(clipped["w"], np.float64)) <= 1.0)
    assert 0 <= float(state.clip_fraction) <= 1


@hypothesis.given(
    g=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, max_side=6),
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
    ),
    c=st.floats(2.0**-100, 2.0**100, width=32),
)
def test_matches_the_formula_in_float64(g, c):
    clipped, state = update(c, jnp.asarray(g))
    # XLA flushes denormals to 0.
    g64 = np.where(np.abs(g) < 2.0**-126, 0, g.astype(np.float64))
    expected = np.minimum(np.maximum(g64, -c), c)
    np.testing.assert_array_equal(np.asarray(clipped, np.float64), expected)
    count = np.sum(np.abs(g64) > c)
    np.testing.assert_allclose(float(state.clip_fraction), count / max(g.size, 1), rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("c", [1.0, 0.1, 3e-4])
def test_equals_optax_clip(dtype, c):
    g = jax.random.normal(jax.random.key(0), (1000,), dtype)
    expected, _ = optax.clip(c).update(g, optax.EmptyState())
    for telemetry in (True, False):
        clipped, _ = update(c, g, telemetry=telemetry)
        chex.assert_trees_all_equal(clipped, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_array_bound_does_not_promote(dtype):
    g = jnp.array([3.0, -0.5], dtype)
    clipped, _ = update(jnp.float32(1.0), g)
    chex.assert_trees_all_equal(clipped, jnp.array([1.0, -0.5], dtype))


def test_nan_passes_uncounted_and_infinity_is_clamped():
    clipped, state = update(1.0, jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.5]))
    np.testing.assert_array_equal(clipped, [np.nan, 1, -1, 0.5])
    assert float(state.clip_fraction) == 0.5
    # A bound beyond float16's range becomes its largest number.
    clipped, _ = update(1e6, jnp.array([jnp.inf], jnp.float16))
    assert float(clipped[0]) == float(jnp.finfo(jnp.float16).max)
    tx = optax.apply_if_finite(optax.chain(clip_by_value(1.0), optax.sgd(1.0)), 5)
    g = jnp.array([jnp.nan, 1.0])
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, [0, 0])


def test_complex_parts_are_clamped_separately():
    g = jnp.array([3 + 0.5j, -2 - 4j, 0.1 + 0.2j, complex(math.nan, 5)], jnp.complex64)
    clipped, state = update(1.0, g)
    np.testing.assert_array_equal(
        clipped[:3], np.array([1 + 0.5j, -1 - 1j, 0.1 + 0.2j], np.complex64)
    )
    assert clipped.dtype == jnp.complex64
    assert np.isnan(clipped[3].real)
    assert float(state.clip_fraction) == 0.5


def test_none_masked_and_float0_leaves_pass_through():
    grads = {
        "none": None,
        "masked": optax.MaskedNode(),
        "float0": np.zeros(3, jax.dtypes.float0),
        "w": jnp.array([2.0, 0.5]),
    }
    clipped, state = update(1.0, grads)
    assert clipped["none"] is None
    assert isinstance(clipped["masked"], optax.MaskedNode)
    assert clipped["float0"].dtype == jax.dtypes.float0
    assert float(state.clip_fraction) == 0.5


def test_integer_params_have_float0_gradients():
    params = {"w": jnp.ones(3), "steps": jnp.arange(3)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] * p["steps"].astype(jnp.float32)), allow_int=True)(
        params
    )
    clipped, state = update(1.0, grads)
    np.testing.assert_array_equal(clipped["w"], [0, 1, 1])
    np.testing.assert_allclose(state.clip_fraction, 1 / 3)


def test_tree_of_bounds_and_schedules():
    params = {"a": {"x": jnp.zeros(2), "y": jnp.zeros(1)}, "b": jnp.zeros(2)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 10.0), params)
    tx = clip_by_value({"a": 1.0, "b": lambda count: 2.0 + count.astype(jnp.float32)})
    state = tx.init(params)
    for step in range(3):
        clipped, state = jax.jit(tx.update)(grads, state)
        np.testing.assert_array_equal(clipped["a"]["x"], [1, 1])
        np.testing.assert_array_equal(clipped["b"], np.full(2, 2.0 + step))
    assert int(state.count) == 3


KERNELS = {"a": {"kernel": jnp.full(2, 5.0)}, "b": {"kernel": jnp.full(3, 5.0)}}
WRAPPERS = {
    "dict": lambda tree: tree,
    "FrozenDict": flax.core.freeze,
    "State": nnx.State,
    "State of variables": lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
    "boxed": lambda tree: jax.tree.map(lambda x: nn.Partitioned(x, names=(None,)), tree),
}


@pytest.mark.parametrize("params", WRAPPERS)
@pytest.mark.parametrize("bounds", WRAPPERS)
def test_bounds_are_matched_by_paths_whatever_the_wrappers(bounds, params):
    grads = WRAPPERS[params](KERNELS)
    for c in ({"a": 1.0, "b": 2.0}, {"a": {"kernel": 1.0}, "b": {"kernel": 2.0}}):
        clipped, _ = update(WRAPPERS[bounds](c), grads)
        assert jax.tree.structure(clipped) == jax.tree.structure(grads)
        first, second = jax.tree.leaves(clipped)
        np.testing.assert_array_equal(first, [1, 1])
        np.testing.assert_array_equal(second, [2, 2, 2])


def test_bounds_match_the_wrappers_of_an_nnx_optimizer():
    """``init`` gets variables and ``update`` arrays, and the model's state has both."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = nnx.as_pure(nnx.state(model))
    state = nnx.state(model, nnx.Param)
    for c in ({"kernel": 0.5, "bias": 0.25}, jax.tree.map(lambda p: 0.1 * p.ndim, state)):
        opt = nnx.Optimizer(model, optax.chain(clip_by_value(c), optax.sgd(1.0)), wrt=nnx.Param)
        opt.update(model, jax.tree.map(lambda p: jnp.full_like(p, 9.0), state))
    off = jax.tree.map(lambda a, b: a - b, before, nnx.as_pure(nnx.state(model)))
    np.testing.assert_allclose(off["kernel"], np.full((2, 3), 0.7), rtol=1e-5)
    np.testing.assert_allclose(off["bias"], np.full(3, 0.35), rtol=1e-5)


@pytest.mark.parametrize(
    ("c", "message"),
    [
        ({"a": 1.0}, r"no bound for the leaf 'b/kernel', only for 'a'; give math\.inf"),
        (
            {"a": 1.0, "b": {"bias": 1.0}},
            r"no bound for the leaf 'b/kernel', only for 'a', 'b/bias'",
        ),
        (
            {"a": 1.0, "b": 1.0, "d": 1.0},
            r"has a bound for 'd', which params do not have.*'b/kernel'",
        ),
    ],
)
def test_bounds_that_do_not_fit_are_refused_by_path(c, message):
    with pytest.raises(ValueError, match=message):
        clip_by_value(c).init(KERNELS)
    with_gaps = {"a": KERNELS["a"], "b": optax.MaskedNode(), "d": None}
    if "b" in c and "d" in c:
        clip_by_value(c).init(with_gaps)


def test_gradients_may_be_python_numbers():
    grads = {"w": 1.5, "v": -3.0}
    for make in (
        lambda: clip_by_value(1.0),
        clip_by_quantile,
        lambda: clip_by_quantile(per_leaf=True),
    ):
        tx = make()
        clipped, _ = tx.update(grads, tx.init(grads))
        assert jax.tree.map(float, clipped) == {"w": 1.0, "v": -1.0}
    tx = clip_by_zscore(max_norm=1.0)
    clipped, _ = tx.update({"w": 3.0, "v": -4.0}, tx.init(grads))
    np.testing.assert_allclose([clipped["w"], clipped["v"]], [0.6, -0.8], rtol=1e-6)


def test_schedule_works_without_telemetry():
    tx = clip_by_value(optax.linear_schedule(1.0, 0.0, 10), telemetry=False)
    g = jnp.array([5.0])
    state = tx.init(g)
    assert state.clip_fraction is None
    for step in range(10):
        clipped, state = tx.update(g, state)
        np.testing.assert_allclose(clipped, [1 - step / 10], rtol=1e-6)


def test_without_telemetry_the_state_is_empty():
    assert jax.tree.leaves(clip_by_value(1.0, telemetry=False).init(jnp.zeros(3))) == []


def test_clip_fractions_lists_every_transform_of_a_chain():
    tx = optax.chain(
        clip_by_value(2.0),
        optax.scale(2.0),
        clip_by_value(1.0),
        clip_by_value(9.0, telemetry=False),
    )
    g = jnp.array([3.0, 0.1, 0.7, 0.2])
    _, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(clip_fractions(state), [0.25, 0.5])
    single = optax.chain(clip_by_value(1.0), optax.sgd(1e-3, 0.9))
    _, state = single.update(g, single.init(g))
    assert float(optax.tree.get(state, "clip_fraction")) == 0.25


def test_clip_fractions_are_arrays_in_an_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.zeros(2))

    model = Model()
    tx = optax.chain(clip_by_value(1.0), clip_by_zscore(), clip_by_value(0.5, telemetry=False))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: m.w[...] @ jnp.array([2.0, 0.5]))(model))
    (fraction,) = clip_fractions(optimizer.opt_state)
    assert isinstance(fraction, jax.Array)
    assert fraction == 0.5


@pytest.mark.parametrize("c", [0, 0.0, -1.0, math.nan, np.float32(-2), jnp.float32(0)])
def test_bound_must_be_positive(c):
    with pytest.raises(ValueError, match=f"c must be positive, got {c}"):
        clip_by_value(c)
    with pytest.raises(ValueError, match="c must be positive"):
        clip_by_value({"a": 1.0, "b": c})


@pytest.mark.parametrize(
    ("c", "error"),
    [("1", TypeError), (None, TypeError), (True, TypeError), (np.ones(2), ValueError)],
)
def test_bound_must_be_a_scalar(c, error):
    with pytest.raises(error, match="clip_by_value: c must be"):
        clip_by_value(c)


def test_integer_gradients_are_refused():
    with pytest.raises(TypeError, match="int32"):
        update(1.0, jnp.arange(3))


@pytest.mark.parametrize("c", [-1.0, math.nan, -math.inf])
def test_bad_traced_or_scheduled_bound_gives_nan(c):
    g = jnp.array([0.5, 3.0])
    assert np.all(np.isnan(jax.jit(lambda c: update(c, g)[0])(jnp.float32(c))))
    assert np.all(np.isnan(update(lambda count: c, g)[0]))


def test_schedule_that_is_not_scalar_is_refused():
    with pytest.raises(
        ValueError, match=r"c, as the schedule gives it, must be a scalar, got .* shape \(4, 3\)"
    ):
        update(lambda count: jnp.ones((4, 3)), jnp.ones(3))


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_infinite_bound_clamps_nothing(dtype):
    g = jnp.array([jnp.inf, -jnp.inf, 1.0, jnp.nan], dtype)
    clipped, state = update(math.inf, g)
    np.testing.assert_array_equal(clipped.astype(jnp.float32), g.astype(jnp.float32))
    assert state.clip_fraction == 0


def test_float64_gradients_are_clamped_in_float64():
    with jax.enable_x64(True):
        clipped, _ = update(0.1, jnp.array([5.0, -5.0, 0.05], jnp.float64))
        np.testing.assert_array_equal(clipped, np.array([0.1, -0.1, 0.05]))  # and not float32's 0.1
        clipped, _ = update(1e39, jnp.array([5e50], jnp.float64))
        np.testing.assert_array_equal(clipped, [1e39])


@pytest.mark.parametrize("shapes", [[(40_000, 40_000)] * 2, [(5, 30_000, 40_000)]])
@pytest.mark.parametrize("tx", [clip_by_value(1.0), clip_by_quantile(), clip_by_zscore()])
def test_fraction_of_more_elements_than_an_int32_counts(tx, shapes):
    params = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.update, params, state), (params, state)
    )


def test_works_with_inject_hyperparams():
    tx = optax.inject_hyperparams(clip_by_value)(c=1.0)
    g = jnp.array([5.0])
    state = tx.init(g)
    state.hyperparams["c"] = jnp.float32(2.0)
    clipped, _ = jax.jit(tx.update)(g, state)
    np.testing.assert_array_equal(clipped, [2.0])


def test_state_types_are_stable_and_nothing_recompiles():
    tx = clip_by_value(1.0)
    g = jnp.ones((3, 4))
    state = tx.init(g)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(g, state):
        return tx.update(g, state)[1]

    for _ in range(3):
        new = step(g, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        state = new
    assert isinstance(state, ClipByValueState)
    scanned, _ = jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), tx.init(g), length=3)
    chex.assert_trees_all_equal(scanned, state)


def test_works_under_vmap():
    g = jnp.array([[3.0, 0.5], [0.1, 0.2]])
    tx = clip_by_value(1.0)
    clipped, state = jax.vmap(lambda g: tx.update(g, tx.init(g)))(g)
    np.testing.assert_array_equal(clipped, [[1, 0.5], np.float32([0.1, 0.2])])
    np.testing.assert_array_equal(state.clip_fraction, [0.5, 0])


@pytest.mark.parametrize("devices", [1, 8])
def test_fraction_over_many_leaves(monkeypatch, variant, devices):
    """On one device, leaves of equal shape are counted together, a bounded number at a time."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    rng = np.random.default_rng(0)
    shapes = [*[(5,)] * 19, *[(4, 3)] * 8, (), (0, 3), *[(96, 64)] * 2, (8192,)]
    grads = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    for i, bad in enumerate((np.nan, np.inf, -np.inf)):
        for leaf in (0, 20, -1, -2):
            grads[leaf].flat[i] = bad
    bounds = [0.1 * (i + 1) for i in range(len(grads))]
    outside = sum(np.sum(np.abs(g) > c) for g, c in zip(grads, bounds, strict=True))
    tx = clip_by_value(bounds)
    _, state = variant(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(state.clip_fraction, outside / sum(g.size for g in grads), rtol=1e-6)
    grads.append((grads[0] + 1j * grads[1]).astype(np.complex64))
    tx = clip_by_value([*bounds, 0.5])
    _, state = variant(tx.update)(grads, tx.init(grads))
    outside += np.sum((np.abs(grads[0]) > 0.5) | (np.abs(grads[1]) > 0.5))
    # A complex number with a NaN in it is not counted.
    np.testing.assert_allclose(state.clip_fraction, outside / sum(g.size for g in grads), rtol=1e-6)


def test_large_counts_are_exact():
    # A float32 count of ones stops at 2**24.
    g = jnp.full(2**24 + 2**20, 2.0, jnp.float16)
    _, state = update(1.0, g)
    assert float(state.clip_fraction) == 1.0
