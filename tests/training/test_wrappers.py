"""Params changed from outside, in each wrapper and runner of training loops, on each kind of grid."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import QUANTIZERS, assert_on_grid, weights

from optax_clipquant import (
    Grid,
    Uniform,
    latent_params,
    quantize_weights,
    softness_schedule,
)

SHAPE, STEPS = (24, 4), 12
FIRST, LOADED = weights(SHAPE), weights(SHAPE, seed=1)
ROW = -1.5 * LOADED[0]
# Far below a step of each grid, and exact in bfloat16.
UPDATE = np.asarray(jnp.asarray(1e-3 * weights(SHAPE, seed=2), jnp.bfloat16), np.float32)


@pytest.fixture(autouse=True, scope="module")
def _as_users_have_it():
    """Optax's wrappers and NNX do not hold the strictness of this test suite."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def edit(i, w):
    """All of the weights are replaced before the first update, and a row later, between two mini-steps."""
    w = jnp.where(i == 0, jnp.asarray(LOADED, w.dtype), w)
    row = (jnp.arange(len(LOADED)) == 0)[:, None] & (i == 6)
    return jnp.where(row, jnp.asarray(ROW, w.dtype)[None], w)


def one_step(tx, i, params, state):
    """Params, edited and updated, and the state."""
    params = {**params, "w": edit(i, params["w"])}
    grads = {"w": jnp.asarray(-UPDATE, params["w"].dtype), "b": jnp.zeros_like(params["b"])}
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def by_jit(tx, params):
    state, step = tx.init(params), jax.jit(functools.partial(one_step, tx))
    for i in range(STEPS):
        params, state = step(i, params, state)
    return params, state


def by_scan(tx, params):
    def body(carry, i):
        return one_step(tx, i, *carry), None

    run = jax.jit(lambda *carry: jax.lax.scan(body, carry, jnp.arange(STEPS)))
    (params, state), _ = run(params, tx.init(params))
    return params, state


def by_multi_steps(tx, params):
    return by_jit(optax.MultiSteps(tx, 2).gradient_transformation(), params)


def by_masked(tx, params):
    return by_jit(optax.masked(tx, {"w": True, "b": False}), params)


def by_partition(tx, params):
    parts = {"weight": tx, "rest": optax.set_to_zero()}
    return by_jit(optax.partition(parts, {"w": "weight", "b": "rest"}), params)


def by_nnx(tx, params):
    class Model(nnx.Module):
        def __init__(self):
            self.w, self.b = nnx.Param(params["w"]), nnx.Param(params["b"])

    model = Model()
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(i, model, opt):
        model.w[...] = edit(i, model.w[...])
        grads = nnx.state(model, nnx.Param)
        grads["w"], grads["b"] = (
            nnx.Param(jnp.asarray(-UPDATE, model.w[...].dtype)),
            nnx.Param(0 * params["b"]),
        )
        opt.update(model, grads)

    for i in range(STEPS):
        step(i, model, opt)
    return {"w": model.w[...], "b": model.b[...]}, opt


