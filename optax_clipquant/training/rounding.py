"""Training that rounds params onto a grid, without latent weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clipquant._tree import PyTree, check_option, check_state, on_shapes
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.params import leaves_of
from optax_clipquant.quant.quantizers.base import is_int
from optax_clipquant.quant.selection import Rules, Where, check_rules, use_of
from optax_clipquant.quant.uses import Uses
from optax_clipquant.training.grids import (
    check_selection,
    difference,
    fit_again,
    init_grids,
    known_rule,
    level_of,
    map_quantized,
    naming_leaf,
)
from optax_clipquant.training.latent import straight_through


class RoundWeightsState(NamedTuple):
    """State of ``round_weights``.

    Attributes:
      count: the number of updates so far.
      grid: a tree with the ``Grid`` of each quantized leaf, None at others.
      key: the PRNG key of stochastic rounding, raw (uint32) so that it can be saved, or None.

    Examples:
      >>> from optax_clipquant import Uniform
      >>> state = round_weights(Uniform(bits=4)).init({"kernel": jnp.ones((3, 2))})
      >>> state.grid["kernel"].scale.shape
      (1, 2)
    """

    count: jax.typing.ArrayLike
    grid: PyTree
    key: jax.Array | None


def round_weights(
    quantizer: Rules,
    *,
    stochastic: bool = False,
    seed: int = 0,
    where: Where | None = None,
    uses: Uses | None = None,
) -> optax.GradientTransformation:
    """Rounds the params onto the grid after every step; put it last in the chain.

    There is no latent copy, so an update smaller than half a step of the grid is rounded away, and with
    rounding to the nearest level training stalls: this plain form of the method is here to show that.
    ``quantize_weights`` does not stall. Stochastic rounding is unbiased, so that small updates count on
    average, and does train.

    Args:
      quantizer: as for ``quantize_weights``.
      stochastic: whether to round stochastically, which is unbiased.
      seed: the seed of stochastic rounding. Under ``jax.vmap``, all members get the same noise.
      where: as for ``quantize_weights``.
      uses: as for ``quantize_weights``.

    Returns:
      A ``GradientTransformation`` with a ``RoundWeightsState``.

    Raises:
      ValueError, TypeError: as for ``quantize_weights``; or in ``update``, the state was made with another
        ``stochastic``.

    Examples:
      >>> from optax_clipquant import Uniform
      >>> tx = optax.chain(optax.sgd(0.1), round_weights(Uniform(bits=4)))
      >>> params = {"kernel": jnp.array([[1.0], [0.5]])}
      >>> updates, _ = tx.update({"kernel": jnp.array([[0.0], [0.1]])}, tx.init(params), params)
      >>> updates["kernel"]  # the step of -0.01 is lost
      Array([[0.],
             [0.]], dtype=float32)
    """

    check_rules(quantizer, where, uses)
    is_integer = is_int(seed) or jnp.issubdtype(getattr(seed, "dtype", bool), jnp.integer)
    if stochastic and not (is_integer and jnp.ndim(seed) == 0):
        raise TypeError(f"round_weights: seed must be an integer, got {seed!r}")

    @on_shapes
    def init(params: PyTree) -> PyTree:
        grid = init_grids(params, quantizer, where, uses)
        key = jax.random.PRNGKey(seed) if stochastic else None
        return RoundWeightsState(jnp.zeros((), jnp.int32), grid, key)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        check_state("round_weights", state, RoundWeightsState)
        check_option("round_weights", "stochastic", stochastic, state.key is not None)
        index = {path: i for i, (path, _) in enumerate(leaves_of(state.grid))}

        def step(path: str, u: jax.Array, p: jax.Array, grid: Grid) -> tuple[Any, Any]:
            w = p.astype(jnp.float32) + u
            rule = known_rule("round_weights", quantizer, path)
            with naming_leaf("round_weights", path):
                grid = fit_again(rule, w, grid, use_of(uses, path), None)
            key = None
            if state.key is not None:
                key = jax.random.fold_in(jax.random.fold_in(state.key, state.count), index[path])
            return difference(straight_through(level_of(grid, w, key), w), p), grid

        updates, grid = map_quantized(step, updates, params, state.grid, "round_weights")
        check_selection("round_weights", params, state.grid, quantizer, where, uses)
        return updates, RoundWeightsState(optax.safe_increment(state.count), grid, state.key)

    return optax.GradientTransformation(init, update)
