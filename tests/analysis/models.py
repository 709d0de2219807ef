"""Models of several libraries, with the use of each weight worked out by hand.

Each case returns a function, its params (or their shapes), its other arguments, and the expected
``Use`` of each leaf by path.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from optax_clipquant import Use

Case = tuple[Callable[..., Any], Any, tuple[Any, ...], dict[str, Use]]

BIAS = Use({"elementwise"})
STACKED_BIAS = Use({"elementwise"}, stacked={0})


def dot(*contracted: int, batch=(), stacked=(), lookup=(), others=(), adapter=False) -> Use:
    kinds = {"dot", "lookup"} if lookup else {"dot"}
    return Use(kinds, contracted, batch, stacked, lookup, others, adapter)


def conv(*contracted: int, batch=()) -> Use:
    return Use({"conv"}, contracted, batch)


def lookup(axis: int = 0, stacked=()) -> Use:
    return Use({"lookup"}, stacked=stacked, lookup={axis})


def spec(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


TOKENS = spec(2, 6, dtype=jnp.int32)


def of_linen(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
    """The forward function of a module, the shapes of its params, and its arguments."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def forward(params: Any, *args: Any) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
        return module.apply({"params": params, **zeros}, *args, **kwargs)

    return forward, variables["params"], args


# Flax linen.


def linen_dense() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(5, dtype=jnp.bfloat16)(x).astype(jnp.float32)
            x = nn.gelu(nn.LayerNorm()(x))
            x = nn.DenseGeneral((2, 3), name="heads")(x)
            return nn.DenseGeneral(4, axis=(-2, -1), name="merge")(x)

    return *of_linen(Net(), spec(7, 8)), {
        "Dense_0/kernel": dot(0),
        "Dense_0/bias": BIAS,
        "LayerNorm_0/scale": BIAS,
        "LayerNorm_0/bias": BIAS,
        "heads/kernel": dot(0),
        "heads/bias": BIAS,
        "merge/kernel": dot(0, 1),
        "merge/bias": BIAS,
    }


def linen_convolutions() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
            x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
            x = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x)
            x = nn.Conv(6, (1, 1), name="pointwise")(x)
            return nn.ConvTranspose(5, (2, 2), strides=(2, 2))(x)

    biases = ("Conv_0", "depthwise", "grouped", "pointwise", "ConvTranspose_0", "BatchNorm_0")
    return *of_linen(Net(), spec(2, 8, 8, 3)), {
        "Conv_0/kernel": conv(0, 1, 2),
        "depthwise/kernel": conv(0, 1, 2, batch={3}),
        "grouped/kernel": conv(0, 1, 2),
        "pointwise/kernel": conv(0, 1, 2),
        "ConvTranspose_0/kernel": conv(0, 1, 2),
        "BatchNorm_0/scale": BIAS,
        **{f"{name}/bias": BIAS for name in biases},
    }


def linen_attention_with_tied_embedding() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 8)
            x = embed(tokens) + self.param("positions", nn.initializers.zeros, (6, 8))[None]
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="mha")(nn.LayerNorm()(x))
            return embed.attend(x)

    return *of_linen(Net(), TOKENS), {
        "Embed_0/embedding": dot(1, lookup={0}),
        "positions": BIAS,
        "LayerNorm_0/scale": BIAS,
        "LayerNorm_0/bias": BIAS,
        **{f"mha/{name}/kernel": dot(0) for name in ("query", "key", "value")},
        "mha/out/kernel": dot(0, 1),
        **{f"mha/{name}/bias": BIAS for name in ("query", "key", "value", "out")},
    }


def linen_recurrent() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.GRUCell(4))(x) + nn.RNN(nn.OptimizedLSTMCell(4))(x)

    forward, params, args = of_linen(Net(), spec(2, 5, 3))
    expected = {
        f"{cell}/{name}/{leaf}": dot(0) if leaf == "kernel" else BIAS
        for cell, gates in params.items()
        for name, gate in gates.items()
        for leaf in gate
    }
    return forward, params, args, expected


