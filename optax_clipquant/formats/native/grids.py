"""Grids as lists in a file's header, ``[bits, lower, upper, offset, group, dtype, book]``."""

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np

from optax_clipquant.quant.levels import Levels

_FLOATS = (
    np.float16,
    np.float32,
    np.float64,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
)
_DECODED = {dtype.name: dtype for dtype in map(np.dtype, _FLOATS)}


def checked_levels(grid: Any) -> Levels:
    """Parses an item of the header's ``grids``.

    Raises:
      ValueError: the item is not valid.
    """
    if not (isinstance(grid, list) and len(grid) == 7):
        raise ValueError(f"it is {short(grid)}, not seven items")
    bits, lower, upper, offset, group, dtype, book = grid
    if not (_is_number(bits) and bits in range(9)):
        raise ValueError(f"its bits are {short(bits)}, not 1 to 8, or 0")
    if not (is_count(lower, upper) and -128 <= lower <= upper <= 127):
        raise ValueError(f"its codes lie from {short(lower)} to {short(upper)}")
    if not (_is_number(offset) and offset in (0, 0.5)):
        raise ValueError(f"its offset is {short(offset)}, neither 0 nor 0.5")
    if not (isinstance(dtype, str) and dtype in _DECODED):
        raise ValueError(f"its dtype is {short(dtype)}, not one of {', '.join(_DECODED)}")
    levels = _book_of(book, upper - lower + 1)
    if levels and offset:
        raise ValueError("it has a codebook and an offset")
    return Levels(
        bits=int(bits) or math.log2(3),
        lower=lower,
        upper=upper,
        offset=float(offset),
        group=_group_of(group),
        dtype=_DECODED[dtype],
        codebook=levels,
    )


def listed(levels: Levels) -> list[Any]:
    """The list for ``levels`` in the JSON."""
    bits = 0 if levels.bits == math.log2(3) else int(levels.bits)
    group, book = list(levels.group or ()), list(levels.codebook or ())
    return [
        *(bits, levels.lower, levels.upper, levels.offset),
        *(group or 0, levels.dtype.name, book or 0),
    ]


def _group_of(item: Any) -> tuple[int, int] | None:
    if type(item) is int and item == 0:
        return None
    if isinstance(item, list) and len(item) == 2 and is_count(*item):
        axis, size = item
        if axis < 0 < size < 2**63:
            return axis, size
    raise ValueError(f"its group is {short(item)}, neither an axis below 0 and a size, nor 0")


def _book_of(item: Any, count: int) -> tuple[float, ...] | None:
    """Parses a codebook for ``count`` codes."""
    if type(item) is int and item == 0:
        return None
    if not (isinstance(item, list) and len(item) == count):
        raise ValueError(f"its codebook is {short(item)}, not one level for each of {count} codes")
    # Sums of multiples of 2**-10 below 2**13 are exact in float32, which decoding relies on.
    if not all(_is_number(x) and abs(x) < 2**13 and x * 2**10 == int(x * 2**10) for x in item):
        raise ValueError("its codebook has levels that are not multiples of 2**-10 below 2**13")
    if any(a >= b for a, b in itertools.pairwise(item)):
        raise ValueError("the levels of its codebook do not rise")
    return tuple(map(float, item))


def is_count(*values: Any) -> bool:
    return all(type(x) is int for x in values)  # excludes bools


def _is_number(x: Any) -> bool:
    return type(x) is int or (type(x) is float and math.isfinite(x))


def short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 60 else f"{text[:57]}..."
