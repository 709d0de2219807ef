import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clipquant import (
    clip_by_zscore,
)


def zclip(norms, z, decay, warmup_steps, max_norm):
    """The algorithm of arXiv:2504.02507 in float64: norms after clipping, and thresholds.

    Except that the moments take in the norm capped a little above the threshold.
    """
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
        clipped.append(mean + z * std / (score / z) if score > z else g)
        g = min(g, mean + 1.5 * z * std)
        mean = decay * mean + (1 - decay) * g
        variance = decay * variance + (1 - decay) * (g - mean) ** 2
    return np.array(clipped), np.array(thresholds)


@pytest.mark.parametrize("size", [1.0, 1e-15, 1e15])
@pytest.mark.parametrize(
    ("z", "decay", "warmup_steps", "max_norm"), [(2.5, 0.97, 25, 1.0), (2.0, 0.9, 5, 5.0)]
)
def test_matches_zclip_in_float64(z, decay, warmup_steps, max_norm, size):
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
        # In units of the size, whose square may overflow float32.
        return state, (optax.tree.norm(optax.tree.scale(1 / size, updates)), state)

    _, (found, states) = jax.jit(
        lambda: jax.lax.scan(step, tx.init(None), jnp.asarray(norms, jnp.float32))
    )()
    np.testing.assert_allclose(np.asarray(found, np.float64) * size, expected, rtol=3e-5)
    np.testing.assert_allclose(states.norm, norms, rtol=1e-5)
    np.testing.assert_allclose(states.threshold, thresholds, rtol=1e-4)
    np.testing.assert_array_equal(states.clipped, norms > thresholds)
    assert 0 < np.sum(states.clipped[warmup_steps:]) < 150


def test_zero_and_non_finite_norms_are_not_recorded():
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
    # The norm is finite but its square is not; it must not pass.
    updates, _ = tx.update(jnp.array([1e30, 100.0]), state)
    np.testing.assert_array_equal(updates, [0, 0])
    updates, after = tx.update(jnp.array([1e18, 0.0]), state)
    np.testing.assert_allclose(updates, [4, 0], rtol=1e-5)
    assert bool(after.clipped)


def test_gradients_without_a_spike_are_unchanged():
    g = jax.random.normal(jax.random.key(0), (1000,))
    tx = clip_by_zscore(max_norm=math.inf)
    updates, state = tx.update(g, tx.init(None))
    chex.assert_trees_all_equal(updates, g)
    np.testing.assert_allclose(state.norm, np.linalg.norm(np.asarray(g, np.float64)), rtol=1e-6)


@pytest.mark.parametrize("rise", [3.0, 10.0, 100.0])
def test_lasting_rise_is_accepted_and_a_single_spike_is_clipped(rise):
    rng = np.random.default_rng(0)
    norms = np.exp(0.1 * rng.standard_normal(700))
    norms[150] *= 20
    norms[200:] *= rise
    tx = clip_by_zscore()

    def step(state, norm):
        updates, state = tx.update(norm[None], state)
        return state, (jnp.abs(updates[0]), state.clipped)

    _, (found, clipped) = jax.jit(lambda x: jax.lax.scan(step, tx.init(None), x))(
        jnp.asarray(norms, jnp.float32)
    )
    assert found[150] < 3
    assert np.mean(clipped[30:200]) < 0.1
    assert np.mean(clipped[200:500]) < (0.1 if rise < 50 else 0.2)
    assert np.mean(clipped[300:]) < 0.1
