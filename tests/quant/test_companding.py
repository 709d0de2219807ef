import chex
import flax.serialization
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_clipquant.lowering.noise import noise
from optax_clipquant.quant.companding import block_of, compand

BITS = [8, 4]


def levels(bits: int, negative: bool) -> np.ndarray:
    """The levels for a largest magnitude of 1, in float64."""
    if negative:
        k = np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
        return np.sign(k) * (k / k[-1]) ** 2
    k = np.arange(2**bits)
    return np.where(k > 0, ((k + 1) / 2**bits) ** 4, 0)


def blocks_of(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The blocks of an array as ``(blocks, size)``, in float64."""
    axis, size = block
    return np.moveaxis(x.astype(np.float64), axis, -1).reshape(-1, size)


@pytest.mark.parametrize("bits", BITS)
@hypothesis.given(
    x=hnp.arrays(
        np.float32,
        st.sampled_from([(6, 32), (4, 3, 16), (64,)]),
        elements=st.one_of(
            st.floats(-1, 1, width=32),
            st.sampled_from([0.0, 1.0, -1.0, 1e-20, 1e-6, -1e-6, 2.0**100, 3e38, -3e38, 1e-30]),
        ),
    ),
    positive=st.booleans(),
)
def test_encodes_to_the_nearest_level(bits, x, positive):
    x = np.abs(x) if positive else x
    x = np.where(np.abs(x) < 2.0**-126, 0, x)  # XLA flushes denormals
    block = (-1, 16)
    kept = compand(jnp.asarray(x), block, bits)
    decoded = np.asarray(kept.decode())
    assert kept.codes.dtype == (jnp.int8 if bits == 8 else jnp.int4)
    chex.assert_equal_shape([decoded, x])
    for w, found in zip(blocks_of(x, block), blocks_of(decoded, block), strict=True):
        largest = np.abs(w).max()
        if largest == 0:
            assert np.all(found == 0)
            continue
        table = levels(bits, w.min() < 0)
        nearest = np.abs(table[None] - w[:, None] / largest).min(1)
        error = np.abs(found - w) / largest
        # In blocks without negative numbers, numbers nearest to zero take the first level above it.
        kept = (w == 0) | (w.min() < 0) | (w / largest >= table[table > 0].min())
        assert np.all(error[kept] <= nearest[kept] + 1e-6)
        np.testing.assert_allclose(
            found[~kept], table[table > 0].min() * largest, rtol=1e-5, atol=0
        )
        assert np.all(found[w == 0] == 0)
        assert np.all(found * w >= 0)
        np.testing.assert_allclose(np.abs(found).max(), largest, rtol=1e-6)


def test_small_second_moments_do_not_become_zero():
    x = jnp.geomspace(1e-37, 1e-30, 256)[None]
    for bits in BITS:
        assert np.all(compand(x, (-1, 256), bits).decode() > 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("positive", [False, True])
def test_stochastic_rounding_is_unbiased(bits, positive):
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    x = jnp.asarray(x**2 if positive else x)

    @jax.jit
    @jax.vmap
    def once(step):
        return compand(x, (-1, 64), bits, noise(x, 0, step)).decode()

    mean = np.asarray(once(jnp.arange(2000)), np.float64).mean(0)
    largest = np.abs(x).max(1, keepdims=True)
    table = levels(bits, not positive)
    # Second moments below the first level are always rounded up.
    right = (np.abs(x) / largest > table[table > 0].min()) | (not positive)
    assert right.mean() > 0.5
    assert (np.abs(mean - x) / largest)[right].max() < 0.005 * np.diff(table).max() + 1e-6


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((150, 80), (-2, 64)),
        ((3, 128, 64), (-2, 64)),
        ((70, 12, 8), (-3, 64)),
        ((100,), (-1, 64)),
        ((3, 150, 80), (-1, 80)),  # a row lies along the axis of 150
    ],
)
def test_error_is_within_a_level_of_the_smaller_magnitude(shape, block, bits, positive):
    """The smaller of the largest magnitudes of its block and its row, with rows and columns that span decades."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    axis, size = len(shape) + block[0], block[1]
    x *= 10 ** -rng.uniform(0, 4, [n if a == axis else 1 for a, n in enumerate(shape)])
    x = (x**2 if positive else x).astype(np.float32)
    found = np.asarray(compand(jnp.asarray(x), block, bits).decode(), np.float64)
    magnitude = np.abs(x.astype(np.float64))
    scale = np.concatenate(
        [
            np.broadcast_to(part.max(axis, keepdims=True), part.shape)
            for part in np.split(magnitude, range(size, shape[axis], size), axis)
        ],
        axis,
    )
    if len(shape) > 1:
        along = tuple(range(axis + 1, len(shape))) or (axis - 1,)
        scale = np.minimum(scale, magnitude.max(along, keepdims=True))
    table = levels(bits, not positive)
    assert np.all(np.abs(found - x) <= 0.51 * np.diff(table).max() * scale + 1e-7 * magnitude)
    # Small rows have many levels.
    if len(shape) > 1:
        small = np.argmin(scale.max(tuple(a for a in range(len(shape)) if a != axis)))
        assert len(np.unique(np.take(found, small, axis))) > 2 ** (bits - 2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1024, 2048), (-2, 256)),
        ((784, 10), (-2, 196)),
        ((50257, 768), (-1, 768)),  # a prime factor too large for a block
        ((50000, 768), (-1, 768)),  # blocks of 250 would cut tiles of 32
        ((2, 3, 1000, 257), (-1, 257)),
        ((50304, 768), (-1, 768)),  # far more rows than columns
        ((100, 768), (-2, 100)),  # a single block
        ((50257, 1), (-2, 256)),  # the last is shorter
        ((768, 12, 64), (-3, 256)),
        ((3, 3, 64, 128), (-2, 64)),
        ((3, 3, 16, 128), (-1, 128)),
        ((1009, 1013), (-1, 1013)),
        ((100, 7), (-2, 100)),
        ((65536,), (-1, 256)),
    ],
)
def test_blocks_follow_from_the_shape(shape, expected):
    assert block_of(shape, 256) == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [(-1, 64), (-2, 64)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_leave_their_block_intact(bits, block, bad):
    x = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    clean = np.asarray(compand(jnp.asarray(np.where(x == x[7, 100], 0, x)), block, bits).decode())
    x[7, 100] = bad
    kept = compand(jnp.asarray(x), block, bits)
    found = np.asarray(kept.decode())
    others = np.arange(128 * 128).reshape(x.shape) != 7 * 128 + 100
    np.testing.assert_array_equal(found[others], clean[others])
    assert np.all(np.isfinite(kept.scale))
    assert np.isfinite(found[7, 100])
    assert np.sign(found[7, 100]) == (0 if np.isnan(bad) else np.sign(bad))
    # With keep_nan they become NaN, and no other element does.
    seen = np.asarray(compand(jnp.asarray(x), block, bits, keep_nan=True).decode())
    np.testing.assert_array_equal(np.isfinite(seen), others)
    np.testing.assert_array_equal(seen[others], clean[others])


@pytest.mark.parametrize("bits", BITS)
def test_keep_nan_works_in_blocks_without_negative_numbers(bits):
    x = jnp.ones((1, 64)).at[0, 3].set(jnp.nan)
    for y in (x, jnp.where(jnp.isnan(x), x, 0)):
        found = np.asarray(compand(y, (-1, 64), bits, keep_nan=True).decode())
        np.testing.assert_array_equal(np.isnan(found), np.isnan(y))


@pytest.mark.parametrize("bits", BITS)
def test_an_overflowing_second_moment_becomes_the_largest(bits):
    """An optimizer divides by it, so it must not become zero."""
    x = jnp.full((1, 64), 2.0).at[0, 3].set(jnp.inf).at[0, 4].set(jnp.nan)
    np.testing.assert_allclose(compand(x, (-1, 64), bits).decode(), 2.0)


@pytest.mark.parametrize("bits", BITS)
def test_checkpoint_of_the_old_layout_is_refused_by_name(bits):
    kept = compand(jnp.ones((64, 64)), (-2, 64), bits)
    state = flax.serialization.to_state_dict(kept)
    assert state["codes"].dtype == np.int8
    found = flax.serialization.from_state_dict(kept, state)
    chex.assert_trees_all_equal(found.decode(), kept.decode())
    with pytest.raises(ValueError, match=r"layout of version 0.1.*tx.init"):
        flax.serialization.from_state_dict(kept, state | {"codes": np.zeros((64, 64), np.uint8)})


@pytest.mark.parametrize("bits", BITS)
def test_restoring_into_other_bits_or_blocks_names_both(bits):
    x, restore = jnp.ones((64, 64)), flax.serialization.from_bytes
    kept = compand(x, (-2, 64), bits)
    raw = flax.serialization.to_bytes({"mu": kept})
    with pytest.raises(
        ValueError, match=rf"mu: .*bits={bits},.*restore into has \(bits={12 - bits},"
    ):
        restore({"mu": compand(x, (-2, 64), 12 - bits)}, raw)
    with pytest.raises(ValueError, match=r"scale=\[1, 64\].*restore into has .*scale=\[2, 64\]"):
        restore({"mu": compand(x, (-2, 32), bits)}, raw)
    # As of a leaf whose blocks were cut short before.
    with pytest.raises(ValueError, match=r"mu: .*block=\[-2, 64\].*into has .*block=\[-1, 64\]"):
        restore({"mu": compand(x, (-1, 64), bits)}, raw)
    with pytest.raises(ValueError, match=rf"^mu: .*array in float, .*one in {bits} bits"):
        restore({"mu": kept}, flax.serialization.to_bytes({"mu": x}))
    # Older checkpoints have no layout.
    state = flax.serialization.to_state_dict(kept)
    del state["layout"]
    found = flax.serialization.from_state_dict(kept, state)
    chex.assert_trees_all_equal(found.decode(), kept.decode())
