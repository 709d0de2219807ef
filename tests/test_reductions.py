import jax.numpy as jnp
import numpy as np
import pytest

from optax_clipquant.reductions import Span, extremes


@pytest.mark.parametrize("shape", [(3, 5), (192, 256), (8, 64, 256)])
@pytest.mark.parametrize("axes", [None, (0,), (1,), (-1,)])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_extremes_see_nan_where_it_is(variant, shape, axes, place):
    """The compiler may not: XLA's CPU backend drops NaN from the maximum of a large array."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x.reshape(-1)[place] = np.nan
    high, low = variant(lambda x: extremes(x, Span(axes)))(jnp.asarray(x))
    expected = np.maximum(x, 0).max(axis=axes, keepdims=True)
    np.testing.assert_array_equal(high, expected)
    np.testing.assert_array_equal(low, np.minimum(x, 0).min(axis=axes, keepdims=True))
    assert np.isnan(expected).any()


def test_zero_is_among_them_and_infinities_are_no_nan():
    x = jnp.array([[1.0, 2.0], [-1.0, -2.0], [np.inf, 1.0]])
    high, low = extremes(x, Span((1,)))
    np.testing.assert_array_equal(high, [[2], [0], [np.inf]])
    np.testing.assert_array_equal(low, [[0], [-2], [0]])
    assert extremes(jnp.zeros((0, 3)), Span((0,)))[0].shape == (1, 3)