def linen_scan_and_remat() -> Case:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.Dense(12)(nn.LayerNorm(name="weight")(x))
            return x + nn.Dense(8)(nn.gelu(h)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return nn.Dense(2)(blocks(name="blocks")(x, None)[0])

    return *of_linen(Net(), spec(7, 8)), {
        "blocks/Dense_0/kernel": dot(1, stacked={0}),
        "blocks/Dense_1/kernel": dot(1, stacked={0}),
        "blocks/Dense_0/bias": STACKED_BIAS,
        "blocks/Dense_1/bias": STACKED_BIAS,
        "blocks/weight/scale": STACKED_BIAS,
        "blocks/weight/bias": STACKED_BIAS,
        "Dense_0/kernel": dot(0),
        "Dense_0/bias": BIAS,
    }


# Flax NNX.


def of_nnx(make: Callable[[nnx.Rngs], nnx.Module], *args: Any) -> tuple[Any, Any, Any]:
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def forward(params, rest, *args):
        return nnx.merge(graphdef, params, rest)(*args)

    return forward, params, (rest, *args)


def nnx_layers() -> Case:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.mha = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm = nnx.RMSNorm(8, rngs=rngs)
            self.conv = nnx.Conv(8, 8, (3,), feature_group_count=8, rngs=rngs)
            self.rnn = nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs), rngs=rngs)
            self.out = nnx.LinearGeneral(8, (2, 3), rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = self.conv(self.norm(x + self.mha(x)))
            x = self.rnn(x, initial_carry=jnp.zeros((len(x), 8)))
            return self.out(x), self.embed.attend(x)

    return *of_nnx(Net, TOKENS), {
        "embed/embedding": dot(1, lookup={0}),
        **{f"mha/{name}/kernel": dot(0) for name in ("query", "key", "value")},
        "mha/out/kernel": dot(0, 1),
        **{f"mha/{name}/bias": BIAS for name in ("query", "key", "value", "out")},
        "norm/scale": BIAS,
        "conv/kernel": conv(0, 1, batch={2}),
        "conv/bias": BIAS,
        "rnn/cell/dense_i/kernel": dot(0),
        "rnn/cell/dense_i/bias": BIAS,
        "rnn/cell/dense_h/kernel": dot(0),
        "out/kernel": dot(0),
        "out/bias": BIAS,
    }


def nnx_lora() -> Case:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LoRALinear(8, 6, lora_rank=2, rngs=rngs)
            self.second = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    return *of_nnx(Net, spec(3, 8)), {
        "first/kernel": dot(0),
        "first/bias": BIAS,
        "first/lora/lora_a": dot(0, adapter=True),
        "first/lora/lora_b": dot(0, adapter=True),
        "second/kernel": dot(0),
        "second/bias": BIAS,
    }


def nnx_scan() -> Case:
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 8, rngs=rngs)
            self.gamma = nnx.Param(jnp.ones(8))

        def __call__(self, x):
            return x + nnx.relu(self.linear(x * self.gamma[None]))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, block):
                return block(x)

            return run(x, self.blocks)

    return *of_nnx(Net, spec(3, 8)), {
        "blocks/linear/kernel": dot(1, stacked={0}),
        "blocks/linear/bias": STACKED_BIAS,
        "blocks/gamma": STACKED_BIAS,
    }


# Equinox and Haiku.


