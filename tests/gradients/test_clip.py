import math

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx

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
@pytest.mark.parametrize("shape", [(), (0,), (3,), (4, 5), (2, 3, 4)])
def test_shape_range_dtype(platform, variant, dtype, shape):
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
def test_is_the_formula_in_float64(g, c):
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
    # A bound beyond float16 is its largest number.
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


def test_none_masked_and_float0_pass():
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
    with pytest.raises(ValueError, match="b"):
        clip_by_value({"a": 1.0}).init(params)


def test_schedule_without_telemetry():
    tx = clip_by_value(optax.linear_schedule(1.0, 0.0, 10), telemetry=False)
    g = jnp.array([5.0])
    state = tx.init(g)
    assert state.clip_fraction is None
    for step in range(10):
        clipped, state = tx.update(g, state)
        np.testing.assert_allclose(clipped, [1 - step / 10], rtol=1e-6)


def test_without_telemetry_the_state_is_empty():
    assert jax.tree.leaves(clip_by_value(1.0, telemetry=False).init(jnp.zeros(3))) == []


def test_clip_fractions_of_a_chain():
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
def test_traced_or_scheduled_bad_bound_gives_nan_never_garbage(c):
    g = jnp.array([0.5, 3.0])
    assert np.all(np.isnan(jax.jit(lambda c: update(c, g)[0])(jnp.float32(c))))
    assert np.all(np.isnan(update(lambda count: c, g)[0]))


def test_schedule_of_another_shape():
    with pytest.raises(
        ValueError, match=r"c must be a scalar, but the schedule gave shape \(4, 3\)"
    ):
        update(lambda count: jnp.ones((4, 3)), jnp.ones(3))


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_infinite_bound_clamps_nothing(dtype):
    g = jnp.array([jnp.inf, -jnp.inf, 1.0, jnp.nan], dtype)
    clipped, state = update(math.inf, g)
    np.testing.assert_array_equal(clipped.astype(jnp.float32), g.astype(jnp.float32))
    assert state.clip_fraction == 0


def test_float64():
    with jax.enable_x64(True):
        clipped, _ = update(0.1, jnp.array([5.0, -5.0, 0.05], jnp.float64))
        np.testing.assert_array_equal(clipped, np.array([0.1, -0.1, 0.05]))  # and not float32's 0.1
        clipped, _ = update(1e39, jnp.array([5e50], jnp.float64))
        np.testing.assert_array_equal(clipped, [1e39])


@pytest.mark.parametrize("shapes", [[(40_000, 40_000)] * 2, [(5, 30_000, 40_000)]])
@pytest.mark.parametrize("tx", [clip_by_value(1.0), clip_by_quantile(), clip_by_zscore()])
def test_more_elements_than_an_int32_counts(tx, shapes):
    params = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.update, params, state), (params, state)
    )


def test_inject_hyperparams():
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


def test_vmap():
    g = jnp.array([[3.0, 0.5], [0.1, 0.2]])
    tx = clip_by_value(1.0)
    clipped, state = jax.vmap(lambda g: tx.update(g, tx.init(g)))(g)
    np.testing.assert_array_equal(clipped, [[1, 0.5], np.float32([0.1, 0.2])])
    np.testing.assert_array_equal(state.clip_fraction, [0.5, 0])


@pytest.mark.parametrize("devices", [1, 8])
def test_the_fraction_of_many_leaves(monkeypatch, variant, devices):
    """Those of one shape are counted together, in bounded numbers, where there is one device."""
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


TRACKING = {
    "quantile": clip_by_quantile(),
    "quantile-per-leaf": clip_by_quantile(per_leaf=True),
    "zscore": clip_by_zscore(warmup_steps=2),
}


def student(key, shape):
    """With 2 degrees of freedom."""
    a, b = jax.random.split(key)
    return jax.random.normal(a, shape) / jnp.sqrt(jax.random.exponential(b, shape))


DRAWS = {
    "normal": (jax.random.normal, scipy.stats.norm()),
    "laplace": (jax.random.laplace, scipy.stats.laplace()),
    "student": (student, scipy.stats.t(2.0)),
    "cauchy": (jax.random.cauchy, scipy.stats.cauchy()),
}


