"""One test over every style of model and tree, and over optax's wrappers.

TREES and WRAPPERS list the combinations that work, and REFUSED those that are refused, with the errors.
"""

import dataclasses
import warnings
from typing import Any

import equinox as eqx
import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_on_grid, batch, make_step, mlp_loss, mlp_params

from optax_clipquant import (
    QArray,
    Uniform,
    average_gradients,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    dequantize_params,
    export_params,
    latent_params,
    load,
    quantize_params,
    quantize_state,
    quantize_weights,
    save,
)
from optax_clipquant.quant.qarray import is_qarray

GRID = Uniform(bits=4)


@pytest.fixture(autouse=True, scope="module")
def _as_users_have_it():
    """Relaxes promotion: Flax, Equinox and some optimizers do not work under the strict kind."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def everything(residual_bits: int | None = None) -> optax.GradientTransformation:
    return optax.chain(
        clip_by_value(1.0),
        clip_by_quantile(0.999, per_leaf=True),
        clip_by_zscore(max_norm=100.0),
        quantize_state(optax.adam(1e-2), min_size=64, block_size=16),
        quantize_weights(GRID, residual_bits=residual_bits),
    )


@dataclasses.dataclass
class Case:
    """Params and the function that applies the model to them; the loss is the square of its output."""

    params: Any
    apply: Any


class LinenLayers(nn.Module):
    """An embedding, attention, a convolution, norms and dense layers."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(20, 16)(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = nn.relu(nn.Conv(16, (3,))(x))
        return nn.Dense(8)(nn.LayerNorm()(x)).mean(1)


class NnxLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3,), rngs=rngs)
        self.out = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return self.out(nnx.relu(self.conv(x))).mean(1)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(8, kernel_init=init)(nn.relu(nn.Dense(16, kernel_init=init)(x)))


@flax.struct.dataclass
class Weights:
    first: jax.Array
    second: jax.Array
    bias: jax.Array


TOKENS = np.random.default_rng(0).integers(0, 20, (8, 12))
INPUTS = np.random.default_rng(1).standard_normal((32, 12)).astype(np.float32)


def linen(model: nn.Module, x: Any, boxed: bool = False) -> Case:
    params = model.init(jax.random.key(0), x)["params"]
    params = params if boxed else nn.unbox(params)
    return Case(params, lambda p: model.apply({"params": nn.unbox(p)}, x))


def nnx_layers() -> Case:
    graphdef, params, rest = nnx.split(NnxLayers(nnx.Rngs(0)), nnx.Param, ...)
    return Case(params, lambda p: nnx.merge(graphdef, p, rest)(TOKENS))


