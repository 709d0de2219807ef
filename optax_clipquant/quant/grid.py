"""The grid of a quantized array: it encodes weights to integer codes and decodes codes to levels."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from optax_clipquant.lowering.sharding import (
    for_pieces,
    is_on_one_device,
    merge_axis,
    piece_of,
    repeat_axis,
    spec_of,
    split_axis,
)
from optax_clipquant.quant.groups import groups_of
from optax_clipquant.quant.levels import Levels, accepting_code_book
from optax_clipquant.quant.restore import (
    Layout,
    as_text,
    check_restored,
    levels_of,
    register_with_layout,
)

_Fn = Callable[[jax.Array], jax.Array]
_STATIC = tuple(field.name for field in dataclasses.fields(Levels))


@partial(register_with_layout, data_fields=("scale", "zero_point", "max_code"), meta_fields=_STATIC)
@accepting_code_book
@dataclasses.dataclass(frozen=True, eq=False)
class Grid(Levels):
    """The levels of a quantized array: scales, zero points and the static half, ``Levels``.

    The level of code ``k`` is ``(k + offset - zero_point) * scale``; or with a codebook,
    ``codebook[k - lower] * scale``.

    Invariants:
      * ``scale`` and ``zero_point`` have the array's rank, with extent 1 along each reduced axis and
        ``ceil(n / size)`` along the grouped one.
      * Every code lies in ``[lower, upper]``, and in ``[-max_code, max_code]`` if that is given.
      * A scale has at most 8 significant bits (the precision of bfloat16), so that a level, and the
        difference of two levels, is exact in float32. (The scale of a constant array under
        ``ZScore`` is the one exception.)
      * A scale of 0 means that all levels are 0; a scale that is not finite means that the array
        held a value that is not finite, and decodes to values that are not finite.

    Attributes:
      scale: the step between neighbouring levels, a float array. It may be negative: then the
        levels are mirrored.
      zero_point: the code of the level 0, or None where it is 0.
      max_code: a traced bound on ``abs(code)``, of the shape of ``scale``, or None.

    ``Levels`` documents the static attributes.

    A Grid is small. State that must be reproduced exactly stores the Grid rather than refitting it: a fit
    in another compilation sums in another order, and may move a scale by one unit in the last place.

    Examples:
      >>> grid = Grid(scale=jnp.full((1, 1), 0.5), bits=4, lower=-8, upper=7)
      >>> codes = grid.encode(jnp.array([[0.6, -9.0]]))
      >>> codes, grid.decode(codes)
      (Array([[ 1, -8]], dtype=int8), Array([[ 0.5, -4. ]], dtype=float32))
    """

    scale: jax.Array
    zero_point: jax.Array | None = None
    max_code: jax.Array | None = None

    @property
    def arrays(self) -> dict[str, jax.Array | None]:
        """The traced half, by name."""
        return {name: getattr(self, name) for name in ("scale", "zero_point", "max_code")}

    def __post_init__(self) -> None:
        # So that ``jnp.bfloat16``, a scalar type and not a dtype, may be given.
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @jax.jit
    def encode(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        noise: jax.Array | None = None,
        draws: jax.Array | None = None,
    ) -> jax.Array:
        """The codes of ``w``, rounded to the nearest level, or stochastically to one of the two around it.

        Args:
          w: a floating array of any shape that the grid's scale fits.
          key: a PRNG key for stochastic rounding, which is unbiased: a value between two levels goes
            to the upper one with a probability equal to its distance from the lower one, in steps. A value
            on a level stays there.
          noise: uniform noise in [0, 1) of the shape of ``w``, to use instead of a key.
          draws: the old name of ``noise``.

        Returns:
          int8 codes of the shape of ``w``. The code of NaN is 0 (its scale is not finite, so it
          decodes to NaN).
        """
        scale = self.scale.astype(jnp.float32)
        split, expand, merge = self._view(w)
        w = split(w)
        noise = draws if noise is None else noise
        if key is not None:
            noise = jax.random.uniform(key, w.shape)
        elif noise is not None:
            noise = split(noise)
        # By the reciprocal: XLA divides by a broadcast scale that way, but not by one of full shape.
        position = w.astype(jnp.float32) * expand(1 / jnp.where(scale == 0, 1, scale))
        if self.codebook is not None and self.max_code is None and noise is None:
            codes = self.lower + _nearest_in(self.codebook, position)
            return merge(jnp.where(jnp.isnan(position), 0, codes).astype(jnp.int8))
        if self.codebook is not None:
            position = self.lower + _index_in(self.codebook, position)
        if self.zero_point is not None:
            position += expand(self._zero_point())
        if self.offset:
            position -= self.offset
        if noise is None:
            codes = jnp.round(position)
        else:
            # The reciprocal is rounded, so a value on a level may land a few units in the last place off
            # its code. The margin keeps it on that code.
            margin = 2.0**-14
            below = jnp.floor(position)
            threshold = margin + (1 - 2 * margin) * noise
            codes = below + (threshold < position - below).astype(jnp.float32)
        codes = jnp.clip(codes, self.lower, self.upper)
        if self.max_code is not None:
            bound = self.max_code.astype(jnp.float32)
            codes = jnp.clip(codes, -bound, bound)
        return merge(jnp.where(jnp.isnan(codes), 0, codes).astype(jnp.int8))

    @jax.jit
    def decode(self, codes: jax.Array) -> jax.Array:
        """The levels of ``codes``, in the grid's dtype."""
        split, expand, merge = self._view(codes)
        codes = split(codes)
        scale = expand(self.scale.astype(jnp.float32))
        if self.codebook is None:
            levels = codes.astype(jnp.float32)
        else:
            levels = _entry_of(self.codebook, codes.astype(jnp.int32) - self.lower)
        if self.offset:
            levels += self.offset
        if self.zero_point is None:
            return merge(self.round(levels * scale))
        values = (levels - expand(self._zero_point())) * scale
        # The outermost level may lie beyond the dtype's range where the weights reach its end.
        largest = jnp.where(jnp.isfinite(scale), float(jnp.finfo(self.dtype).max), jnp.inf)
        return merge(self.round(jnp.clip(values, -largest, largest)))

    def _zero_point(self) -> jax.Array:
        assert self.zero_point is not None
        step = jnp.where(self.scale == 0, 1, self.scale).astype(jnp.float32)
        # Dividing by 1 makes XLA compute this once, rather than for each element it is added to.
        return self.zero_point.astype(jnp.float32) / (step / step)

    def round(self, values: jax.Array) -> jax.Array:
        """Rounds ``values`` to the grid's dtype; a compiler may drop the rounding of a plain cast."""
        if self.dtype.itemsize < 4:
            info = jnp.finfo(self.dtype)
            rounded = jax.lax.reduce_precision(values, 8, info.nmant)
            if info.nexp < 8:
                # Types with fewer exponent bits need not have IEEE's range: float8_e4m3fn reaches 448, not 240.
                least = float(info.smallest_subnormal)
                multiple = jnp.round(values / least) * least
                rounded = jnp.where(jnp.abs(values) < float(info.tiny), multiple, rounded)
                beyond = float(
                    np.float32(np.inf).astype(self.dtype)
                )  # NaN where the type has no infinity
                beyond = jnp.where(values < 0, -beyond, beyond)
                rounded = jnp.where(jnp.abs(rounded) > float(info.max), beyond, rounded)
            values = rounded
        # Code 0 times a negative scale is -0, but a param plus its update gives +0.
        return jnp.where(values == 0, 0, values).astype(self.dtype)

    def _view(self, x: jax.Array) -> tuple[_Fn, _Fn, _Fn]:
        """Functions that split an array like ``x`` into groups, expand a scale to match, and merge the array back.

        On several devices groups become an axis, or pieces of groups where these lie across devices. Else, and
        where the last group is shorter, arrays keep their shape and the scales are repeated: XLA cannot
        overwrite a donated array that another shape of it was computed from, and would copy it.
        """

        def same(y: jax.Array) -> jax.Array:
            return y

        # Unflattened from another tree, or with an axis moved, a grid may have other scales than its
        # static half says.
        if self.scale.ndim:
            groups_of(x.shape, self.scale.shape, self.group)
        if self.group is None:
            return same, same, same
        axis, size = self.group
        axis += x.ndim
        length = x.shape[axis]
        piece = piece_of(x, axis, size)
        if length % piece or is_on_one_device():
            return same, partial(repeat_axis, axis=axis, times=size, length=length), same

        return (
            partial(split_axis, axis=axis, first=0, last=length, size=piece),
            partial(for_pieces, axis=axis, run=size // piece, pieces=length // piece),
            partial(merge_axis, axis=axis, spec=spec_of(x, x.shape)),
        )


def _nearest_in(book: tuple[float, ...], x: jax.Array) -> jax.Array:
    """The int32 index of the entry of ``book`` nearest to ``x``.

    A binary search over the midpoints between entries, each selected by the comparisons before it. That
    fuses, and takes half the time of comparing with all midpoints.
    """
    bounds = [(a + b) / 2 for a, b in itertools.pairwise(book)]
    depth = len(bounds).bit_length()
    bounds += [math.inf] * (2**depth - 1 - len(bounds))
    index, above = jnp.zeros(x.shape, jnp.int32), []

    def select(first: int, size: int, above: list[jax.Array]) -> jax.Array | float:
        half = size // 2
        if not above:
            return bounds[first + half - 1]
        upper, lower = select(first + half, half, above[1:]), select(first, half, above[1:])
        return jnp.where(above[0], upper, lower)

    for level in reversed(range(depth)):
        above.append(x > select(0, 2**depth, above))
        index += jnp.where(above[-1], 2**level, 0)
    return index


def _index_in(book: tuple[float, ...], x: jax.Array) -> jax.Array:
    """The fractional index of ``x`` in ``book``: 1.25 is a quarter of the way from entry 1 to entry 2.

    A sum over the intervals, which fuses where a search or a gather would not.
    """
    return sum(
        (jnp.clip((x - a) * (1 / (b - a)), 0, 1) for a, b in itertools.pairwise(book)),
        start=jnp.zeros_like(x),
    )


def _entry_of(book: tuple[float, ...], index: jax.Array) -> jax.Array:
    """``book[index]``, exactly: sums of multiples of 2**-10 have no rounding error."""
    return sum(
        (jnp.where(index >= k, b - a, 0.0) for k, (a, b) in enumerate(itertools.pairwise(book), 1)),
        start=jnp.full(index.shape, book[0], jnp.float32),
    )


def _to_state_dict(grid: Grid) -> dict[str, Any]:
    return {**grid.arrays, "levels": as_text(vars(grid.levels))}


def _from_state_dict(grid: Grid, state: Mapping[str, Any]) -> Grid:
    saved = dict(state)
    text = saved.pop("levels", None)
    path = flax.serialization.current_path()
    check_restored(path, vars(grid.levels), text, grid.arrays, saved)
    return dataclasses.replace(grid, **saved)


flax.serialization.register_serialization_state(Grid, _to_state_dict, _from_state_dict)


jax.export.register_pytree_node_serialization(
    Grid,
    serialized_name="optax_clipquant.Grid",
    serialize_auxdata=lambda layout: bytes(as_text(dict(zip(_STATIC, layout.static, strict=True)))),
    deserialize_auxdata=lambda text: Layout(tuple(vars(levels_of(json.loads(text))).values())),
)
