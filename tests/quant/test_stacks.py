"""QArrays of stacked layers and experts can be split, sharded and exported."""

import dataclasses
import functools
import operator

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import weights

from optax_clipquant import (
    NormalFloat,
    QArray,
    Uniform,
    Use,
    ZScore,
    dequantize_params,
    load,
    quantize_params,
    save,
    shardings_for,
    trace_weights,
)

STACKED = Use({"dot"}, contracted={1}, stacked={0})
KINDS = {
    "uniform": Uniform(4),
    "groups": Uniform(4, group_size=4),
    "asymmetric": Uniform(4, group_size=4, symmetric=False),
    "zscore": ZScore(R=jnp.asarray(3), channel_axis="auto"),
    "normal float": NormalFloat(4, group_size=8),
}


def stack_of(kind: str) -> QArray:
    """Three layers of [10, 6] with a shorter last group."""
    return KINDS[kind].quantize(jnp.asarray(weights((3, 10, 6))), use=STACKED)


def assert_is(found, expected, *, quantized=True):
    assert isinstance(found, QArray) == quantized
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def without(q, name: str):
    return dataclasses.replace(q, grid=dataclasses.replace(q.grid, **{name: None}))


def test_prefixes_hold_none_in_place_of_an_array():
    """As those of any dataclass: an axis of None, or a sharding of None."""
    q = stack_of("asymmetric")
    axes = without(jax.tree.map(lambda _: 0, q), "zero_point")
    point = q.grid.zero_point[0]
    shared = dataclasses.replace(q, grid=dataclasses.replace(q.grid, zero_point=point))
    found = jax.vmap(lambda w: w.grid.zero_point, in_axes=(axes,), out_axes=None)(shared)
    np.testing.assert_array_equal(found, point)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = without(jax.tree.map(lambda _: here, q), "zero_point")
    chex.assert_trees_all_equal(jax.jit(lambda w: w, in_shardings=(shardings,))(q), q)


def test_structure_and_keys_are_those_of_the_fields():
    """Also of a tree in which an array was put in place of None, or None in place of an array."""
    q = stack_of("asymmetric")
    bare = without(q, "zero_point")
    for before, after in ((q, bare), (bare, q)):
        found = jax.tree.map(lambda _, x: x, before, after, is_leaf=lambda x: x is None)
        (paths, structure), (expected, same) = map(
            jax.tree_util.tree_flatten_with_path, (found, after)
        )
        assert structure == same
        assert [path for path, _ in paths] == [path for path, _ in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_scan_and_indexing_split_a_stack(kind):
    q = stack_of(kind)
    w = q.dequantize()
    x = jnp.asarray(weights((2, 10)))
    layers = [w[i] for i in range(3)]
    for taken in (
        list(q),
        [jax.tree.map(operator.itemgetter(i), q) for i in range(3)],
        [jax.jit(lambda q, i: q[i])(q, i) for i in range(3)],
    ):
        for found, expected in zip(taken, layers, strict=True):
            assert_is(found, expected)
    chex.assert_trees_all_close(
        jax.vmap(lambda layer: x @ layer)(q), jax.vmap(lambda layer: x @ layer)(w), rtol=1e-6
    )
    _, scanned = jax.lax.scan(lambda c, layer: (c, layer), 0, q)
    assert_is(scanned, w)
    quantized_again = jax.vmap(lambda layer: KINDS[kind].quantize(layer, use=Use({"dot"}, {0})))(w)
    assert quantized_again.grid.group == q.grid.group
    assert quantized_again.scale.shape == q.scale.shape
    restacked = jax.tree.map(lambda *parts: jnp.stack(parts), *q)
    assert_is(restacked, w)


entries = st.one_of(
    st.integers(-2, 1),
    st.builds(slice, st.none() | st.integers(-2, 2), st.none() | st.integers(-2, 3), st.none() | st.sampled_from([1, 2, -1])),
    st.none(),
    st.just(Ellipsis),
)  # fmt: skip


# Few of each, since every combination is compiled.
@hypothesis.given(
    shape=st.sampled_from([(2, 5, 3), (3, 4, 2)]),
    contracted=st.sampled_from([{0}, {1}, {1, 2}]),
    group_size=st.sampled_from([None, 2, 4]),
    index=st.lists(entries, max_size=4).filter(
        lambda index: index.count(Ellipsis) <= 1 and sum(i is not None and i is not Ellipsis for i in index) <= 3
    ),
)  # fmt: skip
def test_any_index_matches_the_dequantized_array(shape, contracted, group_size, index):
    use = Use({"dot"}, contracted=contracted)
    q = Uniform(4, group_size=group_size, symmetric=False).quantize(
        jnp.asarray(weights(shape)), use=use
    )
    found = q[tuple(index)]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(q.dequantize())[tuple(index)])
    if q.grid.group is None:
        assert isinstance(found, QArray)