def equinox_under_vmap() -> Case:
    class Net(eqx.Module):
        embed: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        linear: eqx.nn.Linear
        conv: eqx.nn.Conv1d
        gru: eqx.nn.GRUCell
        mlps: eqx.nn.MLP

        def __init__(self, key):
            self.embed = eqx.nn.Embedding(11, 8, key=key)
            self.norm = eqx.nn.LayerNorm(8)
            self.linear = eqx.nn.Linear(8, 4, key=key)
            self.conv = eqx.nn.Conv1d(4, 4, 3, padding=1, key=key)
            self.gru = eqx.nn.GRUCell(4, 4, key=key)
            make = eqx.filter_vmap(lambda key: eqx.nn.MLP(4, 3, 5, 1, key=key))
            self.mlps = make(jax.random.split(key, 6))  # one for each place

        def __call__(self, tokens):
            x = jax.vmap(self.linear)(jax.vmap(self.norm)(jax.vmap(self.embed)(tokens)))
            x = self.conv(x.T).T
            state, _ = jax.lax.scan(lambda h, y: (self.gru(y, h), None), jnp.zeros(4), x)
            return eqx.filter_vmap(lambda mlp, y: mlp(y))(self.mlps, x + state[None])

    model = eqx.filter_eval_shape(Net, jax.random.key(0))

    params, rest = eqx.partition(model, lambda leaf: hasattr(leaf, "shape"))

    def forward(params, tokens):
        return jax.vmap(eqx.combine(params, rest))(tokens)

    return forward, params, (TOKENS,), {
        "embed/weight": lookup(),
        "norm/weight": BIAS,
        "norm/bias": BIAS,
        "linear/weight": dot(1),
        "linear/bias": BIAS,
        "conv/weight": conv(1, 2),
        "conv/bias": BIAS,
        "gru/weight_ih": dot(1),
        "gru/weight_hh": dot(1),
        "gru/bias": BIAS,
        "gru/bias_n": BIAS,
        "mlps/layers/0/weight": dot(2, batch={0}),
        "mlps/layers/0/bias": BIAS,
        "mlps/layers/1/weight": dot(2, batch={0}),
        "mlps/layers/1/bias": BIAS,
    }  # fmt: skip


def haiku() -> Case:
    def net(tokens):
        x = hk.Embed(11, 8, name="embed")(tokens)
        x = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal(), name="mha")(x, x, x)
        x = hk.LayerNorm(-1, True, True, name="norm")(x)
        x = hk.Conv1D(4, 3, name="conv")(x)
        x, _ = hk.dynamic_unroll(
            hk.LSTM(5, name="lstm"), x, hk.LSTM(5).initial_state(2), time_major=False
        )
        return hk.Linear(3, name="out")(x)

    model = hk.without_apply_rng(hk.transform(net))
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    attention = ("query", "key", "value", "linear")
    return model.apply, params, (TOKENS,), {
        "embed/embeddings": lookup(),
        **{f"mha/{name}/w": dot(0) for name in attention},
        **{f"mha/{name}/b": BIAS for name in attention},
        "norm/scale": BIAS,
        "norm/offset": BIAS,
        "conv/w": conv(0, 1),
        "conv/b": BIAS,
        "lstm/linear/w": dot(0),
        "lstm/linear/b": BIAS,
        "out/w": dot(0),
        "out/b": BIAS,
    }  # fmt: skip


# Plain JAX.


def einsum_experts() -> Case:
    def forward(params, x):
        gates = jax.nn.softmax(x @ params["router"])
        h = jnp.einsum("td,edf->tef", x, params["up"])
        y = jnp.einsum("tef,efd->ted", jax.nn.relu(h), params["down"])
        chosen = jnp.argmax(gates, -1)
        alone = jnp.einsum("td,tdf->tf", x, params["picked"][chosen])
        two, few = jax.lax.top_k(gates, 2)
        mixed = jnp.einsum("td,tkdf,tk->tf", x, params["mixed"][few], two)
        return jnp.einsum("ted,te->td", y, gates), alone + mixed

    shapes = {"router": (8, 4), "up": (4, 8, 6), "down": (4, 6, 8), "picked": (4, 8, 5), "mixed": (4, 8, 5)}  # fmt: skip
    params = {name: spec(*shape) for name, shape in shapes.items()}
    return forward, params, (spec(7, 8),), {
        "router": dot(0),
        "up": dot(1),
        "down": dot(1, batch={0}),
        "picked": dot(1, lookup={0}),
        "mixed": dot(1, lookup={0}),
    }  # fmt: skip


