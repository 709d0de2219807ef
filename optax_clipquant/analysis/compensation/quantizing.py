"""The handler that quantizes each weight where it meets data."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from optax_clipquant.analysis.compensation.interpret import Finished
from optax_clipquant.analysis.compensation.leaf import RoundedLeaf, fitted
from optax_clipquant.analysis.compensation.meetings import matrix, second_moments
from optax_clipquant.analysis.compensation.moves import View
from optax_clipquant.analysis.compensation.plan import (
    COMPENSATED,
    LEAST_SQUARES,
    POOLED,
    SEARCH,
    Follower,
    Leaves,
    Moments,
    Part,
    Planner,
)
from optax_clipquant.analysis.compensation.rounding import (
    Factor,
    corrected,
    factorize,
    round_groups,
    round_on,
)
from optax_clipquant.analysis.compensation.streams import Stream
from optax_clipquant.lowering.sharding import gathered
from optax_clipquant.quant.levels import Levels
from optax_clipquant.quant.quantizers.base import Quantizer
from optax_clipquant.quant.uses import Use

FEW = 16  # with fewer tokens than this, or a 16th of the contracted weights, off-diagonals are unreliable


@dataclasses.dataclass
class Outcome:
    """How a leaf was quantized, and the errors of its output.

    Attributes:
      method: the method.
      tokens: the smallest number of tokens that a part of it met.
      power: the power of its output, ``trace(w.T H w)``.
      before: the power of the output's error with least squares.
      after: the power of the output's error.
    """

    method: str
    tokens: int | None = None
    power: float = 0.0
    before: float = 0.0
    after: float = 0.0

    def relative(self) -> tuple[str, int | None, float | None, float | None]:
        """The method, the tokens, and the relative errors before and after."""
        if not self.power > 0:
            return self.method, self.tokens, None, None
        before, after = (math.sqrt(max(x, 0) / self.power) for x in (self.before, self.after))
        return self.method, self.tokens, before, after


class Quantizing(Follower):
    """Rounds the weights of each leaf at their first meeting.

    Args:
      leaves: the leaves that are followed.
      quantizers: the quantizer of each leaf.
      uses: the use of each leaf, which says which axes share scales.
      planner: the meetings of each leaf.
      moments: the moments of leaves that are not simply compensated.
      done: called with the number of a leaf whenever a part of it, or all, is quantized.

    Attributes:
      rounded: the leaves of which a part has been rounded.
      lost: the leaves of which a part has inputs that are not finite.
    """

    def __init__(
        self,
        leaves: Leaves,
        quantizers: list[Quantizer],
        uses: list[Use | None],
        planner: Planner,
        moments: Moments,
        done: Callable[[int], None],
    ) -> None:
        super().__init__(leaves)
        self.quantizers, self.uses, self.moments, self.done = quantizers, uses, moments, done
        self.methods = list(moments.methods)
        # The parts still to be rounded.
        self.waiting = {
            (i, key)
            for i, found in enumerate(planner.found)
            for key in found.times
            if found.method in (COMPENSATED, POOLED)
        }
        self.rounded: set[int] = set()
        self.lost: set[int] = set()
        self.found: dict[int, RoundedLeaf] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._moments: dict[tuple, tuple] = {}  # moments of the last inputs

    def wants(self, leaf: int) -> bool:
        return self.methods[leaf] in (COMPENSATED, POOLED)

    def leaf(self, number: int) -> RoundedLeaf:
        """The leaf with this number; quantized at once if it is not to be compensated."""
        if number not in self.found:
            value, method = self.leaves.values[number], self.methods[number]
            importance = self.moments.importance.get(number)
            if importance is not None and not np.isfinite(importance).all():
                self.lost.add(number)
                importance = None
            if not bool(jnp.isfinite(value).all()) or (
                method == SEARCH and (importance is None or not importance.any())
            ):
                method = LEAST_SQUARES
            if importance is not None:
                importance = jnp.asarray(
                    (importance / importance.mean()).reshape(value.shape), jnp.float32
                )
            grid = fitted(
                self.quantizers[number],
                value,
                self.uses[number],
                importance if method == SEARCH else None,
            )
            leaf = self.found[number] = RoundedLeaf(value, grid)
            self.methods[number] = method
            self.outcomes[number] = Outcome(method)
            if method not in (COMPENSATED, POOLED):
                leaf.left = 0
                self.waiting -= {name for name in self.waiting if name[0] == number}
                self.done(number)
        return self.found[number]

    def outcome(self, number: int) -> Outcome:
        """How a leaf was quantized, after the run: by least squares, if it met no data that is of use."""
        found = self.outcomes[number]
        if found.method in (COMPENSATED, POOLED) and number not in self.rounded:
            return Outcome(LEAST_SQUARES, found.tokens)
        return found

    def settled(self, view: View) -> Stream | None:
        if all(self.leaf(i).left == 0 for i in view.leaves):
            return self.resolve(view)
        return None

    def resolve(self, view: View) -> Stream:
        index, found = np.asarray(view.index), np.array(view.value)
        for number in view.leaves:
            first, last = self.leaves.first[number : number + 2]
            inside = (index >= first) & (index < last)
            found[inside] = self.leaf(number).decoded[index[inside] - first]
        sharding = view.value.sharding
        whole = sharding.num_devices == 1
        return Stream(view.value, jnp.asarray(found) if whole else jax.device_put(found, sharding))

    def meet(self, eqn: JaxprEqn, side: int, view: View, x: Stream) -> None:
        inputs, parts = self.leaves.parts(eqn, side, view)
        w = None
        for part in parts:
            leaf, name = self.leaf(part.leaf), (part.leaf, part.key)
            if name not in self.waiting or view.changed:
                continue
            self.waiting.remove(name)
            if w is None:
                w = matrix(eqn, side, gathered(view.value)).astype(jnp.float32)
            weights = w if len(part.columns) == w.shape[2] else w[:, :, part.columns]
            if name in self.moments.pooled:
                h, tokens = self.moments.pooled[name]
                moments = (*_trusted(h, None, tokens), {})
            else:
                moments = self._moments_of(inputs, x)
            self._round(leaf, part, weights[: len(part.index)], moments)
            self.done(part.leaf)
        if not self.waiting and self.left is not None:
            raise Finished

    def _moments_of(self, inputs: Any, x: Stream) -> tuple:
        """The second moments of ``x``, kept with their factors for all weights that meet the same inputs."""
        key = (id(x), inputs)
        if key not in self._moments:
            batches = len(x.float) if x.batched else 1
            sums: Any = None
            for batch in range(batches):
                found = second_moments(inputs, *x.pair(batch))
                sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
            # Keeps `x` alive, so that its id is not reused.
            self._moments = {key: (*_trusted(*sums), {}, x)}
        return self._moments[key]

    def _round(self, leaf: RoundedLeaf, part: Part, w: jax.Array, moments: tuple) -> None:
        h, cross, tokens, finite, factors = moments[:5]
        outcome, least = self.outcomes[part.leaf], int(np.min(tokens))
        outcome.tokens = least if outcome.tokens is None else min(least, outcome.tokens)
        if not finite or not jnp.any(h):  # stays on the grid of least squares
            if not finite:
                self.lost.add(part.leaf)
            leaf.left -= part.index.size
            return
        self.rounded.add(part.leaf)
        layout = leaf.layout(part.index)
        name = layout.rows.tobytes(), layout.size
        if name not in factors:
            factors[name] = _factors(h, jnp.asarray(layout.rows), layout.size)
        scale = zero = None
        if layout.own is None:
            scale = jnp.asarray(leaf.scale[layout.each], jnp.float32)
            if leaf.zero_point is not None:
                zero = jnp.asarray(leaf.zero_point[layout.each], jnp.float32)
        found = _rounded(w, cross, factors[name], scale, zero, leaf.grid.levels, leaf.zero_points)
        before = leaf.decoded[part.index]
        codes, scale, zero = (None if x is None else np.asarray(x) for x in found)
        assert codes is not None
        leaf.put(part.index, layout, codes, scale, zero)
        after = leaf.decoded[part.index]
        power, *errors = np.asarray(_powers(h, w, before, after), np.float64)
        outcome.power += power
        outcome.before += errors[0]
        outcome.after += errors[1]


@jax.jit
def _trusted(
    h: jax.Array, cross: jax.Array | None, tokens: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Moments without the entries that too few tokens cannot estimate, and whether all are finite."""
    finite = jnp.isfinite(h).all()
    if cross is not None:
        finite &= jnp.isfinite(cross).all()
    few = (tokens < max(FEW, h.shape[-1] // FEW))[:, None, None]
    h = jnp.where(few & ~jnp.eye(h.shape[-1], dtype=bool)[None], 0, h)
    return h, None if cross is None else jnp.where(few, 0, cross), tokens, finite


@jax.jit
def _powers(h: jax.Array, w: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    """The power of the output, and of its errors with the weights ``before`` and ``after``."""
    errors = (w - x.astype(jnp.float32) for x in (before, after))
    return jnp.stack([jnp.sum(x * (h @ x)) for x in (w, *errors)])


@partial(jax.jit, static_argnames="size")
def _factors(h: jax.Array, rows: jax.Array, size: int) -> Factor:
    return _over_batch(partial(factorize, rows=rows, size=size), h)


@partial(jax.jit, static_argnames=("levels", "zero_points"))
def _rounded(
    w: jax.Array,
    cross: jax.Array | None,
    factors: Factor,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    levels: Levels,
    zero_points: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes ``[batch, K, N]``, scales and zero points; if ``scale`` is given, codes for these scales."""

    def one(w, cross, factor, scale, zero):
        if cross is not None:
            w = corrected(w, cross @ w, factor)
        if scale is not None:
            return round_on(w, factor, scale, zero, levels), scale, zero
        return round_groups(w, factor, levels, zero_points=zero_points)

    return _over_batch(one, w, cross, factors, scale, zero_point)


def _over_batch(fn: Callable[..., Any], *args: Any) -> Any:
    """Maps ``fn`` over the first axes, one index after the other, or several together if they are small."""
    batch, length = args[0].shape[:2]
    if batch == 1:
        one = fn(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], one)
    together = max(1, min(batch, 2**20 // length**2))
    return jax.lax.map(lambda args: fn(*args), args, batch_size=together)
