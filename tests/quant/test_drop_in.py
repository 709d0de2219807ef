"""A QArray works in a model's code exactly as the docstring of quant/drop_in.py claims."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import weights
from jax import lax

from optax_clipquant import QArray, Uniform
from optax_clipquant.quant import drop_in

X = jnp.asarray(weights((5, 6), seed=1))
ROWS = jnp.asarray([[2, 0], [1, 1]])

METHODS = {
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "itemsize": lambda w: jnp.asarray(w.itemsize),
    "at": lambda w: w.at[0, 1].set(3.0),
    "astype": lambda w: [w.astype(jnp.bfloat16), w.astype(jnp.float32, copy=True)],
    "reshape": lambda w: [w.reshape(2, 12), w.reshape((-1,))],
    "transpose": lambda w: w.transpose(1, 0),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "ravel": lambda w: w.ravel(),
    "flatten": lambda w: w.flatten(),
    "squeeze": lambda w: w.squeeze(),
    "sum": lambda w: w.sum(axis=0),
    "mean": lambda w: w.mean(axis=1, keepdims=True),
    "max": lambda w: w.max(),
    "dot": lambda w: w.dot(X.T[:4]),
    "take": lambda w: w.take(ROWS, axis=0),
}

FUNCTIONS = {
    "jnp.dot": lambda w: jnp.dot(X, w),
    "jnp.matmul": lambda w: jnp.matmul(X, w),
    "jnp.einsum": lambda w: jnp.einsum("td,df->tf", X, w),
    "jnp.tensordot": lambda w: jnp.tensordot(X, w, 1),
    "jnp.take": lambda w: jnp.take(w, ROWS, axis=0),
    "jnp.where": lambda w: jnp.where(jnp.ones((6, 4)) > 0, w, 0),
    "jnp.concatenate": lambda w: jnp.concatenate([w, w]),
    "jnp.stack": lambda w: jnp.stack([w, w]),
    "jnp.reshape": lambda w: jnp.reshape(w, (3, 8)),
    "jnp.swapaxes": lambda w: jnp.swapaxes(w, 0, 1),
    "jnp.sum": lambda w: jnp.sum(w),
    "jnp.asarray": lambda w: jnp.asarray(w),
    "jax.nn.relu": lambda w: jax.nn.relu(w),
}

TRANSFORMATIONS = {
    "jax.jit": lambda w: jax.jit(lambda w: X @ w)(w),
    "jax.vmap": lambda w: jax.vmap(lambda x, w: x @ w, (0, None))(X, w),
    "lax.scan": lambda w: lax.scan(lambda c, x: (c, x @ w), 0, X)[1],
    "lax.cond": lambda w: X @ lax.cond(True, lambda: w, lambda: w),
    "jax.checkpoint": lambda w: jax.checkpoint(lambda w: X @ w)(w),
    "jax.export": lambda w: jax.export.export(jax.jit(lambda w: X @ w))(w).call(w),
}

REFUSED = {
    "lax.dot": lambda w: lax.dot(X, w),
    "lax.dot_general": lambda w: lax.dot_general(X, w, (((1,), (0,)), ((), ()))),
    "lax.conv_general_dilated": lambda w: lax.conv_general_dilated(
        X[:, :4, None], w[..., None], (1,), "SAME"
    ),
    "lax.ragged_dot": lambda w: lax.ragged_dot(X, w[None], jnp.asarray([5])),
    "lax.dynamic_slice": lambda w: lax.dynamic_slice(w, (0, 0), (1, 4)),
    "lax.dynamic_index_in_dim": lambda w: lax.dynamic_index_in_dim(w, 1),
    "lax.reshape": lambda w: lax.reshape(w, (24,)),
    "lax.transpose": lambda w: lax.transpose(w, (1, 0)),
    "lax.add": lambda w: lax.add(w, 1.0),
}


@pytest.fixture(params=["channels", "groups"])
def q(request) -> QArray:
    group_size = 4 if request.param == "groups" else None
    return Uniform(bits=4, group_size=group_size).quantize(jnp.asarray(weights((6, 4))))


def test_every_claim_of_the_docstring_is_tested():
    claimed, refused = str(drop_in.__doc__).split("``jax.lax`` only accepts arrays.")
    tested = {*METHODS, *FUNCTIONS, *TRANSFORMATIONS}
    prose = {"jax.Array", "len", "float", "jnp", "np", "jax.nn", "np.asarray"}
    assert set(re.findall("``([^`]+)``", claimed)) - prose == tested
    assert set(re.findall("``([^`]+)``", refused)) - {"dequantize"} == set(REFUSED)


@pytest.mark.parametrize("name", [*METHODS, *FUNCTIONS, *TRANSFORMATIONS])
def test_results_equal_those_for_the_dequantized_array(q, name):
    fn = {**METHODS, **FUNCTIONS, **TRANSFORMATIONS}[name]
    expected = fn(q.dequantize())
    for found in (fn(q), jax.jit(fn)(q)):
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
        chex.assert_trees_all_equal_dtypes(found, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_lax_refuses_and_names_dequantize(q, name):
    for fn in (REFUSED[name], jax.jit(REFUSED[name])):
        with pytest.raises(ValueError, match=r"not a QArray of shape .*; give it w.dequantize\(\)"):
            fn(q)
        fn(q.dequantize())


def test_unknown_attributes_are_refused(q):
    for name in ("foo", "is_fully_addressable", "__array_interface__", "_value"):
        assert not hasattr(q, name)
    with pytest.raises(
        AttributeError, match=r"no attribute 'foo'; .dequantize\(\) returns the array"
    ):
        q.foo  # noqa: B018


def test_operators_work_like_those_of_the_array(q):
    w = q.dequantize()
    other = jnp.asarray(weights((6, 4), seed=1)) + 4
    chex.assert_trees_all_equal(
        [q + other, other + q, q - other, other - q, q * other, other * q, q / other, other / q],
        [w + other, other + w, w - other, other - w, w * other, other * w, w / other, other / w],
    )
    chex.assert_trees_all_equal(
        [
            -q,
            abs(q),
            q**2,
            2.0**q,
            q @ other.T,
            other.T @ q,
            q // 2,
            2 // (q + 9),
            q % 2,
            7 % other,
        ],
        [
            -w,
            abs(w),
            w**2,
            2.0**w,
            w @ other.T,
            other.T @ w,
            w // 2,
            2 // (w + 9),
            w % 2,
            7 % other,
        ],
    )
    for right in (0, np.asarray(other), other):
        found = [q == right, q != right, q < right, q <= right, q > right, q >= right, right == q]
        chex.assert_trees_all_equal(
            [jnp.asarray(x) for x in found],
            [w == right, w != right, w < right, w <= right, w > right, w >= right, w == right],
        )


def test_every_operator_of_float_arrays_is_defined(q):
    w = q.dequantize()
    chex.assert_trees_all_equal(
        [+q, round(q), round(q, 1), *divmod(q, 2), *divmod(2, q + 9)],
        [w, round(w), round(w, 1), *divmod(w, 2), *divmod(2, w + 9)],
    )
    of_integers = {f"__{r}{name}__" for name in ("and", "or", "xor", "lshift", "rshift") for r in ("", "r")}  # fmt: skip
    others = {"__invert__", "__contains__", "__copy__", "__deepcopy__", "__setitem__", "__slots__"}
    protocols = {"__array_namespace__", "__numpy_dtype__"}
    names = {name for name in dir(jax.Array) if name.startswith("__")}
    assert names - set(dir(QArray)) <= of_integers | others | protocols


def test_conversions_work_like_those_of_the_array(q):
    w = q.dequantize()
    np.testing.assert_array_equal(np.asarray(q, np.float64), np.asarray(w, np.float64))
    assert (q.shape, q.ndim, q.size, q.dtype, len(q)) == (w.shape, w.ndim, w.size, w.dtype, 6)
    assert (float(q[1, 2]), int(q[1, 2]), bool(q[1, 2])) == (float(w[1, 2]), int(w[1, 2]), True)
    assert q.sharding == w.sharding
    chex.assert_trees_all_equal([jnp.asarray(row) for row in q], list(w))
    with pytest.raises(TypeError, match="unhashable"):
        hash(q)
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(q, copy=False)
