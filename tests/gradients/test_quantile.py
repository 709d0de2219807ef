import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx
from helpers import case_rows

from optax_clipquant import (
    clip_by_quantile,
    clip_fractions,
)


def student(key, shape):
    """Student's t with 2 degrees of freedom."""
    a, b = jax.random.split(key)
    return jax.random.normal(a, shape) / jnp.sqrt(jax.random.exponential(b, shape))


DRAWS = {
    "normal": (jax.random.normal, scipy.stats.norm()),
    "laplace": (jax.random.laplace, scipy.stats.laplace()),
    "student": (student, scipy.stats.t(2.0)),
    "cauchy": (jax.random.cauchy, scipy.stats.cauchy()),
}


@pytest.mark.parametrize(
    ("draw", "q"),
    case_rows(
        itertools.product(DRAWS, (0.1, 0.999)),
        [("normal", 0.1), ("normal", 0.999), ("cauchy", 0.1), ("cauchy", 0.999)],
    )
    + case_rows([("laplace", 0.9), ("student", 0.99)], []),
)
def test_bound_converges_from_1000_times_off(draw, q):
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


def test_step_matches_the_formula_in_float64():
    g = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    for q, c in ((0.99, 2.5), (0.99, 2.0), (0.99, 10.0), (0.9, 1.6), (0.2, 0.3)):
        tx = clip_by_quantile(q, learning_rate=0.1, initial=c)
        clipped, state = tx.update(jnp.asarray(g), tx.init(None))
        np.testing.assert_array_equal(clipped, np.clip(g, -np.float32(c), np.float32(c)))
        f = np.mean(np.abs(g) > np.float32(c))
        np.testing.assert_allclose(state.clip_fraction, f, rtol=1e-6)
        off = np.clip((f - (1 - q)) / min(q, 1 - q), -1, 1)
        np.testing.assert_allclose(state.threshold, c * np.exp(0.1 * off), rtol=1e-5)


def test_bound_does_not_oscillate_in_the_tail():
    """Undamped, the bound would oscillate about the quantile 0.9999 forever."""
    tx = clip_by_quantile(0.9999, initial=3.9)

    def step(state, key):
        _, state = tx.update(jax.random.normal(key, (1000, 400)), state)
        return state, state.threshold

    keys = jax.random.split(jax.random.key(0), 60)
    thresholds = jax.jit(lambda: jax.lax.scan(step, tx.init(None), keys)[1])()
    assert np.std(np.log(thresholds[20:])) < 0.05


def test_bound_follows_a_drift():
    tx = clip_by_quantile(0.95, initial=2.0)

    def step(state, i):
        scale = jnp.exp(0.05 * i.astype(jnp.float32))
        _, state = tx.update(scale * jax.random.normal(jax.random.key(i), (20_000,)), state)
        return state, (state.clip_fraction, state.threshold / scale)

    _, (share, ratio) = jax.lax.scan(step, tx.init(None), jnp.arange(120))
    # It lags: keeping up with 5% per step takes a clipped fraction of 0.05 * (1 + 0.05 / 0.2).
    np.testing.assert_allclose(np.mean(share[60:]), 0.0625, rtol=0.03)
    assert np.ptp(ratio[60:]) < 0.15


@pytest.mark.parametrize("per_leaf", [False, True])
def test_bound_stays_positive_and_finite(per_leaf):
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


def test_per_leaf_keeps_a_bound_for_each_leaf():
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


def test_per_leaf_works_in_an_nnx_optimizer():
    model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(clip_by_quantile(per_leaf=True), optax.sgd(0.1)), wrt=nnx.Param
    )
    grads = nnx.grad(lambda m: jnp.mean(jnp.square(m(jnp.ones((4, 64))))))(model)
    optimizer.update(model, grads)
    assert len(clip_fractions(nnx.as_pure(optimizer.opt_state))) == 1


@pytest.mark.parametrize("per_leaf", [False, True])
def test_zeros_are_not_counted(per_leaf):
    """The bound follows the few rows of an embedding that a step touches."""
    tx = clip_by_quantile(0.99, per_leaf=per_leaf)

    def step(state, key):
        touched, draw = jax.random.split(key)
        rows = jax.random.randint(touched, (32,), 0, 5_000)
        values = jax.random.normal(draw, (32, 16))
        grads = {"embedding": jnp.zeros((5_000, 16)).at[rows].set(values)}
        _, state = tx.update(grads, state)
        return state, jax.tree.leaves(state.threshold)[0]

    keys = jax.random.split(jax.random.key(0), 300)
    _, thresholds = jax.jit(
        lambda: jax.lax.scan(step, tx.init({"embedding": jnp.zeros((5_000, 16))}), keys)
    )()
    assert 1.8 < thresholds[-1] < 3.6
    assert np.all((thresholds[100:] > 1.5) & (thresholds[100:] < 4.5))


def test_bound_is_nearly_unbiased_with_few_elements():
    """Where at most one element is clamped, the step is proportional to the expected number."""
    tx = clip_by_quantile(0.99)

    def step(state, key):
        g = jnp.zeros(1000).at[:8].set(jax.random.normal(key, (8,)))
        _, state = tx.update(g, state)
        return state, state.threshold

    keys = jax.random.split(jax.random.key(0), 6000)
    _, thresholds = jax.jit(lambda: jax.lax.scan(step, tx.init(None), keys))()
    true = scipy.stats.norm.ppf(0.995)
    assert abs(np.mean(np.log(thresholds[1000:] / true))) < 0.15
