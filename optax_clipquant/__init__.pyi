"""The public names, in the order in which data flows."""

from .collectives import AverageGradientsState, average_gradients, state_specs
from .clipping import (
    ClipByQuantileState,
    ClipByValueState,
    ClipByZScoreState,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    clip_fractions,
)
from .grids import Grid
from .qarray import QArray, narrow
from .quantizers import Binary, NormalFloat, Quantizer, Ternary, Uniform, ZScore
from .params import dequantize_params, quantize_params
from .softness import softness_schedule
from .weights import (
    QuantizeWeightsState,
    RoundWeightsState,
    clipquant,
    quantize_weights,
    round_weights,
)
from .export import export_params, latent_params
from .companding import CompandedArray
from .state import QuantizeStateState, quantize_state
from .allocation import allocate_bits, squared_gradients
from .sweeping import Sweep, sweep
from .files import load, save
from .interchange import to_qwix
from .report import bits_per_param, summarize
from .rows import Summary

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
