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
    narrow,
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
    with pytest.raises(ValueError, match="uses=trace_weights"):
        quantize_weights(Uniform(3, **MSE), start=qparams)
    with pytest.raises(ValueError, match="'out' is a QArray, but no rule of the quantizer matches"):
        quantize_weights({"in": Uniform(4, **MSE)}, start=qparams)
    with pytest.raises(TypeError, match="start must be a tree with QArrays"):
        quantize_weights(Uniform(4, **MSE), start=PARAMS)
    tx = quantize_weights(Uniform(4, **MSE), start=qparams)
    with pytest.raises(ValueError, match=r"start has scales of \(3, 16\)"):
        tx.init({"in": jnp.ones((40, 16)), "out": jnp.ones((16, 8))})
    with pytest.raises(ValueError, match="where no leaf of params is selected: 'out'"):
        tx.init({"in": jnp.ones((24, 16))})


def test_leaves_that_the_start_left_float_are_rounded_with_a_warning():
    quantizer = Uniform(4, **MSE)
    qparams = calibrated(quantizer) | {"out": PARAMS["out"]}
    tx = quantize_weights(quantizer, start=qparams)
    with pytest.warns(UserWarning, match="start has no QArray for 'out', which the rules select"):
        assert tx.init(dequantize_params(qparams)).grid["out"] is not None
    tx = quantize_weights({"in": quantizer, "out": None}, start=qparams)
    assert tx.init(dequantize_params(qparams)).grid["out"] is None


def zero_step(qparams, params, quantizer=Uniform(4, **MSE)):  # noqa: B008 (immutable)
    """The params and two states of two steps with zero gradients."""
    tx = quantize_weights(quantizer, start=qparams)
    first = tx.init(params)
    update = jax.jit(tx.update)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, second = update(zeros, first, params)
    with jax.numpy_dtype_promotion("standard"):
        params = optax.apply_updates(params, updates)
    updates, third = update(zeros, second, params)
    return params, first, third, update


def test_half_precision_params_stay_where_no_gradient_moves_them():
    qparams = quantize_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS), Uniform(4, **MSE))  # fmt: skip
    before = dequantize_params(qparams)
    params, first, third, _ = zero_step(qparams, before)
    chex.assert_trees_all_equal(params, before)
    chex.assert_trees_all_equal(first.grid, third.grid)


def test_narrow_codes_are_a_start():
    qparams = quantize_params(PARAMS, Uniform(4, **MSE))
    params = dequantize_params(qparams)
    served, first, third, _ = zero_step(narrow(qparams), params)
    chex.assert_trees_all_equal(served, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, third)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_scales_of_a_start_are_sharded_like_the_params():
    mesh = jax.make_mesh((2,), ("data",))
    qparams = quantize_params({"w": PARAMS["in"]}, Uniform(4, **MSE))
    columns = jax.NamedSharding(mesh, jax.P(None, "data"))
    params = jax.device_put(dequantize_params(qparams), columns)
    _, first, third, _ = zero_step(qparams, params)
    assert first.grid["w"].scale.sharding == columns
    assert third.grid["w"].scale.sharding == columns


def test_importance_that_weights_nothing_is_refused():
    quantizer, params = Uniform(4, **MSE), {"w": PARAMS["in"]}
    for importance, error, match in [
        (lambda path: 1.0, TypeError, "importance leaf .* must be an array, got <function"),
        ({"params": {"w": 1.0}}, ValueError, "'params/w', and these are to be quantized: 'w'"),
        ({"w": jnp.full((24, 1), jnp.nan)}, ValueError, "leaf 'w' is negative or not finite"),
        ({"w": -1.0}, ValueError, "leaf 'w' is negative or not finite"),
        (Calibration(Uses({}), {}), TypeError, "give it as calibration="),
    ]:
        with pytest.raises(error, match=match):
            quantize_params(params, quantizer, importance=importance)
        with pytest.raises(error, match=match):
            quantize_weights(quantizer, importance=importance).init(params)
    with pytest.raises(TypeError, match="must be a Calibration"):
        quantize_params(params, quantizer, calibration={"w": 1.0})


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
