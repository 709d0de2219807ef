import functools
import itertools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import batch, mlp_loss, mlp_params, weights

from optax_clipquant import (
    NormalFloat,
    Uniform,
    allocate_bits,
    calibrate,
    dequantize_params,
    export_params,
    quantize_params,
    quantize_weights,
    squared_gradients,
)
from optax_clipquant.tuning.allocate import _knapsack


def brute_force(sizes, errors, budget):
    best = np.inf
    for chosen in itertools.product(range(sizes.shape[1]), repeat=len(sizes)):
        rows = np.arange(len(sizes))
        if sizes[rows, chosen].sum() <= budget:
            best = min(best, errors[rows, chosen].sum())
    return best


@hypothesis.given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_knapsack_matches_brute_force(rows, columns, data):
    draw = lambda low, high: data.draw(  # noqa: E731
        st.lists(st.integers(low, high), min_size=rows * columns, max_size=rows * columns)
    )
    sizes = np.array(draw(1, 10**7)).reshape(rows, columns)
    exponents = np.array(draw(-8, 3)).reshape(rows, columns)
    errors = np.array(draw(0, 1000)).reshape(rows, columns) * 10.0**exponents
    budget = data.draw(st.integers(int(sizes.min(1).sum()), int(sizes.max(1).sum())))
    chosen = _knapsack(sizes, errors, budget)
    assert sizes[np.arange(rows), chosen].sum() <= budget
    found = errors[np.arange(rows), chosen].sum()
    np.testing.assert_allclose(
        found, brute_force(sizes, errors, budget), rtol=1e-6, atol=1e-9 * errors.max()
    )


def tree():
    return {
        name: {"kernel": jnp.asarray(weights(shape, kind, seed)), "bias": jnp.ones(shape[-1])}
        for seed, (name, shape, kind) in enumerate(
            [
                ("a", (32, 8), "normal"),
                ("b", (64, 16), "heavy"),
                ("c", (64, 16), "uniform"),
                ("d", (32, 8), "laplace"),
            ]
        )
    }


CHOICES = (2, 3, 4, 6, 8)


@pytest.mark.parametrize(
    ("bits", "quantizer"),
    [
        pytest.param(9.0, Uniform, marks=pytest.mark.slow),
        (3.5, functools.partial(Uniform, group_size=16)),
    ],
    ids=str,
)
def test_widths_have_the_least_error_within_the_budget(bits, quantizer):
    params = tree()
    sensitivity = {
        name: {"kernel": jnp.asarray(weights(leaf["kernel"].shape, "skewed", 9)) ** 2 * 10.0**i}
        for i, (name, leaf) in enumerate(params.items())
    }
    rules = allocate_bits(
        params, sensitivity, bits_per_param=bits, choices=CHOICES, quantizer=quantizer
    )
    sizes, errors = np.zeros((4, 5), int), np.zeros((4, 5))
    for i, name in enumerate(params):
        w = np.asarray(params[name]["kernel"], np.float64)
        for j, width in enumerate(CHOICES):
            q = quantizer(bits=width).quantize(params[name]["kernel"])
            sizes[i, j] = q.nbytes_packed
            weight = np.asarray(sensitivity[name]["kernel"], np.float64)
            errors[i, j] = np.sum(weight * (np.asarray(q) - w) ** 2)
    budget = int(bits * sum(leaf["kernel"].size for leaf in params.values()) // 8)
    chosen = [CHOICES.index(rules[f"^{name}/kernel$"].bits) for name in params]
    assert sizes[range(4), chosen].sum() <= budget
    np.testing.assert_allclose(
        errors[range(4), chosen].sum(), brute_force(sizes, errors, budget), rtol=1e-5
    )
    qparams = quantize_params(params, rules)
    assert sum(leaf["kernel"].nbytes_packed for leaf in qparams.values()) <= budget


def test_rules_work_in_training():
    params = mlp_params()
    batches = [batch(i) for i in range(4)]
    sensitivity = squared_gradients(lambda p, b: mlp_loss(p, *b), params, batches)
    rules = allocate_bits(params, sensitivity, bits_per_param=5.5)
    tx = quantize_weights(rules)
    params = dequantize_params(quantize_params(params, rules))
    exported = export_params(params, tx.init(params))
    assert {rule.bits for rule in rules.values()} == {
        exported[name]["kernel"].bits for name in exported
    }


def test_squared_gradients_are_the_mean_of_squares(platform):
    params = mlp_params()
    batches = [batch(i) for i in range(3)]
    grads = [jax.grad(mlp_loss)(params, *b) for b in batches]
    expected = jax.tree.map(
        lambda *g: np.mean([np.asarray(x, np.float64) ** 2 for x in g], axis=0), *grads
    )
    found = squared_gradients(lambda p, b: mlp_loss(p, *b), params, iter(batches))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), found, expected
    )


