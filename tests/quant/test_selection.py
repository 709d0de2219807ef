"""Selected leaves that stay unquantized, slices lost to shared scales, and small dtypes."""

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import weights

from optax_clipquant import (
    QArray,
    Uniform,
    Use,
    Uses,
    ZScore,
    allocate_bits,
    bits_per_param,
    quantize_params,
    quantize_weights,
    round_weights,
    squared_gradients,
)

SHORT = jnp.asarray(weights((1, 64)), jnp.bfloat16)
KERNEL = jnp.asarray(weights((64, 32)), jnp.bfloat16)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_leaf_that_would_not_become_smaller_stays_float(wrap):
    params = {"short": SHORT, "kernel": KERNEL}
    with pytest.warns(
        UserWarning, match=r"'short' \(1x64 bfloat16: quantized it would take 20 bits per weight\)"
    ):
        found = wrap(lambda p: quantize_params(p, Uniform(4, group_size=32)))(params)
    assert found["short"] is SHORT or np.array_equal(found["short"], SHORT)
    assert isinstance(found["kernel"], QArray)
    assert bits_per_param(found) == 4.5
    # With the axes of its use, it does become smaller.
    uses = Uses({path: Use({"dot"}, {1}) for path in params})
    assert isinstance(quantize_params(params, Uniform(4), uses=uses)["short"], QArray)


def test_leaves_that_stay_float_do_so_in_training_and_allocation():
    params = {"short": SHORT, "kernel": KERNEL}
    with pytest.warns(UserWarning, match="'short'"):
        state = quantize_weights(Uniform(4, group_size=32)).init(params)
    assert state.grid["short"] is None
    assert state.latent["short"] is None
    with (
        pytest.warns(UserWarning, match="'short'"),
        pytest.raises(ValueError, match="no leaf of params would become smaller"),
    ):
        quantize_weights(Uniform(4)).init({"short": SHORT})
    ones = jax.tree.map(jnp.ones_like, params)
    with pytest.warns(UserWarning, match="'short'"):
        rules = allocate_bits(params, ones, bits_per_param=6.0)
    assert set(rules) == {"^kernel$"}


def test_leaves_at_the_limit_are_decided_by_their_float_size():
    """16 bits per weight gain nothing over bfloat16, but halve float32; an empty leaf is quantized."""
    leaf = jnp.asarray(weights((2, 8)))
    halved = quantize_params({"w": leaf}, Uniform(8))["w"]
    assert isinstance(halved, QArray)
    assert 8 * halved.nbytes_packed == 16 * leaf.size
    with pytest.warns(UserWarning, match="16 bits per weight"):
        quantize_params({"w": leaf.astype(jnp.bfloat16)}, Uniform(8))
    assert isinstance(quantize_params({"w": jnp.zeros((0, 4))}, Uniform(8))["w"], QArray)


def stack(shape=(3, 16, 8)):
    scale = jnp.asarray([1.0, 1e-4, 1.0]).reshape(-1, *[1] * (len(shape) - 1))
    return {"layers": {"kernel": jnp.asarray(weights(shape)) * scale}}


def test_layer_lost_to_a_shared_scale_is_reported():
    message = (
        r"zero in 1 of 3 slices of 'layers/kernel' along its first axis.*trace_weights\(fn, params"
    )
    with pytest.warns(UserWarning, match=message):
        quantize_params(stack(), Uniform(4))
    with pytest.warns(UserWarning, match=message):
        quantize_params(stack((3, 64)), Uniform(4))  # rows of an embedding
    for transform in (quantize_weights, round_weights):
        with pytest.warns(UserWarning, match=message):
            transform(Uniform(4)).init(stack())


@pytest.mark.parametrize(
    "quantize",
    [
        jax.jit(lambda params: quantize_params(params, Uniform(4))),
        lambda params: quantize_params(params, Uniform(4, channel_axis=(0, -1))),
        lambda params: quantize_params(params, Uniform(4), uses=Uses({"layers/kernel": Use({"dot"}, {1})})),
        lambda params: quantize_params(params, Uniform(2)),  # which has no level at zero
        lambda params: quantize_params({"w": params["layers"]["kernel"][0, :, :1] * 1e-3**jnp.arange(16.0)[:, None]}, Uniform(4)),
        lambda params: quantize_params(jax.tree.map(lambda w: w.at[1].set(0), params), Uniform(4)),
        jax.jit(quantize_weights(Uniform(4)).init),
        quantize_weights(Uniform(4), uses=Uses({"layers/kernel": Use({"dot"}, {1})})).init,
    ],
    ids=[
        *("jit", "a scale each", "uses", "no zero level", "rows of one weight", "zero before"),
        *("training, jit", "training, uses"),
    ],
)  # fmt: skip
def test_no_warning_where_no_slice_is_lost(quantize):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(stack())


FLOAT8 = [
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e4m3b11fnuz", "float8_e4m3", "float8_e3m4"),
]


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_is_quantized_through_float32(name):
    w = jnp.asarray(weights((32, 8)) * 0.3).astype(name)
    wide = np.asarray(w.astype(jnp.float32))
    for quantizer in (Uniform(4), Uniform(3, symmetric=False), ZScore(3)):
        q = quantize_params({"kernel": w}, quantizer)["kernel"]
        assert q.dtype == w.dtype
        found = np.asarray(q.dequantize().astype(jnp.float32))
        by_float32 = quantizer.quantize(jnp.asarray(wide))
        np.testing.assert_array_equal(q.qvalue, by_float32.qvalue)
        # Only the levels are rounded to float8.
        eps = float(ml_dtypes.finfo(name).eps)
        np.testing.assert_allclose(found, by_float32.dequantize(), rtol=eps / 2, atol=2e-2)


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float8_e8m0fnu", "float6_e2m3fn"])
def test_codes_and_scales_of_other_programs_are_left_alone(name):
    leaf = np.ones((8, 4)).astype(getattr(ml_dtypes, name))
    params = {"blocks": leaf if "6" in name else jnp.asarray(leaf), "kernel": KERNEL}
    with pytest.warns(UserWarning, match=rf"'blocks' \({name}: codes or scales already\)"):
        found = quantize_params(params, Uniform(4))
    assert found["blocks"] is params["blocks"]
    assert isinstance(found["kernel"], QArray)


def test_squared_gradients_skip_integer_params():
    def loss(params, x):
        return jnp.sum(params["w"][params["order"]] * x)

    params = {"w": jnp.ones(2), "order": jnp.asarray([1, 0])}
    found = squared_gradients(loss, params, [jnp.asarray([1.0, 2.0])])
    np.testing.assert_array_equal(found["w"], [4, 1])
    np.testing.assert_array_equal(found["order"], [0, 0])
