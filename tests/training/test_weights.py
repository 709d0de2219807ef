import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from helpers import (
    CORE,
    FORMULAS,
    QUANTIZERS,
    VARIANTS,
    assert_on_grid,
    batch,
    cases,
    make_step,
    mlp_loss,
    mlp_params,
    optimizer,
    projected,
    weights,
)

from optax_clipquant import (
    QArray,
    Ternary,
    Uniform,
    clipquant,
    dequantize_params,
    export_params,
    latent_params,
    quantize_params,
    quantize_weights,
    round_weights,
)

TRAINED = {**QUANTIZERS, "rules": {"Dense_0": Uniform(bits=3), "Dense_1": Ternary()}}


@pytest.mark.parametrize(
    ("variant", "name"), [*VARIANTS, pytest.param(jax.jit, "rules", id="jit-rules")]
)
def test_params_are_on_the_grid_after_every_step(platform, variant, name):
    tx = optimizer(quantize_weights(TRAINED[name]))
    params = projected(TRAINED[name])
    state = tx.init(params)
    step = variant(make_step(tx))
    x, y = batch()
    for _ in range(6):
        params, state, _ = step(params, state, x, y)
        assert_on_grid(params, state)
    chex.assert_tree_all_finite(params)


def test_a_float_start_is_on_the_grid_after_three_steps():
    tx = optimizer(quantize_weights(Uniform(bits=4)))
    params = mlp_params()
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    for _ in range(3):
        params, state, _ = step(params, state, *batch())
    for _ in range(5):
        params, state, _ = step(params, state, *batch())
        assert_on_grid(params, state)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((jnp.bfloat16, name) for name in ("uniform2-groups", "zscore7")),
        pytest.param(jnp.float16, "uniform8", marks=pytest.mark.slow),
    ],
)
def test_half_precision_params_equal_the_rounded_levels(dtype, name):
    tx = optimizer(quantize_weights(QUANTIZERS[name]))
    params = projected(QUANTIZERS[name], dtype=dtype)
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    x, y = batch(dtype=dtype)
    for _ in range(5):
        params, state, _ = step(params, state, x, y)
        chex.assert_type(params["Dense_0"]["kernel"], dtype)
        assert_on_grid(params, state)
    chex.assert_type(latent_params(params, state)["Dense_0"]["kernel"], jnp.float32)


