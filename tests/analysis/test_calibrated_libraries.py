"""quantize_calibrated on models of Flax, NNX and Equinox, and on uses that it cannot compensate."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_clipquant import (
    QArray,
    Uniform,
    dequantize_params,
    quantize_calibrated,
    quantize_params,
    trace_weights,
)

ONCE, POOLED, SEARCH = "compensated", "compensated, pooled", "weighted search"
PLAIN = "least squares"
QUANTIZER = Uniform(3, group_size=8, scale_rule="mse")
TOKENS = [jax.random.randint(jax.random.key(seed), (16, 12), 0, 40) for seed in range(3)]


def vectors(*shape, seeds=3):
    """Correlated vectors of very different power, like activations."""
    width = shape[-1]
    mix = jax.random.normal(jax.random.key(9), (width, width)) / width**0.5
    mix *= jnp.exp(jnp.linspace(-1.5, 1.5, width))[None]
    return [jax.random.normal(jax.random.key(seed), shape) @ mix for seed in range(seeds)]


def linen(module, example):
    params = module.init(jax.random.key(0), example)["params"]
    return lambda params, x: module.apply({"params": params}, x), params


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(use_fast_variance=False)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h)
        h = nn.gelu(nn.Dense(32)(nn.LayerNorm(use_fast_variance=False)(x)))
        return x + nn.Dense(16)(h), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, 16)
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return embed.attend(blocks(name="blocks")(embed(tokens), None)[0])


def linen_transformer():
    names = ("query", "key", "value", "out")
    attention = {f"blocks/MultiHeadDotProductAttention_0/{name}/kernel": ONCE for name in names}
    dense = {f"blocks/Dense_{i}/kernel": ONCE for i in (0, 1)}
    methods = {"Embed_0/embedding": ONCE, **attention, **dense}
    return *linen(Transformer(), TOKENS[0]), TOKENS, methods


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class NNXTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(40, 16, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(NNXBlock))(rngs)
        self.head = nnx.Linear(16, 40, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return self.head(run(self.embed(tokens), self.blocks))


def nnx_transformer():
    graphdef, params, rest = nnx.split(NNXTransformer(nnx.Rngs(0)), nnx.Param, ...)
    names = ("query", "key", "value", "out")
    return (
        lambda params, tokens: nnx.merge(graphdef, params, rest)(tokens),
        params,
        TOKENS,
        {
            "embed/embedding": PLAIN,  # rows are looked up, and met by no data
            **{f"blocks/attention/{name}/kernel": ONCE for name in names},
            **{f"blocks/{name}/kernel": ONCE for name in ("up", "down")},
            "head/kernel": ONCE,
        },
    )


class Equinox(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, 16, key=key)
        self.mlp = eqx.nn.MLP(16, 8, 24, 1, key=key)

    def __call__(self, x):
        return jax.vmap(self.mlp)(x + self.attention(x, x, x))


def equinox_under_vmap():
    params, rest = eqx.partition(Equinox(jax.random.key(0)), eqx.is_array)
    names = ("query", "key", "value", "output")
    attention = {f"attention/{name}_proj/weight": ONCE for name in names}
    layers = {f"mlp/layers/{i}/weight": ONCE for i in (0, 1)}

    def fn(params, x):
        return jax.vmap(eqx.combine(params, rest))(x)

    return fn, params, vectors(16, 12, 16), attention | layers


def lstm():
    fn, params = linen(nn.RNN(nn.OptimizedLSTMCell(16)), vectors(4, 10, 16)[0])
    methods = {f"cell/{side}{gate}/kernel": POOLED for side in "ih" for gate in "ifgo"}
    return fn, params, vectors(16, 10, 16), methods


def shared_layer():
    """One layer that is applied twice, to data of different kinds."""

    def fn(params, x):
        h = jnp.tanh(x @ params["shared"])
        return jnp.tanh(h @ params["shared"]) @ params["out"]

    return fn, plain({"shared": (16, 16), "out": (16, 8)}), vectors(150, 16), {"shared": POOLED, "out": ONCE}  # fmt: skip


def ragged_experts():
    """A primitive that is evaluated whole is named, and its weight quantized by least squares; later ones are not."""

    def fn(params, x):
        sizes = jnp.array([40, 60, 50])
        return jnp.tanh(jax.lax.ragged_dot(x, params["experts"], sizes)) @ params["out"]

    return fn, plain({"experts": (3, 16, 12), "out": (12, 8)}), vectors(150, 16), {"experts": PLAIN, "out": ONCE}  # fmt: skip


def plain(shapes):
    return {
        name: jax.random.normal(jax.random.key(i), shape) / shape[-2] ** 0.5
        for i, (name, shape) in enumerate(shapes.items())
    }


# The largest ratio of the output's error, in squares, to that of least squares. What is looked up, or
# evaluated whole, is quantized as there.
MODELS = {
    linen_transformer: 0.85,  # half of the error comes from rows of the tied embedding that are looked up
    nnx_transformer: 0.7,
    equinox_under_vmap: 0.5,
    lstm: 0.6,
    shared_layer: 0.6,
    ragged_experts: 0.9,
}


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, marks=() if make is shared_layer else pytest.mark.slow) for make in MODELS],
)
def test_output_error_is_below_least_squares(make):
    fn, params, batches, methods = make()
    params = jax.tree.map(lambda x: x, params)
    qparams, report = quantize_calibrated(
        fn, params, batches, QUANTIZER, progress=False, return_report=True
    )
    found = {row.path.removesuffix("/.value"): row.method for row in report.rows}
    assert found == methods
    uses = trace_weights(fn, params, batches[0])
    least_squares = quantize_params(params, QUANTIZER, uses=uses)

    def is_q(x):
        return isinstance(x, QArray)

    pairs = zip(*(jax.tree.leaves(x, is_leaf=is_q) for x in (qparams, least_squares)), strict=True)
    for ours, theirs in pairs:
        assert is_q(ours) == is_q(theirs)
        if is_q(ours):
            chex.assert_equal_shape([ours.scale, theirs.scale])
        else:
            chex.assert_trees_all_equal(ours, theirs)
    run = jax.jit(fn)

    def error(qparams):
        restored = dequantize_params(qparams)
        return sum(float(jnp.sum(jnp.square(run(restored, x) - run(params, x)))) for x in batches)

    assert error(qparams) < MODELS[make] * error(least_squares)


def test_expert_with_few_tokens_falls_back_to_the_diagonal():
    """Off-diagonals of 3 tokens are noise: the expert gets the codes of the weighted search with H's diagonal."""
    width, tokens = 32, 300

    def fn(params, x):
        gate = jax.nn.one_hot((jnp.arange(tokens) < 3).astype(jnp.int32), 2)
        return jnp.einsum("etd,edo->eto", jnp.einsum("te,td->etd", gate, x), params["w"])

    params = plain({"w": (2, width, 6)})
    x = vectors(tokens, width, seeds=1)
    qparams, report = quantize_calibrated(
        fn, params, x, QUANTIZER, progress=False, return_report=True
    )
    (row,) = report.rows
    assert row.tokens == 3
    few, many = np.asarray(x[0][:3], np.float64), np.asarray(x[0][3:], np.float64)
    w = np.asarray(params["w"], np.float64)
    decoded = np.asarray(qparams["w"].dequantize(), np.float64)
    plain_w = QUANTIZER.quantize(params["w"], use=trace_weights(fn, params, x[0])["w"])
    plain_w = np.asarray(plain_w.dequantize(), np.float64)

    def loss(h, expert, decoded):
        difference = w[expert] - decoded[expert]
        return np.trace(difference.T @ h @ difference)

    # Error compensation on 3 tokens would find weights with no error there, and much on all others.
    everywhere = many.T @ many
    assert loss(everywhere, 1, decoded) < 1.3 * loss(everywhere, 1, plain_w)
    assert loss(np.diag(np.diag(few.T @ few)), 1, decoded) < loss(np.diag(np.diag(few.T @ few)), 1, plain_w)  # fmt: skip
    assert loss(everywhere, 0, decoded) < 0.5 * loss(everywhere, 0, plain_w)