@pytest.mark.parametrize("q", [0.1, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("draw", DRAWS)
def test_quantile_arrives_from_far_off(draw, q):
    """From 1000 times too small or large at the true quantile within 100 steps, and then at the right
    share of 2 million elements.
    """
    sample, distribution = DRAWS[draw]
    true = distribution.ppf((1 + q) / 2)
    keys = jax.random.split(jax.random.key(0), 150)

    @jax.jit
    @jax.vmap
    def run(initial):
        tx = clip_by_quantile(q, initial=initial)

        def step(state, key):
            _, state = tx.update({"w": sample(key, (200, 200))}, state)
            return state, state

        return jax.lax.scan(step, tx.init({"w": 0}), keys)[1]

    states = run(jnp.array([1e-3, 1e3]) * true)
    shares = np.mean(np.asarray(states.clip_fraction[:, 100:], np.float64), axis=1)
    assert np.all(np.abs(shares / (1 - q) - 1) < 0.02)
    thresholds = np.exp(np.mean(np.log(states.threshold[:, 100:]), axis=1))
    # The quantile of 2 million numbers is itself uncertain, in units of the density there.
    density = 2 * distribution.pdf(true) * true
    bound = 5 * (q * (1 - q) / 2e6) ** 0.5 / density + 0.01
    assert np.all(np.abs(thresholds / true - 1) < bound)


def test_quantile_step_is_the_formula_in_float64():
    g = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    for q, c in ((0.99, 2.5), (0.99, 2.0), (0.99, 10.0), (0.9, 1.6), (0.2, 0.3)):
        tx = clip_by_quantile(q, learning_rate=0.1, initial=c)
        clipped, state = tx.update(jnp.asarray(g), tx.init(None))
        np.testing.assert_array_equal(clipped, np.clip(g, -np.float32(c), np.float32(c)))
        f = np.mean(np.abs(g) > np.float32(c))
        np.testing.assert_allclose(state.clip_fraction, f, rtol=1e-6)
        off = np.clip((f - (1 - q)) / min(q, 1 - q), -1, 1)
        np.testing.assert_allclose(state.threshold, c * np.exp(0.1 * off), rtol=1e-5)


def test_quantile_does_not_swing_at_the_tail():
    """With the undamped step the bound would jump about the quantile 0.9999 for ever."""
    tx = clip_by_quantile(0.9999, initial=3.9)

    def step(state, key):
        _, state = tx.update(jax.random.normal(key, (1000, 400)), state)
        return state, state.threshold

    keys = jax.random.split(jax.random.key(0), 60)
    thresholds = jax.jit(lambda: jax.lax.scan(step, tx.init(None), keys)[1])()
    assert np.std(np.log(thresholds[20:])) < 0.05


def test_quantile_follows_a_drift():
    tx = clip_by_quantile(0.95, initial=2.0)

    def step(state, i):
        scale = jnp.exp(0.05 * i.astype(jnp.float32))
        _, state = tx.update(scale * jax.random.normal(jax.random.key(i), (20_000,)), state)
        return state, (state.clip_fraction, state.threshold / scale)

    _, (share, ratio) = jax.lax.scan(step, tx.init(None), jnp.arange(120))
    # It lags behind: what makes up for 5% a step is a share of 0.05 * (1 + 0.05 / 0.2).
    np.testing.assert_allclose(np.mean(share[60:]), 0.0625, rtol=0.03)
    assert np.ptp(ratio[60:]) < 0.15


@pytest.mark.parametrize("per_leaf", [False, True])
def test_quantile_bound_survives_anything(per_leaf):
    tx = clip_by_quantile(0.9, per_leaf=per_leaf)
    state = tx.init({"w": jnp.zeros(4)})
    before = jax.tree.leaves(state.threshold)
    for bad in (jnp.zeros(4), jnp.array([1, 2, jnp.nan, 3]), jnp.array([1, jnp.inf, 2, 3])):
        clipped, state = jax.jit(tx.update)({"w": bad}, state)
        chex.assert_trees_all_equal(jax.tree.leaves(state.threshold), before)
        np.testing.assert_array_equal(np.isnan(clipped["w"]), np.isnan(bad))
    # In a large array XLA's CPU backend drops NaN from a maximum.
    large = jax.random.normal(jax.random.key(0), (192, 256)).at[7, 255].set(jnp.nan)
    start = tx.init({"w": large})
    _, after = jax.jit(tx.update)({"w": large}, start)
    chex.assert_trees_all_equal(after.threshold, start.threshold)
    extremes = jnp.array([1e-38, 3e38, 1e-45, 1.0, 1e30], jnp.float32)
    for magnitude in extremes:

        def step(state, _, magnitude=magnitude):
            _, state = tx.update({"w": jnp.full(4, magnitude)}, state)
            return state, state.threshold

        state, thresholds = jax.lax.scan(step, state, length=1500)
        values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(thresholds)])
        assert np.all(values > 0)
        assert np.all(np.isfinite(values))


