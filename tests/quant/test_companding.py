import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_clipquant.lowering.noise import dither
from optax_clipquant.quant.companding import compand

BITS = [8, 4]


def levels(bits: int, negative: bool) -> np.ndarray:
    """For a largest magnitude of 1, in float64."""
    if negative:
        k = np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
        return np.sign(k) * (k / k[-1]) ** 2
    k = np.arange(2**bits)
    return np.where(k > 0, ((k + 1) / 2**bits) ** 4, 0)


def blocks_of(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """(blocks, size), in float64."""
    axis, size = block
    return np.moveaxis(x.astype(np.float64), axis, -1).reshape(-1, size)


@pytest.mark.parametrize("bits", BITS)
@hypothesis.given(
    x=hnp.arrays(
        np.float32,
        st.sampled_from([(6, 32), (4, 3, 16), (64,)]),
        elements=st.one_of(
            st.floats(-1, 1, width=32),
            st.sampled_from([0.0, 1.0, -1.0, 1e-20, 1e-6, -1e-6, 2.0**100, 1e-30]),
        ),
    ),
    positive=st.booleans(),
)
def test_nearest_level_in_float64(bits, x, positive):
    x = np.abs(x) if positive else x
    x = np.where(np.abs(x) < 2.0**-126, 0, x)  # XLA flushes denormals
    block = (-1, 16)
    kept = compand(jnp.asarray(x), block, bits)
    decoded = np.asarray(kept.decode())
    assert kept.codes.nbytes == x.size * bits // 8
    chex.assert_equal_shape([decoded, x])
    for w, found in zip(blocks_of(x, block), blocks_of(decoded, block), strict=True):
        largest = np.abs(w).max()
        if largest == 0:
            assert np.all(found == 0)
            continue
        table = levels(bits, w.min() < 0)
        nearest = np.abs(table[None] - w[:, None] / largest).min(1)
        error = np.abs(found - w) / largest
        # Where there are no negative numbers, what is nearest to zero takes the first level.
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
def test_rounding_is_right_on_the_average(bits, positive):
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    x = jnp.asarray(x**2 if positive else x)

    @jax.jit
    @jax.vmap
    def once(step):
        return compand(x, (-1, 64), bits, dither(x, 0, step)).decode()

    mean = np.asarray(once(jnp.arange(2000)), np.float64).mean(0)
    largest = np.abs(x).max(1, keepdims=True)
    table = levels(bits, not positive)
    # Below the first level second moments are rounded up, always.
    right = (np.abs(x) / largest > table[table > 0].min()) | (not positive)
    assert right.mean() > 0.5
    assert (np.abs(mean - x) / largest)[right].max() < 0.005 * np.diff(table).max() + 1e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(192, 256), (256, 192)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_block_nan(bits, shape, bad):
    x = np.ones(shape, np.float32)
    x[7, 100] = bad
    finite = np.isfinite(compand(jnp.asarray(x), (-1, shape[1]), bits).decode()).all(1)
    np.testing.assert_array_equal(finite, np.arange(shape[0]) != 7)
