"""Clamp gradients, train on a quantization grid, ship a small model."""

from optax_clipquant.collectives import AverageGradientsState, average_gradients, state_specs
from optax_clipquant.clipping import (
    ClipByQuantileState,
    ClipByValueState,
    ClipByZScoreState,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    clip_fractions,
)
from optax_clipquant.grids import Grid
from optax_clipquant.qarray import QArray, narrow
from optax_clipquant.quantizers import Binary, NormalFloat, Quantizer, Ternary, Uniform, ZScore
from optax_clipquant.params import dequantize_params, quantize_params
from optax_clipquant.softness import softness_schedule
from optax_clipquant.weights import (
    QuantizeWeightsState,
    RoundWeightsState,
    clipquant,
    quantize_weights,
    round_weights,
)
from optax_clipquant.export import export_params, latent_params
from optax_clipquant.companding import CompandedArray
from optax_clipquant.state import QuantizeStateState, quantize_state
from optax_clipquant.allocation import allocate_bits, squared_gradients
from optax_clipquant.sweeping import Sweep, sweep
from optax_clipquant.files import load, save
from optax_clipquant.interchange import to_qwix
from optax_clipquant.report import Summary, bits_per_param, summarize

__all__ = [
    "average_gradients",
    "state_specs",
    "AverageGradientsState",
    "clip_by_value",
    "clip_by_quantile",
    "clip_by_zscore",
    "clip_fractions",
    "ClipByValueState",
    "ClipByQuantileState",
    "ClipByZScoreState",
    "Grid",
    "QArray",
    "narrow",
    "Quantizer",
    "ZScore",
    "Uniform",
    "Binary",
    "Ternary",
    "NormalFloat",
    "quantize_params",
    "dequantize_params",
    "quantize_weights",
    "QuantizeWeightsState",
    "softness_schedule",
    "round_weights",
    "RoundWeightsState",
    "clipquant",
    "export_params",
    "latent_params",
    "CompandedArray",
    "quantize_state",
    "QuantizeStateState",
    "allocate_bits",
    "squared_gradients",
    "sweep",
    "Sweep",
    "save",
    "load",
    "to_qwix",
    "summarize",
    "bits_per_param",
    "Summary",
]
