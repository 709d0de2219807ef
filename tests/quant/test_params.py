import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import QUANTIZERS, VARIANTS, mlp_params, weights

from optax_clipquant import (
    QArray,
    Ternary,
    Uniform,
    ZScore,
    dequantize_params,
    quantize_params,
)


def quantized_paths(tree) -> list[str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, QArray))[0]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if isinstance(leaf, QArray)
    ]


@pytest.mark.parametrize(("variant", "name"), VARIANTS)
def test_shapes_and_value_ranges(platform, variant, name):
    params = mlp_params()
    qparams = variant(lambda p: quantize_params(p, QUANTIZERS[name]))(params)
    dequantized = variant(dequantize_params)(qparams)
    chex.assert_trees_all_equal_shapes_and_dtypes(dequantized, params)
    for layer in params:
        q = qparams[layer]["kernel"]
        chex.assert_type(q.qvalue, jnp.int8)
        assert np.all((q.qvalue >= q.grid.lower) & (q.qvalue <= q.grid.upper))
        assert np.all(
            np.abs(dequantized[layer]["kernel"]) <= 2 * np.abs(params[layer]["kernel"]).max()
        )
        chex.assert_trees_all_equal(qparams[layer]["bias"], params[layer]["bias"])


def test_quantize_params_is_pure():
    params = mlp_params()
    before = jax.tree.map(np.array, params)
    quantize_params(params)
    chex.assert_trees_all_equal(params, before)


def test_default_selection():
    params = {
        "attention": {"kernel": jnp.ones((4, 2, 2)), "bias": jnp.ones((2, 2))},
        "norm": {"scale": jnp.ones((4, 1)), "bias": jnp.ones(4)},
        "embedding": jnp.ones((7, 4)),
        "vector": jnp.ones(9),
        "steps": jnp.ones((3, 3), jnp.int32),
        "none": None,
    }
    assert quantized_paths(quantize_params(params)) == ["attention/kernel", "embedding"]


def test_where_selects_other_leaves():
    qparams = quantize_params(mlp_params(), where=lambda path, leaf: path.endswith("0/bias"))
    assert quantized_paths(qparams) == ["Dense_0/bias"]


def test_first_rule_that_matches_decides():
    params = mlp_params() | {"Embed_0": {"embedding": jnp.ones((5, 3))}}
    rules = {"Dense_1": None, "kernel$": Uniform(bits=4), "embedding": Ternary()}
    qparams = quantize_params(params, rules)
    assert qparams["Dense_0"]["kernel"].bits == 4
    assert qparams["Embed_0"]["embedding"].grid.upper == 1
    assert quantized_paths(qparams) == ["Dense_0/kernel", "Embed_0/embedding"]


def test_a_rule_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(ValueError, match=r"'Dense_0/kernl' matches no path.*Dense_0/kernel"):
        quantize_params(mlp_params(), {"Dense_0/kernl": Uniform()})
    with pytest.raises(ValueError, match=r"'bias' matches only leaves.*where"):
        quantize_params(mlp_params(), {"bias": Uniform(), "kernel": Uniform()})
    with pytest.raises(ValueError, match="not a regular expression"):
        quantize_params(mlp_params(), {"(": Uniform()})


