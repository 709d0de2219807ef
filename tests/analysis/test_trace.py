import functools

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analysis import models
from flax import nnx
from jax.experimental import pallas
from jax.sharding import AxisType, PartitionSpec

from optax_clipquant import Uniform, Use, quantize_params, trace_weights


@functools.cache
def case(name):
    return models.CASES[name]()


@pytest.mark.parametrize("name", models.CASES)
def test_use_of_each_leaf(name):
    fn, params, args, expected = case(name)
    assert dict(trace_weights(fn, params, *args)) == expected
    assert dict(trace_weights(jax.jit(fn), params, *args)) == expected


def products(uses):
    """The part of each use that decides which leaves are quantized, and along which axes."""
    return {path: (use.is_weight, use.reduced(9)) for path, use in uses.items() if use.is_weight}


@pytest.mark.parametrize("name", models.CASES)
def test_tracing_loss_or_gradients_selects_the_same_weights(name):
    """A backward pass contracts other axes, which are listed beside the first."""
    fn, params, args, expected = case(name)
    if name in ("closed_over_by_custom_vjp", "loop_counter"):
        pytest.skip("it has no derivatives")

    def loss(params, *args):
        return sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in jax.tree.leaves(fn(params, *args)))

    arrays = jax.tree.map(lambda x: x, params)
    assert products(trace_weights(loss, arrays, *args)) == products(expected)
    step = trace_weights(jax.value_and_grad(loss), arrays, *args)
    assert products(step) == products(expected)


def test_gradients_list_their_contracted_axes_as_others():
    def step(params, x):
        tx = optax.sgd(1e-3, momentum=0.9)
        grads = jax.grad(lambda p: jnp.sum(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])))(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    params = {"a": models.spec(3, 4), "b": models.spec(4, 5)}
    uses = trace_weights(step, params, models.spec(2, 3))
    assert uses["a"] == Use({"dot", "elementwise"}, contracted={0})
    assert uses["b"] == Use({"dot", "elementwise"}, contracted={0}, others=[{1}])


def test_under_shard_map():
    mesh = jax.make_mesh((len(jax.devices()),), ("d",), axis_types=(AxisType.Auto,))
    n = len(jax.devices())
    spec = PartitionSpec

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=({"rows": spec("d"), "experts": spec("d"), "gathered": spec(None, "d"), "b": spec("d")}, spec(None, "d")),
        out_specs=spec("d"),
    )  # fmt: skip
    def forward(params, x):
        y = jax.lax.psum(x @ params["rows"], "d")
        y = y @ jax.lax.all_gather(params["gathered"], "d", axis=1, tiled=True)
        y = jnp.einsum("td,edf->etf", y, params["experts"])
        return y + params["b"][:, None]

    shapes = {"rows": (2 * n, 4), "experts": (n, 2 * n, 3), "gathered": (4, 2 * n), "b": (n, 3)}
    params = {name: models.spec(*shape) for name, shape in shapes.items()}
    uses = trace_weights(forward, params, models.spec(5, 2 * n))
    assert dict(uses) == {
        "rows": models.dot(0),
        "gathered": models.dot(0),
        "experts": models.dot(1),
        "b": models.BIAS,
    }


def test_unsupported_operations_are_reported_as_unknown():
    def forward(params, x):
        parts = params["split"].reshape(3, 2, 8)
        q, _ = jnp.linalg.qr(params["factored"])
        y = x @ q + x @ params["both"] + jnp.linalg.inv(params["both"])[:1]
        callback = jax.pure_callback(lambda w: w, params["called"], params["called"])

        def in_place(ref):
            ref[...] = ref[...] @ params["both"]

        y = y + x @ callback + pallas.run_state(in_place)(params["referred"])[:1]
        return y, jnp.einsum("bn,nmk->bmk", x[:, :3], parts)

    names = dict.fromkeys(("factored", "both", "called", "referred"), (6, 6)) | {"split": (6, 8)}
    uses = trace_weights(
        forward, {k: models.spec(*shape) for k, shape in names.items()}, models.spec(1, 6)
    )
    assert uses["split"].kinds == {"dot", "unknown"}
    assert uses["factored"] == Use({"unknown"})
    assert uses["both"] == Use({"dot", "unknown"}, contracted={0})
    assert uses["called"] == uses["referred"] == Use({"unknown"})
    assert not any(use.is_weight for use in uses.values())


