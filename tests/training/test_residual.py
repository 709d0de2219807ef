import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    CORE,
    FORMULAS,
    QUANTIZERS,
    assert_on_grid,
    batch,
    cases,
    make_step,
    optimizer,
    projected,
    weights,
)

from optax_clipquant import (
    Binary,
    NormalFloat,
    QArray,
    Ternary,
    Uniform,
    ZScore,
    dequantize_params,
    latent_params,
    quantize_params,
    quantize_weights,
    softness_schedule,
)
from optax_clipquant.training.residual import advance, latent_of, start

SIZES = {
    "channel": Uniform(bits=4),
    "group": Uniform(bits=4, group_size=5),
    "tensor": ZScore(),
    "first": Uniform(bits=2, channel_axis=0),
    "both": Uniform(bits=2, channel_axis=(0, 1)),
}


@pytest.mark.parametrize("name", SIZES)
def test_each_scale_has_a_unit_that_bounds_the_error(variant, name):
    w = weights((33, 7), "heavy")
    grid = SIZES[name].fit(jnp.asarray(w))

    def distance(w):
        level = grid.decode(grid.encode(jnp.asarray(w)))
        return level, np.asarray(w) - np.asarray(level)

    def units(kept):
        return np.asarray(kept.grid.decode(jnp.ones((33, 7), jnp.int8)))

    level, residual = distance(w)
    kept = variant(start)(jnp.asarray(w), level, grid)
    assert kept.grid.scale.shape == grid.scale.shape
    chex.assert_type(kept.qvalue, jnp.int8)
    assert np.all(np.abs(np.asarray(kept.dequantize()) - residual) <= 0.5001 * units(kept))
    # 127 units are half a step, or the distance beyond the outermost level.
    one, zero = (grid.decode(jnp.full((33, 7), code, jnp.int8)) for code in (1, 0))
    step = np.abs(np.asarray(one - zero))
    assert np.all(127 * units(kept) <= 1.02 * np.maximum(step / 2, np.abs(residual).max()))
    level, residual = distance(1.3 * w)
    moved = variant(advance)(jnp.asarray(1.3 * w), level, grid, kept, 0, 1)
    assert np.all(np.abs(np.asarray(moved.dequantize()) - residual) <= 1.0001 * units(moved))


def stood(w, quantizer=Uniform(bits=4)):  # noqa: B008 (immutable)
    """The levels of ``w`` on the grid fitted to it, and the grid."""
    grid = quantizer.fit(w)
    return grid.decode(grid.encode(w)), grid


def test_stochastic_rounding_is_unbiased():
    w = jnp.asarray(weights((64, 8), seed=1))
    level, grid = stood(w)
    kept, residual = start(w, level, grid), np.asarray(w - level)
    fn = jax.jit(jax.vmap(lambda step: advance(w, level, grid, kept, 0, step).dequantize()))
    mean = np.asarray(fn(jnp.arange(4000)), np.float64).mean(0)
    unit = np.asarray(kept.grid.scale.astype(jnp.float32))
    # Closer than with independent noise, whose means have errors of up to half a unit / sqrt(4000) = .008.
    assert np.abs((mean - residual) / unit).max() < 0.002
    assert abs(((mean - residual) / unit).mean()) < 0.0002


def test_unchanged_residual_is_kept_bit_for_bit():
    level, grid = stood(jnp.asarray(weights((64, 8), "heavy")))
    kept = start(jnp.asarray(weights((64, 8), "heavy")), level, grid)
    for step in range(50):
        again = advance(level + kept.dequantize(), level, grid, kept, 0, step)
        np.testing.assert_array_equal(again.qvalue, kept.qvalue)
        np.testing.assert_array_equal(again.grid.scale, kept.grid.scale)
        kept = again


