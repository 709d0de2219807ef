"""Error-compensated rounding: each weight compensates the errors of those rounded before it.

For a dot of inputs ``x [tokens, K]`` with weights ``w [K, N]``, the squared error of the output is
``trace(E.T H E)`` with ``E = w - w_hat`` and ``H = E[x x.T]``. With ``A ~ H`` and ``U`` the upper Cholesky
factor of ``A^-1``, rows are rounded in turn; the error of row ``j`` over ``U_jj``, times ``U_jk``, is
subtracted from all later rows ``k``, the least-squares response of the weights that are still free.

References:
  Frantar et al., GPTQ, 2022 (arXiv:2210.17323). Arai and Ichikawa, QEP, 2025 (arXiv:2504.09629). Li et
  al., GPTAQ, 2025 (arXiv:2504.02692).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optax_clipquant.quant.levels import Levels
from optax_clipquant.quant.scales.closed_form import round_scale
from optax_clipquant.quant.scales.nearest import (
    decode_codes,
    is_mirrored,
    largest_level,
    nearest_codes,
)
from optax_clipquant.quant.scales.weighted import search_scale

SHRINKAGE = 0.8  # factor on H's off-diagonals, which a few thousand tokens estimate poorly
DAMPING = 0.01  # fraction of the mean diagonal added to the diagonal
CORRECTION = (
    0.5  # fraction of the inputs' error to compensate; all of it would overfit the calibration data
)
BLOCK = 32  # rows rounded between two matrix products, in groups of more than twice as many


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("u", "order", "groups", "unit"),
    meta_fields=("size",),
)
@dataclasses.dataclass(frozen=True)
class Factor:
    """The factorized second moments of the inputs, and the order of rounding.

    Attributes:
      u: the upper Cholesky factor of ``A^-1``, rows and columns in ``order``.
      order: the rows of the weight in the order of rounding; K pads groups.
      groups: the groups in this order.
      unit: the unit of the moments, by which they are divided.
      size: the number of rows of a group.
    """

    u: jax.Array
    order: jax.Array
    groups: jax.Array
    unit: jax.Array
    size: int

    def sorted(self, x: jax.Array) -> jax.Array:
        """``x [K, ...]`` in the order of rounding, with 0 where groups are padded."""
        return x.at[self.order].get(mode="fill", fill_value=0)

    def restored(self, x: jax.Array, length: int) -> jax.Array:
        """The inverse of ``sorted``."""
        return jnp.zeros((length, *x.shape[1:]), x.dtype).at[self.order].set(x, mode="drop")


@partial(jax.jit, static_argnames=("size", "shrinkage", "damping", "ordered"))
def factorize(
    h: jax.Array,
    rows: jax.Array,
    *,
    size: int,
    shrinkage: float = SHRINKAGE,
    damping: float = DAMPING,
    ordered: bool = True,
) -> Factor:
    """Factorizes ``h [K, K]``, to round weights whose rows share scales in the groups ``rows``.

    Args:
      h: the second moments of the inputs, in any unit.
      rows: the rows of each group of ``size``, group after group; K pads a group.
      size: the number of rows of a group.
      shrinkage: the factor on off-diagonals.
      damping: the fraction of the mean diagonal added to the diagonal.
      ordered: whether groups, and rows in a group, are rounded in order of their inputs' power.
    """
    there = rows < h.shape[0]
    power = jnp.diagonal(h).at[rows].get(mode="fill", fill_value=0)
    mean = jnp.sum(power) / jnp.maximum(jnp.sum(there.astype(power.dtype)), 1)
    unit = jnp.where(mean > 0, mean, 1)
    groups, order = jnp.arange(rows.size // size), jnp.arange(rows.size)
    if ordered:
        inner = jnp.argsort(-jnp.where(there, power, -1).reshape(-1, size), axis=1)
        groups = jnp.argsort(-jnp.sum(power.reshape(-1, size), axis=1))
        order = (groups[:, None] * size + inner[groups]).reshape(-1)
    rows, there, power = rows[order], there[order], power[order]
    a = h.at[rows].get(mode="fill", fill_value=0).at[:, rows].get(mode="fill", fill_value=0)
    diagonal = jnp.where(there, power / unit + damping, 1)
    a = jnp.where(jnp.eye(rows.size, dtype=bool), diagonal[None], a * (shrinkage / unit))
    # The lower factor of the reversed matrix, reversed back, is an upper factor of `a`.
    root = jnp.linalg.cholesky(a[::-1, ::-1])[::-1, ::-1]
    u = jax.scipy.linalg.solve_triangular(root, jnp.eye(rows.size, dtype=a.dtype), lower=False)
    return Factor(u, rows, groups, unit, size)


@jax.jit
def corrected(w: jax.Array, lost: jax.Array, factor: Factor) -> jax.Array:
    """The target that compensates part of the inputs' error: ``w + A^-1 lost / 2``.

    Args:
      w: the weights ``[K, N]``.
      lost: ``E[xq y.T] [K, N]``, with ``y`` the error of the output due to the inputs.
      factor: the factor of the quantized inputs ``xq``.
    """
    shift = factor.u.T @ (factor.u @ factor.sorted(lost / factor.unit))
    return w + CORRECTION * factor.restored(shift, w.shape[0])


@partial(jax.jit, static_argnames=("levels", "zero_points", "compensate"))
def round_groups(
    w: jax.Array,
    factor: Factor,
    levels: Levels,
    *,
    zero_points: bool = False,
    compensate: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Rounds ``w [K, N]`` to codes, and finds the scale of each group and column on the way.

    A scale is searched on the rows as compensated so far, with the weights ``1 / U_jj**2``, the cost of an
    error that all later rows compensate. Scales near the best, of either sign, are then tried with
    compensation inside the group, and each column keeps its best.

    Returns:
      ``codes [K, N]`` in float32, ``scale [groups, N]`` and ``zero_point [groups, N]`` or None, groups in
      the order of ``rows``.
    """
    size, (length, columns) = factor.size, w.shape
    multiples = _multiples(levels, zero_points, size) if compensate else (1.0,)
    tries = len(multiples)
    there = factor.sorted(jnp.ones((length, 1)))

    def totals(arrays: list[jax.Array]) -> list[jax.Array]:
        return [jnp.sum(x, axis=0, keepdims=True) for x in arrays]

    def group(i: jax.Array, carry: tuple) -> tuple:
        w, codes, scales, zeros = carry

        def part(x: jax.Array, axis: int = 0) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        rows, mask, wide = part(w), part(there), part(factor.u)
        square = part(wide, 1)
        cost = mask / jnp.square(jnp.diagonal(square))[:, None]
        high, low = (jnp.max(x, axis=0, initial=0, keepdims=True) for x in (rows, -rows))
        scale, zero = search_scale(rows, cost, levels, totals, high, -low, zero_points=zero_points)
        largest = largest_level(levels, zero_points)
        tried = [round_scale(scale * m, largest, levels.dtype) for m in multiples]
        tried = jnp.concatenate(tried, axis=1)
        found, errors = _round_rows(
            jnp.tile(rows, (1, tries)),
            square,
            tried,
            None if zero is None else jnp.tile(zero, (1, tries)),
            levels,
            compensate,
        )
        loss = jnp.sum(mask * jnp.square(errors), axis=0)
        best = jnp.argmin(loss.reshape(tries, columns), axis=0)

        def kept(x: jax.Array) -> jax.Array:
            x = x.reshape(-1, tries, columns)
            return jnp.take_along_axis(x, best[None, None], axis=1)[:, 0]

        if compensate:
            w -= wide.T @ kept(errors)
        put = jax.lax.dynamic_update_slice_in_dim
        return (
            w,
            put(codes, kept(found), i * size, 0),
            put(scales, kept(tried), i, 0),
            None if zero is None else put(zeros, zero, i, 0),
        )

    w = factor.sorted(w)
    blank = jnp.zeros((factor.groups.size, columns))
    carry = (w, jnp.zeros_like(w), blank, blank if zero_points else None)
    _, codes, scale, zero = jax.lax.fori_loop(0, factor.groups.size, group, carry)

    def restored(x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x).at[factor.groups].set(x)

    codes = factor.restored(codes, length)
    return codes, restored(scale), None if zero is None else restored(zero)


