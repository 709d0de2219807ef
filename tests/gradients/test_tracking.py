"""Properties shared by the transforms that keep a running state."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cases

from optax_clipquant import (
    clip_by_quantile,
    clip_by_zscore,
)

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]

TRACKING = {
    "quantile": clip_by_quantile(),
    "quantile-per-leaf": clip_by_quantile(per_leaf=True),
    "zscore": clip_by_zscore(warmup_steps=2),
}


@pytest.mark.parametrize("dtype", cases([*FLOATS, jnp.complex64], [jnp.float32, jnp.bfloat16]))
@pytest.mark.parametrize("name", TRACKING)
def test_tracking_keeps_dtypes_and_state_types(platform, variant, name, dtype):
    tx = TRACKING[name]
    params = {"w": jnp.zeros((30, 20), dtype), "f": jnp.zeros(3, int), "n": optax.MaskedNode()}
    state = tx.init(params)
    others = {"f": np.zeros(3, jax.dtypes.float0), "n": optax.MaskedNode()}
    update = variant(lambda g, state: _pick(tx.update({**others, "w": g}, state)))
    for step in range(4):
        g = (jax.random.normal(jax.random.key(step), (30, 20), dtype) * 10.0).astype(dtype)
        w, new = update(g, state)
        chex.assert_equal_shape([w, g])
        assert w.dtype == dtype
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    assert np.all(np.abs(np.asarray(w, np.complex128)) <= np.abs(np.asarray(g)) * 1.01)


def _pick(output):
    """The tree without float0 leaves, which a jitted function cannot return."""
    updates, state = output
    assert updates["f"].dtype == jax.dtypes.float0
    return updates["w"], state


@pytest.mark.parametrize("name", cases(TRACKING, ["quantile-per-leaf", "zscore"]))
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
def test_tracking_state_can_be_donated(name):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    state = TRACKING[name].init(params)
    step = jax.jit(lambda p, s: TRACKING[name].update(p, s), donate_argnums=(0, 1))
    for _ in range(2):
        params, state = step(params, state)


def test_tracking_copies_its_initial_values():
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
def test_tracking_accepts_numpy_numbers(name):
    make, value = NUMPY[name]
    g = jax.random.normal(jax.random.key(0), (30,))
    plain = make(**{name: value})
    expected = plain.update(g, plain.init(g))
    with jax.enable_x64(True):
        tx = make(**{name: np.float64(value)})
        state, _ = jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), tx.init(g), length=1)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected[1])
        chex.assert_trees_all_close(state, expected[1], rtol=1e-6)


def test_tracking_works_with_inject_hyperparams():
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
        (
            lambda: clip_by_zscore(max_norm=-1),
            "max_norm must be positive, got -1; give math.inf for no limit",
        ),
    ],
)
def test_tracking_refuses_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tracking_refuses_a_non_integer_warmup():
    with pytest.raises(TypeError, match=r"warmup_steps must be an integer, got 2\.5"):
        clip_by_zscore(warmup_steps=2.5)  # pyright: ignore[reportArgumentType]


def test_tracking_refuses_a_decay_that_is_no_number():
    with pytest.raises(TypeError, match=r"decay must be a number in \[0, 1\), got None"):
        clip_by_zscore(decay=None)  # pyright: ignore[reportArgumentType]


def test_tracking_refuses_duplicate_paths():
    params = {"a": {"b": jnp.ones(3)}, "a/b": jnp.ones(2)}
    with pytest.raises(ValueError, match="two leaves of params have the same path"):
        clip_by_quantile(per_leaf=True).init(params)
