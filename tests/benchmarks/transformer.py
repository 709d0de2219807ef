"""A scanned decoder in the shapes of a language model with a billion weights, of which only shapes are needed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

WIDTH, HEADS, HIDDEN, VOCABULARY = 2048, 16, 8192, 32768


def shapes(layers: int) -> Any:
    """Stacked weights: 14 layers have a billion, 470 million of them in the leaf ``gate_up``."""
    stacked = {
        "norm_1": (WIDTH,),
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "norm_2": (WIDTH,),
        "gate_up": (WIDTH, 2 * HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    blocks = {
        name: jax.ShapeDtypeStruct((layers, *shape), jnp.float32) for name, shape in stacked.items()
    }
    return {
        "embedding": jax.ShapeDtypeStruct((VOCABULARY, WIDTH), jnp.float32),
        "blocks": blocks,
        "norm": jax.ShapeDtypeStruct((WIDTH,), jnp.float32),
    }


def _normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale).astype(
        jnp.bfloat16
    )


@jax.checkpoint
def _block(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
    """Activations and products are in bfloat16, as in mixed precision."""
    tokens = x.shape[:2]
    w = w | {name: w[name].astype(jnp.bfloat16) for name in ("qkv", "out", "gate_up", "down")}
    qkv = (_normalised(x, w["norm_1"]) @ w["qkv"]).reshape(*tokens, 3, HEADS, -1)
    attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
    x = x + attended.reshape(x.shape) @ w["out"]
    gate, up = jnp.split(_normalised(x, w["norm_2"]) @ w["gate_up"], 2, axis=-1)
    return x + (jax.nn.silu(gate) * up) @ w["down"], None


def loss(params: Any, tokens: jax.Array) -> jax.Array:
    """The mean cross entropy of the next token, over rows of tokens."""
    embedding = params["embedding"].astype(jnp.bfloat16)
    x, _ = jax.lax.scan(_block, embedding[tokens[:, :-1]], params["blocks"])
    x = _normalised(x, params["norm"])

    def row(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        """Logits of one row at a time, which would otherwise take more memory than the weights."""
        x, targets = pair
        logits = (x @ embedding.T).astype(jnp.float32)
        return total + optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum(), None

    total, _ = jax.lax.scan(jax.checkpoint(row), jnp.zeros(()), (x, tokens[:, 1:]))
    return total / tokens[:, 1:].size
