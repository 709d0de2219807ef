"""``from_compressed_tensors`` reads a Hugging Face folder as a tree with exact quantized leaves."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_clipquant.formats.compressed_tensors.folder import read_config, shards_of
from optax_clipquant.formats.compressed_tensors.layout import (
    PARTS,
    Scheme,
    codes_of,
    symmetric_levels,
)
from optax_clipquant.formats.safetensors import Reader
from optax_clipquant.quant.grid import Grid
from optax_clipquant.quant.qarray import QArray


def from_compressed_tensors(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a Hugging Face folder whose layers are ``pack-quantized`` at 4 or 8 bits.

    Args:
      folder: the folder.

    Returns:
      A dict of the tensors by name, packed ones as exact ``QArray`` leaves ``[out, in]`` named
      ``...weight``; and the content of ``config.json``.

    Raises:
      OSError: a file cannot be opened.
      ValueError: the folder is not of this kind, or its tensors do not match its configuration. The
        message names the file or the tensor.

    Examples:
      >>> import json, pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> import safetensors.flax
      >>> from optax_clipquant import Uniform, dequantize_params, quantize_params, to_compressed_tensors
      >>> folder = tempfile.TemporaryDirectory()
      >>> like = pathlib.Path(folder.name, "like")
      >>> like.mkdir()
      >>> _ = (like / "config.json").write_text(json.dumps({"model_type": "llama"}))
      >>> weights = {"up_proj.weight": jnp.ones((64, 32)), "norm.weight": jnp.ones(32)}
      >>> safetensors.flax.save_file(weights, like / "model.safetensors")
      >>> rule = {"proj": Uniform(8, channel_axis=0, group_size=32)}
      >>> written = to_compressed_tensors(
      ...     folder.name + "/w8a16", quantize_params(weights, rule), like=like
      ... )
      >>> tree, config = from_compressed_tensors(folder.name + "/w8a16")
      >>> tree["up_proj.weight"].bits, tree["norm.weight"].dtype, config["model_type"]
      (8, dtype('float32'), 'llama')
      >>> params = dequantize_params(tree)  # to train on from there
      >>> folder.cleanup()
    """
    folder = os.fspath(folder)
    config = read_config(folder)
    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups")
    if quantization.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
        raise ValueError(f"{folder} is not quantized by compressed-tensors: see its config.json")
    tensors: dict[str, np.ndarray] = {}
    for path in shards_of(folder).values():
        with Reader(path) as reader:
            tensors |= {name: reader.read(name) for name in reader.specs}
    tree: dict[str, Any] = {}
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        parts = {part: tensors.pop(f"{module}.weight_{part}", None) for part in PARTS}
        where = f"{folder}: layer {module!r}"
        scheme = _scheme_of(module, quantization, where)
        try:
            tree[f"{module}.weight"] = _unpacked(parts, scheme)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: its tensors do not fit {scheme} ({error})") from error
    for name, array in tensors.items():
        module, _, last = name.rpartition(".")
        if last in ("weight_scale", "weight_g_idx"):
            raise ValueError(
                f"{folder}: layer {module!r} has {last}, and only pack-quantized layers in the order of "
                "their columns can be read"
            )
        tree[name] = jnp.asarray(array) if array.dtype.itemsize <= 4 else array
    return tree, config


def _scheme_of(module: str, quantization: Mapping[str, Any], where: str) -> Scheme:
    """The scheme that ``config.json`` gives for a layer."""

    def matches(target: str, exact: bool) -> bool:
        if target.startswith("re:"):
            return exact and re.match(target[3:], module) is not None
        return target == (module if exact else "Linear")

    groups = quantization["config_groups"].values()
    for exact in (True, False):
        for group in groups:
            if any(matches(target, exact) for target in group["targets"]):
                args = group["weights"] or {}
                style = group.get("format") or quantization.get("format")
                bits, strategy = args.get("num_bits"), args.get("strategy")
                integers = style == "pack-quantized" and args.get("type", "int") == "int"
                if integers and bits in (4, 8) and strategy in ("group", "channel"):
                    size = args.get("group_size") if strategy == "group" else None
                    return Scheme(bits, size, args.get("symmetric", True))
                raise ValueError(
                    f"{where} is {style} of {bits} bits by {strategy}, and only pack-quantized integers of 4 or "
                    "8 bits by group or channel can be read"
                )
    raise ValueError(f"{where} is packed, but in no group of config.json")


def _unpacked(parts: Mapping[str, Any], scheme: Scheme) -> QArray:
    """Decodes a layer's weight from its tensors."""
    outputs, length = (int(extent) for extent in parts["shape"])
    size = scheme.group or length
    groups = length // size
    words, scales = parts["packed"], parts["scale"]
    for what, found, wanted in (
        ("weight_packed", words.shape, (outputs, -(-length * scheme.bits // 32))),
        ("weight_scale", scales.shape, (outputs, groups)),
    ):
        if found != wanted or length % size:
            raise ValueError(f"{what} is {found}, not {wanted}")
    zeros = None
    if not scheme.symmetric:
        zeros = jnp.asarray(codes_of(parts["zero_point"].T, outputs, scheme.bits).T)
        if zeros.shape != (outputs, groups):
            raise ValueError(f"weight_zero_point is {zeros.shape}, not {(outputs, groups)}")
    levels = symmetric_levels(scheme.bits)
    grid = Grid(
        jnp.asarray(scales.astype(np.float32)),
        zeros,
        **{"bits": levels.bits, "lower": levels.lower, "upper": levels.upper},
        group=(-1, size) if groups > 1 else None,
        dtype=scales.dtype,
    )
    return QArray(jnp.asarray(codes_of(words, length, scheme.bits)), grid)
