import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_clipquant.lowering import count
from optax_clipquant.lowering.count import counts


@pytest.fixture(params=[1, 8])
def devices(request, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: request.param)


SHAPES = [(), (0, 3), (7,), (192, 256), (8192,), (3, 5, 1024), (9000, 1), *[(5, 3)] * 19]


@pytest.mark.parametrize("count_them", [counts, count._of_floats, count._of_integers])
def test_counts_are_exact_on_each_platform(devices, count_them):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in SHAPES]
    leaves = [((jnp.asarray(x > 1), jnp.asarray(x < -1)), (jnp.asarray(x > 0),)) for x in arrays]
    found = jax.jit(count_them)(leaves)
    expected = [sum(np.sum(np.abs(x) > 1) for x in arrays), sum(np.sum(x > 0) for x in arrays)]
    assert [int(x) for x in found] == expected
    assert all(x.dtype == jnp.float32 and x.shape == () for x in found)


def test_counts_beyond_int32(monkeypatch):
    monkeypatch.setattr(count, "_COUNTABLE", 100)
    x = np.random.default_rng(0).normal(size=(5, 7, 1024))
    mask = jnp.asarray(x > 1), jnp.asarray(x < -1)
    assert int(jax.jit(count._of_integers)([(mask,)])[0]) == np.sum(np.abs(x) > 1)
    many = jax.ShapeDtypeStruct((3, 2**15, 2**15), bool)
    lowered = jax.jit(count._of_integers).lower([((many, many),)]).as_text("hlo")
    assert "s32[3,1,1]" in lowered
