"""Functions that XLA's CPU backend keeps apart."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_clipquant.lowering.outline import outlined
from optax_clipquant.quant.quantizers.uniform import Uniform
from optax_clipquant.training.weights import quantize_weights


@pytest.fixture
def one_device(monkeypatch):
    """What a process with one device runs; the tests have eight."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def scaled(power: int, x: jax.Array, seed: jax.Array) -> dict[str, jax.Array | None]:
    factor = 2.0**-32 * (seed * seed).astype(jnp.float32)
    norm = jnp.max(jnp.abs(x), axis=0, keepdims=True)
    return {"norm": norm, "x": jnp.sin(x / norm) ** power * factor, "none": None}


def twice(x: jax.Array, y: jax.Array) -> list:
    fn = outlined(scaled, statics=1)
    return [fn(2, x * 3, jnp.uint32(70001)), fn(2, y * 3, jnp.uint32(80001))]


X = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)


def test_equal_calls_stay_calls_with_equal_kernels_on_a_cpu(one_device):
    text = jax.jit(twice).lower(X, X + 1).compile().as_text()
    assert len(re.findall(r" call\(", text)) == 2
    # Both functions and the fusions they call occur twice, but for names: no seed was folded into one.
    bodies = [
        re.sub(r"%[\w.\-]+|[\w.]+: |, metadata=\{.*?\}", "", body)
        for body in re.findall(r"^%(?:scaled|fused)[\w.]* \(.*?^\}", text, re.S | re.M)
    ]
    assert len(bodies) >= 4
    assert all(bodies.count(body) % 2 == 0 for body in bodies)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_inline_the_call(one_device, platform):
    text = jax.jit(twice).trace(X, X).lower(lowering_platforms=(platform,)).as_text()
    assert "inlineable" not in text
    assert "optimization_barrier" not in text


def test_several_devices_inline_the_call(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "inlineable" not in jax.jit(lambda x: twice(x, x)).lower(X).as_text()


def test_results_and_transformations_are_those_of_the_function(one_device):
    fn, seed = outlined(scaled, statics=1), jnp.uint32(90001)

    def everything(fn):
        def total(x):
            return jnp.sum(fn(3, x, seed)["x"])

        return jax.jit(
            lambda x: (
                jax.jvp(jax.grad(total), (x,), (x,)),
                jax.lax.map(jax.vmap(lambda x: fn(3, x, seed)), x[None, None]),
            )
        )(X)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        everything(fn),
        everything(scaled),
    )


def test_error_in_a_shared_trace_names_each_leaf(one_device):
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((4, 8))}
    state = quantize_weights(Uniform(4), residual_bits=8).init(params)
    for other in ("a", "b"):
        tx = quantize_weights({other: Uniform(3), "": Uniform(4)}, residual_bits=8)
        with pytest.raises(
            ValueError, match=f"quantize_weights: leaf '{other}' is on another grid"
        ):
            tx.update(params, state, params)
