import dataclasses

import chex
import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import NAMES, QUANTIZERS, VARIANTS, cases, weights

from optax_clipquant import Grid, NormalFloat, QArray, Uniform, ZScore, narrow

MIXED = [
    *(Uniform(bits=4), Uniform(bits=2, group_size=4), Uniform(bits=8, symmetric=False), ZScore()),
    NormalFloat(group_size=4),
]


def traced_r(w: jax.Array) -> QArray:
    return jax.jit(lambda w, R: ZScore(R=R).quantize(w))(w, 3)


def expanded(grid: Grid, x: jax.Array, shape) -> np.ndarray:
    """The scale or zero point of each element, by index arithmetic."""
    index = list(np.indices(shape))
    for axis in range(len(shape)):
        if grid.group is not None and axis == grid.group[0] + len(shape):
            index[axis] = index[axis] // grid.group[1]
        elif x.shape[axis] == 1:
            index[axis] = np.zeros_like(index[axis])
    return np.asarray(x, np.float64)[tuple(index)]


def levels(grid: Grid, shape) -> np.ndarray:
    """All levels of each element in float64, with codes along the last axis."""
    zero = 0 if grid.zero_point is None else expanded(grid, grid.zero_point, shape)[..., None]
    codes = np.arange(grid.lower, grid.upper + 1)
    if grid.codebook is not None:
        return np.array(grid.codebook) * expanded(grid, grid.scale, shape)[..., None]
    return (codes + grid.offset - zero) * expanded(grid, grid.scale, shape)[..., None]


@pytest.mark.parametrize(("variant", "name"), VARIANTS)
@pytest.mark.parametrize("shape", cases([(7, 6), (12,), (3, 3, 8, 5)], [(7, 6), (3, 3, 8, 5)]))
def test_encode_picks_the_nearest_level(platform, variant, name, shape):
    w = weights(shape)
    grid = QUANTIZERS[name].fit(jnp.asarray(w))
    codes = variant(grid.encode)(jnp.asarray(w))
    chex.assert_shape(codes, shape)
    chex.assert_type(codes, jnp.int8)
    assert np.all((np.asarray(codes) >= grid.lower) & (np.asarray(codes) <= grid.upper))
    choices = levels(grid, shape)
    decoded = np.asarray(variant(grid.decode)(codes), np.float64)
    chosen = np.take_along_axis(choices, np.asarray(codes, int)[..., None] - grid.lower, -1)[..., 0]
    np.testing.assert_array_equal(decoded, chosen)
    best = np.min(np.abs(choices - w[..., None].astype(np.float64)), axis=-1)
    np.testing.assert_allclose(np.abs(decoded - w), best, atol=2e-6 * np.abs(w).max())


@pytest.mark.parametrize("name", NAMES)
def test_requantizing_gives_the_same_codes(name):
    grid = QUANTIZERS[name].fit(jnp.asarray(weights((9, 7))))
    codes = grid.encode(jnp.asarray(weights((9, 7), seed=1)))
    requantize = jax.jit(lambda codes, key: grid.encode(grid.decode(codes), key=key))
    for _ in range(6):
        again = requantize(codes, None)
        chex.assert_trees_all_equal(again, codes)
        stochastic = requantize(codes, jax.random.key(3))
        chex.assert_trees_all_equal(stochastic, codes)


@pytest.mark.parametrize("quantizer", MIXED, ids=str)
def test_stochastic_rounding_is_unbiased(quantizer):
    w = weights((16, 4), "uniform")
    grid = quantizer.fit(jnp.asarray(w))
    keys = jax.random.split(jax.random.key(0), 1000)
    decoded = jax.jit(jax.vmap(lambda key: grid.decode(grid.encode(jnp.asarray(w), key=key))))(keys)
    decoded = np.asarray(decoded, np.float64)
    step = np.abs(expanded(grid, grid.scale, w.shape))
    choices = levels(grid, w.shape)
    inside = (w > choices.min(-1)) & (w < choices.max(-1))
    error = np.abs(np.mean(decoded, 0) - w) / step
    # Five standard errors, where one rounding has a standard deviation of at most half a step.
    assert np.max(np.where(inside, error, 0)) < 5 * 0.5 / np.sqrt(len(keys))
    # Only the two levels around a weight occur.
    assert np.max(np.where(inside, np.abs(decoded - w) / step, 0)) < 1.001


