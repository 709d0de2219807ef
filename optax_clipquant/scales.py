"""Statistics of weights, and the scales that follow from them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.grids import Grid
from optax_clipquant.host import largest_scale
from optax_clipquant.reductions import Span, Zero, extremes

HALF = 0.49
"""Of the steps of a grid with zero points: weights can lie as far apart as twice their dtype's range
reaches. A bit less, since the scale is rounded up; what lies beyond the range, ``decode`` cuts.
"""
_LARGEST = float(jnp.finfo(jnp.float32).max)


def round_scale(scale: jax.Array, largest: float, dtype: np.dtype) -> jax.Array:
    """``scale`` to the precision of bfloat16, so that no level ``largest * scale`` overflows.

    Scales below 2**-126 become 0 and those from 2**126 the number before that, since the reciprocals
    of others are no normal numbers: 1 and 2 bits and ternary saturate at weights beyond that. With 8 significant bits in the scale, the product with a code, and the difference of two such
    products, is exact in float32. Plain casts to bfloat16 and back may be dropped by a compiler.
    """
    cap = largest_scale(largest, dtype)
    rounded = jnp.clip(jax.lax.reduce_precision(scale, 8, 7), -cap, cap)
    rounded = jnp.where(jnp.abs(rounded) < 2.0**-126, 0, rounded)
    return jnp.where(jnp.isinf(scale), scale, rounded)


@jax.jit
def moments(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, standard deviation, and whether all elements are equal (then the mean is that value).

    Moments of each column first, in units of the column's range, then those of the columns: nothing
    cancels or overflows, and the weights are read twice.
    """
    w = w.reshape(-1, 1) if w.ndim < 2 else w
    span = Span(tuple(range(w.ndim - 1)))
    rows = w.size // w.shape[-1]
    # Halves, for a sum can round up.
    high, low, halves = extremes(w, span, lambda _: [w * (0.5 / rows)])
    means = 2 * halves
    reach = jnp.maximum(high, -low)
    unit = jnp.where(reach == 0, 1, reach)
    any_element = jnp.where(high > 0, high, low)
    squares, differ = span.reduce(
        ("sum", "max"),
        lambda zero: (
            jnp.square(w / unit - (means + zero) / unit),
            (w != any_element).astype(jnp.int32),
        ),
    )
    mean = 2 * jnp.sum(means * (0.5 / means.size))
    largest = jnp.max(unit)
    between = jnp.square(means / largest - mean / largest)
    spread = jnp.sqrt(jnp.mean(squares / rows * jnp.square(unit / largest) + between))
    std = jnp.minimum(largest * jnp.minimum(spread, 1), _LARGEST)
    highest = jnp.max(any_element)
    constant = (jnp.max(differ) == 0) & (highest == jnp.min(any_element)) & ~jnp.isnan(mean)
    return jnp.where(constant, highest, mean), std, constant


def mean_magnitude(w: jax.Array, span: Span) -> jax.Array:
    """The mean of ``abs(w)`` in each span, cut so that twice the mean is finite where ``w`` is."""
    share = jnp.asarray(0.5 / np.maximum(span.counts(w.shape), 1), jnp.float32)
    # Of two sums, since one by itself is slower (see `Span.reduce`); one of them has all NaN.
    share_of = w * share
    up, down = span.reduce(
        ("sum", "sum"),
        lambda _: (jnp.where(w > 0, share_of, 0), jnp.where(w > 0, 0, share_of)),
    )
    half = up - down
    return 2 * jnp.where(jnp.isinf(half), half, jnp.minimum(half, _LARGEST / 4))


def least_squares(w: jax.Array, span: Span, start: Grid | None, absmax: Grid) -> Grid:
    """``absmax`` with the scale that minimises the squared error of ``w``.

    Nearest codes for a scale, then the least-squares scale for these codes, in turn: the error never
    rises. Without ``start``, two rounds from the best of several scales, of which the absmax scale
    is one; with it, one round from the scale that it holds.
    """
    base, offset = absmax.scale, absmax.offset
    low, high = absmax.lower + offset, absmax.upper + offset
    if absmax.zero_point is None:
        largest = high if offset else float(-low)
    else:
        shift = absmax.zero_point.astype(jnp.float32)
        low, high = low - shift, high - shift
        largest = HALF * (absmax.upper - absmax.lower)
    unit = jnp.where(base == 0, 1, base)

    def levels(w: jax.Array, scale: Zero, zero: Zero) -> jax.Array:
        """The nearest levels, in steps."""
        steps = w * (1 / jnp.where(scale == 0, 1, scale))
        half = offset + zero
        return jnp.clip(
            jnp.round(steps - half) + half if offset else jnp.round(steps), low + zero, high + zero
        )

    def refit(scale: jax.Array) -> jax.Array:
        """The least-squares scale for the codes at ``scale``."""

        def parts(zero: Zero) -> tuple[jax.Array, jax.Array]:
            steps = levels(w, scale + zero, zero)
            return jnp.square(steps), w / unit * steps

        squares, products = span.reduce(("sum", "sum"), parts, 0 * base)
        best = unit * (products / jnp.where(squares == 0, 1, squares))
        return round_scale(best, largest, absmax.dtype)

    if start is None:
        narrowest = min(0.02 * (absmax.upper - absmax.lower + 1), 0.7)
        # In units of the absmax scale, so that no square overflows.
        x = w / unit

        def search(
            best: tuple[jax.Array, jax.Array], ratios: jax.Array, here: np.ndarray
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            ratio, least = best

            def errors(zero: Zero) -> list[jax.Array]:
                return [jnp.square(x - r * levels(x, r + zero, zero)) for r in ratios]

            found = span.reduce(("sum",) * 3, errors, 0 * base, most=8)
            for r, error in zip(ratios, found, strict=True):
                better = (error < least) & here
                ratio = jnp.where(better, r, ratio)
                least = jnp.where(better, error, least)
            return (ratio, least), None

        best = jnp.ones_like(base), jnp.full_like(base, jnp.inf)
        # The fewer weights share a scale, the more rugged is their error.
        few = span.counts(w.shape) < 32
        for starts, here in ((6, ~few), (24, few)):
            if here.any():
                ratios = jnp.asarray([1.0, *np.geomspace(narrowest, 1, starts)[:-1]], jnp.float32)
                ratios = ratios.reshape(-1, 3)
                # A loop of two is none; one of eight takes a fourth of the time to compile.
                best, _ = jax.lax.scan(partial(search, here=here), best, ratios, unroll=2)
        scale = refit(round_scale(base * best[0], largest, absmax.dtype))
    else:
        # Within the range where the largest weight keeps a code that is not 0. Which side has the
        # largest weight may change from step to step; the grid is not mirrored then.
        size = jnp.clip(jnp.abs(start.scale), 1e-3 * jnp.abs(base), jnp.abs(base))
        scale = jnp.where(
            jnp.isfinite(start.scale),
            jnp.where(start.scale * base < 0, -1, 1) * jnp.sign(base) * size,
            base,
        )
    return dataclasses.replace(absmax, scale=refit(scale))
