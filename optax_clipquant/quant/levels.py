"""The static half of a grid: its levels in units of the scale. No JAX here."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
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

    def packed_size(self, size: int) -> int:
        """Bytes of ``size`` packed codes: ``ceil(size * bits / 8)``; at log2(3) bits, five codes per byte."""
        return math.ceil(size / 5) if self.bits == math.log2(3) else math.ceil(size * self.bits / 8)


def as_text(static: Mapping[str, Any]) -> np.ndarray:
    """``static`` as JSON in a byte array, which every kind of checkpoint can hold."""
    return np.frombuffer(json.dumps(static, default=str).encode(), np.uint8)


def levels_from_text(text: bytes) -> Levels:
    """The levels that ``as_text`` wrote."""
    found = json.loads(text)
    for name in ("group", "codebook"):
        found[name] = None if found[name] is None else tuple(found[name])
    return Levels(**{**found, "dtype": np.dtype(found["dtype"])})


def check_restored(
    path: str,
    here: Mapping[str, Any],
    text: Any,
    arrays: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> None:
    """Raises if a checkpoint does not match the tree it is restored into.

    Args:
      path: the place in the tree.
      here: the static half in the tree.
      text: the static half in the checkpoint, from ``as_text``; None in checkpoints before version 0.2.
      arrays: the arrays in the tree.
      saved: the arrays in the checkpoint.

    Raises:
      ValueError: the static halves or the shapes of the arrays differ; the message shows both.
    """

    # The tree may hold placeholders without shapes, such as shardings.
    names = [name for name, x in arrays.items() if x is None or hasattr(x, "shape")]

    def with_shapes(static: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        shapes = {name: None if arrays[name] is None else [*arrays[name].shape] for name in names}
        return {**static, **{f"shape of {name}": shape for name, shape in shapes.items()}}

    own = with_shapes(json.loads(bytes(as_text(here))), arrays)
    found = with_shapes({} if text is None else json.loads(bytes(np.asarray(text))), saved)
    # Older checkpoints lack the fields that were added since.
    if own | found != own:
        raise ValueError(
            f"{path.removeprefix('./')}: the checkpoint holds {_listed(found)}, and the tree to restore "
            f"into has {_listed(own)}; build that tree with the quantizer that the checkpoint was saved with"
        )


def _listed(fields: Mapping[str, Any]) -> str:
    return "(" + ", ".join(f"{name}={value}" for name, value in fields.items()) + ")"


def largest_scale(largest: float, dtype: np.dtype) -> float:
    """The largest bfloat16 scale for which ``largest * scale`` does not overflow ``dtype``.

    It is below 2**126, from where on reciprocals are subnormal.
    """
    limit = min(float(ml_dtypes.finfo(t).max) for t in (dtype, _BFLOAT16)) / largest
    mantissa, exponent = math.frexp(limit)
    return min(math.ldexp(math.floor(mantissa * 256) / 256, exponent), 2.0**126 * (1 - 2.0**-8))