@hypothesis.given(
    bits=st.integers(1, 8),
    exponent=st.integers(-100, 100),
    seed=st.integers(0, 2**31),
)
def test_levels_and_their_differences_are_exact_in_float32(bits, exponent, seed):
    w = weights((8, 3), seed=seed) * np.float32(2.0) ** exponent
    grid = Uniform(bits=bits).fit(jnp.asarray(w))
    scale = np.asarray(grid.scale)
    np.testing.assert_array_equal(np.asarray(jax.lax.reduce_precision(grid.scale, 8, 7)), scale)
    exact = levels(grid, (8, 3))
    np.testing.assert_array_equal(exact.astype(np.float32).astype(np.float64), exact)


@pytest.mark.parametrize("dtype", cases([jnp.float32, jnp.bfloat16, jnp.float16], [jnp.bfloat16]))
@pytest.mark.parametrize("quantizer", MIXED, ids=str)
def test_decoded_dtype_is_that_of_the_grid(dtype, quantizer):
    w = jnp.asarray(weights((8, 3))).astype(dtype)
    q = quantizer.quantize(w)
    assert q.dtype == dtype
    chex.assert_type(q.dequantize(), dtype)
    wide = dataclasses.replace(q.grid, dtype=jnp.dtype(jnp.float32))
    chex.assert_trees_all_equal(q.dequantize(), wide.decode(q.qvalue).astype(dtype))


def test_short_last_group_has_a_separate_scale():
    w = weights((33, 2))
    grid = Uniform(bits=4, group_size=16, scale_rule="absmax").fit(jnp.asarray(w))
    chex.assert_shape(grid.scale, (3, 2))
    assert grid.group == (-2, 16)
    expected = np.stack([np.abs(part).max(0) for part in (w[:16], w[16:32], w[32:])]) / 8
    np.testing.assert_allclose(np.abs(grid.scale), expected, rtol=2**-8)


def test_vmap_keeps_the_group_axis():
    w = jnp.asarray(weights((5, 33, 2)))
    quantizer = Uniform(bits=3, group_size=16)
    batched = jax.vmap(lambda w: quantizer.quantize(w))(w)
    single = quantizer.quantize(w[2])
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[2], batched), single)
    dequantized = jax.vmap(lambda q: q.dequantize())(batched)
    chex.assert_trees_all_equal(dequantized[2], single.dequantize())


def test_max_code_bounds_the_codes():
    grid = Grid(jnp.ones((1,)), max_code=jnp.int32(2), bits=8, lower=-127, upper=127)
    np.testing.assert_array_equal(grid.encode(jnp.array([5.0, -9.0, 1.0])), [2, -2, 1])


def test_grid_is_a_pytree_and_holds_placeholders():
    grid = traced_r(jnp.asarray(weights((4, 4)))).grid
    assert len(jax.tree.leaves(grid)) == 3
    rebuilt = jax.tree.map(lambda x: object(), grid)
    assert rebuilt.group == grid.group
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x, grid), grid)


@pytest.mark.parametrize("quantize", [*(q.quantize for q in MIXED), traced_r])
def test_msgpack_round_trip(quantize):
    q = {"w": quantize(jnp.asarray(weights((6, 4))))}
    restored = flax.serialization.from_bytes(q, flax.serialization.to_bytes(q))
    chex.assert_trees_all_equal(restored, q)
    assert restored["w"].grid.bits == q["w"].grid.bits


OTHERS = [
    (Uniform(bits=4), Uniform(bits=8), "bits=4.*bits=8"),
    (Uniform(bits=4), NormalFloat(bits=4), "codebook=None.*codebook=\\["),
    (Uniform(bits=4), Uniform(bits=4, symmetric=False), "zero_point=None.*zero_point=\\["),
    (Uniform(bits=4, group_size=4), Uniform(bits=4, group_size=5), "group=.*-2, 4.*group=.*-2, 5"),
    (Uniform(bits=4, group_size=2), Uniform(bits=4), "scale=\\[4, 4\\].*scale=\\[1, 4\\]"),
    (ZScore(), ZScore(R=1), "upper=.*restore into has.*upper="),
]  # fmt: skip


