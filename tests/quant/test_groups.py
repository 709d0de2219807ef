"""Which weights share a scale, for arrays of any rank."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import weights

from optax_clipquant import Binary, NormalFloat, Ternary, Uniform, Use, ZScore
from optax_clipquant.quant.groups import contracted_axes, cut_groups, groups_of, scale_shape


@pytest.mark.parametrize(
    ("shape", "size", "scales", "group"),
    [
        ((64, 8), 32, (2, 8), (-2, 32)),
        ((50, 8), 32, (2, 8), (-2, 32)),
        ((32, 8), 32, (1, 8), None),
        ((3, 3, 64, 8), 32, (3, 3, 2, 8), (-2, 32)),
        ((3, 3, 16, 8), 64, (3, 1, 1, 8), None),
        ((5, 5, 3, 16), 32, (3, 1, 1, 16), (-4, 2)),
        ((3, 3, 1, 8), 32, (1, 1, 1, 8), None),
        ((3, 3, 1, 8), 8, (2, 1, 1, 8), (-4, 2)),
        ((4, 0, 8), 2, (1, 1, 8), None),
        ((64, 0), 32, (2, 0), (-2, 32)),
    ],
)
def test_each_scale_serves_one_group(shape, size, scales, group):
    grid = Uniform(4, group_size=size).fit(jnp.ones(shape))
    assert grid.scale.shape == scales
    assert grid.group == group
    shared, found = cut_groups(shape, contracted_axes(len(shape)), size)
    assert scale_shape(shape, shared, found) == scales
    # An axis of extent 1 may count as shared or not, which makes no difference.
    again, _ = groups_of(shape, scales, group)
    assert scale_shape(shape, again, group) == scales


@pytest.mark.parametrize(
    ("use", "shape", "kwargs", "scales"),
    [
        (Use({"dot"}, contracted={1}), (6, 4), {}, (6, 1)),
        (Use({"dot"}, contracted={0, 1}), (2, 3, 8), {}, (1, 1, 8)),  # [heads, hd, d]
        (Use({"dot"}, contracted={0}), (8, 2, 3), {}, (1, 2, 3)),
        (Use({"dot"}, contracted={1}, stacked={0}), (5, 8, 4), {}, (5, 1, 4)),
        (Use({"dot"}, contracted={1}, batch={0}), (5, 8, 4), {"group_size": 4}, (5, 2, 4)),
        (Use({"conv"}, contracted={0, 1}, batch={3}), (3, 3, 1, 8), {}, (1, 1, 1, 8)),
        (Use({"lookup"}, lookup={0}), (10, 4), {}, (10, 1)),
        (Use({"lookup"}, lookup={1}, stacked={0}), (3, 10, 4), {}, (3, 10, 1)),
        (Use({"dot"}, contracted={1}, stacked={0}), (5, 8, 4), {"channel_axis": -1}, (1, 1, 4)),
        (Use({"dot"}, contracted={1}, stacked={0}), (5, 8, 4), {"channel_axis": None}, (5, 1, 1)),
    ],
)
def test_use_gives_the_contracted_axes(use, shape, kwargs, scales):
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    for make in (Uniform, Ternary, Binary, NormalFloat):
        rule = make(**({"group_size": None} | kwargs))
        grid = jax.eval_shape(lambda w, rule=rule: rule.fit(w, use=use), w)
        again = jax.eval_shape(
            lambda w, start, rule=rule: rule.fit(w, use=use, start=start), w, grid
        )
        assert grid.scale.shape == again.scale.shape == scales
        assert again.group == grid.group
    if "group_size" not in kwargs:
        rule = ZScore(**({"channel_axis": "auto"} | kwargs))
        assert jax.eval_shape(lambda w: rule.fit(w, use=use), w).scale.shape == scales


def test_use_with_too_many_axes_is_refused():
    with pytest.raises(ValueError, match="Uniform: it was traced with the axes"):
        Uniform().fit(jnp.ones((2, 3)), use=Use({"dot"}, contracted={2}))


def test_start_with_other_groups_is_refused():
    w = jnp.ones((64, 4))
    start = Uniform(4, group_size=32).fit(w)
    for rule in (Uniform(4), Uniform(4, group_size=16), Uniform(4, channel_axis=0)):
        with pytest.raises(ValueError, match=r"start from has scales of shape \(2, 4\) in groups"):
            rule.fit(w, start=start)


# Each new shape compiles tens of operations: few shapes of each rank.
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    shape=st.sampled_from(
        [(6,), (1,), (5, 4), (6, 1), (3, 2, 4), (1, 5, 3), (3, 3, 2, 2), (2, 1, 5, 2)]
    ),
    size=st.sampled_from([2, 3, 5, 12]),
    data=st.data(),
)
def test_groups_are_exact(shape, size, data):
    """Growing one weight changes the decoded values of at most ``group_size`` weights, all at the same
    index along each axis that is not contracted.
    """
    axes = data.draw(st.sets(st.sampled_from(range(len(shape))), min_size=1))
    use = Use({"dot"}, contracted=axes)
    place = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    w = weights(tuple(shape))
    grown = w.copy()
    grown[place] = 100
    rule = Uniform(8, group_size=size, scale_rule="absmax")
    quantize = jax.jit(lambda w: rule.quantize(w, use=use).dequantize())
    before, after = (np.asarray(quantize(x)) for x in (w, grown))
    changed = np.argwhere(before != after)
    assert 1 <= len(changed) <= size
    others = [axis for axis in range(len(shape)) if axis not in axes]
    assert (changed[:, others] == np.asarray(place)[others]).all()
