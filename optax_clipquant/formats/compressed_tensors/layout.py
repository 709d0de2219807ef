"""The compressed-tensors format of quantized Hugging Face models, which vLLM and transformers load.

In such a folder, a linear layer has, instead of its ``weight`` ``[out, in]``,

* ``weight_packed``: int32 ``[out, ceil(in * bits / 32)]``. A code ``k`` is stored unsigned as ``k +
  2**(bits - 1)``; the codes of a row start at the lowest bit of its first word.
* ``weight_scale``: ``[out, in / group]``, or ``[out, 1]`` for channels. Readers decode in its dtype, so it
  has the dtype of the leaf.
* ``weight_shape``: int64 ``[2]``.
* ``weight_zero_point``, for affine grids: int32 ``[ceil(out * bits / 32), in / group]``, packed along the
  first axis.

A weight is ``(k - zero point) * scale``. The entry ``quantization_config`` of ``config.json`` gives the bits
of each layer.

References:
  https://github.com/vllm-project/compressed-tensors (``compressors/pack_quantized``).
"""

from typing import Any, NamedTuple

import numpy as np

from optax_clipquant.formats.packing import pack, unpack
from optax_clipquant.quant.levels import Levels

PARTS = ("packed", "scale", "shape", "zero_point")


class Scheme(NamedTuple):
    """How a layer's weight is quantized, in the terms of ``config.json``."""

    bits: int
    group: int | None
    symmetric: bool

    def args(self) -> dict[str, Any]:
        """The fields of compressed-tensors' ``QuantizationArgs``."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            **({"group_size": self.group} if self.group else {}),
            "dynamic": False,
        }


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs ``int8[rows, n]`` codes into ``int32[rows, ceil(n * bits / 32)]``."""
    levels = symmetric_levels(bits)
    padding = -codes.shape[1] % (32 // bits)
    padded = np.pad(codes, ((0, 0), (0, padding)), constant_values=levels.lower)
    words = pack(np.ascontiguousarray(padded), levels).view("<i4").astype(np.int32, copy=False)
    return words.reshape(codes.shape[0], -1)


def codes_of(words: np.ndarray, length: int, bits: int) -> np.ndarray:
    """Unpacks the codes that ``words_of`` packed."""
    content = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8).ravel()
    width = words.shape[1] * 32 // bits
    codes = unpack(content, words.shape[0] * width, symmetric_levels(bits))
    return codes.reshape(words.shape[0], width)[:, :length]


def symmetric_levels(bits: int) -> Levels:
    return Levels(bits=bits, lower=-(2 ** (bits - 1)), upper=2 ** (bits - 1) - 1)
