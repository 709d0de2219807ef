import re
import warnings

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    CORE,
    FORMULAS,
    QUANTIZERS,
    assert_on_grid,
    batch,
    cases,
    make_step,
    mlp_params,
    optimizer,
    projected,
)

from optax_clipquant import (
    Ternary,
    Uniform,
    export_params,
    latent_params,
    quantize_weights,
    softness_schedule,
)
from optax_clipquant.training.softness import soften


@pytest.mark.parametrize("steepness", [0.5, 20.0, 1000.0])
def test_schedule_matches_the_scaled_sigmoid(platform, variant, steepness):
    schedule = variant(softness_schedule(100, 900, steepness))
    counts = np.arange(0, 1000, 7)
    values = np.array([schedule(jnp.asarray(count, jnp.int32)) for count in counts])
    ratio = (counts - 100) / 800
    with np.errstate(over="ignore"):
        fall = 1 / (1 + np.exp(steepness * (ratio - 0.5)))
        first, last = 1 / (1 + np.exp(-steepness / 2)), 1 / (1 + np.exp(steepness / 2))
    expected = np.where(
        counts <= 100, 1, np.where(counts >= 900, 0, (fall - last) / (first - last))
    )
    np.testing.assert_allclose(values, expected, atol=2e-6)
    assert np.all(values[counts <= 100] == 1)
    assert np.all(values[counts >= 900] == 0)
    assert np.all(np.diff(values) <= 0)
    chex.assert_type(schedule(jnp.asarray(5, jnp.int32)), jnp.float32)


def test_schedule_accepts_vectors_and_python_numbers():
    schedule = softness_schedule(0, 10)
    np.testing.assert_array_equal(schedule(jnp.array([0, 10, 11])), [1, 0, 0])
    assert schedule(0) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((5, 5), "need 0 <= start < end, got 5 and 5"),
        ((-1, 5), "got -1 and 5"),
        ((0, 5, 0.0), "steepness must be positive, got 0.0"),
        ((0, 5, float("nan")), "steepness must be positive, got nan"),
    ],
)
def test_schedule_refuses_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        softness_schedule(*args)


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@hypothesis.given(hnp.arrays(np.float32, (2, 5), elements=FLOATS))
def test_softness_0_and_1_are_exact(pair):
    level, latent = jnp.asarray(pair)
    np.testing.assert_array_equal(soften(level, latent, 0), level)
    np.testing.assert_array_equal(soften(level, latent, jnp.float32(1)), latent)


@hypothesis.given(
    hnp.arrays(np.float32, (2, 5), elements=st.floats(-1e6, 1e6, width=32)),
    st.lists(st.floats(0, 1, width=32), min_size=3, max_size=8),
)
def test_softness_is_monotone(pair, values):
    level, latent = pair
    path = np.array([soften(level, latent, s) for s in sorted(values)], np.float64)
    reach = np.abs(latent - level.astype(np.float64))
    tolerance = 1e-6 * (np.abs(level) + np.abs(latent)) + 1e-30
    distance = np.abs(path - level)
    assert np.all(np.diff(distance, axis=0) >= -tolerance)
    assert np.all(distance <= reach + tolerance)
    exact = level + np.array(sorted(values))[:, None] * (latent - level.astype(np.float64))
    np.testing.assert_allclose(path, exact, rtol=0, atol=float(tolerance.max()))


def test_softness_1_trains_like_float():
    x, y = batch()
    soft, plain = optimizer(quantize_weights(Uniform(bits=2), softness=1.0)), optimizer()
    params = {"soft": projected(Uniform(bits=2)), "plain": projected(Uniform(bits=2))}
    states = {"soft": soft.init(params["soft"]), "plain": plain.init(params["plain"])}
    for _ in range(5):
        for name, tx in (("soft", soft), ("plain", plain)):
            params[name], states[name], _ = make_step(tx)(params[name], states[name], x, y)
    chex.assert_trees_all_close(params["soft"], params["plain"], rtol=1e-5, atol=1e-6)
    latent = latent_params(params["soft"], states["soft"])
    chex.assert_trees_all_close(latent, params["soft"], rtol=1e-6, atol=1e-7)


def test_softness_0_stays_on_the_grid():
    for softness in (0.0, lambda count: 0.0 * count):
        tx = optimizer(quantize_weights(Uniform(bits=3), softness=softness))
        hard = optimizer(quantize_weights(Uniform(bits=3)))
        params = projected(Uniform(bits=3))
        results = [jax.jit(make_step(t))(params, t.init(params), *batch())[:2] for t in (tx, hard)]
        chex.assert_trees_all_equal(results[0], results[1])