def test_unit_follows_the_residual():
    w = jnp.asarray(weights((8, 1)))
    level, grid = stood(w)
    kept = start(w, level, grid)
    for factor in (0.9, 0.6):
        level, grid = stood(factor * w)
        same = advance(factor * w, level, grid, kept, 0, 0)
        np.testing.assert_array_equal(same.grid.scale, kept.grid.scale)
    for factor in (1.05, 0.3, 1e-20, 1e20, 0.0):
        level, grid = stood(factor * w)
        moved = advance(factor * w, level, grid, kept, 0, 0)
        unit = float(moved.grid.scale[0, 0])
        largest = float(jnp.max(jnp.abs(factor * w - level)))
        step = float(jnp.abs(grid.scale[0, 0]))
        assert largest <= 127 * unit <= 1.02 * max(step / 2, largest)
    level, grid = stood(w.at[0, 0].set(jnp.nan))
    bad = advance(w.at[0, 0].set(jnp.nan), level, grid, kept, 0, 0)
    assert np.isnan(np.asarray(bad.dequantize())).all()


BINARY = {"channel": Binary(), "group": Binary(group_size=5), "tensor": Binary(channel_axis=None)}


@pytest.mark.parametrize("name", BINARY)
def test_one_bit_codes_are_fine_around_zero(variant, name):
    w = jnp.asarray(weights((33, 7), "heavy"))
    grid = BINARY[name].fit(w)
    level = grid.decode(grid.encode(w))
    first = variant(start)(w, level, grid)
    assert first.grid.scale.shape == grid.scale.shape
    unit = np.asarray(first.grid.decode(jnp.ones(w.shape, jnp.int8)), np.float64)
    # A float64 reference: the neighbouring squares of each weight.
    root = np.floor(np.sqrt(np.abs(np.asarray(w, np.float64))) / unit)
    low, high = (root * unit) ** 2, ((root + 1) * unit) ** 2
    nearest = np.where(np.abs(w) - low < high - np.abs(w), low, high) * np.sign(w)
    np.testing.assert_allclose(latent_of(level, grid, first), nearest, rtol=1e-5, atol=1e-9)
    fn = jax.jit(
        jax.vmap(lambda step: latent_of(level, grid, advance(w, level, grid, first, 0, step)))
    )
    found = np.abs(np.asarray(fn(jnp.arange(4000)), np.float64))
    assert np.all((found >= low * (1 - 1e-5)) & (found <= high * (1 + 1e-5)))
    assert np.all(np.abs(found.mean(0) - np.abs(w)) < 0.002 * (high - low))
    # Where a weight changes sign, these are finer than codes of the distance to its level.
    distance = np.abs(np.asarray(w - level))
    small = np.abs(w) < 0.1 * np.abs(level)
    assert np.median((high - low)[small]) < 0.5 * distance.max() / 127


def test_unchanged_one_bit_residual_is_kept():
    w = jnp.asarray(weights((64, 8), "heavy"))
    grid = Binary().fit(w)
    level = grid.decode(grid.encode(w))
    kept = start(w, level, grid)
    for step in range(50):
        again = advance(latent_of(level, grid, kept), level, grid, kept, 0, step)
        np.testing.assert_array_equal(again.qvalue, kept.qvalue)
        np.testing.assert_array_equal(again.grid.scale, kept.grid.scale)
        kept = again
    zeros = start(jnp.zeros_like(w), jnp.zeros_like(w), grid)
    np.testing.assert_array_equal(latent_of(level, grid, zeros), 0.0)
    bad = advance(w.at[0, 0].set(jnp.inf), level, grid, kept, 0, 0)
    assert not np.isfinite(np.asarray(latent_of(level, grid, bad))[:, 0]).any()


def zero_updates(quantizer, w, residual_bits, steps=1000):
    """The grids before and after zero updates, and the distance of the latent weights from ``w``, in units."""
    tx = quantize_weights(quantizer, residual_bits=residual_bits)
    params = {"w": jnp.asarray(w)}
    zeros = {"w": jnp.zeros_like(params["w"])}

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(zeros, state, params)
        return (optax.apply_updates(params, updates), state), None

    state = tx.init(params)
    (after, moved), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=steps))((params, state))
    error = jnp.abs(latent_params(after, moved)["w"] - w)
    if residual_bits is not None:
        kept = moved.latent["w"]
        unit = kept.grid.decode(jnp.ones(w.shape, jnp.int8))
        if quantizer == Binary():  # its codes hold roots
            unit = (2 * jnp.abs(kept.dequantize()) + unit) * unit
        error /= unit
    return state.grid["w"], moved.grid["w"], np.asarray(error)