def test_quantile_per_leaf_has_a_bound_for_each():
    params = {"a": {"kernel": jnp.zeros((300, 300))}, "b": jnp.zeros((300, 300)), "n": None}
    scale = {"a": {"kernel": 1e-4}, "b": 50.0, "n": None}
    tx = clip_by_quantile(0.95, per_leaf=True)

    def step(state, key):
        grads = jax.tree.map(lambda s: s * jax.random.normal(key, (300, 300)), scale)
        return tx.update(grads, state)[1], None

    state, _ = jax.lax.scan(step, tx.init(params), jax.random.split(jax.random.key(0), 80))
    assert set(state.threshold) == {"a/kernel", "b"}
    true = scipy.stats.norm.ppf(0.975)
    np.testing.assert_allclose(state.threshold["a/kernel"], 1e-4 * true, rtol=0.02)
    np.testing.assert_allclose(state.threshold["b"], 50 * true, rtol=0.02)
    assert abs(float(state.clip_fraction) - 0.05) < 0.003
    with pytest.raises(ValueError, match="'c'"):
        tx.update({"c": jnp.zeros(3)}, state)


def test_quantile_per_leaf_in_an_nnx_optimizer():
    model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(clip_by_quantile(per_leaf=True), optax.sgd(0.1)), wrt=nnx.Param
    )
    grads = nnx.grad(lambda m: jnp.mean(jnp.square(m(jnp.ones((4, 64))))))(model)
    optimizer.update(model, grads)
    assert len(clip_fractions(nnx.as_pure(optimizer.opt_state))) == 1


def zclip(norms, z, decay, warmup_steps, max_norm):
    """The algorithm of arXiv:2504.02507 in float64: norms after clipping, and thresholds."""
    clipped, thresholds, collected = [], [], []
    for g in norms:
        if len(collected) < warmup_steps:
            collected.append(g)
            clipped.append(min(g, max_norm))
            thresholds.append(max_norm)
            if len(collected) == warmup_steps:
                mean, variance = np.mean(collected), np.var(collected)
            continue
        std = np.sqrt(variance)
        thresholds.append(mean + z * std)
        score = (g - mean) / std
        g = mean + z * std / (score / z) if score > z else g
        clipped.append(g)
        mean = decay * mean + (1 - decay) * g
        variance = decay * variance + (1 - decay) * (g - mean) ** 2
    return np.array(clipped), np.array(thresholds)


