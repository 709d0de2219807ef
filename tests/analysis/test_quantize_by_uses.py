"""Selection of leaves and of axes by traced uses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis import models
from helpers import weights

from optax_clipquant import (
    Calibration,
    QArray,
    Uniform,
    allocate_bits,
    dequantize_params,
    quantize_params,
    trace_weights,
)


def arrays(shapes, seed=0):
    """A tree of normally distributed weights with the given shapes."""
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten(
        jnp.asarray(weights(leaf.shape, seed=seed + i), leaf.dtype) for i, leaf in enumerate(leaves)
    )


def quantized_paths(qparams):
    flat = jax.tree_util.tree_flatten_with_path(qparams, is_leaf=lambda x: isinstance(x, QArray))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in flat
        if isinstance(leaf, QArray)
    }


def snr_db(w, q):
    w, q = np.asarray(w, np.float64), np.asarray(q, np.float64)
    return 10 * np.log10(np.sum(w**2) / np.sum((w - q) ** 2))


def test_stacked_layers_of_different_magnitude_keep_their_signal():
    fn, shapes, args, _ = models.linen_scan_and_remat()
    params = arrays(shapes)
    kernel = params["blocks"]["Dense_0"]["kernel"]
    scaled = kernel * jnp.array([1.0, 1e-2, 1e-4])[:, None, None]
    params["blocks"]["Dense_0"]["kernel"] = scaled
    uses = trace_weights(fn, shapes, *args)
    found = quantize_params(params, Uniform(bits=4), uses=uses)
    for layer, q in zip(scaled, found["blocks"]["Dense_0"]["kernel"].dequantize(), strict=True):
        assert snr_db(layer, q) > 14
    assert quantized_paths(found) == {
        "Dense_0/kernel", "blocks/Dense_0/kernel", "blocks/Dense_1/kernel"
    }  # fmt: skip


def test_norms_tables_and_buffers_stay_float_under_any_name():
    fn, shapes, args, expected = models.llama_with_rotary_tables()
    params = arrays(shapes)
    found = quantize_params(params, Uniform(bits=4), uses=trace_weights(fn, params, *args))
    assert quantized_paths(found) == {path for path, use in expected.items() if use.is_weight}
    for path in ("gamma",):
        assert isinstance(found["layers"][path], jax.Array)
    assert found["embed"].scale.shape == (11, 1)
    assert found["layers"]["qkv"].scale.shape == (4, 1, 3, 2, 4)
    assert found["layers"]["down"].scale.shape == (4, 8, 1)


def test_groups_run_along_the_contracted_axes():
    fn, shapes, args, _ = models.einsum_experts()
    params = arrays(shapes)
    uses = trace_weights(fn, shapes, *args)
    found = quantize_params(params, Uniform(bits=4, group_size=4), uses=uses)
    assert found["up"].scale.shape == (4, 2, 6)
    assert found["router"].scale.shape == (2, 4)
    given = quantize_params(params, Uniform(bits=4, channel_axis=(0, 1)), uses=uses, where=lambda path, _: path == "up")  # fmt: skip
    assert given["up"].scale.shape == (4, 8, 1)
    assert quantized_paths(given) == {"up"}


def test_adapters_are_quantized_only_when_asked():
    fn, shapes, args, _ = models.nnx_lora()
    params = arrays(shapes)
    uses = trace_weights(fn, shapes, *args)
    by_default = quantize_params(params, Uniform(bits=8), uses=uses)
    assert not isinstance(by_default["first"]["lora"]["lora_a"].get_value(), QArray)
    with pytest.raises(ValueError, match="'lora' matches only leaves that are not to be"):
        quantize_params(params, {"lora": Uniform(bits=8)}, uses=uses)
    asked = quantize_params(
        params, Uniform(bits=8), uses=uses, where=lambda path, _: "lora" in path
    )
    assert asked["first"]["lora"]["lora_a"].get_value().scale.shape == (1, 2)


def test_uses_of_other_params_are_refused():
    uses = trace_weights(lambda p, x: x @ p["w"], {"w": models.spec(4, 3)}, models.spec(2, 4))
    with pytest.raises(ValueError, match=r"has no leaf 'params/w', .* \(the nearest: w\)"):
        quantize_params({"params": {"w": jnp.ones((4, 3))}}, uses=uses)
    with pytest.raises(ValueError, match=r"shape \(3, 4\), and was traced with \(4, 3\)"):
        quantize_params({"w": jnp.ones((3, 4))}, uses=uses)
    norm = trace_weights(lambda p, x: x * p["w"], {"w": models.spec(4, 3)}, models.spec(4, 3))
    with pytest.raises(ValueError, match=r"those in a dot, a convolution or a lookup, which print"):
        quantize_params({"w": jnp.ones((4, 3))}, uses=norm)


def net():
    """Two layers, the second of which hardly affects the result in spite of its squared error."""

    def forward(params, x):
        hidden = jnp.tanh(x @ params["a"])
        return hidden @ params["b"].T, 1e-3 * (hidden @ params["c"].T)

    shapes = {"a": (32, 32), "b": (32, 32), "c": (32, 32), "gain": (4, 4)}
    params = arrays({name: models.spec(*shape) for name, shape in shapes.items()})
    return forward, params, jnp.asarray(weights((16, 32), seed=9))


def test_allocation_takes_axes_and_moments_from_a_calibration():
    forward, params, x = net()
    uses = trace_weights(forward, params, x)
    moments = {"a": jnp.ones((32, 1)), "b": jnp.ones((1, 32)), "c": jnp.full((1, 32), 1e-8)}
    rules = allocate_bits(params, Calibration(uses, moments), bits_per_param=5.0)
    assert set(rules) == {"^a$", "^b$", "^c$"}
    assert rules["^c$"].bits < rules["^b$"].bits
    with pytest.raises(ValueError, match="sensitivity has no leaf 'c'"):
        allocate_bits(
            params, Calibration(uses, {"a": moments["a"], "b": moments["b"]}), bits_per_param=5.0
        )


def test_an_evaluated_allocation_is_never_worse_than_uniform():
    forward, params, x = net()
    uses = trace_weights(forward, params, x)
    asked = []

    def evaluate(qparams):
        asked.append({path: getattr(leaf, "bits", 32) for path, leaf in qparams.items()})
        found = forward(dequantize_params(qparams), x)
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(found, forward(params, x), strict=True))

    # A misleading sensitivity: c matters least.
    misleading = {"a": 1e-4, "b": 1e-4, "c": 1.0, "gain": 0.0}
    plain = allocate_bits(params, misleading, bits_per_param=4.5, uses=uses)
    assert plain["^c$"].bits == 8
    rules = allocate_bits(params, misleading, bits_per_param=4.5, uses=uses, evaluate=evaluate)
    assert 2 <= len(asked) <= 5
    assert asked[0] == {"a": 4, "b": 4, "c": 4, "gain": 32}
    assert {path: re.sub("[^a-c]", "", path) for path in rules} == {
        "^a$": "a",
        "^b$": "b",
        "^c$": "c",
    }
    losses = {tuple(bits.items()): None for bits in asked}
    chosen = {path: rules[f"^{path}$"].bits for path in "abc"} | {"gain": 32}
    assert tuple(chosen.items()) in losses

    def loss_of(bits):
        by_hand = {f"^{path}$": Uniform(bits=bits[path]) for path in "abc"}
        return float(evaluate(quantize_params(params, by_hand, uses=uses)))

    assert loss_of(chosen) == min(map(loss_of, list(asked)))
    assert loss_of(chosen) <= loss_of(dict.fromkeys("abc", 4))

    # With a correct one, the allocation beats uniform widths.
    right = {"a": 1.0, "b": 1.0, "c": 1e-6, "gain": 0.0}
    rules = allocate_bits(params, right, bits_per_param=4.5, uses=uses, evaluate=evaluate)
    assert loss_of({p: rules[f"^{p}$"].bits for p in "abc"}) < loss_of(dict.fromkeys("abc", 4)) / 2

    with pytest.raises(ValueError, match="evaluate returned no finite number"):
        allocate_bits(params, right, bits_per_param=4.5, uses=uses, evaluate=lambda _: jnp.nan)