def ragged_dot() -> Case:
    def forward(params, x, sizes):
        return jax.lax.ragged_dot(jax.lax.ragged_dot(x, params["up"], sizes), params["down"], sizes)

    params = {"up": spec(4, 8, 6), "down": spec(4, 6, 8)}
    return forward, params, (spec(7, 8), spec(4, dtype=jnp.int32)), {
        "up": dot(1, batch={0}),
        "down": dot(1, batch={0}),
    }  # fmt: skip


def loop_counter() -> Case:
    def forward(params, x):
        def body(i, x):
            x = jax.nn.relu(x @ params["w"][i] + params["b"][i][None])
            return x @ jax.lax.dynamic_index_in_dim(params["v"], i, 1, keepdims=False)

        x = jax.lax.fori_loop(0, 3, body, x)
        x, _ = jax.lax.while_loop(
            lambda s: s[1] < 3, lambda s: (body(s[1], s[0]), s[1] + 1), (x, 0)
        )
        for i in range(2):
            x = x @ params["unrolled"][i] * params["gain"][i][None]
        return x

    shapes = {"w": (3, 8, 6), "b": (3, 6), "v": (6, 3, 8), "unrolled": (2, 8, 8), "gain": (2, 8)}
    params = {name: spec(*shape) for name, shape in shapes.items()}
    return forward, params, (spec(2, 8),), {
        "w": dot(1, stacked={0}),
        "b": STACKED_BIAS,
        "v": dot(0, stacked={1}),
        "unrolled": dot(1, stacked={0}),
        "gain": STACKED_BIAS,
    }  # fmt: skip


def stacked_and_unstacked() -> Case:
    """Layers that the function itself stacks or takes apart."""

    def forward(params, x):
        pairs = [(params["a"], params["a_bias"]), (params["b"], params["b_bias"])]
        layers = jax.tree.map(lambda *w: jnp.stack(w), *pairs)
        x, _ = jax.lax.scan(lambda x, p: (jnp.tanh(x @ p[0] + p[1][None]), None), x, layers)
        q, k = (x @ w for w in jnp.unstack(params["qk"], axis=1))
        return q * k

    shapes = {"a": (8, 8), "b": (8, 8), "a_bias": (8,), "b_bias": (8,), "qk": (8, 2, 5)}
    params = {name: spec(*shape) for name, shape in shapes.items()}
    return forward, params, (spec(3, 8),), {
        "a": dot(0),
        "b": dot(0),
        "a_bias": BIAS,
        "b_bias": BIAS,
        "qk": dot(0, stacked={1}),
    }  # fmt: skip


def llama_with_rotary_tables() -> Case:
    def forward(params, tokens, positions):
        x = params["embed"][tokens]
        cos, sin = params["cos"][positions], params["sin"][positions]

        def turn(y):
            left, right = jnp.split(y, 2, -1)
            return jnp.concatenate([left * cos[:, None] - right * sin[:, None], right * cos[:, None] + left * sin[:, None]], -1)  # fmt: skip

        def block(x, layer):
            y = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)) * layer["gamma"][None]
            qkv = jnp.einsum("td,dnhk->tnhk", y, layer["qkv"])
            q, k, v = turn(qkv[:, 0]), turn(qkv[:, 1]), qkv[:, 2]
            mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k)), v)
            x = x + mixed.reshape(len(x), -1) @ layer["out"]
            gate, up = jnp.split(x @ jnp.concatenate([layer["gate"], layer["up"]], 1), 2, 1)
            return x + (jax.nn.silu(gate) * up) @ layer["down"].T, None

        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"])
        return x @ params["embed"].T

    layers = {"qkv": (8, 3, 2, 4), "out": (8, 8), "gate": (8, 5), "up": (8, 5), "down": (8, 5), "gamma": (8,)}  # fmt: skip
    shapes = {"embed": (11, 8), "cos": (9, 2), "sin": (9, 2), "old": (3, 3)}
    params: dict[str, Any] = {name: spec(*shape) for name, shape in shapes.items()}
    params["layers"] = {name: spec(4, *shape) for name, shape in layers.items()}
    args = spec(6, dtype=jnp.int32), spec(6, dtype=jnp.int32)
    return forward, params, args, {
        "embed": dot(1, lookup={0}),
        "cos": Use({"elementwise"}, lookup={0}),
        "sin": Use({"elementwise"}, lookup={0}),
        "old": Use(),
        "layers/qkv": dot(1, stacked={0}),
        "layers/out": dot(1, stacked={0}),
        "layers/gate": dot(1, stacked={0}),
        "layers/up": dot(1, stacked={0}),
        "layers/down": dot(2, stacked={0}),
        "layers/gamma": STACKED_BIAS,
    }  # fmt: skip