def test_selecting_no_leaf_is_an_error():
    with pytest.raises(ValueError, match=r"no leaf of params is selected.*bias"):
        quantize_params({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"no leaf of params is selected.*none"):
        quantize_params({})


@pytest.mark.parametrize("leaf", [jnp.arange(4), jnp.ones(4, jnp.complex64)])
def test_selected_integer_leaf_is_refused(leaf):
    with pytest.raises(
        TypeError, match=f"params leaf 'w' was selected, but has dtype {leaf.dtype}"
    ):
        quantize_params({"w": leaf}, where=lambda path, leaf: True)


def test_leaves_without_values_are_refused():
    shapes = jax.eval_shape(mlp_params)
    with pytest.raises(TypeError, match=r"is a ShapeDtypeStruct.* within jax.eval_shape"):
        quantize_params(shapes)
    abstract = jax.eval_shape(quantize_params, shapes)
    assert jax.tree.structure(abstract) == jax.tree.structure(quantize_params(mlp_params()))


def test_bad_quantizer_is_refused():
    with pytest.raises(TypeError, match="quantizer must be a Quantizer or a mapping"):
        quantize_params(mlp_params(), 4)
    with pytest.raises(TypeError, match="must be a Quantizer or None"):
        quantize_params(mlp_params(), {"kernel": 4})


def test_stochastic_rounding_has_a_key_for_each_leaf():
    params = {"a": jnp.asarray(weights((20, 20))), "b": jnp.asarray(weights((20, 20)))}
    first = quantize_params(params, Uniform(bits=4), key=jax.random.key(0))
    again = quantize_params(params, Uniform(bits=4), key=jax.random.key(0))
    other = quantize_params(params, Uniform(bits=4), key=jax.random.key(1))
    chex.assert_trees_all_equal(first, again)
    assert np.any(first["a"].qvalue != first["b"].qvalue)
    assert np.any(first["a"].qvalue != other["a"].qvalue)


def test_works_under_vmap_and_with_a_traced_quantizer():
    params = jax.tree.map(lambda *x: jnp.stack(x), mlp_params(0), mlp_params(1))
    batched = jax.vmap(lambda p: quantize_params(p, Uniform(bits=4)))(params)
    single = quantize_params(mlp_params(1), Uniform(bits=4))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], batched), single)
    traced = jax.jit(quantize_params)(mlp_params(), ZScore(R=3))
    expected = quantize_params(mlp_params(), ZScore(R=3))
    chex.assert_trees_all_equal(dequantize_params(traced), dequantize_params(expected))


def test_second_call_compiles_nothing():
    step = jax.jit(chex.assert_max_traces(lambda p: quantize_params(p, Uniform(bits=3)), 1))
    for seed in range(3):
        step(mlp_params(seed))


def test_nnx_states_frozen_dicts_and_boxes_are_kept():
    _, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    qstate = quantize_params(state, {"^kernel$": Uniform(bits=4)})
    assert isinstance(qstate, nnx.State)
    assert isinstance(qstate["kernel"].get_value(), QArray)
    frozen = flax.core.freeze(mlp_params())
    assert isinstance(quantize_params(frozen), flax.core.FrozenDict)
    boxed = {"kernel": nn.Partitioned(jnp.ones((4, 2)), names=("x", None))}
    qboxed = quantize_params(boxed, {"^kernel$": Uniform(bits=4)})
    assert qboxed["kernel"].names == ("x", None)
    assert isinstance(qboxed["kernel"].value, QArray)


def test_dequantize_dtype():
    qparams = quantize_params(mlp_params())
    dequantized = dequantize_params(qparams, jnp.bfloat16)
    chex.assert_type(dequantized["Dense_0"]["kernel"], jnp.bfloat16)
    chex.assert_type(dequantized["Dense_0"]["bias"], jnp.float32)


def test_quantized_leaves_pass_through():
    once = quantize_params(mlp_params(), {"Dense_0/kernel": Uniform(bits=2)})
    twice = quantize_params(once, Uniform(bits=8))
    assert twice["Dense_0"]["kernel"].bits == 2
    assert twice["Dense_1"]["kernel"].bits == 8


def test_quantizer_error_names_the_leaf():
    with pytest.raises(
        ValueError, match=r"params leaf 'Dense_0/kernel': Uniform: channel_axis 2 is out of range"
    ):
        quantize_params(mlp_params(), Uniform(channel_axis=2))


def test_duplicate_paths_are_refused():
    params = {"a": {"b": jnp.ones((3, 2))}, "a/b": jnp.ones((4, 5))}
    with pytest.raises(ValueError, match="two leaves with the path 'a/b'"):
        quantize_params(params)


def test_a_key_named_value_is_part_of_the_path():
    params = {"attention": {"value": jnp.ones((3, 2)), "key": jnp.ones((3, 2))}}
    found = quantize_params(params, {"attention/value": Uniform(bits=4)})
    assert isinstance(found["attention"]["value"], QArray)
    assert not isinstance(found["attention"]["key"], QArray)
