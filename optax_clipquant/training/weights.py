"""Training on a quantization grid, with latent weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_clipquant._tree import PyTree, check_state, map_with_path, on_shapes, path_of, unboxed
from optax_clipquant.gradients.clip import Bound, clip_by_value
from optax_clipquant.lowering.noise import stream_of
from optax_clipquant.lowering.outline import outlined
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.params import check_weighting, leaves_of, weighting_of
from optax_clipquant.quant.qarray import QArray
from optax_clipquant.quant.quantizers.base import Quantizer
from optax_clipquant.quant.quantizers.uniform import Uniform
from optax_clipquant.quant.selection import Rules, Where, check_rules, use_of
from optax_clipquant.quant.uses import Calibration, Use, Uses
from optax_clipquant.training import residual
from optax_clipquant.training.grids import (
    check_selection,
    difference,
    exact_level_of,
    fit_again,
    init_grids,
    known_rule,
    level_of,
    map_quantized,
    naming_leaf,
    start_anew,
    start_grids,
)
from optax_clipquant.training.latent import adopt, crosses, straight_through
from optax_clipquant.training.origins import check_optimizer
from optax_clipquant.training.rounding import RoundWeightsState
from optax_clipquant.training.softness import check_softness, soften, softness_at, softness_before


class QuantizeWeightsState(NamedTuple):
    """State of ``quantize_weights``.

    Attributes:
      count: the number of updates so far.
      latent: a tree with the float32 latent weights of each quantized leaf, None at others; with
        ``residual_bits``, a ``QArray`` of their distance to the levels, or on a grid of two levels of
        their signed roots. ``latent_params`` reads all three.
      grid: a tree with the ``Grid`` of each quantized leaf, None at others.

    Examples:
      >>> state = quantize_weights(Uniform(bits=4)).init({"kernel": jnp.ones((3, 2))})
      >>> state.grid["kernel"].scale.shape
      (1, 2)
    """

    count: jax.typing.ArrayLike
    latent: PyTree
    grid: PyTree


def quantize_weights(
    quantizer: Rules,
    *,
    softness: float | optax.Schedule | None = None,
    where: Where | None = None,
    uses: Uses | None = None,
    calibration: Calibration | None = None,
    importance: PyTree | None = None,
    start: PyTree | None = None,
    residual_bits: int | None = None,
) -> optax.GradientTransformation:
    """Keeps the params on a quantization grid; put it last in the chain.

    A float copy of the weights, the latent weights ``v``, receives the updates ``u``. The params are
    their nearest levels, where gradients are taken (straight-through)::

        v <- v + u
        grid <- quantizer.fit(v)
        level = grid.decode(grid.encode(v))
        emitted update = level + softness * (v - level) - params

    After each ``optax.apply_updates`` the float32 params equal the levels exactly: from the first
    step if training starts from projected params, ``dequantize_params(quantize_params(params,
    quantizer))``, else from about the third. bfloat16 and float16 params equal the levels rounded to
    their dtype. ``export_params`` turns them into codes without any loss of accuracy.

    With a ``softness`` that falls from 1 to 0, the params move gradually from the latent weights to the
    levels, which improves accuracy at 2 bits and below. For ternary and 2 bits, the larger scales of
    ``scale_rule="absmax"`` may improve it further. The params are on the grid once softness is exactly
    0, from about the third such step. If training stops earlier, ``export_params`` moves them to the
    nearest levels, and warns with the number of weights that were off the grid.

    Params changed outside the chain, such as by a load, a clamp or an average, change the latent weights
    before the next update. A change of at most 1/128 of a weight is added to its latent weight, any larger
    one replaces it. Where such larger changes come in every step and each is below half a step of the grid,
    the next update rounds each of them back to the same level. With ``residual_bits``, a weight moved from
    one level to another keeps its distance to the level. A ``softness`` changed from outside, on resume or
    by ``optax.inject_hyperparams``, looks like a change of the params: give the schedule itself.

    Updates for half-precision params are emitted in float32. Apply them with ``optax.apply_updates``:
    ``p + u`` and ``eqx.apply_updates`` give float32 params, which the next update refuses, and which
    ``lax.scan`` refuses as a carry of another type. A wrapper that needs a single dtype goes around the
    optimizer alone: ``optax.chain(optax.apply_if_finite(optimizer, n),
    quantize_weights(quantizer))``.

    On a mesh, the state is sharded like the params, and devices that hold whole groups exchange nothing
    larger than the scales. For groups that span devices, they exchange a few numbers per piece. A piece is
    as long as the greatest common divisor of a group and a device's part; if that is below 4, the weight is
    gathered instead.

    Args:
      quantizer: the quantizer, or a mapping from regular expressions on paths to quantizers, as in
        ``quantize_params``.
      softness: None for 0; a number from 0 to 1; or a schedule of the number of updates so far, such
        as ``softness_schedule``, whose values are clipped to 0..1.
      where: which leaves may be quantized, as in ``quantize_params``.
      uses: how the function uses the params, from ``trace_weights``: it selects the leaves and their
        axes, as in ``quantize_params``.
      calibration: from ``calibrate``: the default of ``uses`` and ``importance``.
      importance: a tree like the params, or a part of it, of arrays that broadcast to the leaves, as in
        ``quantize_params``. In each step, the scales are those of the weighted least squares for the codes
        at the scales of the step before, whatever the quantizer's rule.
      start: a tree like the params, as ``quantize_calibrated`` or ``from_gguf`` return, whose ``QArray``
        leaves have the grids to start on. Training that starts from ``dequantize_params(start)`` has
        exactly their codes at step 0, which a fit to the levels would not find again.
      residual_bits: None, or 8 to keep the latent weights in one byte each: their distance to the levels,
        in 127ths of the largest distance in a channel or group, stochastically rounded; at 1 bit their
        signed roots, which are finest where a weight changes sign.

    Returns:
      A ``GradientTransformation`` with a ``QuantizeWeightsState``. It keeps 4 bytes per quantized weight,
      or 1 with ``residual_bits`` (and 6 per scale). The updates of other leaves pass through.

    Warns:
      UserWarning: from ``init``, for the reasons that ``quantize_params`` has, or ``start`` has no
        ``QArray`` for leaves that the rules select.

    Raises:
      ValueError: ``softness`` is a concrete number outside 0..1, or ``residual_bits`` is neither None
        nor 8, or the quantizer does not keep the grids of ``start``; in ``init``, as for
        ``quantize_params``; in ``update``, no params are given.
      TypeError: an argument or the state has another type, or ``start`` has no ``QArray``.

    References:
      Courbariaux et al., BinaryConnect, 2015 (arXiv:1511.00363). Jin et al., PARQ, 2025
      (arXiv:2503.15748), for softness.

    Examples:
      >>> from optax_clipquant import Uniform, export_params, quantize_weights
      >>> tx = optax.chain(optax.sgd(0.1), quantize_weights(Uniform(bits=4)))
      >>> params = {"kernel": jnp.array([[1.0, -0.3], [0.4, 0.2]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> export_params(params, state)["kernel"].qvalue
      Array([[-8, -8],
             [-3,  2]], dtype=int8)

      To shard the state, put the params on the mesh. A checkpoint is restored to the same shardings:

      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> columns = jax.NamedSharding(mesh, jax.P(None, "data"))
      >>> params = jax.device_put({"kernel": jnp.ones((2, 16))}, columns)
      >>> state = tx.init(params)
      >>> shardings = jax.tree.map(lambda x: x.sharding, state)
      >>> shardings[-1].latent["kernel"] == columns
      True
      >>> state = jax.device_put(jax.device_get(state), shardings)

      Continue training from the result of ``quantize_calibrated``::

        qparams = quantize_calibrated(fn, params, batches, quantizer)
        tx = optax.chain(optax.adam(1e-5), quantize_weights(quantizer, start=qparams))
        params = dequantize_params(qparams)
    """
    check_rules(quantizer, where, uses)
    if not callable(softness):
        check_softness(softness)
    if residual_bits not in (None, 8):
        raise ValueError(
            f"quantize_weights: residual_bits must be 8, or None for float32, got {residual_bits!r}"
        )

    uses, weighting = weighting_of(uses, calibration, importance)
    begin = None if start is None else start_grids(start, quantizer, uses, weighting)

    @on_shapes
    def init(params: PyTree) -> PyTree:
        grid = init_grids(params, quantizer, where, uses, weighting, begin)
        grids = dict(leaves_of(grid))
        check_weighting(weighting, grids, importance is None)

        def keep(path: str, p: jax.Array) -> Any:
            if path not in grids:
                return None
            # A copy, so that params and state can be donated together.
            latent = jnp.array(p, jnp.float32, copy=True)
            if begin and path in begin and p.dtype.itemsize < 4:
                # The levels that half precision rounds: the next fit then finds the same scale.
                level = exact_level_of(grids[path], latent)
                latent = jnp.where(level.astype(p.dtype) == p, level, latent)
            return latent if residual_bits is None else _start_residual(latent, grids[path])

        latent = map_with_path(lambda path, p: keep(path_of(path), p), unboxed(params))
        return QuantizeWeightsState(jnp.zeros((), jnp.int32), latent, grid)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        check_state("quantize_weights", state, QuantizeWeightsState)
        latents = dict(leaves_of(state.latent))
        index = {path: i for i, path in enumerate(latents)}
        soft = softness_at(softness, state.count)
        before = softness_before(softness, state.count)

        def step(path: str, u: jax.Array, p: jax.Array, grid: Grid) -> tuple[Any, Any, Any]:
            kept = latents[path]
            residual.check_kept(path, kept, residual_bits, start_anew("quantize_weights"))
            rule = known_rule("quantize_weights", quantizer, path)
            advance = _advance_residual if isinstance(kept, QArray) else _advance
            with naming_leaf("quantize_weights", path):
                return advance(
                    rule,
                    use_of(uses, path),
                    u,
                    p,
                    grid,
                    kept,
                    soft,
                    before,
                    weighting.get(path),
                    stream_of(index[path]),
                    state.count,
                )

        updates, grid, latent = map_quantized(
            step, updates, params, state.grid, "quantize_weights", latents
        )
        check_selection("quantize_weights", params, state.grid, quantizer, where, uses)
        return updates, QuantizeWeightsState(optax.safe_increment(state.count), latent, grid)

    return optax.GradientTransformation(init, update)


def _advance(
    rule: Quantizer,
    use: Use | None,
    u: jax.Array,
    p: jax.Array,
    grid: Grid,
    kept: jax.Array | QArray,
    soft: jax.typing.ArrayLike | None,
    before: jax.Array,
    importance: jax.Array | None,
    stream: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, Grid, jax.Array | QArray]:
    """A step of one leaf: its update, its grid and its latent weights."""
    latent = adopt(p, grid, kept, before, count, between=soft is not None) + u
    grid = fit_again(rule, latent, grid, use, importance)
    level = target = level_of(grid, latent)
    if soft is not None:
        target = soften(level, latent, soft)
    u = difference(straight_through(target, latent), p)
    if not isinstance(kept, QArray):
        return u, grid, latent
    if soft is None:
        return u, grid, residual.advance(latent, level, grid, kept, stream, count)
    # The next step will recover the level from the params, rounded to their dtype.
    level = level_of(grid, grid.round(p.astype(u.dtype) + u))
    kept = residual.advance(latent, level, grid, kept, stream, count)
    # Served from what is kept, so that outside edits smaller than the residual's codes can be told from its
    # rounding; but not where that would cross over to another level.
    target = soften(level, residual.latent_of(level, grid, kept), soft)
    served = difference(straight_through(target, latent), p)
    return jnp.where(crosses(target, level, grid), u, served), grid, kept


_advance_residual = outlined(_advance, statics=2)
_start_residual = outlined(lambda w, grid: residual.start(w, level_of(grid, w), grid))


def clipquant(
    optimizer: optax.GradientTransformation,
    *,
    c: Bound = 1.0,
    quantizer: Rules = Uniform(bits=4),  # noqa: B008 (immutable)
    uses: Uses | None = None,
) -> optax.GradientTransformation:
    """Chains clipping of gradients, an optimizer, and quantization of weights.

    Args:
      optimizer: any optax optimizer.
      c: the bound on each gradient, as for ``clip_by_value``.
      quantizer: as for ``quantize_weights``.
      uses: as for ``quantize_weights``.

    Returns:
      A ``GradientTransformation`` whose state is that of the chain.

    Raises:
      ValueError, TypeError: as ``clip_by_value`` and ``quantize_weights`` do.

    Examples:
      >>> tx = clipquant(optax.adam(1e-3), c=1.0, quantizer=Uniform(bits=4))
    """
    check_optimizer("clipquant", optimizer)
    return optax.chain(clip_by_value(c), optimizer, quantize_weights(quantizer, uses=uses))


def weight_states(opt_state: PyTree) -> list[Any]:
    """The states of ``quantize_weights`` and ``round_weights`` in an optimizer's state."""

    def is_state(x: Any) -> bool:
        return isinstance(x, (QuantizeWeightsState, RoundWeightsState))

    found = jax.tree.leaves(unboxed(opt_state), is_leaf=is_state)
    return [state for state in found if is_state(state)]