def test_indices_that_cut_groups_return_an_array():
    q = stack_of("groups")
    w = q.dequantize()
    for index in ((0, 3), (slice(None), slice(0, 4)), (..., 3, slice(None))):
        assert_is(q[index], w[index], quantized=False)
    rows = np.array([[2, 0], [1, -1]])
    assert_is(q[rows], w[rows], quantized=False)
    assert_is(q[w > 0], w[w > 0], quantized=False)
    assert_is(q[:, None, :, 2], w[:, None, :, 2])
    assert_is(q.T[1], w.T[1], quantized=False)
    shared = Uniform(4).quantize(w)
    assert_is(shared[rows], shared.dequantize()[rows], quantized=False)
    with pytest.raises(IndexError, match="Too many indices"):
        q[0, 0, 0, 0]


def test_expand_scale_separates_layers_that_share_a_scale():
    w = jnp.asarray(weights((5, 4, 6)))
    channels = Uniform(4).quantize(w)
    groups_of_layers = Uniform(4, group_size=8, symmetric=False).quantize(w)
    assert (channels.scale.shape, groups_of_layers.scale.shape) == ((1, 1, 6), (3, 1, 6))
    for shared in (channels, groups_of_layers):
        with pytest.raises(ValueError, match="vmap got inconsistent sizes"):
            jax.vmap(lambda layer: layer.dequantize())(shared)
        whole = shared.expand_scale(-3)
        assert_is(whole, shared.dequantize())
        assert whole.scale.shape == (5, 1, 6)
        layers = jax.vmap(lambda layer: layer.dequantize())(whole)
        chex.assert_trees_all_equal(layers, shared.dequantize())
        assert whole.expand_scale(0).scale.shape == whole.scale.shape
    with pytest.raises(ValueError, match="axis 3 is out of range for an array with 3 axes"):
        channels.expand_scale(3)


def test_moved_axes_that_scales_do_not_fit_are_refused():
    q = Uniform(4, group_size=4).quantize(jnp.asarray(weights((8, 8, 3))), use=Use({"dot"}, {1}))
    with pytest.raises(
        ValueError, match=r"scales of shape \(8, 2\) in groups \(-2, 4\) do not fit"
    ):
        jax.vmap(lambda w: w.dequantize(), in_axes=2)(q)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.relu(nn.Dense(8)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return blocks(name="blocks")(x, None)[0]


def test_linen_scan_runs_a_quantized_stack(variant):
    x = jnp.asarray(weights((2, 8)))
    params = Scanned().init(jax.random.key(0), x)["params"]
    forward = lambda params, x: Scanned().apply({"params": params}, x)  # noqa: E731
    uses = trace_weights(forward, params, x)
    with jax.numpy_rank_promotion("allow"):
        qparams = quantize_params(params, Uniform(4, group_size=4), uses=uses)
        assert isinstance(qparams["blocks"]["Dense_0"]["kernel"], QArray)
        found = variant(forward)(qparams, x)
        expected = variant(forward)(dequantize_params(qparams), x)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs)))(
            rngs
        )

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return x + nnx.relu(block(x))

        return run(x, self.blocks)


