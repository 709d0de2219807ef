"""Translates Hugging Face's names of tensors in llama-family models to GGUF's.

GGUF's ``llama`` architecture rotates neighbouring pairs of a head's rows, and Hugging Face's rotates pairs
half a head apart, so the rows of queries and keys are reordered.

References:
  https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py,
  https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (``LlamaModel.permute``).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_clipquant.formats.gguf.blocks import BLOCKS, decode
from optax_clipquant.formats.gguf.container import PLAIN, SIZES, GGUFFile
from optax_clipquant.formats.leaves import Leaf, dotted
from optax_clipquant.formats.rows import Rows

# In GGUF, Mistral and Mixtral are llamas.
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe")

_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    # Experts: leaves [experts, in, out], and the router.
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
}


def gguf_name(path: str, like: GGUFFile) -> tuple[str, bool]:
    """The name of a leaf in ``like``, and whether it was translated from Hugging Face's.

    A path without a layer's number belongs to a stacked leaf, whose name has ``{}`` in its place.
    """
    name = dotted(path).removeprefix("params.")
    if path in like.tensors or name in like.tensors:
        return (path if path in like.tensors else name), False
    module, _, kind = name.rpartition(".")
    if ".experts." in module + "." and kind not in ("weight", "bias"):
        module, kind = name, "weight"  # stacked experts are usually leaves rather than modules
    found = None
    if module in _MODEL:
        found = _MODEL[module]
    elif match := re.fullmatch(r"model\.layers\.(?:(\d+)\.)?(.+)", module):
        layer, part = match[1] or "{}", match[2]
        found = f"blk.{layer}.{_LAYER[part]}" if part in _LAYER else None
    if found is None or kind not in ("weight", "bias"):
        return path, False
    architecture = like.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"leaf {path!r}: {like.path} is a {architecture!r}, and names are only built in for "
            f"{', '.join(_ARCHITECTURES)}; give `names`"
        )
    return f"{found}.{kind}", True


def row_order(name: str, rows: int, metadata: Mapping[str, Any]) -> np.ndarray | None:
    """For each row of a tensor, the index of Hugging Face's row; None if the order is the same."""
    if metadata.get("general.architecture") != "llama":
        return None
    for part, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
        if f".{part}." in name:
            heads = metadata.get(f"llama.attention.{key}")
            heads = heads or metadata.get("llama.attention.head_count", 0)
            if isinstance(heads, list):
                heads = heads[int(name.split(".")[1])]
            if not heads or rows % (2 * heads):
                raise ValueError(
                    f"{rows} rows of {name!r} cannot be those of {heads} heads (the metadata of GGUF, "
                    f"llama.attention.{key})"
                )
            return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return None


def as_hugging_face(leaves: Mapping[str, Leaf], metadata: Mapping[str, Any]) -> dict[str, Leaf]:
    """Renames the leaves of a GGUF file to Hugging Face's names, and puts rows in its order.

    Leaves without a name there keep theirs, and so do all of an architecture that is not built in.

    Args:
      leaves: the leaves by GGUF's names.
      metadata: the metadata of the file.
    """
    if metadata.get("general.architecture") not in _ARCHITECTURES:
        return dict(leaves)
    modules = {theirs: name for name, theirs in reversed((_MODEL | _LAYER).items())}
    found: dict[str, Leaf] = {}
    for path, leaf in leaves.items():
        name, order = path, None
        if match := re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", path):
            layer, module, kind = match[1], modules.get(match[2]), match[3]
            if module is not None and len(leaf.shape) in (
                1,
                2,
            ):  # Hugging Face stores experts separately
                name = (
                    f"{module}.{kind}" if layer is None else f"model.layers.{layer}.{module}.{kind}"
                )
                order = row_order(path, leaf.shape[0], metadata)
        found[name] = leaf if order is None else _reordered(leaf, np.argsort(order))
    return found


def _reordered(leaf: Leaf, order: np.ndarray) -> Leaf:
    """``leaf`` with its rows, and their scales, reordered."""
    grid = leaf.grid
    if grid is not None:
        grid = dataclasses.replace(grid, scale=grid.scale[order])
    return dataclasses.replace(leaf, grid=grid, read=lambda: leaf.read()[order])


def check_order(rows: Rows, order: np.ndarray, name: str, like: GGUFFile) -> None:
    """Checks that queries or keys are in the order of ``like``, by comparing their values.

    Args:
      rows: the leaf's rows as they will be written, in ``order`` or in the leaf's.
      order: the order in GGUF of rows that are in Hugging Face's.
      name: the tensor.
      like: the file.

    Raises:
      ValueError: the values of ``like`` are known, and much closer to ``rows`` in the other order.
    """
    # The first layer decides for a whole stack, since decoding every layer would take long.
    theirs = _values(like, name) if rows.layer in (None, 0) else None
    if theirs is None:
        return
    ours = dataclasses.replace(rows, order=None).values().astype(np.float32)
    kept, moved = (np.mean(np.square(x - theirs)) for x in (ours, ours[order]))
    if rows.order is not None and kept < moved / 2:
        raise ValueError(
            f"leaf {rows.leaf.path!r}: the rows of {name!r} in {like.path} are in Hugging Face's order of "
            "queries and keys, not in that of a llama in GGUF; convert `like` again, or give `names`, which "
            "leaves rows in their order"
        )
    if rows.order is None and moved < kept / 2:
        raise ValueError(
            f"leaf {rows.leaf.path!r}: its rows are in Hugging Face's order of queries and keys, those of "
            f"{name!r} in {like.path} in that of a llama in GGUF, and given names leave rows in their order; "
            "give the path Hugging Face's name and leave it out of `names`, or reorder each head's rows "
            "before quantizing, by reshape(heads, 2, -1, inputs).swapaxes(1, 2)"
        )


def _values(like: GGUFFile, name: str) -> np.ndarray | None:
    """The values of a tensor, unless decoding them needs the package gguf."""
    kind, shape = like.tensors[name]
    if kind in PLAIN:
        return like.read(name).view(PLAIN[kind]).reshape(shape).astype(np.float32)
    if kind not in BLOCKS:
        return None
    codes, scales = decode(kind, like.read(name).reshape(-1, SIZES[kind][1]))
    return (codes * scales.astype(np.float32)[:, None]).reshape(shape)
