import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DTYPED, QUANTIZERS, cases, mlp_params, weights

from optax_clipquant import (
    NormalFloat,
    QArray,
    Ternary,
    Uniform,
    ZScore,
    dequantize_params,
    narrow,
    quantize_params,
    to_qwix,
)

qwix = pytest.importorskip("qwix")

FITTING = {
    name: quantizer
    for name, quantizer in QUANTIZERS.items()
    if not isinstance(quantizer, (ZScore, NormalFloat))
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [case for case in DTYPED if case.values[0] in FITTING and case.values[1] != jnp.float16],
)
def test_qwix_decodes_the_same_values(name, dtype):
    w = jnp.asarray(weights((20, 12))).astype(dtype)  # groups of 4 and 5 divide 20
    q = FITTING[name].quantize(w)
    ours, theirs = np.asarray(q.dequantize()), to_qwix({"w": q})["w"]
    assert isinstance(theirs, qwix.QArray)
    found = np.asarray(qwix.dequantize(theirs))
    assert found.dtype == ours.dtype
    # Bit for bit, except for the sign of 0.
    assert (found + found.dtype.type(0)).tobytes() == ours.tobytes()
    assert theirs.qvalue.dtype == (jnp.int8 if q.bits == 8 else jnp.int4)


@pytest.mark.parametrize("bits", cases(range(1, 9), [1, 4, 8]))
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width_decodes_equally(bits, symmetric):
    q = Uniform(bits, symmetric=symmetric, group_size=8).quantize(jnp.asarray(weights((32, 3))))
    for tree in ([q], narrow([q])):
        np.testing.assert_array_equal(qwix.dequantize(to_qwix(tree)[0]), q.dequantize())


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (lambda w: NormalFloat(4).quantize(w), "'a/w' has a codebook"),
        (lambda w: ZScore().quantize(w), "'a/w' has fractional zero points"),
        # qwix would take 3 scales of 33 rows for groups of 11.
        (
            lambda w: Uniform(4, group_size=16).quantize(w),
            "'a/w' has 33 entries along axis -2 in groups of 16",
        ),
        (
            lambda w: Uniform(4).quantize((1e-7 * w).astype(jnp.float16)),
            "'a/w' has scales that float16",
        ),
    ],
)
def test_grids_that_qwix_lacks_are_refused(q, message):
    tree = {"a": {"w": q(jnp.asarray(weights((33, 4))))}}
    with pytest.raises(ValueError, match=message):
        to_qwix(tree)


def test_without_qwix_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(ImportError, match=r"pip install 'optax-clipquant\[qwix\]'"):
        to_qwix({})


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(10)(x))
        return nn.Dense(4)(x)


def ptq_of(**rule):
    model = qwix.quantize_model(Net(), qwix.PtqProvider([qwix.QuantizationRule(**rule)]))
    x = jnp.asarray(weights((32, 12)))
    return model, x, jax.eval_shape(model.init, jax.random.key(0), x)["params"]


@pytest.fixture(autouse=True)
def as_qwix_has_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(
    "quantizer",
    cases(
        [Uniform(8), Uniform(4, group_size=2), Uniform(2), Uniform(1), Ternary(), Uniform(4, symmetric=False)],
        [Uniform(4, group_size=2), Uniform(2), Uniform(4, symmetric=False)],
    ),
    ids=str,
)  # fmt: skip
def test_ptq_model_runs_exported_weights(quantizer):
    model, x, like = ptq_of(weight_qtype=jnp.int8)
    qparams = quantize_params(mlp_params(), quantizer)
    found = jax.jit(model.apply)({"params": to_qwix(qparams, like=like)}, x)
    wanted = Net().apply({"params": dequantize_params(qparams)}, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_activations_are_as_accurate_as_with_qwix_weights(symmetric):
    model, x, like = ptq_of(weight_qtype=jnp.int8, act_qtype=jnp.int8)
    params = mlp_params()
    wanted = Net().apply({"params": params}, x)
    qparams = to_qwix(quantize_params(params, Uniform(8, symmetric=symmetric)), like=like)
    ours = model.apply({"params": qparams}, x) - wanted
    theirs = model.apply({"params": qwix.quantize_params(params, like)}, x) - wanted
    assert jnp.sqrt(jnp.mean(ours**2)) <= 1.3 * jnp.sqrt(jnp.mean(theirs**2))
    assert jnp.max(jnp.abs(ours)) > 0  # the activations were quantized


def test_floats_are_written_where_the_model_expects_them():
    model, x, like = ptq_of(module_path="Dense_0", weight_qtype=jnp.int4)
    qparams = quantize_params(mlp_params(), Uniform(4))
    filled = to_qwix(qparams, like=like)
    kernel = qparams["Dense_1"]["kernel"]
    assert isinstance(kernel, QArray)
    np.testing.assert_array_equal(filled["Dense_1"]["kernel"], kernel.dequantize())
    wanted = Net().apply({"params": dequantize_params(qparams)}, x)
    np.testing.assert_allclose(model.apply({"params": filled}, x), wanted, rtol=1e-5, atol=1e-5)


def test_leaves_without_values_are_refused():
    qparams = quantize_params({"w": jnp.ones((4, 4))}, Uniform(4))
    with pytest.raises(TypeError, match=r"leaf 'w' is a ShapeDtypeStruct.* in jax.eval_shape"):
        to_qwix(jax.eval_shape(lambda: qparams))
    assert jax.eval_shape(to_qwix, qparams)["w"].qvalue.dtype == jnp.int4


def test_mismatched_like_is_refused():
    _, _, like = ptq_of(weight_qtype=jnp.int8)
    params = mlp_params()
    with pytest.raises(
        ValueError, match="'Dense_1/kernel' is quantized in `like`, but not in qpar"
    ):
        to_qwix(quantize_params(params, {"Dense_0": Uniform(4)}), like=like)
    params["Dense_1"]["kernel"] = jnp.ones((10, 5))
    with pytest.raises(ValueError, match=r"'Dense_1/kernel' has shape \(10, 5\), but \(10, 4\) in"):
        to_qwix(quantize_params(params, Uniform(4)), like=like)