def test_matches_the_recursion_in_float64():
    """``latent += u``, then ``params = nearest level``, by brute force over the levels."""
    tx = quantize_weights(Uniform(bits=4, scale_rule="absmax"))
    w = weights((40, 6)) * 0.1
    params = {"w": jnp.asarray(w)}
    state = tx.init(params)
    latent = w.astype(np.float64)
    for seed in range(5):
        u = weights((40, 6), seed=seed + 1) * 0.01
        latent += u
        updates, state = tx.update({"w": jnp.asarray(u)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(latent_params(params, state)["w"], latent, rtol=1e-5, atol=1e-7)
        largest = np.take_along_axis(latent, np.abs(latent).argmax(0)[None], 0)
        scale = -largest / 8
        levels = np.arange(-8, 8)[:, None, None] * scale
        nearest = np.take_along_axis(levels, np.abs(levels - latent).argmin(0)[None], 0)[0]
        # Scales are rounded to 8 bits, so a weight near a midpoint may go to the other side.
        error = np.abs(np.asarray(params["w"]) - nearest)
        assert np.mean(error > 2.0**-7 * np.abs(nearest)) < 0.05


@pytest.mark.parametrize("name", cases([*CORE, "rules"], [*FORMULAS, "rules"]))
def test_scan_equals_steps_and_types_are_stable(name):
    tx = optimizer(quantize_weights(TRAINED[name]))
    params = projected(TRAINED[name])
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    x, y = batch()

    def body(carry, _):
        params, state, loss = make_step(tx)(*carry, x, y)
        return (params, state), loss

    (scanned, scanned_state), _ = jax.lax.scan(body, (params, state), length=4)
    for _ in range(4):
        new_params, new_state, _ = step(params, state, x, y)
        chex.assert_trees_all_equal_shapes_and_dtypes((new_params, new_state), (params, state))
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        params, state = new_params, new_state
    assert_on_grid(scanned, scanned_state)
    chex.assert_trees_all_close(
        latent_params(scanned, scanned_state), latent_params(params, state), rtol=1e-4, atol=1e-5
    )


def test_second_call_compiles_nothing():
    tx = clipquant(optax.sgd(0.1), c=1.0, quantizer=Uniform(bits=3))
    params = projected(Uniform(bits=3))
    state = tx.init(params)
    step = jax.jit(chex.assert_max_traces(make_step(tx), 1))
    for _ in range(3):
        params, state, _ = step(params, state, *batch())


def test_params_and_state_can_be_donated_together():
    tx = optimizer(quantize_weights(Uniform(bits=4)))
    params = mlp_params()
    state = tx.init(params)
    # No array of the state shares a buffer with a param.
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    assert not pointers & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    for _ in range(4):
        params, state, _ = step(params, state, *batch())
    assert_on_grid(params, state)


def test_works_under_vmap():
    tx = optimizer(quantize_weights(Uniform(bits=3, group_size=5)))
    start = [projected(Uniform(bits=3, group_size=5), seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *start)
    state = jax.vmap(tx.init)(stacked)
    step = jax.jit(jax.vmap(make_step(tx), in_axes=(0, 0, None, None)))
    for _ in range(3):
        stacked, state, _ = step(stacked, state, *batch())
    for i in range(3):
        assert_on_grid(*jax.tree.map(lambda x, i=i: x[i], (stacked, state)))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(10)(x)))


def test_works_in_a_linen_train_state():
    model = Model()
    x, y = batch()
    quantizer = Uniform(bits=4)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = model.init(jax.random.key(0), x)["params"]
        params = dequantize_params(quantize_params(params, quantizer))
        state = train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=clipquant(optax.adam(1e-2), quantizer=quantizer)
        )

        @jax.jit
        def step(state):
            def loss(params):
                return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

            value, grads = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=grads), value

        losses = []
        for _ in range(200):
            state, loss = step(state)
            losses.append(float(loss))
        assert_on_grid(state.params, state.opt_state)
        assert losses[-1] < 0.35 * losses[0]
        exported = export_params(state.params, state.opt_state)
        out = jax.jit(lambda p: model.apply({"params": p}, x))
        chex.assert_trees_all_equal(out(exported), out(state.params))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(12, 10, rngs=rngs)
        self.second = nnx.Linear(10, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_works_in_an_nnx_optimizer():
    x, y = batch()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = NnxModel(nnx.Rngs(0))
        nnx.update(
            model, dequantize_params(quantize_params(nnx.state(model, nnx.Param), Ternary()))
        )
        tx = clipquant(
            optax.adam(1e-2), quantizer={"first/kernel$": Ternary(), "second": Ternary()}
        )
        opt = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, opt):
            loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
            opt.update(model, grads)
            return loss

        losses = [float(step(model, opt)) for _ in range(100)]
        assert losses[-1] < 0.7 * losses[0]
        params = nnx.state(model, nnx.Param)
        exported = export_params(params, opt)
        assert isinstance(exported["first"]["kernel"].get_value(), QArray)
        chex.assert_trees_all_equal(
            nnx.to_pure_dict(dequantize_params(exported)), nnx.to_pure_dict(params)
        )
        # The bare state and bare params are accepted too.
        pure = export_params(nnx.as_pure(params), opt.opt_state)
        chex.assert_trees_all_equal(dequantize_params(pure), nnx.as_pure(params))
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        chex.assert_trees_all_close(nnx.merge(graphdef, exported, rest)(x), model(x), rtol=1e-5)
        assert latent_params(params, opt)["first"]["kernel"].shape == (12, 10)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", ["zscore7", "uniform2-groups"])
def test_round_weights_stays_on_the_grid(platform, variant, stochastic, name):
    tx = optimizer(round_weights(QUANTIZERS[name], stochastic=stochastic))
    params = projected(QUANTIZERS[name])
    state = tx.init(params)
    step = variant(make_step(tx))
    for _ in range(4):
        params, new_state, _ = step(params, state, *batch())
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        state = new_state
        assert_on_grid(params, state)