def closed_over_by_custom_vjp() -> Case:
    def forward(params, x):
        @jax.custom_vjp
        def f(x):
            return x @ params["w"]

        f.defvjp(lambda x: (f(x), None), lambda _, g: (g @ params["w"].T,))

        @jax.custom_jvp
        def g(x, w):
            return x @ w.reshape(8, 6).T

        g.defjvps(None, None)
        return g(f(x), params["v"])

    return forward, {"w": spec(6, 6), "v": spec(2, 4, 6)}, (spec(3, 6),), {
        "w": dot(0),
        "v": dot(2),
    }  # fmt: skip


def changed_before_their_products() -> Case:
    """Weights that are equalised, masked, fake-quantized, weight-normalised, merged with an adapter, or repeated."""

    def forward(params, x):
        x = x @ (params["scaled"] * 0.5)
        x = x @ jnp.where(jnp.tril(jnp.ones((6, 6))) > 0, params["masked"], 0)
        step = jnp.max(jnp.abs(params["rounded"])) / 7
        rounded = jnp.clip(jnp.round(params["rounded"] / step), -8, 7) * step
        x = x @ (params["rounded"] + jax.lax.stop_gradient(rounded - params["rounded"]))
        direction = params["direction"] / jnp.linalg.norm(
            params["direction"], axis=0, keepdims=True
        )
        x = x @ (direction * params["length"][None])
        x = x @ (params["base"] + 2.0 * (params["a"] @ params["b"]))
        x = x @ jnp.repeat(params["repeated"], 2, axis=0)
        x = jnp.tile(params["start"], (2, 1)) @ params["from_start"] + x
        return x + 1e-4 * sum(jnp.sum(w**2) for w in params.values())

    names = ("scaled", "masked", "rounded", "direction", "base", "from_start")
    shapes = {name: (6, 6) for name in names}
    shapes |= {"length": (6,), "a": (6, 2), "b": (2, 6), "repeated": (3, 6), "start": (6,)}
    both = Use({"dot", "elementwise"}, contracted={0})
    adapter = Use({"dot", "elementwise"}, contracted={1}, adapter=True)
    return forward, {name: spec(*shape) for name, shape in shapes.items()}, (spec(2, 6),), {
        **dict.fromkeys((*names, "repeated"), both),
        "length": BIAS,
        "start": BIAS,
        "a": adapter,
        "b": Use({"dot", "elementwise"}, contracted={0}, adapter=True),
    }  # fmt: skip


def used_twice() -> Case:
    """A weight whose second axis is contracted first, and whose first axis later."""

    def forward(params, x):
        hidden = jax.nn.relu(x @ params["tied"].T)
        return hidden @ params["tied"]

    return forward, {"tied": spec(5, 8)}, (spec(3, 8),), {"tied": dot(1, others=[{0}])}


CASES = {
    fn.__name__: fn
    for fn in (
        *(linen_dense, linen_convolutions, linen_attention_with_tied_embedding, linen_recurrent),
        *(linen_scan_and_remat, nnx_layers, nnx_lora, nnx_scan, equinox_under_vmap, haiku),
        *(einsum_experts, ragged_dot, loop_counter, stacked_and_unstacked),
        llama_with_rotary_tables,
        *(closed_over_by_custom_vjp, changed_before_their_products, used_twice),
    )
}