@partial(jax.jit, static_argnames="levels")
def round_on(
    w: jax.Array, factor: Factor, scale: jax.Array, zero_point: jax.Array | None, levels: Levels
) -> jax.Array:
    """Rounds ``w [K, N]`` to codes with a given ``scale [K, N]`` for each weight; groups do not matter."""
    zero_point = None if zero_point is None else factor.sorted(zero_point)
    rows, scale = factor.sorted(w), factor.sorted(scale)
    codes, _ = _round_rows(rows, factor.u, scale, zero_point, levels, True)
    return factor.restored(codes, w.shape[0])


def _multiples(levels: Levels, zero_points: bool, size: int) -> tuple[float, ...]:
    """The multiples of the best uncompensated scale to try with compensation; spread wider with fewer levels."""
    if size > 2 * BLOCK:
        near = (1.0, 0.9, 1.1)  # many rows determine the scale well, and are slow to try
    elif levels.upper - levels.lower >= 15:
        near = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15)
    else:
        near = (1.0, 0.7, 0.77, 0.84, 0.92, 1.08, 1.16)
    one_sign = zero_points or is_mirrored(levels) or size > 2 * BLOCK
    return near if one_sign else (*near, *(-x for x in near))


def _round_rows(
    w: jax.Array,
    u: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    levels: Levels,
    compensate: bool,
) -> tuple[jax.Array, jax.Array]:
    """Rounds the rows of ``w`` in turn; returns codes, and errors over ``U_jj``.

    ``scale`` and ``zero_point`` have as many rows as ``w``, or one.
    """
    length = w.shape[0]
    scale = jnp.broadcast_to(scale, w.shape)
    zero_point = None if zero_point is None else jnp.broadcast_to(zero_point, w.shape)
    diagonal = jnp.diagonal(u)[:, None]

    def codes_and_errors(w, scale, zero, diagonal):
        codes = nearest_codes(levels, w / jnp.where(scale == 0, 1, scale), zero)
        return codes, (w - decode_codes(levels, codes, zero) * scale) / diagonal

    if not compensate:
        return codes_and_errors(w, scale, zero_point, diagonal)

    def in_turn(w: jax.Array, u: jax.Array, scale: jax.Array, zero: jax.Array | None) -> tuple:
        def step(j: jax.Array, carry: tuple) -> tuple:
            w, codes, errors = carry

            def row(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, j, 1)

            code, error = codes_and_errors(
                row(w),
                row(scale),
                None if zero is None else row(zero),
                row(jnp.diagonal(u)[:, None]),
            )
            put = jax.lax.dynamic_update_slice_in_dim
            return w - row(u).T * error, put(codes, code, j, 0), put(errors, error, j, 0)

        blank = jnp.zeros_like(w)
        return jax.lax.fori_loop(0, w.shape[0], step, (w, blank, blank))[1:]

    if length <= 2 * BLOCK:
        return in_turn(w, u, scale, zero_point)

    def block(i: jax.Array, carry: tuple) -> tuple:
        w, codes, errors = carry
        start = jnp.minimum(i * BLOCK, length - BLOCK)

        def part(x: Any, axis: int = 0) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis)

        wide = part(u)
        zero = None if zero_point is None else part(zero_point)
        code, error = in_turn(part(w), part(wide, 1), part(scale), zero)
        put = jax.lax.dynamic_update_slice_in_dim
        return w - wide.T @ error, put(codes, code, start, 0), put(errors, error, start, 0)

    blank = jnp.zeros_like(w)
    return jax.lax.fori_loop(0, length // BLOCK, block, (w, blank, blank))[1:]