def test_nearest_rounding_stalls_and_the_others_train():
    quantizer = Uniform(bits=4, scale_rule="absmax")
    x, y = batch()

    def train(last):
        tx = optax.chain(optax.sgd(0.002), last)
        params = projected(quantizer)
        first = mlp_loss(params, x, y)
        step = make_step(tx)
        (params, _), _ = jax.lax.scan(
            lambda carry, _: (step(*carry, x, y)[:2], None), (params, tx.init(params)), length=1000
        )
        kernels_moved = np.any(
            params["Dense_0"]["kernel"] != projected(quantizer)["Dense_0"]["kernel"]
        )
        return float(mlp_loss(params, x, y) / first), kernels_moved

    stalled, moved = train(round_weights(quantizer))
    trained, _ = train(quantize_weights(quantizer))
    stochastic, _ = train(round_weights(quantizer, stochastic=True))
    assert not moved
    assert trained < 0.6 * stalled
    assert stochastic < 0.6 * stalled


def test_stochastic_seeds_and_steps_differ():
    def run(seed, steps=2):
        tx = round_weights(Uniform(bits=4), stochastic=True, seed=seed)
        params = {"w": jnp.asarray(weights((30, 20)))}
        state = tx.init(params)
        moves = []
        for _ in range(steps):
            updates, state = tx.update({"w": jnp.zeros((30, 20))}, state, params)
            moves.append(updates["w"])
        return moves

    first, again, other = run(0), run(0), run(1)
    chex.assert_trees_all_equal(first, again)
    assert np.any(first[0] != other[0])
    assert np.any(first[0] != first[1])


def test_latent_params_keep_small_updates():
    tx = quantize_weights(Uniform(bits=2))
    params = {"w": jnp.asarray(weights((10, 3))), "b": jnp.ones(3)}
    state = tx.init(params)
    chex.assert_trees_all_equal(latent_params(params, state), params)
    updates = jax.tree.map(lambda p: jnp.full_like(p, 1e-4), params)
    emitted, state = tx.update(updates, state, params)
    chex.assert_trees_all_equal(emitted["b"], updates["b"])
    params = optax.apply_updates(params, emitted)
    chex.assert_trees_all_close(latent_params(params, state)["w"], weights((10, 3)) + 1e-4)


def test_update_without_params_is_refused():
    for make in (quantize_weights, round_weights):
        tx = make(Uniform(bits=4))
        params = mlp_params()
        with pytest.raises(ValueError, match=f"{make.__name__} needs the params"):
            tx.update(params, tx.init(params))


@pytest.mark.parametrize("make", [quantize_weights, round_weights])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"where": "kernel"}, "where must be a function of path and leaf, got 'kernel'"),
        ({"uses": {}}, r"uses must be what trace_weights\(.* returns, got {}"),
    ],
)
def test_arguments_of_other_types_are_refused_at_once(make, kwargs, message):
    with pytest.raises(TypeError, match=message):
        make(Uniform(bits=4), **kwargs)


@pytest.mark.parametrize("seed", [jax.random.key(0), jax.random.PRNGKey(0), 1.5, None])
def test_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(TypeError, match="seed must be an integer, got"):
        round_weights(Uniform(bits=4), stochastic=True, seed=seed)


def test_optimizer_that_was_not_called_is_refused():
    with pytest.raises(TypeError, match=r"clipquant: optimizer must .*optax\.adam\(1e-3\), got"):
        clipquant(optax.adam)  # pyright: ignore[reportArgumentType]


def test_init_refuses_what_quantize_params_refuses():
    with pytest.raises(ValueError, match="no leaf of params is selected"):
        quantize_weights(Uniform()).init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="matches no path"):
        quantize_weights({"nothing": Uniform()}).init(mlp_params())
    with pytest.raises(ValueError, match=r"params leaf 'Dense_0/kernel': .*out of range"):
        quantize_weights(Uniform(channel_axis=2)).init(mlp_params())
    with pytest.raises(ValueError, match="matches no path"):
        round_weights({"nothing": Uniform()}).init(mlp_params())


