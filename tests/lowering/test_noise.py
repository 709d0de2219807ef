import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from optax_clipquant.lowering.noise import noise, stream_of


def numbers(shape, steps, stream=0, alone=False):
    fn = jax.jit(lambda step: noise(jnp.zeros(shape), stream_of(stream), step, alone=alone))
    return np.array([fn(step) for step in steps], np.float64)


def test_noise_is_uniform_in_each_step(platform, variant):
    fn = variant(lambda step: noise(jnp.zeros((512, 300)), stream_of(0), step))
    values = np.array([fn(step) for step in (0, 1, 2, 1000, 2**31 - 1)], np.float64)
    assert values.min() >= 0
    assert values.max() < 1
    for value in values:
        assert scipy.stats.kstest(value.ravel(), "uniform").pvalue > 1e-4
        # Along rows and columns as well: of 812 tests the least p-value is about 1/812.
        means = np.concatenate([value.mean(0) * 512**0.5, value.mean(1) * 300**0.5])
        sizes = np.concatenate([np.full(300, 512), np.full(512, 300)])
        z = (means - 0.5 * sizes**0.5) * 12**0.5
        assert np.abs(z).max() < 5
        assert 0.8 < z.var() < 1.2


@pytest.mark.parametrize("alone", [False, True])
def test_neighbours_and_streams_are_independent(alone):
    (a,) = numbers((400, 400), [3], 0, alone)
    (b,) = numbers((400, 400), [3], 1, alone)
    pairs = {
        "row": (a[1:], a[:-1]),
        "column": (a[:, 1:], a[:, :-1]),
        "diagonal": (a[1:, 1:], a[:-1, :-1]),
        "stream": (a, b),
    }
    for name, (x, y) in pairs.items():
        correlation = np.corrcoef(x.ravel(), y.ravel())[0, 1]
        assert abs(correlation) < 5 / x.size**0.5, name
    assert noise(jnp.zeros(()), stream_of(0), 3, alone=alone).shape == ()


@pytest.mark.parametrize("every", [1, 2, 3, 10])
def test_noise_is_even_over_steps(every):
    """In any run of steps, and every k-th step, the fraction below p is right to within a few."""
    values = numbers((20, 20), range(0, 1000 * every, every))
    for p in (0.003, 0.1, 0.37, 0.5, 0.9):
        below = np.cumsum(values < p, axis=0)
        off = below - p * np.arange(1, 1001)[:, None, None]
        # Independent numbers would be off by up to 3 sqrt(p (1 - p) 1000), which is 47 at p = .5.
        assert np.abs(off).max() < 10, (p, np.abs(off).max())


@pytest.mark.parametrize(("mean", "std", "bound"), [(0.01, 0.05, 0.9), (0.02, 0.005, 0.5)])
def test_sum_of_rounded_steps_drifts_less_than_with_independent_noise(mean, std, bound):
    """1,000 steps far smaller than a unit, each rounded, against their float sum."""
    updates = np.random.default_rng(0).normal(mean, std, (1000, 400))

    def final(draws):
        x = np.zeros(400)
        for u, d in zip(updates, draws, strict=True):
            x = np.floor(x + u) + (d < (x + u) - np.floor(x + u))
        off = x - updates.sum(0)
        return np.sqrt(np.mean(off**2)), np.mean(off)

    even, bias = final(numbers((400,), range(1000)))
    independent, _ = final(np.random.default_rng(1).random((1000, 400)))
    assert even < bound * independent
    assert abs(bias) < 4 * independent / 400**0.5
