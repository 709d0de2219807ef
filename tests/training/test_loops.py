"""Training loops that edit the params outside the chain, each compared with the same loop in float."""

import functools

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import QUANTIZERS, assert_on_grid, weights

from optax_clipquant import (
    Grid,
    Uniform,
    average_gradients,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    clipquant,
    dequantize_params,
    export_params,
    latent_params,
    quantize_params,
    quantize_state,
    quantize_weights,
    round_weights,
    softness_schedule,
    trace_weights,
)

SHAPE = (24, 4)
TARGET = weights(SHAPE, seed=9)
STEPS = 40


@pytest.fixture(autouse=True, scope="module")
def _as_users_have_it():
    """Relaxes dtype promotion: Optax's wrappers and NNX do not work under the strict kind."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss(w, target=TARGET):
    return jnp.sum(jnp.square(w.astype(jnp.float32) - target)) / 2


def stepper(tx):
    @jax.jit
    def step(params, state, target=TARGET):
        grads = jax.grad(lambda p: loss(p["w"], target))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def start(dtype, seed=0):
    return {"w": jnp.asarray(weights(SHAPE, seed=seed), dtype)}


def loaded_after_init(tx, dtype):
    params, step = start(dtype), stepper(tx)
    state = tx.init(params)
    params = start(dtype, seed=1)
    for i in range(STEPS):
        if i == 10:
            params = start(dtype, seed=2)
        params, state = step(params, state)
        yield params["w"], state


def updated_by_nnx(tx, dtype):
    model = nnx.Linear(*SHAPE, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0))
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, opt):
        opt.update(model, nnx.grad(lambda m: loss(m.kernel[...]))(model))

    for i in range(STEPS):
        if i in (0, 10):
            nnx.update(model, {"kernel": start(dtype, seed=i)["w"]})
        step(model, opt)
        yield model.kernel[...], opt


def clamped_after_each_step(tx, dtype):
    params, step = start(dtype), stepper(tx)
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
        params = jax.tree.map(lambda p: jnp.clip(p, -0.5, 0.5), params)
        yield params["w"], state


def workers_averaged_every_10_steps(tx, dtype):
    step = stepper(tx)
    targets = TARGET + weights((2, *SHAPE), seed=5)
    workers = [start(dtype, seed=worker) for worker in range(2)]
    states = [tx.init(params) for params in workers]
    for i in range(STEPS):
        for j in range(2):
            workers[j], states[j] = step(workers[j], states[j], targets[j])
        if i % 10 == 9:
            mean = jax.tree.map(lambda a, b: (a + b) / 2, *workers)
            workers = [mean, mean]
        yield workers[0]["w"], states[0]


def lookahead(tx, dtype):
    tx = optax.lookahead(tx, sync_period=5, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(start(dtype))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: loss(p["w"]))(params.fast)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
        yield params.fast["w"], state


def sharpness_aware(tx, dtype):
    """SAM by hand: the gradient is taken at perturbed params, which are then moved back."""
    params, rho = start(dtype), 0.05
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: loss(p["w"]))
        g = gradient(params)
        there = optax.apply_updates(params, optax.tree.scale(rho / optax.tree.norm(g), g))
        back = optax.apply_updates(there, optax.tree.sub(params, there))
        updates, state = tx.update(gradient(there), state, back)
        return optax.apply_updates(back, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
        yield params["w"], state


def sharpness_aware_of_optax(tx, dtype):
    tx = optax.contrib.sam(
        tx, optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), reset_state=False
    )
    params, step = start(dtype), stepper(tx)
    state = tx.init(params)
    for i in range(STEPS):
        params, state = step(params, state)
        if i % 2:
            yield params["w"], state


def average_swapped_in(tx, dtype):
    params, step = start(dtype), stepper(tx)
    state, ema = tx.init(params), params
    for i in range(STEPS):
        params, state = step(params, state)
        ema = jax.tree.map(lambda e, p: (0.8 * e + 0.2 * p).astype(dtype), ema, params)
        if i == 8:
            params = ema
        yield params["w"], state


LOOPS = [
    loaded_after_init,
    updated_by_nnx,
    clamped_after_each_step,
    workers_averaged_every_10_steps,
    lookahead,
    sharpness_aware,
    sharpness_aware_of_optax,
    average_swapped_in,
]
KINDS = {
    "4 bits": (quantize_weights, {"quantizer": Uniform(bits=4)}, jnp.float32),
    "soft, 8-bit residual, bfloat16": (
        quantize_weights,
        {"quantizer": Uniform(bits=4), "softness": softness_schedule(0, 30), "residual_bits": 8},
        jnp.bfloat16,
    ),
    **{
        f"{name}, soft": (
            quantize_weights,
            {"quantizer": QUANTIZERS[name], "softness": softness_schedule(0, 30)},
            jnp.float32,
        )
        for name in ("uniform3", "uniform4-groups", "uniform4-asymmetric", "normalfloat3-groups")
    },
    **{
        f"{name}, 8-bit residual": (
            quantize_weights,
            {"quantizer": QUANTIZERS[name], "residual_bits": 8},
            jnp.float32,
        )
        for name in ("uniform4", "uniform8", "zscore7")
    },
    "bfloat16": (quantize_weights, {"quantizer": Uniform(bits=4)}, jnp.bfloat16),
    "rounded": (
        round_weights,
        {"quantizer": Uniform(bits=8), "stochastic": True},
        jnp.float32,
    ),
}
GATE = ["4 bits", "soft, 8-bit residual, bfloat16"]


def run(loop, tx, dtype):
    """The weights after each step, and the largest step of their grids."""
    found, step = [], 0.0
    for w, state in loop(tx, dtype):
        found.append(np.asarray(w, np.float32))
        is_grid = lambda x: isinstance(x, Grid)  # noqa: E731
        for grid in filter(is_grid, jax.tree.leaves(nnx.as_pure(state), is_leaf=is_grid)):
            gap = 1 if grid.codebook is None else np.diff(grid.codebook).max()
            step = max(step, gap * float(jnp.abs(grid.scale).max()))
    return np.stack(found), step


@functools.cache
def in_float(loop, dtype):
    return run(loop, optax.sgd(0.3), dtype)[0]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize(
    "kind", [k if k in GATE else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_edited_loop_follows_the_float_loop_to_within_the_grid(loop, kind):
    make, options, dtype = KINDS[kind]
    expected = in_float(loop, dtype)
    tx = optax.chain(optax.sgd(0.3), make(**options))
    found, step = run(loop, tx, dtype)
    off, limit = np.abs(found - expected).max((1, 2)) / step, 1.2
    if kind == "rounded":
        # No latent weights: in steps of the grid, the distance to the float weight follows e <- (1 - 0.3) e + xi,
        # where xi is one stochastic rounding, unbiased and of a variance of at most 1/4. So the variance of e
        # settles at no more than (1/4) / (1 - 0.7^2), which the mean square of the weights is held to.
        off = np.sqrt(np.square((found - expected) / step).mean((1, 2)))
        limit = 0.5 / (1 - 0.7**2) ** 0.5
    curves = "\n".join(
        f"{i:3d}  {loss(f):8.3f}  {loss(e):8.3f}  {o:6.2f}"
        for i, (f, e, o) in enumerate(zip(found, expected, off, strict=True))
    )
    assert off.max() <= limit, (
        f"step  loss, quantized and in float, distance in steps (limit {limit:.2f})\n{curves}"
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softness": 0.5},
        {"residual_bits": 8},
        {"residual_bits": 8, "softness": softness_schedule(0, 150)},
    ],
    ids=["hard", "soft", "8-bit residual", "soft, 8-bit residual"],
)
def test_small_updates_are_not_mistaken_for_edits(options, dtype):
    """200 updates of 1e-3 on a grid with steps of 0.3, also with an outside decay of 1e-4, match float."""
    first = jnp.asarray(np.linspace(-2.0, 2.2, 96, dtype=np.float32).reshape(SHAPE), dtype)
    tx = quantize_weights(Uniform(bits=4, channel_axis=None), **options)

    @functools.partial(jax.jit, static_argnames="decay")
    def train(decay):
        def step(carry, _):
            params, state, plain = carry
            updates, state = tx.update({"w": jnp.full(SHAPE, 1e-3)}, state, params)
            params = optax.apply_updates(params, updates)
            params = jax.tree.map(lambda p: (p * (1 - decay)).astype(dtype), params)
            return (params, state, (plain + 1e-3) * (1 - decay)), None

        params = {"w": first}
        carry = params, tx.init(params), first.astype(jnp.float32)
        (params, state, plain), _ = jax.lax.scan(step, carry, length=200)
        return latent_params(params, state)["w"], plain

    for decay in (0.0, 1e-4):
        if decay and dtype == jnp.bfloat16:
            continue  # rounded away there, in float too
        latent, plain = train(decay)
        start = np.asarray(first, np.float32)
        moved, expected = (np.mean(np.asarray(x) - start) for x in (latent, plain))
        np.testing.assert_allclose(moved, expected, rtol=0.01)


def test_decay_outside_the_chain_is_followed():
    """200 steps of 1e-4 take .0198 off each weight in float; replacing the latents would lose most of it."""
    tx = quantize_weights(Uniform(bits=4))
    params = {"w": jnp.asarray(np.linspace(0.5, 2.0, 96, dtype=np.float32).reshape(SHAPE))}
    state = tx.init(params)
    first, zeros = params["w"], {"w": jnp.zeros(SHAPE)}

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        return (jax.tree.map(lambda p: p * (1 - 1e-4), params), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), length=200)
    lost = np.asarray(1 - latent_params(params, state)["w"] / first)
    np.testing.assert_allclose(lost.mean(), 1 - (1 - 1e-4) ** 200, rtol=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"residual_bits": 8, "softness": softness_schedule(0, 30)}]
)
def test_resumes_from_a_checkpoint_bit_for_bit(options):
    tx = optax.chain(optax.adam(0.1), quantize_weights(Uniform(bits=4), **options))
    step, params = stepper(tx), start(jnp.float32)
    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    saved = flax.serialization.to_bytes((params, state))
    fresh = start(jnp.float32, seed=7)
    restored = flax.serialization.from_bytes((fresh, tx.init(fresh)), saved)
    for _ in range(5):
        params, state = step(params, state)
        restored = step(*restored)
    chex.assert_trees_all_equal(restored, (params, state))


@pytest.mark.parametrize("stochastic", [False, True])
def test_no_state_holds_a_typed_key(stochastic):
    """Flax, msgpack and safetensors cannot store them."""
    for tx in (
        round_weights(Uniform(bits=4), stochastic=stochastic),
        quantize_weights(Uniform(bits=4), residual_bits=8),
    ):
        state = tx.init(start(jnp.float32))
        assert all(
            x.dtype in (jnp.int32, jnp.uint32, jnp.int8, jnp.float32, jnp.bfloat16)
            for x in jax.tree.leaves(state)
        )
        restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
        chex.assert_trees_all_equal(restored, state)


TRANSFORMS = {
    "clip_by_value": clip_by_value(1.0),
    "clip_by_quantile": clip_by_quantile(per_leaf=True),
    "clip_by_zscore": clip_by_zscore(),
    "quantize_weights": quantize_weights(Uniform(bits=4)),
    "residual": quantize_weights(Uniform(bits=3), residual_bits=8),
    "round_weights": round_weights(Uniform(bits=4), stochastic=True),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_init_accepts_abstract_params(name):
    tx, params = TRANSFORMS[name], start(jnp.float32)
    shapes = jax.eval_shape(lambda: params)
    expected = jax.eval_shape(tx.init, params)
    for found in (tx.init(shapes), jax.eval_shape(tx.init, shapes)):
        assert jax.tree.structure(found) == jax.tree.structure(tx.init(params))
        chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


QUANTIZING = [name for name in TRANSFORMS if "clip" not in name]


@pytest.mark.parametrize("name", QUANTIZING)
def test_params_of_another_dtype_or_shape_are_refused(name):
    tx, params = TRANSFORMS[name], start(jnp.bfloat16)
    state, updates = tx.init(params), start(jnp.float32)
    for apply in (lambda p, u: p + u, eqx.apply_updates):
        wrong = {"w": apply(params["w"], updates["w"])}
        with pytest.raises(
            TypeError, match=r"'w' is float32, but was bfloat16.*optax\.apply_updates"
        ):
            jax.eval_shape(tx.update, updates, state, wrong)
    for shape in ((24, 1), (1, 4), (4,), (24, 4, 1)):
        if name == "round_weights" and shape == (1, 4):
            # Its state has scales alone, which fit a single row too; a shape beside them would be wrong under
            # vmap and shard_map. Nothing broadcasts: the row is rounded as the row that it is.
            row = {"w": jnp.ones(shape, jnp.bfloat16)}
            assert tx.update(row, state, row)[0]["w"].shape == shape
            continue
        wrong = {"w": jnp.ones(shape, jnp.bfloat16)}
        with pytest.raises(ValueError, match=r"params leaf 'w' has shape .*call tx\.init again"):
            jax.eval_shape(tx.update, wrong, state, wrong)
    with pytest.raises(ValueError, match=r"updates leaf 'w' has shape \(1, 4\), but had \(24, 4\)"):
        jax.eval_shape(tx.update, {"w": jnp.ones((1, 4))}, state, params)
    with pytest.raises(ValueError, match=r"params leaf 'w' has shape \(24, 1\)"):
        jax.eval_shape(tx.update, updates, state, {"w": params["w"][:, :1]})


@pytest.mark.parametrize("name", QUANTIZING)
def test_leaves_that_appear_after_init_are_refused(name):
    tx, params = TRANSFORMS[name], start(jnp.float32)
    state = tx.init({**params, "none": None})
    more = {**params, "none": None, "v": params["w"]}
    with pytest.raises(ValueError, match="leaf 'v' that they did not have in init"):
        tx.update(more, state, more)


@pytest.mark.parametrize("make", [quantize_weights, round_weights])
@pytest.mark.parametrize(
    "other",
    [
        *(Uniform(bits=3), Uniform(bits=4, symmetric=False), Uniform(bits=4, channel_axis=0)),
        *(Uniform(bits=4, group_size=6), {"w": None}),
    ],
)
def test_another_quantizer_on_resume_is_refused(make, other):
    params = start(jnp.float32)
    state = make(Uniform(bits=4)).init(params)
    with pytest.raises(ValueError, match=r"'w' is on .*(another grid|no rule)"):
        make(other).update(params, state, params)


@pytest.mark.parametrize("make", [quantize_weights, round_weights])
def test_rules_that_select_another_leaf_on_resume_are_refused(make):
    params = {**start(jnp.float32), "head": jnp.ones(SHAPE), "tiny": jnp.ones((1, 1), jnp.bfloat16)}
    with pytest.warns(UserWarning, match="'tiny'"):
        state = make({"w|tiny": Uniform(bits=4)}).init(params)
    for rules in ({"w": Uniform(bits=4)}, {"w|tiny": Uniform(bits=4)}):
        make(rules).update(params, state, params)
    rules = {"w": Uniform(bits=4), "head": Uniform(bits=8)}
    with pytest.raises(
        ValueError, match=r"'head' is not on a grid.*bits=8.*state = tx\.init\(params\)"
    ):
        make(rules).update(params, state, params)
    make(rules, where=lambda path, leaf: path == "w").update(params, state, params)


@pytest.mark.parametrize(("before", "after"), [(None, 8), (8, None)])
def test_other_residual_bits_on_resume_are_refused(before, after):
    params = start(jnp.float32)
    state = quantize_weights(Uniform(bits=4), residual_bits=before).init(params)
    with pytest.raises(ValueError, match=rf"'w' are kept in .*residual_bits={after}.*start anew"):
        quantize_weights(Uniform(bits=4), residual_bits=after).update(params, state, params)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (functools.partial(clip_by_value, 1.0), "telemetry"),
        (clip_by_quantile, "per_leaf"),
        (functools.partial(round_weights, Uniform(bits=4)), "stochastic"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_other_options_on_resume_are_refused(make, option, before):
    params = start(jnp.float32)
    state = make(**{option: before}).init(params)
    make(**{option: before}).update(params, state, params)
    message = rf"state was made with {option}={before}, and not {option}={not before}.*tx\.init"
    with pytest.raises(ValueError, match=message):
        make(**{option: not before}).update(params, state, params)


def test_schedule_on_resume_of_a_state_without_steps_is_refused():
    state = clip_by_value(1.0, telemetry=False).init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"does not count the steps.*tx\.init"):
        clip_by_value(lambda count: 1.0 + count, telemetry=False).update(jnp.ones(3), state)


@pytest.mark.parametrize(
    "tx", [*TRANSFORMS.values(), average_gradients("data"), quantize_state(optax.adam(1e-3))]
)
def test_state_of_another_transform_is_refused(tx):
    params = start(jnp.float32)
    other = optax.sgd(0.1, momentum=0.9).init(params)
    for state, found in ((other, "tuple"), (params, "dict"), (other[0], "TraceState")):
        with pytest.raises(TypeError, match=rf"state is a {found}, not a \w+State.*tx\.init"):
            tx.update(params, state, params)


def test_tree_map_params_error_tells_how_to_shard_the_state():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = jax.NamedSharding(mesh, jax.P("x", None))
    params = jax.device_put(start(jnp.float32), sharding)
    for name in QUANTIZING:
        tx = TRANSFORMS[name]
        state = tx.init(params)
        with pytest.raises(
            TypeError, match=r"put the params on the mesh: state = tx\.init\(params\)"
        ):
            optax.tree_map_params(tx, lambda x: x, state)
        found = jax.tree.map(lambda x: x.sharding, state)
        for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
            if leaf.shape == SHAPE:
                assert where.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("options", [{}, {"softness": 0.5}, {"residual_bits": 8}])
def test_meta_gradients_match_the_latent_path(options):
    """Against float64 finite differences of the latent path, with the distances to the levels held fixed."""
    rate, steps, first = 0.05, 6, weights(SHAPE).astype(np.float64)
    tx = quantize_weights(Uniform(bits=4), **options)

    def train(rate, first):
        params = {"w": first}
        state = tx.init(params)
        served = []
        for _ in range(steps):
            updates = {"w": -rate * (params["w"] - TARGET)}
            updates, state = tx.update(updates, state, params)
            params = optax.apply_updates(params, updates)
            served.append(params["w"])
        return loss(params["w"]), served

    w = jnp.asarray(first, jnp.float32)
    (by_rate, by_first), served = jax.jit(jax.grad(train, argnums=(0, 1), has_aux=True))(rate, w)
    served = [first, *(np.asarray(x, np.float64) for x in served)]

    def latent_path(rate, first, distances=None):
        latent, p, found = first, first, []
        for i in range(steps):
            latent = latent - rate * (p - TARGET)
            found.append(served[i + 1] - latent)
            p = latent + (found[-1] if distances is None else distances[i])
        return np.sum((p - TARGET) ** 2) / 2, found

    _, distances = latent_path(rate, first)

    def difference(make, size=1e-5):
        up, down = (latent_path(*make(s), distances)[0] for s in (size, -size))
        return (up - down) / (2 * size)

    np.testing.assert_allclose(by_rate, difference(lambda s: (rate + s, first)), rtol=1e-3)
    for index in ((0, 0), (7, 2)):
        bump = np.zeros(SHAPE)
        bump[index] = 1
        expected = difference(lambda s, bump=bump: (rate, first + s * bump))
        np.testing.assert_allclose(by_first[index], expected, rtol=1e-3)
        assert abs(expected) > 1e-3


@pytest.mark.parametrize("make", [quantize_weights, round_weights, clipquant])
def test_uses_select_leaves_and_give_them_their_axes(make):
    """A two-axis bias stays float; a transposed weight and stacked layers get a scale for each output."""
    params = {
        "transposed": jnp.asarray(weights((5, 24))),
        "layers": jnp.asarray(weights((3, 5, 5))),
        "bias": jnp.ones((3, 5)),
    }

    def model(params, x):
        x = x @ params["transposed"].T
        body = lambda x, layer: (jnp.tanh(x @ layer[0] + layer[1][None]), None)  # noqa: E731
        return jax.lax.scan(body, x, (params["layers"], params["bias"]))[0]

    uses, x = trace_weights(model, params, jnp.ones((2, 24))), jnp.ones((2, 24))
    quantizer = Uniform(bits=4, group_size=8)
    expected = quantize_params(params, quantizer, uses=uses)
    options = {"quantizer": quantizer, "uses": uses}
    last = make(optax.sgd(0.1), **options) if make is clipquant else make(**options)
    tx = last if make is clipquant else optax.chain(optax.sgd(0.1), last)
    params = dequantize_params(expected)
    state = tx.init(params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for _ in range(2):
        grads = jax.grad(lambda p: jnp.sum(jnp.square(model(p, x))))(params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert_on_grid(params, state)
    exported = export_params(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(exported, expected)
    assert exported["transposed"].scale.shape == (5, 3)
    assert exported["layers"].scale.shape == (3, 1, 5)
    assert isinstance(exported["bias"], jax.Array)