def test_non_weights_are_recognised_under_any_name():
    """Gains, shifts, tables, masks and state with the shapes and names of kernels."""

    def forward(params, x, labels, positions):
        y = (x - params["mean/kernel"][None, None]) * params["weight"][None, None]
        y = y + params["kernel"][None, None]
        y = y * params["gamma_of_class"][labels][:, None] + params["positions"][None, : y.shape[1]]
        y = y * params["cos"][positions][:, None] / params["weight_scale_inv"][None]
        h = jnp.tile(params["initial_state"][None], (len(x), 1))
        h = jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params["cell"]), h)
        classes = jnp.concatenate([jnp.tile(params["cls"][None], (len(x), 1, 1)), y], 1)
        return classes @ params["out"], h

    vectors = ("mean/kernel", "weight", "kernel", "initial_state")
    shapes = dict.fromkeys(vectors, (8,)) | {
        "gamma_of_class": (5, 8),
        "positions": (9, 8),
        "cos": (9, 8),
        "weight_scale_inv": (4, 8),
        "cell": (8, 8),
        "cls": (1, 8),
        "out": (8, 3),
    }
    params = {name: models.spec(*shape) for name, shape in shapes.items()}
    integers = models.spec(2, dtype=jnp.int32)
    uses = trace_weights(forward, params, models.spec(2, 4, 8), integers, integers)
    assert {path for path, use in uses.items() if use.is_weight} == {"cell", "out"}
    assert {path for path, use in uses.items() if "unknown" in use.kinds} == set()


def test_lookup_is_recognised_for_any_form_of_tokens():
    params = {"table": models.spec(11, 8)}
    tokens = jnp.arange(6) % 4
    masks = jnp.ones((6, 1))

    def of_rows(rows):
        return rows * masks - jnp.mean(rows, 0, keepdims=True)

    ways = [
        lambda p, t: p["table"][t],
        lambda p, t: of_rows(jnp.take(p["table"], t, axis=0)) * 3.0,
        lambda p, t: jax.vmap(lambda token: p["table"][token])(t),
        lambda p, t: jax.lax.scan(lambda h, token: (h + p["table"][token], None), jnp.zeros(8), t),
        lambda p, t: of_rows(p["table"].T[:, t].T),
        lambda p, t: of_rows(p["table"][tokens]),
        lambda p, t: jnp.take_along_axis(p["table"], t[None, :1], axis=0) * masks,
    ]
    for way in ways[:-1]:
        assert trace_weights(way, params, tokens)["table"] == models.lookup(), way
    one_hot = trace_weights(lambda p, t: jax.nn.one_hot(t, 11) @ p["table"], params, tokens)
    assert one_hot["table"] == models.dot(0)


def test_accepts_any_arguments_and_trees():
    def forward(params, x, *, scale, train):
        assert train is True
        return x @ params["w"] * scale

    arrays = {"w": jnp.ones((64, 3)), "none": None}
    expected = {"w": models.dot(0)}
    given = dict(scale=2.0, train=True)
    assert trace_weights(forward, arrays, jnp.ones((2, 64)), **given) == expected
    quantized = quantize_params(arrays, Uniform(bits=4))
    assert trace_weights(forward, quantized, models.spec(2, 64), **given) == expected
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    uses = trace_weights(lambda module, x: module(x), module, models.spec(4, 3))
    mlp = eqx.nn.MLP(3, 2, 5, 1, key=jax.random.key(0))  # functions are among its leaves
    assert trace_weights(lambda mlp, x: mlp(x), mlp, models.spec(3))[
        "layers/0/weight"
    ] == models.dot(1)
    assert uses == {"kernel": models.dot(0), "bias": models.BIAS}
    assert uses.shapes == {"kernel": (3, 2), "bias": (2,)}
    assert jax.eval_shape(
        lambda params: trace_weights(forward, params, models.spec(2, 64), **given)["w"].contracted
        == {0} and params["w"], arrays
    ).shape == (64, 3)  # fmt: skip
    with pytest.raises(ValueError, match="two leaves with the path 'a/b'"):
        trace_weights(lambda p: p, {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)})