RUNNERS = [by_jit, by_scan, by_multi_steps, by_masked, by_partition, by_nnx]
OPTIONS = {
    "hard": functools.partial(quantize_weights),
    "soft": functools.partial(quantize_weights, softness=softness_schedule(0, STEPS - 4)),
    "residual": functools.partial(quantize_weights, residual_bits=8),
    "soft residual": functools.partial(
        quantize_weights, residual_bits=8, softness=softness_schedule(0, STEPS - 4)
    ),
}
DTYPES = [jnp.float32, jnp.bfloat16]
# Each runner with each grid, and with these all other pairs: of the whole product a tenth.
GRIDS = [
    *("binary", "ternary", "uniform2", "uniform3", "uniform4", "uniform8", "zscore7"),
    *("uniform4-groups", "uniform4-asymmetric", "ternary-absmax", "normalfloat3-groups"),
]
PAIRWISE = [
    (runner, name, list(OPTIONS)[(i + j) % len(OPTIONS)], DTYPES[(i + j // 2 + i // 3) % 2])
    for (i, runner), (j, name) in itertools.product(enumerate(RUNNERS), enumerate(GRIDS))
]
GATE = {
    "by_jit": 7,
    "by_scan": 5,
    "by_multi_steps": 4,
    "by_masked": 10,
    "by_partition": 3,
    "by_nnx": 8,
}


def test_each_pair_of_a_runner_grid_option_and_dtype_is_tried():
    for a, b in itertools.combinations(range(4), 2):
        values = [sorted({str(case[k]) for case in PAIRWISE}) for k in (a, b)]
        assert {(str(c[a]), str(c[b])) for c in PAIRWISE} == set(itertools.product(*values))


@pytest.mark.parametrize(
    ("runner", "name", "option", "dtype"),
    [
        pytest.param(
            *case,
            id=f"{case[0].__name__}-{case[1]}-{case[2]}-{case[3].__name__}",
            marks=() if GRIDS[GATE[case[0].__name__]] == case[1] else pytest.mark.slow,
        )
        for case in PAIRWISE
    ],
)
def test_edits_from_outside_move_the_latent_weights_and_nothing_else_does(
    runner, name, option, dtype
):
    """Against sums in float64: of the updates, from what was loaded last."""
    tx = optax.chain(optax.sgd(1.0), OPTIONS[option](QUANTIZERS[name]))
    params, state = runner(tx, {"w": jnp.asarray(FIRST, dtype), "b": jnp.ones(4, dtype)})
    np.testing.assert_array_equal(params["b"], np.ones(4))
    # The last: that of a residual comes first.
    is_grid = lambda x: isinstance(x, Grid)  # noqa: E731
    *_, grid = filter(is_grid, jax.tree.leaves(nnx.as_pure(state), is_leaf=is_grid))
    gap = 1 if grid.codebook is None else np.diff(grid.codebook).max()
    step = gap * np.abs(np.asarray(grid.scale, np.float64))
    step = np.repeat(step, -(-SHAPE[0] // step.shape[0]), 0)[: SHAPE[0]]  # of each group

    expected = np.zeros(SHAPE)
    for i in range(STEPS):
        if i == 0:
            expected[:] = np.asarray(jnp.asarray(LOADED, dtype), np.float64)
        if i == 6:
            expected[0] = np.asarray(jnp.asarray(ROW, dtype), np.float64)
        emits = runner is not by_multi_steps or i % 2
        expected += UPDATE if emits else 0
    latent = np.asarray(latent_params(params, state)["w"], np.float64)
    # A residual in 127 parts of half a step is rounded in each step, to either side. Of what is loaded very
    # near to a level between two steps it does not tell that it is new, and keeps the distance of what was
    # there before. What is loaded before the first step is kept.
    allowed = 1e-5 + (12 * step / 254 if "residual" in option else np.zeros(SHAPE))
    if "residual" in option:
        allowed[0] += step[0] / 2
    off = np.abs(latent - expected)
    assert np.all(off <= allowed), f"in steps of the grid:\n{off / step}"
    if dtype == jnp.float32 and not ("soft" in option and runner is by_multi_steps):
        assert_on_grid(params, state)


@pytest.mark.parametrize(
    "options",
    [{}, {"softness": 0.5}, {"softness": 1.0}, {"softness": 0.5, "residual_bits": 8}],
    ids=["hard", "soft", "softest", "soft residual"],
)
def test_change_by_one_unit_of_bfloat16_is_seen(options):
    """Below powers of two, where the unit is half as large, and where rounding makes it look like two."""
    first = jnp.asarray(np.linspace(0.6, 8, 256)[:, None], jnp.bfloat16)
    tx = quantize_weights(Uniform(bits=4, scale_rule="absmax"), **options)
    zeros = jnp.zeros(first.shape)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, latent_params(params, state)

    params, state, before = step(*step(first, tx.init(first))[:2])
    assert np.any(np.log2(np.asarray(params, np.float64)) % 1 == 0)
    lower = jnp.asarray((np.asarray(params).view(np.uint16) - 1).view(jnp.bfloat16))
    edit = np.asarray(lower, np.float64) - np.asarray(params, np.float64)
    *_, after = step(lower, state)
    off = np.abs(np.asarray(after, np.float64) - np.asarray(before, np.float64) - edit)
    if "residual_bits" in options:
        # What the latent weights were before rounding is known to a code of the residual: where rounding went
        # the other way, it hides the change.
        assert np.all(off <= -edit + 2 * np.asarray(state.latent.grid.scale, np.float64))
    else:
        assert np.all(off <= 1e-6)
