"""The public names, in the order in which data flows."""

from .gradients.average import AverageGradientsState, average_gradients, state_specs
from .gradients.clip import ClipByValueState, clip_by_value, clip_fractions
from .gradients.quantile import ClipByQuantileState, clip_by_quantile
from .gradients.zscore import ClipByZScoreState, clip_by_zscore
from .quant.grid import Grid
from .quant.qarray import QArray
from .quant.devices import narrow, shardings_for
from .quant.quantizers.base import ChannelwiseQuantizer, Quantizer
from .quant.quantizers.ternary import Ternary
from .quant.quantizers.uniform import Binary, Uniform
from .quant.quantizers.normal_float import NormalFloat
from .quant.quantizers.zscore import ZScore
from .quant.uses import Calibration, Use, Uses
from .quant.params import dequantize_params, quantize_params
from .training.softness import softness_schedule
from .training.weights import QuantizeWeightsState, clipquant, quantize_weights
from .training.rounding import RoundWeightsState, round_weights
from .training.export import export_params, latent_params
from .quant.companding import CompandedArray
from .training.state import QuantizeStateState, quantize_state
from .analysis.trace import trace_weights
from .analysis.sensitivity import squared_gradients
from .analysis.calibrate import (
    CalibratedLeaf,
    CalibrationReport,
    calibrate,
    quantize_calibrated,
)
from .tuning.allocate import allocate_bits
from .tuning.sweep import Sweep, sweep
from .formats.native.trees import load, save
from .formats.qwix import to_qwix
from .formats.gguf.read import from_gguf
from .formats.gguf.write import to_gguf
from .formats.compressed_tensors.read import from_compressed_tensors
from .formats.compressed_tensors.write import to_compressed_tensors
from .report.summarize import bits_per_param, summarize
from .report.rows import Summary

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
    "shardings_for",
    "Quantizer",
    "ChannelwiseQuantizer",
    "ZScore",
    "Uniform",
    "Binary",
    "Ternary",
    "NormalFloat",
    "Use",
    "Uses",
    "Calibration",
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
    "trace_weights",
    "allocate_bits",
    "squared_gradients",
    "calibrate",
    "quantize_calibrated",
    "CalibrationReport",
    "CalibratedLeaf",
    "sweep",
    "Sweep",
    "save",
    "load",
    "to_qwix",
    "to_gguf",
    "from_gguf",
    "to_compressed_tensors",
    "from_compressed_tensors",
    "summarize",
    "bits_per_param",
    "Summary",
]