@pytest.mark.parametrize("through", ["flax", "orbax"])
@pytest.mark.parametrize(("saved", "other", "both"), OTHERS)
def test_restoring_onto_other_levels_names_both_and_the_path(through, saved, other, both, tmp_path):
    w = jnp.asarray(weights((8, 4)))
    kept, target = ({"a": {"w": quantizer.quantize(w)}} for quantizer in (saved, other))
    state = flax.serialization.to_state_dict(kept)
    if through == "orbax":  # which keeps arrays but not the static half
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "kept", state)
            checkpointer.wait_until_finished()
            state = checkpointer.restore(tmp_path / "kept", state)
    else:
        state = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(state))
    chex.assert_trees_all_equal(flax.serialization.from_state_dict(kept, state), kept)
    with pytest.raises(ValueError, match=rf"^a/w/grid: the checkpoint holds .*{both}"):
        flax.serialization.from_state_dict(target, state)


def test_orbax_refuses_other_levels_and_names_both_and_the_path(tmp_path):
    """Orbax keeps nothing of a tree but its arrays and their keys."""
    w = jnp.asarray(weights((8, 4)))
    quantizers = [Uniform(bits=4), Uniform(bits=3), *(other for _, other, _ in OTHERS[:4])]
    trees = [{"a": {"w": quantizer.quantize(w)}} for quantizer in quantizers]
    message = r"a\.w\.grid\.scale\(bits=4, lower=-8, upper=7"
    with ocp.StandardCheckpointer() as checkpointer:
        for i, tree in enumerate(trees):
            checkpointer.save(tmp_path / f"{i}", tree)
        checkpointer.wait_until_finished()
        for i, tree in enumerate(trees):
            found = checkpointer.restore(tmp_path / f"{i}", jax.eval_shape(lambda tree=tree: tree))
            chex.assert_trees_all_equal(found, tree)
            if i:
                with pytest.raises(ValueError, match=message):
                    checkpointer.restore(tmp_path / f"{i}", trees[0])
                with pytest.raises(ValueError, match=message):
                    checkpointer.restore(tmp_path / "0", tree)


def test_checkpoint_without_levels_is_checked_by_its_codes_and_shapes():
    w = jnp.asarray(weights((8, 4)))
    kept = {"w": Uniform(bits=4).quantize(w)}
    state = flax.serialization.to_state_dict(kept)
    del state["w"]["grid"]["levels"]
    chex.assert_trees_all_equal(flax.serialization.from_state_dict(kept, state), kept)
    for other, both in [
        (Uniform(bits=2).quantize(w), "w: .*codes from -8 to .* codes from -2 to 1"),
        (Uniform(bits=4, group_size=2).quantize(w), r"w/grid: .*scale=\[1, 4\].*scale=\[4, 4\]"),
        (Uniform(bits=4).quantize(w[:4]), r"w: .*qvalue=\[8, 4\].*qvalue=\[4, 4\]"),
    ]:
        with pytest.raises(ValueError, match=both):
            flax.serialization.from_state_dict({"w": other}, state)


def test_narrow_codes_survive_msgpack():
    q = narrow({"w": Uniform(bits=4).quantize(jnp.asarray(weights((8, 4))))})
    restored = flax.serialization.from_bytes(q, flax.serialization.to_bytes(q))
    chex.assert_trees_all_equal(restored, q)
    assert restored["w"].qvalue.dtype == jnp.int4