def test_nnx_scan_runs_a_quantized_stack():
    graphdef, params, rest = nnx.split(Stack(nnx.Rngs(0)), nnx.Param, ...)
    forward = lambda params, x: nnx.merge(graphdef, params, rest)(x)  # noqa: E731
    x = jnp.asarray(weights((2, 8)))
    with jax.numpy_rank_promotion("allow"):
        uses = trace_weights(forward, params, x)
        qparams = quantize_params(params, Uniform(4, group_size=4), uses=uses)
        expected = forward(dequantize_params(qparams), x)
        found = [forward(qparams, x), jax.jit(forward)(qparams, x)]
    for y in found:
        chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)


def test_donated_codes_are_reused():
    q = stack_of("uniform")
    fresh = jax.tree.map(jnp.copy, q)
    step = jax.jit(lambda q: QArray(-q.qvalue, q.grid), donate_argnums=0)
    found = step(fresh)
    assert fresh.qvalue.is_deleted()
    np.testing.assert_array_equal(found.qvalue, -q.qvalue)
    chex.assert_trees_all_equal(found.scale, q.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_functions_take_and_return_qarrays(kind):
    q = stack_of(kind)

    def forward(params, x):
        return jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, params["w"])[0], params["w"][1]

    x = jnp.asarray(weights((2, 10)))
    exported = jax.export.export(jax.jit(forward))({"w": q}, x)
    again = jax.export.deserialize(exported.serialize())
    chex.assert_trees_all_equal(again.call({"w": q}, x), exported.call({"w": q}, x))
    assert again.in_tree == exported.in_tree


def where(tree):
    return [x.sharding.spec for x in jax.tree.leaves(tree)]


SPECS = [("x", None), (None, "x"), ("x", "y"), (("x", "y"), None), (None, ("x", "y"))]


@pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 host devices")
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=["auto", "explicit"])  # fmt: skip
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_and_scales_are_split_along_rows_and_columns(tmp_path, spec, kind):
    """Groups of 8 along 32 rows (4 scales), along 24 rows (3 scales, which 4 or 8 devices cannot split)."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2, devices=jax.devices("cpu")[:8])
    params = {"a": jnp.asarray(weights((32, 16))), "b": jnp.asarray(weights((24, 16))), "bias": jnp.ones(16)}  # fmt: skip
    qparams = quantize_params(params, {"a": Uniform(4, group_size=8), "b": Uniform(4, group_size=8, symmetric=False)})  # fmt: skip
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    shardings = {"a": sharding, "b": sharding, "bias": jax.NamedSharding(mesh, jax.P())}
    placed = jax.device_put(qparams, shardings_for(qparams, shardings))
    for name in "ab":
        q = placed[name]
        assert q.sharding.is_equivalent_to(sharding, 2)
        extents = q.scale.sharding.shard_shape(q.scale.shape)
        rows, columns = q.qvalue.sharding.shard_shape(q.shape)
        assert extents[1] == columns
        assert extents[0] == (rows // 8 if rows % 8 == 0 and name == "a" else q.scale.shape[0])
    assert where(jax.device_put(qparams["a"], shardings_for(qparams["a"], sharding))) == where(placed["a"])  # fmt: skip
    save(tmp_path / "file", qparams)
    for like in (placed, jax.device_put(params, shardings)):
        loaded = load(tmp_path / "file", like=like)
        for name in qparams:
            assert where(loaded[name]) == where(placed[name])
    x = jnp.asarray(weights((3, 32)))
    with jax.set_mesh(mesh):
        out = None if kind == jax.sharding.AxisType.Auto else jax.P()
        matmul = jax.jit(functools.partial(jnp.matmul, out_sharding=out))
        found = matmul(jax.device_put(x, jax.NamedSharding(mesh, jax.P())), placed["a"])
        np.testing.assert_allclose(found, x @ qparams["a"].dequantize(), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(placed["b"].dequantize(), qparams["b"].dequantize())


def test_specs_without_a_mesh_are_refused():
    with pytest.raises(TypeError, match=r"jax.P needs its mesh: jax.NamedSharding\(mesh, spec\)"):
        shardings_for({"w": stack_of("uniform")}, {"w": jax.P("x", None)})