def equinox() -> Case:
    model = eqx.nn.MLP(12, 8, 16, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    # Equinox calls methods on its leaves' arrays: the QArrays are made arrays first.
    def apply(params: Any) -> jax.Array:
        return jax.vmap(eqx.combine(dequantize_params(params), static))(INPUTS)

    return Case(params, apply)


def plain(params: Any, leaves: Any) -> Case:
    def apply(params: Any) -> jax.Array:
        first, second, bias = leaves(params)
        return jax.nn.relu(INPUTS @ first) @ second + bias

    return Case(params, apply)


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    a, b = jax.random.split(jax.random.key(0))
    return jax.random.normal(a, (12, 16)) / 3, jax.random.normal(b, (16, 8)) / 4, jnp.zeros(8)


def haiku() -> Case:
    first, second, bias = arrays()
    tree = {"mlp/~/linear_0": {"w": first}, "mlp/~/linear_1": {"w": second, "b": bias}}

    def leaves(params: Any) -> tuple[jax.Array, ...]:
        last = params["mlp/~/linear_1"]
        return params["mlp/~/linear_0"]["w"], last["w"], last["b"]

    return plain(tree, leaves)


def frozen() -> Case:
    case = linen(LinenLayers(), TOKENS)
    return Case(flax.core.freeze(case.params), lambda p: case.apply(flax.core.unfreeze(p)))


TREES = {
    "linen layers": lambda: linen(LinenLayers(), TOKENS),
    "linen layers, frozen": frozen,
    "linen, boxed": lambda: linen(Boxed(), INPUTS, boxed=True),
    "nnx layers": nnx_layers,
    "equinox": equinox,
    "haiku": haiku,
    "dataclass": lambda: plain(Weights(*arrays()), lambda p: (p.first, p.second, p.bias)),
    "tuple": lambda: plain(arrays(), lambda p: p),
    "list in a dict": lambda: plain({"layers": list(arrays())}, lambda p: p["layers"]),
}


@pytest.mark.parametrize(
    ("name", "residual_bits"),
    [
        ("tuple", None),
        ("equinox", 8),
        *(pytest.param(name, 8, marks=pytest.mark.slow) for name in TREES if name != "equinox"),
    ],
)
def test_trains_on_the_grid_and_ships(tmp_path, name, residual_bits):
    case = TREES[name]()
    tx = everything(residual_bits)
    params = dequantize_params(quantize_params(case.params, GRID))
    state = tx.init(params)
    target = jnp.sin(jnp.arange(8.0))

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean(jnp.square(case.apply(p) - target))  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for i in range(25):
        params, state, loss = step(params, state)
        losses.append(float(loss))
        if i < 3 or i == 24:
            assert_on_grid(params, state)
    assert losses[-1] < 0.8 * losses[0]
    assert jax.tree.structure(params) == jax.tree.structure(case.params)
    exported = export_params(params, state)
    count = sum(is_qarray(x) for x in jax.tree.leaves(exported, is_leaf=is_qarray))
    # Attention's biases have two axes, and are left alone.
    biases = 3 if "layers" in name else 0
    assert count == sum(x.ndim >= 2 for x in jax.tree.leaves(params)) - biases
    np.testing.assert_allclose(
        jax.jit(case.apply)(exported), case.apply(params), rtol=1e-5, atol=1e-6
    )
    save(tmp_path / "model.safetensors", exported)
    loaded = load(tmp_path / "model.safetensors", like=exported)
    for a, b in zip(
        jax.tree.leaves(dequantize_params(loaded)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    latent = latent_params(params, state)
    assert jax.tree.structure(latent) == jax.tree.structure(params)


def test_equinox_model_is_exported_with_its_functions():
    """Its activation functions and numbers are leaves, which pass unchanged through everything that reads params."""
    model = eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = quantize_weights(GRID)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    whole = eqx.combine(params, static)
    exported = export_params(whole, state)
    assert exported.activation is model.activation
    for a, b in zip(
        jax.tree.leaves(exported.layers),
        jax.tree.leaves(export_params(params, state).layers),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert latent_params(whole, state).activation is model.activation
    quantized = quantize_params(model, GRID)
    assert quantized.activation is model.activation
    restored = dequantize_params(exported)
    np.testing.assert_array_equal(restored(jnp.ones(4)), whole(jnp.ones(4)))


def labels(params: dict) -> dict:
    return {k: "q" if k == "Dense_0" else "f" for k in params}


def chain(*last: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(clip_by_value(1.0), optax.adam(1e-2), *last)


FULL = chain(quantize_weights(GRID))
# Each wrapper, and whether both layers end up on a grid.
WRAPPERS: dict[str, tuple[optax.GradientTransformation, bool]] = {
    "MultiSteps": (optax.MultiSteps(FULL, 2).gradient_transformation(), True),
    "masked": (
        optax.chain(
            optax.masked(FULL, lambda p: {k: k == "Dense_0" for k in p}),
            optax.masked(optax.sgd(0.1), lambda p: {k: k != "Dense_0" for k in p}),
        ),
        False,
    ),
    "partition": (optax.partition({"q": FULL, "f": optax.sgd(0.1)}, labels), False),
    "two partitions": (
        optax.partition(
            {"q": FULL, "f": optax.chain(optax.sgd(0.1), quantize_weights(GRID))}, labels
        ),
        True,
    ),
    "inject_hyperparams": (
        optax.chain(
            optax.inject_hyperparams(clip_by_quantile)(q=0.99),
            optax.inject_hyperparams(optax.sgd)(learning_rate=0.05),
            optax.inject_hyperparams(quantize_weights)(quantizer=GRID),
        ),
        True,
    ),
    "apply_if_finite": (
        optax.chain(optax.apply_if_finite(optax.adam(1e-2), 3), quantize_weights(GRID)),
        True,
    ),
    "flatten, of the optimizer": (
        optax.chain(optax.flatten(optax.adam(1e-2)), quantize_weights(GRID)),
        True,
    ),
    "with extra args": (optax.with_extra_args_support(FULL), True),
    "skip_not_finite of MultiSteps": (
        optax.MultiSteps(
            FULL, 2, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
        True,
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_trains_inside_optax_wrappers(name):
    tx, whole = WRAPPERS[name]
    params = dequantize_params(quantize_params(mlp_params(), GRID))
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    losses = []
    for _ in range(30):
        params, state, loss = step(params, state, *batch())
        losses.append(float(loss))
        assert_on_grid(params, state)
    assert losses[-1] < 0.9 * losses[0]
    exported = export_params(params, state)
    on_grid = [isinstance(exported[layer]["kernel"], QArray) for layer in exported]
    assert on_grid == [True, whole]


REFUSED = {
    # It turns the params into one long vector, which has no channels.
    "flatten": (lambda: optax.flatten(FULL), ValueError, "no leaf of params is selected"),
    "quantize_state": (lambda: quantize_state(FULL), ValueError, "put that transform after"),
    "average_gradients alone": (
        lambda: optax.chain(average_gradients("data"), optax.sgd(0.1)), NameError, "data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_combinations_are_refused(name):
    make, error, message = REFUSED[name]
    params = mlp_params()
    params["Dense_0"]["kernel"] = jnp.ones((64, 64))
    with pytest.raises(error, match=message):
        make().update(params, make().init(params), params)


def test_export_warns_after_lookahead_moved_params_off_the_grid():
    """Lookahead's slow params are means of params that stood on the grid."""
    tx = optax.lookahead(FULL, sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(
        dequantize_params(quantize_params(mlp_params(), GRID))
    )
    state = tx.init(params)
    for _ in range(2):
        grads = jax.grad(mlp_loss)(params.fast, *batch())
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    with pytest.warns(UserWarning, match="weights are off the grid"):
        export_params(params.slow, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert isinstance(export_params(params.slow, state)["Dense_0"]["kernel"], QArray)