def test_paths_with_dots_boxes_and_nnx_states_match_their_rules():
    params = {"a.b": {"kernel": jnp.asarray(weights((8, 4)))}, "aXb": {"kernel": jnp.ones((8, 4))}}
    rules = allocate_bits(params, jax.tree.map(jnp.ones_like, params), bits_per_param=14)
    assert set(rules) == {r"^a\.b/kernel$", "^aXb/kernel$"}
    state = nnx.state(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Param)
    rules = allocate_bits(state, jax.tree.map(jnp.ones_like, state), bits_per_param=12)
    quantize_params(state, rules)
    boxed = {"kernel": nn.Partitioned(jnp.asarray(weights((6, 4))), names=(None, None))}
    rules = allocate_bits(boxed, jax.tree.map(jnp.ones_like, boxed), bits_per_param=12)
    quantize_params(boxed, rules)


def test_accepts_scalar_sensitivities_and_other_quantizers():
    params = tree()
    rules = allocate_bits(
        params,
        {name: {"kernel": 10.0**i} for i, name in enumerate(params)},
        bits_per_param=3.6,
        choices=(2, 3, 4),
        quantizer=functools.partial(NormalFloat, group_size=64),
    )
    assert rules["^d/kernel$"].bits >= rules["^a/kernel$"].bits
    only = allocate_bits(
        params, {"a": {"kernel": 1.0}}, bits_per_param=9, where=lambda path, _: path == "a/kernel"
    )
    assert set(only) == {"^a/kernel$"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"bits_per_param": 2.0}, "a budget of 2.0 bits .* with the scales.* take 2.3"),
        ({"bits_per_param": float("nan")}, "bits_per_param must be a positive number, got nan"),
        ({"choices": ()}, "choices must be distinct bit widths"),
        ({"choices": (2, 2)}, "choices must be distinct bit widths"),
        ({"choices": (2, 9)}, "bits must be an integer from 1 to 8, got 9"),
        ({"sensitivity": {"a": {"kernel": 1.0}}}, "sensitivity has no leaf 'b/kernel'"),
        ({"a": jnp.ones((3, 8))}, r"leaf 'a/kernel' has shape \(3, 8\), which does not broadcast"),
        ({"a": -1.0}, "leaf 'a/kernel' is negative or not finite"),
        ({"a": np.nan}, "leaf 'a/kernel' is negative or not finite"),
        ({"w": jnp.inf}, "params leaf 'a/kernel': its error is not finite"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(edit, message):
    params = tree()
    arguments = {
        "bits_per_param": 5.0,
        "sensitivity": {name: {"kernel": 1.0} for name in params},
    }
    if "a" in edit:
        arguments["sensitivity"]["a"]["kernel"] = edit.pop("a")
    if "w" in edit:
        params["a"]["kernel"] = params["a"]["kernel"].at[0, 0].set(edit.pop("w"))
    arguments |= edit
    with pytest.raises(ValueError, match=message):
        allocate_bits(params, arguments.pop("sensitivity"), **arguments)


def test_leaves_without_values_and_losses_that_are_no_numbers_are_refused():
    params, ones = tree(), jax.tree.map(jnp.ones_like, tree())
    with pytest.raises(TypeError, match=r"leaf 'a/kernel' is a ShapeDtypeStruct"):
        allocate_bits(jax.eval_shape(lambda: params), ones, bits_per_param=5)
    with pytest.raises(TypeError, match=r"leaf 'a/kernel' is traced; .* outside jax.jit"):
        jax.jit(lambda params: allocate_bits(params, ones, bits_per_param=5))(params)
    for loss in (None, jnp.ones(2), "good"):
        with pytest.raises(TypeError, match="evaluate must return a number, got"):
            allocate_bits(params, ones, bits_per_param=5, evaluate=lambda q, loss=loss: loss)


def test_missing_batches_are_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        squared_gradients(lambda p, b: 0.0, {"w": jnp.ones(2)}, [])
    with pytest.raises(TypeError, match=r"squared_gradients: .*a single batch is given as"):
        squared_gradients(lambda p, b: 0.0, {"w": jnp.ones(2)}, {"x": jnp.ones(2)})


@pytest.mark.parametrize(("size", "sensitivity"), [(1e22, 1e-3), (1e-22, 1.0), (1.0, 1e-33), (1.0, 1e33)])  # fmt: skip
def test_errors_beyond_the_range_of_float32_are_compared(size, sensitivity):
    params = {name: size * jnp.asarray(weights((16, 16), seed=i)) for i, name in enumerate("abc")}
    factors = {"a": 1.0, "b": 1e-2, "c": 1e-4}
    plain = {name: factor * jnp.ones(()) for name, factor in factors.items()}
    ordinary = {name: w / size for name, w in params.items()}
    wanted = allocate_bits(ordinary, plain, bits_per_param=5.5)
    scaled = {name: sensitivity * factor * jnp.ones(()) for name, factor in factors.items()}
    found = allocate_bits(params, scaled, bits_per_param=5.5)
    assert found == wanted
    assert len({rule.bits for rule in found.values()}) > 1


def test_budget_holds_despite_the_tolerance_of_the_solver():
    """The solver's tolerance is relative: with tens of millions of bytes, one too many would pass."""
    rng = np.random.default_rng(0)
    tried = 0
    for _ in range(40):
        weights = 10 ** rng.uniform(4, 9, 5)
        sizes = np.stack(
            [np.ceil(weights * bits / 8) + rng.integers(9) for bits in (2, 3, 4, 6, 8)], 1
        )
        sizes = sizes.astype(np.int64)
        errors = weights[:, None] * 4.0 ** -np.array([2, 3, 4, 6, 8]) * rng.uniform(0.5, 2, (5, 5))
        each = np.array(list(itertools.product(range(5), repeat=5)))
        total = sizes[np.arange(5), each].sum(1)
        budget = int(total[rng.integers(len(each))]) - 1
        if budget < total.min():
            continue
        chosen = _knapsack(sizes, errors, budget)
        assert sizes[np.arange(5), chosen].sum() <= budget
        least = errors[np.arange(5), each].sum(1)[total <= budget].min()
        np.testing.assert_allclose(errors[np.arange(5), chosen].sum(), least, rtol=1e-6)
        tried += 1
    assert tried > 30


def test_calibration_weights_the_error_and_the_scales():
    params = {name: jnp.asarray(weights((48, 8), seed=i)) for i, name in enumerate("abc")}
    x = [jnp.asarray(weights((64, 48), seed=9)) * jnp.exp(jnp.linspace(-2, 2, 48))[None]]

    def fn(params, x):
        return x @ params["a"] + x[:, ::-1] @ params["b"] + 0.01 * x @ params["c"]

    calibration = calibrate(fn, params, x, progress=False)
    quantizer = functools.partial(Uniform, group_size=16)
    tried = []

    def evaluate(qparams):
        tried.append(qparams)
        restored = dequantize_params(qparams)
        return float(jnp.mean(jnp.square(fn(restored, x[0]) - fn(params, x[0]))))

    rules = allocate_bits(
        params,
        calibration,
        bits_per_param=4.5,
        choices=(2, 3, 4, 5, 6),
        quantizer=quantizer,
        evaluate=evaluate,
    )
    losses = [evaluate(q) for q in list(tried)]
    best = tried[int(np.argmin(losses))]
    ours = quantize_params(params, rules, calibration=calibration)
    for name in params:
        np.testing.assert_array_equal(ours[name].qvalue, best[name].qvalue)
        np.testing.assert_array_equal(ours[name].scale, best[name].scale)
    assert rules["^c$"].bits < 3.5 < rules["^a$"].bits
    assert min(losses) < 0.9 * losses[0]  # uniform comes first
