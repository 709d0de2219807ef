"""GGUF's blocks of weights: a float16 scale ``d``, and codes whose levels are ``d * code``.

| type | codes | a block | bytes of a block, in order |
|---|---|---|---|
| Q4_0 | -8..7 | 32 | ``d``; 16 bytes: code ``i`` + 8 low, code ``i + 16`` + 8 high |
| Q5_0 | -16..15 | 32 | ``d``; the codes' fifth bits as a uint32, code 0 lowest; their low bits as Q4_0 |
| Q8_0 | -128..127 | 32 | ``d``; the codes |
| TQ2_0 | -1..1 | 256 | 64 bytes, 32 for each half of the block: code ``i + 32 j`` + 1 in bits ``2 j`` of byte ``i``; ``d`` |

Blocks run along a row, the contracted axis. ``d`` may be negative or subnormal. float16 holds every scale
of 8 significant bits with ``2**-17 <= abs(scale) <= 65280`` exactly, and its product with a code is exact
in float32, so that readers decode exactly the levels of a grid.

References:
  https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h (layouts),
  https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c (``dequantize_row_*``).
"""

from typing import NamedTuple

import numpy as np


class Blocks(NamedTuple):
    """A type of block.

    Attributes:
      size: the number of codes in a block.
      lower: the smallest code.
      upper: the largest code.
      bits: the bits of a grid with all of its codes, as a quantizer makes it.
    """

    size: int
    lower: int
    upper: int


# From small to large, since the first that can hold a grid is chosen.
BLOCKS = {
    "TQ2_0": Blocks(256, -1, 1),
    "Q4_0": Blocks(32, -8, 7),
    "Q5_0": Blocks(32, -16, 15),
    "Q8_0": Blocks(32, -128, 127),
}


def encode(kind: str, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Encodes blocks to bytes, ``uint8[n, bytes per block]``.

    Args:
      kind: the type of the blocks.
      codes: ``int8[n, size]`` in the type's range.
      scales: ``float16[n]``.
    """
    d = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    if kind == "Q8_0":
        return np.concatenate([d, codes.view(np.uint8)], 1)
    digits = (codes - np.int8(BLOCKS[kind].lower)).view(np.uint8)
    if kind == "TQ2_0":
        digits = digits.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
        return np.concatenate([np.bitwise_or.reduce(digits, 2).reshape(-1, 64), d], 1)
    low = digits & np.uint8(15)
    low = low[:, :16] | low[:, 16:] << np.uint8(4)
    if kind == "Q4_0":
        return np.concatenate([d, low], 1)
    return np.concatenate([d, np.packbits(digits >> np.uint8(4), 1, "little"), low], 1)


def decode(kind: str, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decodes blocks to codes and scales; the inverse of ``encode``."""
    if kind == "TQ2_0":
        packed, d = np.split(content, [64], 1)
        digits = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
        digits = (digits & np.uint8(3)).reshape(-1, 256)
    else:
        d, packed = np.split(content, [2], 1)
        if kind == "Q8_0":
            digits = packed.copy()
        else:
            high, low = np.split(packed, [4 if kind == "Q5_0" else 0], 1)
            digits = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], 1)
            if kind == "Q5_0":
                digits |= np.unpackbits(high, 1, bitorder="little") << np.uint8(4)
    scales = np.ascontiguousarray(d).view("<f2")[:, 0].astype(np.float16, copy=False)
    codes = digits.view(np.int8)
    return (codes if kind == "Q8_0" else codes + np.int8(BLOCKS[kind].lower)), scales
