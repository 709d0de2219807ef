"""The static half of a grid: its levels in units of the scale. No JAX here."""

import dataclasses
import functools
import math
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

T = TypeVar("T", bound=type)
_BFLOAT16, _FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def accepting_code_book(cls: T) -> T:
    """Class decorator that accepts the field ``codebook`` under its old name, ``code_book``, too."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "code_book" in kwargs:
            kwargs["codebook"] = kwargs.pop("code_book")
        init(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


@accepting_code_book
@dataclasses.dataclass(frozen=True, eq=True, kw_only=True)
class Levels:
    """The levels of a grid in units of the scale, and how their codes are stored.

    Attributes:
      bits: bits per stored code; log2(3) for three levels.
      lower: the smallest code.
      upper: the largest code.
      offset: 0.5 for a mid-rise grid (no level at 0), else 0.
      group: ``(axis, size)`` where runs of ``size`` neighbours along ``axis`` share a scale; the
        axis is negative, so that ``jax.vmap`` does not shift it. The last run may be shorter.
      dtype: the dtype of the decoded array.
      codebook: None for evenly spaced levels; or the levels for a scale of 1 in rising order, one for each
        code from ``lower`` to ``upper``, all multiples of 2**-10 so that levels are exact in float32.
    """

    bits: float = 8
    lower: int = -128
    upper: int = 127
    offset: float = 0.0
    group: tuple[int, int] | None = None
    dtype: np.dtype = _FLOAT32
    codebook: tuple[float, ...] | None = None

    @property
    def code_book(self) -> tuple[float, ...] | None:
        """The old name of ``codebook``."""
        return self.codebook

    @property
    def levels(self) -> "Levels":
        """The static half alone, also of a ``Grid``."""
        return Levels(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Levels)}
        )

    def kind(self, zero_point: np.dtype | None) -> str:
        """The kind of grid in a word, given the dtype of its zero points if it has any."""
        if self.codebook is not None:
            return "codebook"
        if zero_point is not None:
            return "affine" if zero_point.kind == "i" else "z-score"
        return {1: "binary", 2: "ternary"}.get(self.upper - self.lower, "uniform")

    def packed_size(self, size: int) -> int:
        """Bytes of ``size`` packed codes: ``ceil(size * bits / 8)``; at log2(3) bits, five codes per byte."""
        return math.ceil(size / 5) if self.bits == math.log2(3) else math.ceil(size * self.bits / 8)


def largest_scale(largest: float, dtype: np.dtype) -> float:
    """The largest bfloat16 scale for which ``largest * scale`` does not overflow ``dtype``.

    It is below 2**126, from where on reciprocals are subnormal.
    """
    limit = min(float(ml_dtypes.finfo(t).max) for t in (dtype, _BFLOAT16)) / largest
    mantissa, exponent = math.frexp(limit)
    return min(math.ldexp(math.floor(mantissa * 256) / 256, exponent), 2.0**126 * (1 - 2.0**-8))
