"""Training that starts from quantized params, with scales that minimise a weighted error."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clipquant import (
    Calibration,
    NormalFloat,
    Ternary,
    Uniform,
    Use,
    Uses,
    dequantize_params,
    export_params,
    quantize_calibrated,
    quantize_params,
    quantize_weights,
)

X = jax.random.normal(jax.random.key(0), (64, 24)) * jnp.exp(jnp.linspace(-2, 2, 24))[None]
PARAMS = {
    "in": jax.random.normal(jax.random.key(1), (24, 16)) / 5,
    "bias": jnp.ones(16),
    "out": jax.random.normal(jax.random.key(2), (16, 8)) / 4,
}


def model(params, x):
    x = x.astype(params["in"].dtype)
    return jnp.tanh(x @ params["in"] + params["bias"][None]) @ params["out"]


def loss(params):
    return jnp.mean(jnp.square(model(params, X).astype(jnp.float32) - 1))


MSE = {"group_size": 8, "scale_rule": "mse"}
STARTS = {
    "3 bits": (Uniform(3, **MSE), {}),
    "affine": (Uniform(4, symmetric=False, **MSE), {"importance": {"in": 1.0, "out": 1.0}}),
    "ternary": (Ternary(group_size=8), {"residual_bits": 8}),
    "codebook": (NormalFloat(3, group_size=8), {"importance": {"in": 1.0, "out": 1.0}}),
}


def calibrated(quantizer, params=PARAMS):
    return quantize_calibrated(model, params, [X], quantizer, progress=False)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in STARTS), ("3 bits", "bfloat16")]
)
def test_calibrated_codes_are_served_from_step_0(name, dtype):
    quantizer, options = STARTS[name]
    qparams = calibrated(quantizer, jax.tree.map(lambda x: x.astype(dtype), PARAMS))
    params = dequantize_params(qparams)
    tx = optax.chain(optax.sgd(1.0), quantize_weights(quantizer, start=qparams, **options))
    state = jax.jit(tx.init)(params)
    for step in range(3):
        exported = export_params(params, state)
        for leaf in ("in", "out"):
            chex.assert_trees_all_equal(exported[leaf].qvalue, qparams[leaf].qvalue)
        rate = 0.0 if step == 0 else 1e-7
        grads = jax.tree.map(lambda g, rate=rate: rate * g, jax.grad(loss)(params))
        updates, state = jax.jit(tx.update)(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        if dtype == "float32" and step == 0:
            chex.assert_trees_all_equal(params, dequantize_params(qparams))


def test_codes_change_without_a_start():
    quantizer, _ = STARTS["3 bits"]
    qparams = calibrated(quantizer)
    params = dequantize_params(qparams)
    with pytest.warns(UserWarning, match="are off the grid"):
        exported = export_params(params, quantize_weights(quantizer).init(params))
    assert any(
        np.any(np.asarray(exported[leaf].qvalue) != qparams[leaf].qvalue) for leaf in ("in", "out")
    )


def test_start_that_the_quantizer_does_not_keep_is_refused():
    qparams = calibrated(Uniform(4, **MSE))
    with pytest.raises(ValueError, match="scale_rule='mse'"):
        quantize_weights(Uniform(4, group_size=8), start=qparams)
    with pytest.raises(ValueError, match="on another grid"):
        quantize_weights(Uniform(3, **MSE), start=qparams)
    with pytest.raises(TypeError, match="start must be a tree with QArrays"):
        quantize_weights(Uniform(4, **MSE), start=PARAMS)
    tx = quantize_weights(Uniform(4, **MSE), start=qparams)
    with pytest.raises(ValueError, match=r"start has scales of \(3, 16\)"):
        tx.init({"in": jnp.ones((40, 16)), "out": jnp.ones((16, 8))})
    with pytest.raises(ValueError, match="where no leaf of params is selected: out"):
        tx.init({"in": jnp.ones((24, 16))})


def least_squares(w, importance, start):
    """The scale of the least weighted error for the nearest codes at ``start``, in float64."""
    codes = np.clip(np.round(w / start), -8, 7)
    return np.sum(importance * codes * w, axis=0) / np.sum(importance * codes**2, axis=0)


@pytest.mark.parametrize("given", ["importance", "calibration"])
def test_scales_in_training_minimise_the_weighted_error(given):
    importance = np.exp(np.linspace(-3, 3, 24))[:, None]
    moments = {"w": jnp.asarray(importance, jnp.float32)}
    calibration = Calibration(Uses({"w": Use("dot", contracted={0})}, {"w": (24, 6)}), moments)
    options = {"importance": moments} if given == "importance" else {"calibration": calibration}
    tx = quantize_weights(Uniform(4), **options)
    w = np.asarray(jax.random.normal(jax.random.key(0), (24, 6)))
    params = {"w": jnp.asarray(w)}
    state = tx.init(params)
    latent = w.astype(np.float64)
    for step in range(3):
        before = np.asarray(state.grid["w"].scale, np.float64)
        update = 0.1 * np.asarray(jax.random.normal(jax.random.key(step + 1), (24, 6)))
        latent += update
        updates, state = tx.update({"w": jnp.asarray(update)}, state, params)
        params = optax.apply_updates(params, updates)
        found = np.asarray(state.grid["w"].scale)
        expected = least_squares(latent, importance, before)
        np.testing.assert_allclose(found[0], expected, rtol=2.0**-8)


def test_weights_with_dead_inputs_keep_their_scales():
    qparams = quantize_params({"w": PARAMS["in"]}, Uniform(4, **MSE))
    dead = {"w": jnp.zeros((24, 1)).at[:8].set(1.0)}
    tx = quantize_weights(Uniform(4, **MSE), start=qparams, importance=dead)
    params = dequantize_params(qparams)
    updates, state = tx.update({"w": jnp.zeros((24, 16))}, tx.init(params), params)
    chex.assert_trees_all_equal(updates, {"w": jnp.zeros((24, 16))})
    chex.assert_trees_all_equal(state.grid["w"].scale, qparams["w"].scale)
