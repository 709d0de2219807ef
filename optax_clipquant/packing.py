"""Codes packed at exactly their bits.

Codes are made unsigned by subtracting the grid's least code, and lie in C order in a stream of bits:
with ``b`` bits, code ``i`` takes the bits ``b * i`` to ``b * (i + 1)``, where bit ``j`` of the stream
is bit ``j % 8``, counted from the least, of byte ``j // 8``. With three levels each byte holds five
codes, the first the least significant digit in base 3. Unused digits and bits are 0.
"""

import math
from collections.abc import Callable

import numpy as np

from optax_clipquant.grids import Grid
from optax_clipquant.qarray import packed_size


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """The packed bytes of ``codes``: see the head of this module."""
    digits = codes.ravel().view(np.uint8) - np.uint8(grid.lower % 256)  # modulo 256
    if grid.bits == 8:
        return digits
    if grid.bits == math.log2(3):
        fives = np.pad(digits, (0, -digits.size % 5)).reshape(-1, 5)
        return fives @ np.array([1, 3, 9, 27, 81], np.uint8)
    return _map_blocks(lambda part: _pack_bits(part, int(grid.bits)), digits, 8 * _BLOCK)


def unpack(packed: np.ndarray, size: int, grid: Grid) -> np.ndarray:
    """The int8 codes, flat, that ``pack`` packed. Raises ``ValueError`` where they cannot be."""
    if packed.size != packed_size(size, grid.bits):
        raise ValueError(f"{packed.size} bytes cannot hold {size} codes of {grid.bits} bits")
    if grid.bits == 8:
        digits = packed
    elif grid.bits == math.log2(3):
        digits = (packed[:, None] // np.array([1, 3, 9, 27, 81], np.uint8) % 3).ravel()[:size]
    else:
        bits = int(grid.bits)
        digits = _map_blocks(lambda part: _unpack_bits(part, bits), packed, bits * _BLOCK)[:size]
    if np.any(digits > grid.upper - grid.lower):
        raise ValueError(f"a code is above {grid.upper}")
    return (digits + np.uint8(grid.lower % 256)).view(np.int8)


# Bits are spread to a byte each, so blocks keep that small.
_BLOCK = 2**17


def _map_blocks(fn: Callable[[np.ndarray], np.ndarray], x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([fn(x[i : i + size]) for i in range(0, max(x.size, 1), size)])


def _pack_bits(digits: np.ndarray, bits: int) -> np.ndarray:
    if 8 % bits == 0:  # no code crosses a byte: several times as fast
        count = 8 // bits
        digits = np.pad(digits, (0, -digits.size % count))
        packed = digits[::count].copy()
        for i in range(1, count):
            packed |= digits[i::count] << np.uint8(bits * i)
        return packed
    spread = np.unpackbits(digits[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(spread, bitorder="little")


def _unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    if 8 % bits == 0:
        count = 8 // bits
        digits = np.empty((packed.size, count), np.uint8)
        for i in range(count):
            digits[:, i] = packed >> np.uint8(bits * i) & np.uint8(2**bits - 1)
        return digits.ravel()
    spread = np.unpackbits(packed, bitorder="little")
    spread = spread[: spread.size // bits * bits].reshape(-1, bits)
    return np.packbits(spread, axis=1, bitorder="little").ravel()