def test_uses_of_carried_weights_reach_a_fixed_point():
    """Weights that swap places at each step have both uses; a value mixed with data is not a weight."""

    def forward(params, x):
        def body(carry, _):
            x, a, b, c = carry
            return (jnp.tanh(x @ a), b, a, c + jnp.sum(x)), None

        carry = (x, params["a"], params["b"], params["c"])
        (x, _, _, c), _ = jax.lax.scan(body, carry, length=3)
        chosen = jax.lax.cond(x[0, 0] > 0, lambda: params["d"], lambda: params["e"].T)
        return x @ c @ chosen

    params = {name: models.spec(4, 4) for name in "abcde"}
    uses = trace_weights(forward, params, models.spec(2, 4))
    assert dict(uses) == {
        **dict.fromkeys("abd", models.dot(0)),
        "c": models.BIAS,
        "e": models.dot(1),
    }


EXTENTS = st.sampled_from([1, 2, 3, 4, 6])


def transpose(x, order):
    return x.transpose(order)


def reshape(x, shape):
    return x.reshape(shape)


def repeat(x, axis):
    return x.repeat(2, axis)


def index(x, at):
    return x[at]


@st.composite
def rearrangements(draw):
    """A shape and a chain of transposes, reshapes, slices and indexing for an array of that shape."""
    shape = tuple(draw(st.lists(EXTENTS, min_size=1, max_size=3)))
    x, steps = np.zeros(shape), []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["transpose", "reshape", "slice", "index", "flip", "repeat"]))
        axis = draw(st.integers(0, x.ndim - 1)) if x.ndim else 0
        if kind == "transpose":
            step = functools.partial(transpose, order=draw(st.permutations(range(x.ndim))))
        elif kind == "reshape":
            left, new = x.size, []
            while left > 1 and len(new) < 3:
                new.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
                left //= new[-1]
            step = functools.partial(reshape, shape=(*new, left))
        elif not x.ndim:
            continue
        elif kind == "repeat":
            step = functools.partial(repeat, axis=axis)
        else:
            start = draw(st.integers(0, x.shape[axis] - 1))
            stop = draw(st.integers(start + 1, x.shape[axis]))
            of_axis = {"slice": slice(start, stop), "index": start, "flip": slice(None, None, -1)}
            step = functools.partial(index, at=(slice(None),) * axis + (of_axis[kind],))
        steps.append(step)
        x = step(x)
    contracted = draw(st.lists(st.booleans(), min_size=x.ndim, max_size=x.ndim))
    return shape, steps, tuple(i for i, c in enumerate(contracted) if c)


@hypothesis.given(rearrangements())
def test_contracted_axes_match_brute_force(case):
    """The reference moves the leaf's indices through the same operations, to see which are summed over."""
    shape, steps, contracted = case

    def rearrange(x):
        return functools.reduce(lambda x, step: step(x), steps, x)

    def forward(params, x):
        w = rearrange(params["w"])
        return jax.lax.dot_general(x, w, ((tuple(range(x.ndim)), contracted), ((), ())))

    places = rearrange(np.arange(np.prod(shape)).reshape(shape))
    data = models.spec(*(places.shape[i] for i in contracted))
    use = trace_weights(forward, {"w": models.spec(*shape)}, data)["w"]
    along = {axis: set() for axis in range(len(shape))}
    for axis, coordinate in enumerate(np.unravel_index(places, shape)):
        for i in range(places.ndim):
            if np.any(coordinate != coordinate.take([0], i)):
                along[axis].add(i in contracted)
    running = {axis for axis, roles in along.items() if roles}
    if any(len(roles) > 1 for roles in along.values()):
        assert "unknown" in use.kinds
    elif "unknown" not in use.kinds:
        assert use.contracted & running == {axis for axis in running if True in along[axis]}
        left = {axis for axis in range(len(shape)) if not along[axis] and shape[axis] > 1}
        assert use.stacked <= left
        assert left <= use.stacked | use.contracted | set(range(len(shape)))
    else:
        hypothesis.assume(False)