@pytest.mark.parametrize("size", [1.0, 1e-15, 1e15])
@pytest.mark.parametrize(
    ("z", "decay", "warmup_steps", "max_norm"), [(2.5, 0.97, 25, 1.0), (2.0, 0.9, 5, 5.0)]
)
def test_zscore_is_zclip_in_float64(z, decay, warmup_steps, max_norm, size):
    rng = np.random.default_rng(0)
    norms = 2 * np.exp(0.2 * rng.standard_normal(300)) * np.linspace(1, 0.3, 300)
    norms[[10, 60, 61, 150, 299]] *= [20, 5, 50, 1000, 1e6]
    norms *= size
    expected, thresholds = zclip(norms, z, decay, warmup_steps, max_norm * size)
    tx = clip_by_zscore(z, decay=decay, warmup_steps=warmup_steps, max_norm=max_norm * size)
    direction = rng.standard_normal(17)
    direction = {"a": direction[:5].reshape(5, 1), "b": direction[5:]}
    length = np.sqrt(sum(np.sum(d**2) for d in direction.values()))

    def step(state, norm):
        grads = {k: jnp.asarray(d / length, jnp.float32) * norm for k, d in direction.items()}
        updates, state = tx.update(grads, state)
        # In units of the size, whose square may not be a float32.
        return state, (optax.tree.norm(optax.tree.scale(1 / size, updates)), state)

    _, (found, states) = jax.jit(
        lambda: jax.lax.scan(step, tx.init(None), jnp.asarray(norms, jnp.float32))
    )()
    np.testing.assert_allclose(np.asarray(found, np.float64) * size, expected, rtol=3e-5)
    np.testing.assert_allclose(states.norm, norms, rtol=1e-5)
    np.testing.assert_allclose(states.threshold, thresholds, rtol=1e-4)
    np.testing.assert_array_equal(states.clipped, norms > thresholds)
    assert 0 < np.sum(states.clipped[warmup_steps:]) < 150


def test_zscore_records_neither_zero_nor_what_is_not_finite():
    tx = clip_by_zscore(warmup_steps=2, max_norm=10.0)
    state = tx.init(None)
    for value in (3.0, 0.0, jnp.nan, 5.0, 0.0, jnp.inf):
        _, state = tx.update(jnp.array([value, 0.0]), state)
    assert int(state.count) == 2
    np.testing.assert_allclose([state.mean, state.variance], [4, 1])
    g = jnp.array([jnp.nan, 100.0])
    updates, state = tx.update(g, state)
    np.testing.assert_array_equal(updates, g)
    updates, _ = tx.update(jnp.array([jnp.inf, 100.0]), state)
    np.testing.assert_array_equal(updates, [np.nan, 0])
    # Finite, and the square is not: not let through.
    updates, _ = tx.update(jnp.array([1e30, 100.0]), state)
    np.testing.assert_array_equal(updates, [0, 0])
    updates, after = tx.update(jnp.array([1e18, 0.0]), state)
    np.testing.assert_allclose(updates, [4, 0], rtol=1e-5)
    assert bool(after.clipped)


def test_zscore_does_not_change_what_is_no_spike():
    g = jax.random.normal(jax.random.key(0), (1000,))
    tx = clip_by_zscore(max_norm=math.inf)
    updates, state = tx.update(g, tx.init(None))
    chex.assert_trees_all_equal(updates, g)
    np.testing.assert_allclose(state.norm, np.linalg.norm(np.asarray(g, np.float64)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [*FLOATS, jnp.complex64])
@pytest.mark.parametrize("name", TRACKING)
def test_tracking_keeps_dtypes_and_state_types(platform, variant, name, dtype):
    tx = TRACKING[name]
    params = {"w": jnp.zeros((30, 20), dtype), "f": jnp.zeros(3, int), "n": optax.MaskedNode()}
    state = tx.init(params)
    for step in range(4):
        w = jax.random.normal(jax.random.key(step), (30, 20), dtype) * 10.0
        grads = {"w": w.astype(dtype), "f": np.zeros(3, jax.dtypes.float0), "n": optax.MaskedNode()}
        w, new = variant(lambda w, s, g=grads: _pick(tx.update({**g, "w": w}, s)))(
            grads["w"], state
        )
        chex.assert_equal_shape([w, grads["w"]])
        assert w.dtype == dtype
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    assert np.all(np.abs(np.asarray(w, np.complex128)) <= np.abs(np.asarray(grads["w"])) * 1.01)


def _pick(output):
    """Without the float0, which no jitted function returns."""
    updates, state = output
    assert updates["f"].dtype == jax.dtypes.float0
    return updates["w"], state


@pytest.mark.parametrize("name", TRACKING)
def test_tracking_compiles_once_and_scans(name):
    tx = TRACKING[name]
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def step(g, state):
        return tx.update(g, state)[1]

    state = tx.init(params)
    for _ in range(4):
        state = step(params, state)
    scanned, _ = jax.lax.scan(
        lambda s, _: (tx.update(params, s)[1], None), tx.init(params), length=4
    )
    chex.assert_trees_all_close(scanned, state, rtol=1e-6)
    batched = jax.vmap(lambda g: tx.update(g, tx.init(g)))(jax.tree.map(lambda p: p[None], params))
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[0], batched), tx.update(params, tx.init(params)), rtol=1e-6
    )
    with pytest.raises(TypeError, match="int32"):
        tx.update({"a": jnp.arange(3), "b": jnp.ones(5)}, tx.init(params))