@pytest.mark.parametrize("name", cases(CORE, [*FORMULAS, "binary"]))
def test_on_the_grid_from_the_end_of_the_schedule(name):
    """Before that they are off the grid, and exporting reports the number of such weights."""
    chex.clear_trace_counter()
    tx = optimizer(quantize_weights(QUANTIZERS[name], softness=softness_schedule(1, 6)))
    params = projected(QUANTIZERS[name])
    state = tx.init(params)
    step = jax.jit(chex.assert_max_traces(make_step(tx), 1))
    for _ in range(3):
        params, state, _ = step(params, state, *batch())
    with pytest.warns(UserWarning, match=r"\d+ of 160 weights are off the grid"):
        export_params(params, state)
    for _ in range(6):  # the last with softness 1 is the 2nd, the first with 0 the 7th
        params, state, _ = step(params, state, *batch())
    for _ in range(3):
        params, state, _ = step(params, state, *batch())
        assert_on_grid(params, state)


def test_schedule_works_under_scan():
    tx = optimizer(quantize_weights(Ternary(), softness=softness_schedule(2, 20)))
    params = projected(Ternary())

    def body(carry, _):
        params, state, loss = make_step(tx)(*carry, *batch())
        return (params, state), loss

    (params, state), losses = jax.jit(
        lambda params: jax.lax.scan(body, (params, tx.init(params)), length=60)
    )(params)
    assert_on_grid(params, state)
    assert losses[-1] < losses[0]


def test_works_with_inject_hyperparams():
    """Softness can be set by hand, as a hyperparameter in the state."""
    tx = optax.inject_hyperparams(quantize_weights, static_args="residual_bits")(
        quantizer=Uniform(bits=3), softness=1.0
    )
    params = projected(Uniform(bits=3))
    state = tx.init(params)
    updates = jax.tree.map(lambda p: 0.01 * jnp.ones_like(p), params)
    emitted, state = jax.jit(tx.update)(updates, state, params)
    chex.assert_trees_all_close(emitted, updates, atol=1e-6)
    state.hyperparams["softness"] = jnp.zeros_like(state.hyperparams["softness"])
    for _ in range(3):
        emitted, state = jax.jit(tx.update)(updates, state, params)
        params = optax.apply_updates(params, emitted)
    assert_on_grid(params, state)


@pytest.mark.parametrize("softness", [-0.1, 1.5, float("nan"), np.float32(2)])
def test_numbers_outside_0_to_1_are_refused(softness):
    with pytest.raises(ValueError, match="softness must be from 0 to 1, got"):
        quantize_weights(Uniform(bits=4), softness=softness)


def test_no_warning_on_the_grid():
    tx = quantize_weights(Uniform(bits=4), softness=0.0)
    params = projected(Uniform(bits=4))
    state = tx.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_params(params, state)


@pytest.mark.parametrize("steepness", [1e-7, 1e-3, 1.0, 20.0, 200.0])
def test_schedule_matches_float64_at_any_steepness(steepness):
    r = np.arange(11) / 10
    expected = (1 + np.tanh(steepness / 2 * (0.5 - r)) / np.tanh(steepness / 4)) / 2
    found = softness_schedule(0, 10, steepness)(jnp.arange(11))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("softness", ["0.5", True, [0.5]])
def test_what_is_no_number_is_refused(softness):
    with pytest.raises(
        TypeError, match=f"must be a number or a schedule, got {re.escape(repr(softness))}"
    ):
        quantize_weights(Uniform(bits=4), softness=softness)


@pytest.mark.parametrize("value", [None, np.full(3, 0.5)])
def test_schedule_that_gives_no_scalar_is_refused(value):
    tx, params = quantize_weights(Uniform(bits=4), softness=lambda count: value), mlp_params()
    with pytest.raises((TypeError, ValueError), match="softness, as the schedule gives it, must"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(("given", "used"), [(1.5, 1.0), (-0.5, 0.0)])
def test_scheduled_softness_is_clipped_to_0_to_1(given, used):
    params = projected(Uniform(bits=4))
    updates = jax.tree.map(lambda p: 0.01 * jnp.ones_like(p), params)
    emitted = []
    for softness in (lambda count: given, used):
        tx = quantize_weights(Uniform(bits=4), softness=softness)
        emitted.append(tx.update(updates, tx.init(params), params)[0])
    chex.assert_trees_all_equal(*emitted)