def test_export_refuses_the_state_of_other_params():
    params = mlp_params()
    with pytest.raises(ValueError, match="no state of quantize_weights"):
        export_params(params, optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="no state of quantize_weights; give"):
        latent_params(params, round_weights(Uniform()).init(params))
    state = quantize_weights(Uniform()).init(params)
    with pytest.raises(ValueError, match="no leaf 'Dense_0/kernel'"):
        export_params({"w": jnp.ones((2, 2))}, state)
    with pytest.raises(ValueError, match="no leaf 'Dense_0/kernel'"):
        quantize_weights(Uniform()).update(params, state, {"Dense_1": params["Dense_1"]})


def test_export_warns_of_weights_off_the_grid():
    params = projected(Uniform(bits=4))
    state = quantize_weights(Uniform(bits=4)).init(params)
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[0, 0].add(1e-3)
    with pytest.warns(UserWarning, match="1 of 160 weights are off the grid"):
        export_params(params, state)
    jax.jit(export_params)(params, state)


def test_nan_gradients_reach_params_and_export():
    tx = quantize_weights(Uniform(bits=4))
    params = projected(Uniform(bits=4))
    state = tx.init(params)
    updates = jax.tree.map(jnp.zeros_like, params)
    updates["Dense_0"]["kernel"] = updates["Dense_0"]["kernel"].at[0, 0].set(jnp.nan)
    emitted, state = tx.update(updates, state, params)
    params = optax.apply_updates(params, emitted)
    assert np.isnan(params["Dense_0"]["kernel"][0, 0])
    assert np.isnan(export_params(params, state)["Dense_0"]["kernel"].dequantize()[0, 0])


def test_none_and_integer_leaves_pass_through():
    tx = quantize_weights(Uniform(bits=4))
    params = {"w": jnp.asarray(weights((4, 3))), "none": None, "steps": jnp.arange(3)}
    params = dequantize_params(quantize_params(params, Uniform(bits=4)))
    state = tx.init(params)
    updates = {"w": jnp.zeros((4, 3)), "none": None, "steps": np.zeros(3, jax.dtypes.float0)}
    emitted, state = tx.update(updates, state, params)
    assert emitted["none"] is None
    assert emitted["steps"].dtype == jax.dtypes.float0
    exported = export_params(params, state)
    assert exported["none"] is None


def test_partitioned_boxes_are_kept():
    params = {"kernel": nn.Partitioned(jnp.asarray(weights((6, 4))), names=(None, None))}
    tx = quantize_weights(Uniform(bits=4))
    state = tx.init(params)
    updates = jax.tree.map(lambda p: 0.01 * p, params)
    for _ in range(3):
        emitted, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, emitted)
    assert isinstance(params["kernel"], nn.Partitioned)
    assert isinstance(export_params(params, state)["kernel"].value, QArray)
    assert_on_grid(params, state)


def test_state_survives_msgpack():
    tx = clipquant(optax.sgd(0.1, 0.9), quantizer=Uniform(bits=3, group_size=4))
    params = projected(Uniform(bits=3, group_size=4))
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    params, state, _ = step(params, state, *batch())
    restored = flax.serialization.from_bytes(
        tx.init(mlp_params(5)), flax.serialization.to_bytes(state)
    )
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(step(params, restored, *batch()), step(params, state, *batch()))


def test_orbax_refuses_to_restore_a_state_onto_other_levels(tmp_path):
    params = {"kernel": jnp.asarray(weights((16, 8)))}

    def state(quantizer):
        return quantize_weights(quantizer).init(params)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "kept", state(Uniform(bits=4)))
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match=r"kernel.*scale\(bits=2, lower=-2, upper=1"):
            checkpointer.restore(tmp_path / "kept", state(Uniform(bits=2)))


