"""Clamp gradients, train on a quantization grid, ship a small model."""

from optax_clipquant.clipping import ClipByValueState, clip_by_value, clip_fractions
from optax_clipquant.files import load, save
from optax_clipquant.grids import Grid
from optax_clipquant.params import dequantize_params, quantize_params
from optax_clipquant.qarray import QArray, narrow
from optax_clipquant.quantizers import Binary, Quantizer, Ternary, Uniform, ZScore
from optax_clipquant.report import Summary, summarize
from optax_clipquant.weights import (
    QuantizeWeightsState,
    RoundWeightsState,
    clipquant,
    export_params,
    latent_params,
    quantize_weights,
    round_weights,
)

__all__ = [
    "Binary",
    "ClipByValueState",
    "Grid",
    "QArray",
    "QuantizeWeightsState",
    "Quantizer",
    "RoundWeightsState",
    "Summary",
    "Ternary",
    "Uniform",
    "ZScore",
    "clip_by_value",
    "clip_fractions",
    "clipquant",
    "dequantize_params",
    "export_params",
    "latent_params",
    "load",
    "narrow",
    "quantize_params",
    "quantize_weights",
    "round_weights",
    "save",
    "summarize",
]
