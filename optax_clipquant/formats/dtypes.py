"""The dtypes of tensors in files, including those that NumPy lacks. No JAX here."""

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class Opaque(NamedTuple):
    """A dtype that NumPy lacks, whose bytes are carried unchanged.

    Attributes:
      name: the name in safetensors, such as ``F6_E2M3``.
      bits: bits per element.
    """

    name: str
    bits: int


DType = np.dtype | Opaque
Spec = tuple[DType, tuple[int, ...]]
"""Dtype and shape of a tensor."""

DTYPES: dict[str, np.dtype] = {
    tag: np.dtype(dtype)
    for tag, dtype in {
        **{"BOOL": np.bool_, "F16": np.float16, "F32": np.float32, "F64": np.float64},
        **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
        **{"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64},
        **{"BF16": ml_dtypes.bfloat16, "C64": np.complex64},
        **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
        **{"F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz},
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
_AXES = 64  # the most that NumPy supports
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # dtypes whose elements do not fill whole bytes


def bits_of(dtype: DType) -> int:
    """Bits per element of ``dtype``."""
    return dtype.bits if isinstance(dtype, Opaque) else 8 * dtype.itemsize


def nbytes(dtype: DType, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * bits_of(dtype) // 8


def check_shape(shape: tuple[int, ...]) -> None:
    """Raises ``ValueError`` if NumPy cannot represent this shape, even for an array of zero bytes."""
    if len(shape) > _AXES:
        raise ValueError(f"it has {len(shape):,} axes, and no more than {_AXES} can be read")
    if math.prod(n for n in shape if n) >= 2**59:
        raise ValueError(f"its shape {shape} is too large")


def spec_of(tag: Any, shape: Any, size: int) -> Spec:
    """Parses the dtype and shape that a header gives for a tensor of ``size`` bytes.

    Raises:
      ValueError: the dtype, shape and size are invalid or contradict each other.
    """
    if not (isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape)):
        raise ValueError("its shape is not a list of counts")
    if not (isinstance(tag, str) and tag):
        raise ValueError(f"its dtype is {tag!r}")
    check_shape(tuple(shape))
    count = math.prod(shape)
    dtype: DType | None = DTYPES.get(tag)
    if dtype is None:
        dtype = Opaque(tag, _BITS.get(tag, 8 * size // max(count, 1)))
    if count * bits_of(dtype) != 8 * size:
        raise ValueError(f"{tag} {shape} does not take {size} bytes")
    return dtype, tuple(shape)