@pytest.mark.parametrize("name", TRACKING)
def test_tracking_state_may_be_donated(name):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    state = TRACKING[name].init(params)
    step = jax.jit(lambda p, s: TRACKING[name].update(p, s), donate_argnums=(0, 1))
    for _ in range(2):
        params, state = step(params, state)


def test_tracking_copies_what_it_starts_from():
    one, g = jnp.float32(1.0), jnp.array([0.5, 2.0])
    for tx in (clip_by_quantile(initial=one), clip_by_zscore(max_norm=one)):
        for _ in range(2):
            jax.tree.map(lambda x: x.delete(), tx.init(g))
    assert one == 1


NUMPY = {
    "q": (clip_by_quantile, 0.9),
    "learning_rate": (clip_by_quantile, 0.2),
    "initial": (clip_by_quantile, 0.3),
    "z": (clip_by_zscore, 2.5),
    "decay": (clip_by_zscore, 0.9),
    "max_norm": (clip_by_zscore, 1.0),
}


@pytest.mark.parametrize("name", NUMPY)
def test_tracking_takes_numbers_of_numpy(name):
    make, value = NUMPY[name]
    g = jax.random.normal(jax.random.key(0), (30,))
    plain = make(**{name: value})
    expected = plain.update(g, plain.init(g))
    with jax.enable_x64(True):
        tx = make(**{name: np.float64(value)})
        state, _ = jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), tx.init(g), length=1)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected[1])
        chex.assert_trees_all_close(state, expected[1], rtol=1e-6)


def test_tracking_takes_injected_hyperparams():
    g = jax.random.normal(jax.random.key(0), (1000,))
    for factory, kwargs in ((clip_by_quantile, {"q": 0.9}), (clip_by_zscore, {"z": 2.0})):
        plain, injected = factory(**kwargs), optax.inject_hyperparams(factory)(**kwargs)
        expected, _ = plain.update(g, plain.init(g))
        found, _ = jax.jit(injected.update)(g, injected.init(g))
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clip_by_quantile(0.0), "q must be positive, got 0.0"),
        (lambda: clip_by_quantile(1), "q must be below 1, got 1"),
        (lambda: clip_by_quantile(math.nan), "q must be positive, got nan"),
        (lambda: clip_by_quantile(learning_rate=-1.0), "learning_rate must be positive, got -1.0"),
        (lambda: clip_by_quantile(initial=0), "initial must be positive, got 0"),
        (lambda: clip_by_quantile(initial=math.inf), "initial must be below inf, got inf"),
        (lambda: clip_by_zscore(0), "z must be positive, got 0"),
        (lambda: clip_by_zscore(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: clip_by_zscore(decay=math.nan), r"decay must be in \[0, 1\), got nan"),
        (lambda: clip_by_zscore(warmup_steps=1), "warmup_steps must be at least 2, .* got 1"),
        (lambda: clip_by_zscore(max_norm=-1), "max_norm must be positive, got -1; for no bound"),
    ],
)
def test_tracking_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tracking_refuses_what_is_no_integer():
    with pytest.raises(TypeError, match=r"warmup_steps must be an integer, got 2\.5"):
        clip_by_zscore(warmup_steps=2.5)  # pyright: ignore[reportArgumentType]


def test_tracking_refuses_two_leaves_of_one_path():
    params = {"a": {"b": jnp.ones(3)}, "a/b": jnp.ones(2)}
    with pytest.raises(ValueError, match="two leaves of params have the same path"):
        clip_by_quantile(per_leaf=True).init(params)