CLOSED_FORM = {
    "binary": Binary(),
    "uniform4": Uniform(bits=4),
    "uniform4-groups": Uniform(bits=4, group_size=32),
    "uniform3-absmax": Uniform(bits=3, scale_rule="absmax"),
    "uniform8": Uniform(bits=8),
    "asymmetric": Uniform(bits=4, symmetric=False),
    "zscore": ZScore(),
    "normalfloat": NormalFloat(),
}


@pytest.mark.parametrize("name", cases(CLOSED_FORM, ["binary", "normalfloat"]))
def test_zero_updates_move_no_scale(name):
    """Saturated weights (11% at 1 bit) lie outside the levels: clipping them would shrink the scale."""
    before, after, error = zero_updates(CLOSED_FORM[name], weights((128, 16)), 8)
    np.testing.assert_allclose(after.scale, before.scale, rtol=0.01)
    assert error.max() < 10  # where the last bit of a scale flips back and forth, levels move too
    assert error.mean() < 1


# Of heavy-tailed weights, whole slices may become zero.
@pytest.mark.filterwarnings("ignore:all weights become zero")
@pytest.mark.parametrize(
    "quantizer",
    cases(
        [
            Ternary(),
            Ternary(group_size=32),
            Uniform(bits=2),
            Uniform(bits=3),
            Uniform(bits=3, group_size=32),
        ],
        [Ternary(group_size=32), Uniform(bits=3)],
    ),
    ids=str,
)
@pytest.mark.parametrize("kind", cases(["normal", "heavy"], ["heavy"]))
def test_zero_updates_move_searched_scales_no_more_than_float_does(quantizer, kind):
    """With float latents the search keeps improving the scale too, so the end results are compared."""
    w = weights((128, 64), kind)
    _, floats, _ = zero_updates(quantizer, w, None)
    _, after, distance = zero_updates(quantizer, w, 8)
    ratio = np.abs(np.asarray(after.scale)) / np.abs(np.asarray(floats.scale))
    assert abs(np.log(ratio).mean()) < 0.01
    assert np.median(np.abs(ratio - 1)) < 0.01

    def error(grid):
        return float(jnp.sum((grid.decode(grid.encode(jnp.asarray(w))) - w) ** 2))

    assert error(after) < 1.01 * error(floats)
    assert distance.mean() < 3


def test_updates_smaller_than_a_unit_count():
    tx = quantize_weights(Uniform(bits=4), residual_bits=8)
    params = dequantize_params(
        quantize_params({"w": jnp.asarray(weights((200, 50)))}, Uniform(bits=4))
    )
    state = tx.init(params)
    first = latent_params(params, state)["w"]
    step = float(jnp.abs(state.grid["w"].scale).mean())
    updates = {"w": jnp.full((200, 50), step / 2000)}  # a unit is about step / 254

    def body(carry, _):
        params, state = carry
        emitted, state = tx.update(updates, state, params)
        return (optax.apply_updates(params, emitted), state), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=400))((params, state))
    moved = np.asarray(latent_params(params, state)["w"] - first) / step
    np.testing.assert_allclose(moved.mean(), 0.2, rtol=0.03)
    assert moved.std() < 0.08


@pytest.mark.parametrize("name", cases(CORE, [*FORMULAS, "binary"]))
def test_params_are_on_the_grid_after_every_step(name):
    tx = optimizer(quantize_weights(QUANTIZERS[name], residual_bits=8))
    params = projected(QUANTIZERS[name])
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    for _ in range(4):
        new_params, new_state, _ = step(params, state, *batch())
        chex.assert_trees_all_equal_shapes_and_dtypes((new_params, new_state), (params, state))
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        params, state = new_params, new_state
        assert_on_grid(params, state)


@pytest.mark.parametrize("quantizer", [Binary(), Uniform(bits=4)], ids=str)
def test_trains_like_float_latents(quantizer):
    losses = {}
    for bits in (None, 8):
        tx = optimizer(quantize_weights(quantizer, residual_bits=bits))
        params = projected(quantizer)
        state = tx.init(params)
        step = jax.jit(make_step(tx), donate_argnums=(0, 1))
        for i in range(300):
            params, state, loss = step(params, state, *batch(i % 10))
        losses[bits] = float(loss)
    assert losses[8] < 1.1 * losses[None]


