"""Packing of codes at exactly their number of bits.

Codes are made unsigned by subtracting the grid's smallest code, and stored in C order in a stream of bits:
with ``b`` bits, code ``i`` takes bits ``b * i`` to ``b * (i + 1)``, where bit ``j`` of the stream is bit
``j % 8``, counted from the least significant, of byte ``j // 8``. With three levels each byte holds five
codes, the first as the least significant digit in base 3. Unused digits and bits are 0.
"""

import math
from collections.abc import Callable

import numpy as np

from optax_clipquant.quant.levels import Levels


def pack(codes: np.ndarray, grid: Levels) -> np.ndarray:
    """Packs ``codes`` into bytes; the module's docstring describes the layout."""
    digits = codes.ravel().view(np.uint8) - np.uint8(grid.lower % 256)  # modulo 256
    if grid.bits == 8:
        return digits
    if grid.bits == math.log2(3):
        fives = np.pad(digits, (0, -digits.size % 5)).reshape(-1, 5)
        return fives @ np.array([1, 3, 9, 27, 81], np.uint8)
    packed = _map_blocks(lambda part: _pack_bits(part, int(grid.bits)), digits, 8 * _BLOCK)
    return packed[: grid.packed_size(digits.size)]


def unpack(packed: np.ndarray, size: int, grid: Levels) -> np.ndarray:
    """Unpacks ``size`` flat int8 codes. Raises ``ValueError`` if the bytes are not what ``pack`` writes."""
    if packed.size != grid.packed_size(size):
        raise ValueError(f"{packed.size} bytes cannot hold {size} codes of {grid.bits} bits")
    if grid.bits == 8:
        digits = packed
    elif grid.bits == math.log2(3):
        if np.any(packed >= 3**5):
            raise ValueError("a byte of five digits is above 242")
        digits = (packed[:, None] // np.array([1, 3, 9, 27, 81], np.uint8) % 3).ravel()[:size]
    else:
        bits = int(grid.bits)
        digits = _map_blocks(lambda part: _unpack_bits(part, bits), packed, bits * _BLOCK)[:size]
    if np.any(digits > grid.upper - grid.lower):
        raise ValueError(f"a code is above {grid.upper}")
    return (digits + np.uint8(grid.lower % 256)).view(np.int8)


# Codes are packed in blocks whose intermediate arrays fit a cache.
_BLOCK = 2**16


def _map_blocks(fn: Callable[[np.ndarray], np.ndarray], x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([fn(x[i : i + size]) for i in range(0, max(x.size, 1), size)])


def _pack_bits(digits: np.ndarray, bits: int) -> np.ndarray:
    if 8 % bits == 0:  # twice as fast, as no code crosses a byte
        count = 8 // bits
        digits = np.pad(digits, (0, -digits.size % count))
        packed = digits[::count].copy()
        for i in range(1, count):
            packed |= digits[i::count] << np.uint8(bits * i)
        return packed
    words = np.pad(digits, (0, -digits.size % 8)).view("<u8")
    for shift, low, high in _halves(bits):
        words = words & low | (words & high) >> shift
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].ravel()


def _unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    if 8 % bits == 0:
        count = 8 // bits
        digits = np.empty((packed.size, count), np.uint8)
        for i in range(count):
            digits[:, i] = packed >> np.uint8(bits * i) & np.uint8(2**bits - 1)
        return digits.ravel()
    count = -(-packed.size // bits)
    spread = np.zeros((count, 8), np.uint8)
    spread[:, :bits] = np.pad(packed, (0, count * bits - packed.size)).reshape(count, bits)
    words = spread.ravel().view("<u8")
    for shift, low, high in reversed(_halves(bits)):
        words = words & low | words << shift & high
    return words.view(np.uint8)


def _halves(bits: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """The ``(shift, low, high)`` steps that compact eight one-byte codes in a 64-bit word, pairwise.

    The steps join pairs, then pairs of pairs, then the two halves. Each shifts the part under ``high`` right,
    next to the part under ``low``.
    """
    steps = []
    for width, room in ((bits, 8), (2 * bits, 16), (4 * bits, 32)):
        low = sum((2**width - 1) << at for at in range(0, 64, 2 * room))
        steps.append((np.uint64(room - width), np.uint64(low), np.uint64(low << room)))
    return steps