def test_levels_are_fixed_points_of_stochastic_rounding():
    # Multiplying by the reciprocal puts some levels one unit in the last place below their code.
    grid = Uniform(bits=8).fit(jnp.asarray(weights((64, 256))))
    codes = jnp.arange(4096 * 256, dtype=jnp.int32).reshape(4096, 256) % 256 - 128
    codes = codes.astype(jnp.int8)
    for seed in range(30):
        again = jax.jit(grid.encode)(grid.decode(codes), key=jax.random.key(seed))
        chex.assert_trees_all_equal(again, codes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_to_half_precision_cannot_be_compiled_away(dtype):
    # A compiler may drop a cast to bfloat16 and back, but not reduce_precision.
    q = Uniform(bits=8).quantize(jnp.asarray(weights((64, 8))).astype(dtype))
    widen = lambda q: q.dequantize().astype(jnp.float32)  # noqa: E731
    chex.assert_trees_all_equal(jax.jit(widen)(q), widen(q))
    assert "reduce_precision" in str(jax.make_jaxpr(widen)(q))


@pytest.mark.parametrize("size", [1.0, 1e-3, 2e-5, 1e-7])
@pytest.mark.parametrize("quantizer", MIXED)
def test_float16_keeps_its_smallest_numbers(variant, quantizer, size):
    """``reduce_precision`` alone would flush numbers below 2**-14 to zero."""
    w = jnp.asarray(weights((24, 6)) * np.float32(size)).astype(jnp.float16)
    q = quantizer.quantize(w)
    grid, codes = q.grid, np.asarray(q.qvalue, np.float32)
    level = codes + np.float32(grid.offset)
    if grid.codebook is not None:
        level = np.asarray(grid.codebook, np.float32)[np.asarray(q.qvalue, int) - grid.lower]
    if grid.zero_point is not None:
        level = level - expanded(grid, grid.zero_point, w.shape).astype(np.float32)
    expected = (level * expanded(grid, grid.scale, w.shape).astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(variant(QArray.dequantize)(q), expected)


FLOAT8 = [getattr(ml_dtypes, name) for name in dir(ml_dtypes) if name.startswith("float8_e")]


@pytest.mark.parametrize("dtype", [t for t in FLOAT8 if ml_dtypes.finfo(t).nmant])
def test_float8_rounding_matches_the_cast(dtype, variant):
    """From the smallest level to the largest, between levels, and beyond, where some types have no infinity."""
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    middles = (every[1:] + every[:-1]) / 2
    ends = every[-1] * np.array([1.02, 1.04, 1.1, 2, 1e9, np.inf, np.nan], np.float32)
    x = np.concatenate([every, middles, np.nextafter(middles, np.float32(0)), ends, -ends])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype).astype(np.float32)
    rounded = variant(Grid(scale=jnp.ones(()), dtype=np.dtype(dtype)).round)(jnp.asarray(x))
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(np.asarray(rounded).astype(np.float32), expected)


def test_dtype_may_be_a_scalar_type():
    grid = Grid(scale=jnp.ones((1, 1)), dtype=jnp.bfloat16)  # pyright: ignore[reportArgumentType]
    chex.assert_type(grid.decode(jnp.zeros((2, 2), jnp.int8)), jnp.bfloat16)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 11, 16])
def test_any_codebook_encodes_to_the_nearest_level(n):
    book = tuple(np.sort(np.random.default_rng(n).choice(np.arange(-1024, 1025), n, False)) / 1024)
    grid = Grid(jnp.full((1, 1), 0.5), bits=4, lower=-3, upper=n - 4, code_book=book)
    x = np.random.default_rng(0).uniform(-0.7, 0.7, (64, 64)).astype(np.float32)
    x[0, :2] = np.inf, -np.inf
    nearest = np.argmin(np.abs(np.clip(x, -9, 9)[..., None] - 0.5 * np.array(book)), axis=-1)
    codes = grid.encode(jnp.asarray(x))
    np.testing.assert_array_equal(codes, nearest - 3)
    np.testing.assert_array_equal(grid.decode(codes), 0.5 * np.array(book)[nearest])
    assert grid.encode(jnp.full((1, 1), jnp.nan)) == 0


def test_encode_accepts_noise_under_its_old_name():
    w = jnp.asarray(weights((4, 3)))
    grid = Uniform(bits=4).fit(w)
    up = grid.encode(w, noise=jnp.zeros(w.shape))
    assert (grid.encode(w, noise=jnp.full(w.shape, 0.999)) < up).any()
    chex.assert_trees_all_equal(grid.encode(w, draws=jnp.zeros(w.shape)), up)