@pytest.mark.parametrize("make", [quantize_weights, round_weights])
def test_updates_are_at_least_float32(make):
    """Half precision could not hold the difference of two levels exactly; float64 stays float64."""
    tx = make(Uniform(bits=4))
    with jax.enable_x64(True):
        for dtype, wide in (
            ("bfloat16", "float32"),
            ("float16", "float32"),
            ("float64", "float64"),
        ):
            params = {"w": jnp.asarray(weights((12, 5)), dtype)}
            updates, _ = tx.update(params, tx.init(params), params)
            assert updates["w"].dtype == wide


@pytest.mark.parametrize("make", [quantize_weights, round_weights])
def test_float64_params_are_on_the_grid_after_three_steps(make):
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(32, 32)))}
        tx = optax.chain(optax.sgd(0.01), make(Uniform(bits=4)))
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        assert_on_grid(params, state)


@pytest.mark.parametrize("name", cases(CORE, [*FORMULAS, "binary"]))
def test_float16_params_at_the_end_of_the_range_stay_finite(name):
    params = {"w": jnp.array([[65504.0, 1], [-65504, 2], [3, 4]] * 2, jnp.float16)}
    tx = quantize_weights(QUANTIZERS[name])
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update({"w": jnp.zeros((6, 2), jnp.float16)}, state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        assert np.all(np.isfinite(params["w"]))
    assert_on_grid(params, state)


def test_round_weights_can_be_donated():
    params = projected(Uniform(bits=4))
    tx = round_weights(Uniform(bits=4), stochastic=True)
    state = tx.init(params)
    step = jax.jit(lambda p, s: (optax.apply_updates(p, tx.update(p, s, p)[0]), tx.update(p, s, p)[1]), donate_argnums=(0, 1))  # fmt: skip
    for _ in range(2):
        params, state = step(params, state)


@pytest.mark.parametrize("shape", [(13, 10), (12, 1), (12, 11), (12, 10, 1)])
@pytest.mark.parametrize("group_size", [None, 4])
def test_export_refuses_other_shapes(shape, group_size):
    params = {"w": jnp.asarray(weights((12, 10)))}
    other = {"w": jnp.ones(shape)}
    rule = Uniform(bits=4, group_size=group_size)
    for options in ({}, {"residual_bits": 8}):
        state = quantize_weights(rule, **options).init(params)
        for read in (export_params, latent_params):
            with pytest.raises(ValueError, match=r"'w' has shape .*, but opt_state .* of one run"):
                read(other, state)
    if (
        shape != (13, 10) or group_size
    ):  # or the grid, which is all the state has, would fit these too
        with pytest.raises(ValueError, match=r"with scales of .*: they are not of one run"):
            export_params(other, round_weights(rule).init(params))


def test_export_of_another_tree_names_the_nearest_leaf_or_the_missing_state():
    params = {"net": {"kernel": jnp.asarray(weights((12, 10)))}}
    state = quantize_weights(Uniform(bits=4)).init(params)
    rounded = round_weights(Uniform(bits=4)).init(params)
    for wrong in ({"params": params}, params["net"], state):
        with pytest.raises(
            ValueError, match=r"no leaf 'net/kernel', .*nearest: .*kernel.*tx\.update"
        ):
            export_params(wrong, state)
    with pytest.raises(ValueError, match=r"nearest: none"):
        export_params(None, state)
    for opt_state in (params, optax.adam(0.1).init(params)):
        with pytest.raises(ValueError, match="no state of quantize_weights or round_weights; give"):
            export_params(params, opt_state)
    with pytest.raises(ValueError, match="no state of quantize_weights; give"):
        latent_params(params, rounded)


def test_quantizer_class_is_refused():
    for make in (quantize_weights, round_weights):
        with pytest.raises(TypeError, match="quantizer must be a Quantizer or a mapping"):
            make(Uniform)


@pytest.mark.parametrize(
    "tx",
    [
        *(quantize_weights(QUANTIZERS[name]) for name in CORE),
        quantize_weights(Uniform(bits=8), residual_bits=8),
        round_weights(Uniform(bits=4), stochastic=True),
    ],
)
def test_export_of_more_elements_than_an_int32_counts(tx):
    params = [jax.ShapeDtypeStruct((5, 30_000, 40_000), jnp.bfloat16)]
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert updates[0].shape == params[0].shape
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
