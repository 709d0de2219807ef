import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import NAMES, QUANTIZERS, weights

from optax_clipquant import (
    QArray,
    Ternary,
    Uniform,
    ZScore,
    dequantize_params,
    narrow,
    quantize_params,
)


@pytest.mark.parametrize(
    ("quantizer", "nbytes"),
    [
        (Uniform(bits=1), 33 * 5 / 8 + 10),
        (Uniform(bits=3), 33 * 5 * 3 / 8 + 10),
        (Uniform(bits=4, group_size=16), 33 * 5 / 2 + 2 * 3 * 5),
        (Uniform(bits=8, symmetric=False), 33 * 5 + 10 + 5),
        (Ternary(), 33 + 10),
        (ZScore(R=7), 33 * 5 / 2 + 2 + 4),
    ],
)
def test_nbytes_packed(quantizer, nbytes):
    assert quantizer.quantize(jnp.asarray(weights((33, 5)))).nbytes_packed == math.ceil(nbytes)


@pytest.mark.parametrize("name", NAMES)
def test_narrow_keeps_all_values(name):
    tree = {"w": QUANTIZERS[name].quantize(jnp.asarray(weights((9, 4)))), "b": jnp.ones(3)}
    narrowed = narrow(tree)
    bits = tree["w"].grid.bits
    expected = jnp.int2 if bits <= 2 else jnp.int4 if bits <= 4 else jnp.int8
    chex.assert_type(narrowed["w"].qvalue, expected)
    chex.assert_trees_all_equal(dequantize_params(narrowed), dequantize_params(tree))
    chex.assert_trees_all_equal(narrowed["b"], tree["b"])
    if tree["w"].zero_point is None:
        chex.assert_type(narrowed["w"].scale, jnp.bfloat16)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, 8)(tokens)
        x = nn.Conv(8, (3,))(x)
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x, x)
        return nn.Dense(5)(x)


def test_linen_layers_accept_qarrays_as_params(variant):
    # Flax's own layers mix dtypes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = Linen()
        tokens = jnp.arange(14).reshape(2, 7)
        params = model.init(jax.random.key(0), tokens)["params"]
        qparams = quantize_params(params, Uniform(bits=4))
        assert isinstance(qparams["Embed_0"]["embedding"], QArray)
        out = variant(lambda p: model.apply({"params": p}, tokens))(qparams)
        expected = variant(lambda p: model.apply({"params": p}, tokens))(dequantize_params(qparams))
    chex.assert_trees_all_close(out, expected, rtol=1e-5, atol=1e-6)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.dense = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, tokens):
        x = self.conv(self.embed(tokens))
        return self.dense(self.attention(x, x))


def test_nnx_modules_accept_qarrays_as_params():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        graphdef, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)
        tokens = jnp.arange(14).reshape(2, 7)
        qparams = quantize_params(params, Uniform(bits=4))
        out = nnx.merge(graphdef, qparams, rest)(tokens)
        expected = nnx.merge(graphdef, dequantize_params(qparams), rest)(tokens)
    chex.assert_trees_all_close(out, expected, rtol=1e-5, atol=1e-6)