@pytest.mark.parametrize("dtype", cases([jnp.bfloat16, jnp.float16], [jnp.bfloat16]))
def test_half_precision_params_stand_on_the_grid(dtype):
    tx = optimizer(quantize_weights(Uniform(bits=4), residual_bits=8))
    params = projected(Uniform(bits=4), dtype=dtype)
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    for _ in range(4):
        params, state, _ = step(params, state, *batch(dtype=dtype))
        assert_on_grid(params, state)
    chex.assert_type(latent_params(params, state)["Dense_0"]["kernel"], jnp.float32)


def test_state_takes_a_byte_per_weight():
    params = {"w": jnp.asarray(weights((512, 256)))}
    tx = quantize_weights(Uniform(bits=4), residual_bits=8)
    state = tx.init(params)
    assert isinstance(state.latent["w"], QArray)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert nbytes == 512 * 256 + 256 * (4 + 2) + 4
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    # Updates and params take 4 bytes per weight each, besides the state.
    assert memory.argument_size_in_bytes <= (4 + 4) * 512 * 256 + nbytes + 64


def test_survives_msgpack():
    tx = optimizer(quantize_weights(Uniform(bits=3), residual_bits=8))
    params = projected(Uniform(bits=3))
    step = jax.jit(make_step(tx))
    params, state, _ = step(params, tx.init(params), *batch())
    restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(step(params, restored, *batch()), step(params, state, *batch()))


@pytest.mark.parametrize("bits", [4, 16, 7.5, "8"])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="residual_bits must be 8, or None for float32, got"):
        quantize_weights(Uniform(bits=4), residual_bits=bits)


def test_works_in_an_nnx_optimizer_with_softness():
    x, y = batch()
    rules = {"kernel": Uniform(bits=3)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = nnx.Sequential(
            nnx.Linear(12, 10, rngs=nnx.Rngs(0)), nnx.Linear(10, 4, rngs=nnx.Rngs(1))
        )
        last = quantize_weights(rules, softness=softness_schedule(2, 8), residual_bits=8)
        opt = nnx.Optimizer(model, optax.chain(optax.adam(1e-2), last), wrt=nnx.Param)

        @nnx.jit
        def step(model, opt):
            loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
            opt.update(model, grads)
            return loss

        losses = [float(step(model, opt)) for _ in range(60)]
        assert losses[-1] < 0.8 * losses[0]
        params = nnx.state(model, nnx.Param)
        assert_on_grid(nnx.as_pure(params), opt)
        latent = nnx.to_pure_dict(latent_params(params, opt))
        assert latent["layers"][0]["kernel"].shape == (12, 10)


@pytest.mark.parametrize("dtype", cases([jnp.float32, jnp.bfloat16, jnp.float16], [jnp.bfloat16]))
@pytest.mark.parametrize("name", ["uniform8", "uniform4", "uniform2", "binary", "zscore7"])
def test_softness_and_half_precision_keep_the_latent(dtype, name):
    """The level must be recovered from params that lie between levels, rounded to their dtype."""
    rng = np.random.default_rng(0)
    tx = quantize_weights(QUANTIZERS[name], residual_bits=8, softness=softness_schedule(0, 400))
    params = {"w": jnp.asarray(rng.normal(size=(64, 32)), dtype)}
    state, update = tx.init(params), jax.jit(tx.update)
    exact = np.asarray(params["w"], np.float64)
    for _ in range(60):
        u = 1e-3 * rng.normal(size=(64, 32)).astype(np.float32)
        exact += u
        updates, state = update({"w": jnp.asarray(u)}, state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
    error = np.asarray(latent_params(params, state)["w"]) - exact
    unit = np.asarray(state.latent["w"].scale.astype(jnp.float32))
    if name == "binary":  # units of roots of weights
        error /= 2 * np.sqrt(np.abs(exact)) + unit
    # One stochastic rounding per step, of at most a unit.
    assert np.abs(error / unit).max() < 4 * np.sqrt(60)
    assert np.sqrt(np.mean(np.square(error / unit))) < np.sqrt(60)
