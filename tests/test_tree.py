"""Paths of leaves in every kind of box and class that holds params."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_clipquant import Uniform, export_params, load, quantize_params, quantize_weights, save
from optax_clipquant._tree import flatten_with_path, path_of

W = jnp.ones((4, 4))


class Attention(eqx.Module):
    query: jax.Array
    value: jax.Array


class Pair(NamedTuple):
    key: jax.Array
    value: jax.Array


@flax.struct.dataclass
class Struct:
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    value: jax.Array


def boxed(w):
    return nn.Partitioned(w, names=(None, None))


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        (Attention(W, W), ["query", "value"]),
        ({"value": Pair(W, W)}, ["value/key", "value/value"]),
        ({"a": Struct(W), "b": Data(W)}, ["a/value", "b/value"]),
        ({"a": boxed(W), "value": boxed(W)}, ["a", "value"]),
        (nnx.State({"a": nnx.Param(W), "value": {"value": nnx.Param(W)}}), ["a", "value/value"]),
        (nnx.State({"a": nnx.Param(Data(W))}), ["a/value"]),
        ([Data(boxed(W)), None], ["0/value"]),
    ],
)
def test_boxes_add_nothing_to_paths_but_fields_named_value_do(tree, paths):
    found, treedef = flatten_with_path(tree)
    assert [path_of(path) for path, _ in found] == paths
    assert treedef == jax.tree.structure(tree)
    for (_, leaf), expected in zip(found, jax.tree.leaves(tree), strict=True):
        assert leaf is expected


def test_fields_named_value_work_in_rules_training_and_files(tmp_path):
    params = {"attention": Attention(jnp.eye(4), 0.1 * jnp.eye(4) + 0.3), "other": Data(W)}
    tx = quantize_weights({"attention/value$": Uniform(bits=4), "^other/value$": Uniform(bits=8)})
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    qparams = export_params(params, state)
    assert qparams["attention"].value.bits == 4
    assert qparams["other"].value.bits == 8
    assert isinstance(qparams["attention"].query, jax.Array)
    save(tmp_path / "model.safetensors", qparams)
    restored = load(tmp_path / "model.safetensors", like=qparams)
    np.testing.assert_array_equal(
        restored["attention"].value.dequantize(), params["attention"].value
    )
    with pytest.raises(ValueError, match=r"nearest paths: attention/value"):
        quantize_params(params, {"attention/valu$": Uniform(bits=4)})
