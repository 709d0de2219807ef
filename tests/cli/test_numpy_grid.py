"""The NumPy path of the command against the library, bit for bit."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import FORMULAS, QUANTIZERS, case_rows, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_clipquant import Grid, QArray, Uniform
from optax_clipquant.cli import numpy_grid
from optax_clipquant.cli.rules import Rule
from optax_clipquant.formats.native.file import Parts, Tensors
from optax_clipquant.formats.native.trees import leaf_of, parts_of
from optax_clipquant.quant.levels import Levels

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


@pytest.fixture(scope="module")
def threads():
    with numpy_grid.Threads(2) as threads:
        yield threads


def joined(parts: Parts) -> dict[str, bytes]:
    return {kind: b"".join(piece.tobytes() for piece in pieces) for kind, pieces in parts}


def encoded(
    w: np.ndarray, threads, bits, axis, group_size
) -> tuple[numpy_grid.Absmax, dict[str, bytes]]:
    content = np.frombuffer(w.tobytes(), np.uint8)

    def read(first: int, out: np.ndarray) -> None:
        out[:] = content[first : first + out.size]

    coder = numpy_grid.Absmax.of(
        (w.dtype, w.shape), Rule(bits, channel_axis=axis, group_size=group_size)
    )
    return coder, joined(coder.encode(read, threads))


def check(w: np.ndarray, threads, bits: int, axis: int, group_size: int | None) -> None:
    quantizer = Uniform(bits, channel_axis=axis, group_size=group_size, scale_rule="absmax")
    q = quantizer.quantize(jnp.asarray(w))
    coder, found = encoded(w, threads, bits, axis, group_size)
    assert coder.leaf == leaf_of(q, "w")
    wanted = joined(parts_of(q, "w"))
    scales = [np.frombuffer(x["s"], ml_dtypes.bfloat16) for x in (found, wanted)]
    np.testing.assert_array_equal(*(x.astype(np.float32) for x in scales))  # any NaN is one
    assert found[""] == wanted[""]


# Each width, dtype and kind of group occurs in the gate.
ENCODED = list(
    itertools.product([(3, "f4"), (4, "f4"), (4, "bf16"), (8, "f4"), (8, "f2")], [None, 1, 5, 100])
)
ENCODED_IN_GATE = [ENCODED[0], ENCODED[6], ENCODED[9], ENCODED[19]]


@pytest.mark.parametrize(("grid", "group_size"), case_rows(ENCODED, ENCODED_IN_GATE), ids=str)
def test_encode(threads, monkeypatch, grid, group_size):
    bits, name = grid
    dtype = {"f4": np.float32, "bf16": ml_dtypes.bfloat16, "f2": np.float16}[name]
    for shape in ((37, 24), (6, 5, 3, 3), (1, 7), (0, 7), (7, 0), (40, 1)):
        w = weights(shape, seed=sum(shape)).astype(dtype)
        for axis in (0, -1) if len(shape) == 2 else (1, -1):
            for block in (64, 2**18):
                monkeypatch.setattr(numpy_grid, "_BLOCK", block)
                check(w, threads, bits, axis, group_size)


nasty = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 3.4028235e38, -3.4028235e38, 1.2e-38, 1e-39, 1e-45, -9e-37, 6e4,
     math.inf, -math.inf, math.nan]
) | st.floats(width=32)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_encode_nasty_values(threads, data):
    values = data.draw(st.lists(nasty, min_size=24, max_size=24))
    w = np.array(values, np.float32).reshape(4, 6)
    bits = data.draw(st.sampled_from([3, 4, 8]))
    check(
        w, threads, bits, data.draw(st.sampled_from([0, 1])), data.draw(st.sampled_from([None, 4]))
    )


# Each quantizer, and each formula in half precision; in the gate, each formula in one dtype.
DECODED = [
    *((name, np.float32) for name in QUANTIZERS),
    *itertools.product(FORMULAS, DTYPES[1:]),
]
DECODED_IN_GATE = list(zip(FORMULAS, itertools.cycle(DTYPES)))


def decoded(q: QArray, threads) -> np.ndarray:
    leaf = leaf_of(q, "w")
    tensors: Tensors = {
        kind: np.concatenate([np.ravel(piece) for piece in pieces]).reshape(leaf.specs[kind][1])
        for kind, pieces in parts_of(q, "w")
    }
    blocks = list(numpy_grid.decode(leaf, tensors, threads))
    assert all(block.dtype == q.dtype for block in blocks)
    return np.concatenate([np.empty(0, q.dtype), *(block.ravel() for block in blocks)]).reshape(q.shape)  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), case_rows(DECODED, DECODED_IN_GATE))
def test_decode(threads, monkeypatch, name, dtype):
    for shape in ((37, 24), (6, 5, 3, 3), (0, 7)):
        q = QUANTIZERS[name].quantize(jnp.asarray(weights(shape, seed=3).astype(dtype)))
        for block in (64, 2**18):
            monkeypatch.setattr(numpy_grid, "_BLOCK", block)
            assert decoded(q, threads).tobytes() == np.asarray(q.dequantize()).tobytes(), shape


@pytest.mark.parametrize("symmetric", [True, False])
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_decode_nasty_scales(threads, symmetric, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    w = jnp.asarray(data.draw(st.lists(nasty, min_size=24, max_size=24)), jnp.float32)
    bits = data.draw(st.sampled_from([1, 2, 4, 8]))
    quantizer = Uniform(bits, symmetric=symmetric, scale_rule="absmax")
    with np.errstate(over="ignore"):
        q = quantizer.quantize(w.reshape(4, 6).astype(dtype))
    found, wanted = decoded(q, threads), np.asarray(q.dequantize())
    np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32))
    assert not np.signbit(found[found == 0]).any()


def test_subnormal_numbers_are_flushed_like_xla(threads):
    """XLA flushes them to 0."""
    w = np.array([[128 * 2.0**-126, 1.1e-38, -1.1e-38, 2.0**-127]], np.float32)
    check(w, threads, 8, 0, None)
    grid = Grid(scale=jnp.full((1, 1), 2.0**-126), bits=2, lower=-2, upper=1, offset=0.5)
    q = QArray(jnp.array([[-2, -1, 0, 1]], jnp.int8), grid)
    assert decoded(q, threads).tobytes() == np.asarray(q.dequantize()).tobytes()


def test_decode_at_the_limits_of_the_range(threads):
    w = jnp.asarray([[3.4028235e38, -3.4028235e38, 1e38, 0]])
    grid = Uniform(8, symmetric=False).quantize(w.T).grid
    q = QArray(jnp.array([[127], [-128]], jnp.int8), grid)
    assert decoded(q, threads).tobytes() == np.asarray(q.dequantize()).tobytes()
    assert np.abs(q.dequantize()).max() == np.finfo(np.float32).max


def test_decode_of_scalars_batches_and_float64(threads):
    grid = Grid(scale=jnp.asarray(0.5), bits=4, lower=-8, upper=7)
    q = QArray(jnp.asarray(3, jnp.int8), grid)
    assert decoded(q, threads) == 1.5
    batch = jax.vmap(Uniform(4, group_size=5).quantize)(jnp.asarray(weights((3, 7, 4))))
    assert decoded(batch, threads).tobytes() == np.asarray(batch.dequantize()).tobytes()
    # As in a file written under x64.
    wide = dataclasses.replace(batch.grid, dtype=np.dtype(np.float64))
    found = decoded(QArray(batch.qvalue, wide), threads)
    np.testing.assert_array_equal(found, np.asarray(batch.dequantize(), np.float64))


@pytest.mark.parametrize(
    ("shape", "bits", "group", "rows"),
    [
        ((8, 4_000_000), 8, None, 1),
        ((8, 4_000_000), 3, None, 1),
        ((64, 2**19 + 1), 4, None, 2),
        ((64, 2**19 + 1), 3, None, 8),
        ((64, 2**19 + 1), math.log2(3), None, 5),
        ((32032, 1000), 8, (-2, 1001), 1001),
        ((4, 8, 16), 8, (-1, 3), 4),
    ],
)
def test_blocks_hold_fewer_rows_the_longer_they_are(shape, bits, group, rows):
    blocks = numpy_grid._blocks(shape, Levels(bits=bits, lower=-2, upper=1, group=group))
    assert blocks[0].stop == rows
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert blocks[-1].stop == shape[0]


def test_only_a_few_blocks_are_made_ahead(threads):
    made = []
    turns = numpy_grid.in_turn(threads, made.append, range(100))
    next(turns)
    assert len(made) <= numpy_grid._AHEAD + 2
    assert len(list(turns)) == 99


def test_error_in_a_thread_is_raised(threads):
    def read(first: int, out: np.ndarray) -> None:
        raise OSError("cannot read")

    coder = numpy_grid.Absmax.of((np.dtype(np.float32), (8, 8)), Rule(8))
    with pytest.raises(OSError, match="cannot read"):
        joined(coder.encode(functools.partial(read), threads))
