import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import case_rows, weights

from optax_clipquant import Quantizer, Ternary, Uniform, quantize_params

# Together in one worker: clearing the caches of a long run takes seconds, and what follows is traced again.
pytestmark = pytest.mark.xdist_group("clears caches")

SEARCHING = [
    Uniform(bits=2),
    Uniform(bits=3),
    Uniform(bits=2, symmetric=False),
    Uniform(bits=4, scale_rule="mse", group_size=24),
    Ternary(),
]


@pytest.fixture
def blocks(monkeypatch):
    """Sets the block size, small enough that small arrays have several blocks, on one device."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def of(size: int) -> None:
        monkeypatch.setattr("optax_clipquant.lowering.blocks._SIZE", size)
        jax.clear_caches()

    yield of
    jax.clear_caches()


@pytest.mark.parametrize(
    ("quantizer", "axis"),
    case_rows(
        itertools.product(SEARCHING, (0, -1)),
        [(SEARCHING[0], -1), (SEARCHING[-2], 0), (SEARCHING[-1], -1)],
    ),
    ids=str,
)
def test_fit_in_blocks_matches_fit_of_the_whole(blocks, quantizer, axis):
    """Also where the last block overlaps the one before it, and has a shorter last group."""
    quantizer = dataclasses.replace(quantizer, channel_axis=axis)
    w = jnp.asarray(weights((100, 2, 100), "student3"))
    found = []
    for size in (2**10, 2**20):
        blocks(size)
        found.append(quantizer.fit(w))
    for grid in found[:-1]:
        # Summing in another order may round a scale differently.
        np.testing.assert_allclose(grid.scale, found[-1].scale, rtol=2.0**-7)
        assert np.mean(grid.scale == found[-1].scale) > 0.95
        if grid.zero_point is not None:
            np.testing.assert_array_equal(grid.zero_point, found[-1].zero_point)
        assert jax.tree.structure(grid) == jax.tree.structure(found[-1])


def test_nan_stays_in_its_channel(blocks):
    w = weights((64, 640))
    w[5, 300], w[6, 639] = np.nan, np.inf
    blocks(2**12)
    scale = Uniform(bits=3).fit(jnp.asarray(w)).scale
    assert np.flatnonzero(~np.isfinite(scale[0])).tolist() == [300, 639]


def test_blocks_work_under_vmap(blocks):
    w = jnp.asarray(weights((3, 64, 640)))
    blocks(2**12)
    quantized = jax.jit(jax.vmap(Uniform(bits=3).quantize))(w)
    for i in range(3):
        alone = Uniform(bits=3).quantize(w[i])
        np.testing.assert_allclose(quantized.scale[i], alone.scale, rtol=2.0**-7)
        assert np.mean(quantized.qvalue[i] == alone.qvalue) > 0.99


def loops(quantizer: Quantizer, w: jax.ShapeDtypeStruct, platform: str) -> int:
    lowered = jax.jit(lambda w: quantizer.fit(w)).trace(w).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("stablehlo.while")


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((2048, 2048), -1, 1),
        ((2048, 512), -1, 0),  # of one block
        ((50257, 100), -1, 1),
        ((50257, 100), 0, 1),
        ((2**22, 64), -1, 0),  # a block would be of few neighbours
        ((2048, 2048), None, 0),  # all is reduced together
    ],
)
def test_only_large_arrays_on_cpu_are_fitted_in_blocks(blocks, shape, axis, expected):
    blocks(2**20)
    quantizer, w = Uniform(bits=3, channel_axis=axis), jax.ShapeDtypeStruct(shape, jnp.float32)
    assert loops(quantizer, w, "cpu") == expected
    assert loops(quantizer, w, "tpu") == loops(quantizer, w, "cuda") == 0


def test_no_blocks_on_several_devices():
    assert jax.device_count() == 1 or loops(Uniform(3), jnp.zeros((2048, 2048)), "cpu") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [
        *((quantizer, jnp.float32) for quantizer in SEARCHING),
        *((Uniform(bits=3), dtype) for dtype in (jnp.bfloat16, jnp.float16)),
    ],
    ids=str,
)
def test_a_search_over_a_model_takes_little_memory(blocks, quantizer, dtype):
    """Without blocks, each round would hold 3/8 of every array at once, in float32."""
    blocks(2**20)
    model = {f"w{i}": jax.ShapeDtypeStruct((2048, 2048), dtype) for i in range(4)}
    if quantizer.group_size:
        # Whole groups, or they are copied.
        quantizer = dataclasses.replace(quantizer, group_size=32)
    compiled = jax.jit(lambda model: quantize_params(model, quantizer)).lower(model).compile()
    copies = len(model) if dtype == jnp.bfloat16 else 0  # of the bits
    assert compiled.memory_analysis().temp_size_in_bytes < 2**23 * (1 + copies)
