"""Everything public and jittable is exported for every platform, serialised, and run again here."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CORE, QUANTIZERS, cases, mlp_params

from optax_clipquant import (
    Uniform,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    clipquant,
    dequantize_params,
    export_params,
    latent_params,
    narrow,
    quantize_params,
    quantize_state,
    quantize_weights,
    round_weights,
    softness_schedule,
)

PLATFORMS = ("cpu", "cuda", "tpu")
GRID = Uniform(bits=4)
TRANSFORMS = {
    "clip_by_value": clip_by_value(1.0),
    "clip_by_quantile": clip_by_quantile(),
    "clip_by_quantile, per leaf": clip_by_quantile(per_leaf=True),
    "clip_by_zscore": clip_by_zscore(),
    "clipquant": clipquant(optax.sgd(0.1), quantizer=GRID),
    "quantize_weights": quantize_weights(QUANTIZERS["ternary-groups"]),
    "softness": quantize_weights(GRID, softness=softness_schedule(0, 10)),
    "residual": quantize_weights(GRID, residual_bits=8),
    "round_weights": round_weights(GRID, stochastic=True),
    "quantize_state 8": quantize_state(optax.sgd(0.1, 0.9), min_size=16, block_size=16),
    "quantize_state 4": quantize_state(optax.sgd(0.1, 0.9), bits=4, min_size=16, block_size=16),
}


def check(fn, *args):
    """Asserts that ``fn``, exported for all platforms and run on this one, agrees with jitted ``fn``."""
    leaves, treedef = jax.tree.flatten(args)

    def flat(*leaves):
        return jax.tree.leaves(fn(*treedef.unflatten(leaves)))

    exported = jax.export.export(jax.jit(flat), platforms=PLATFORMS)(*leaves)
    assert exported.platforms == PLATFORMS
    found = jax.export.deserialize(exported.serialize()).call(*leaves)
    for a, b in zip(found, jax.jit(flat)(*leaves), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "name", cases(TRANSFORMS, ["clipquant", "clip_by_quantile", "residual", "quantize_state 4"])
)
def test_transforms_export_to_every_platform(name):
    params = mlp_params()
    tx = TRANSFORMS[name]
    check(lambda g, s, p: tx.update(g, s, p), params, tx.init(params), params)


@pytest.mark.parametrize("name", cases(CORE, ["ternary", "uniform4-asymmetric"]))
def test_quantizers_export_to_every_platform(name):
    check(lambda p: quantize_params(p, QUANTIZERS[name]), mlp_params())
    check(dequantize_params, quantize_params(mlp_params(), QUANTIZERS[name]))


def test_export_and_dequantization_export_to_every_platform():
    params = mlp_params()
    tx = quantize_weights(GRID)
    state = tx.init(params)
    check(lambda p, s: latent_params(p, s), params, state)
    params = dequantize_params(quantize_params(params, GRID))
    check(lambda p, s: dequantize_params(export_params(p, s)), params, tx.init(params))
    x = jnp.ones((3, 12))
    check(lambda q, x: x @ q["Dense_0"]["kernel"], narrow(quantize_params(params, GRID)), x)
