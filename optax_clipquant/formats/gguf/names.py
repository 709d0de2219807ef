"""Translates Hugging Face's names of tensors in llama-family models to GGUF's.

GGUF's ``llama`` architecture rotates neighbouring pairs of a head's rows, and Hugging Face's rotates pairs
half a head apart, so the rows of queries and keys are reordered.

References:
  https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py,
  https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (``LlamaModel.permute``).
"""

import re

import numpy as np

from optax_clipquant.formats.gguf.container import GGUFFile
from optax_clipquant.formats.leaves import dotted

# In GGUF, Mistral is a llama.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")

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
}


def gguf_name(path: str, like: GGUFFile) -> tuple[str, bool]:
    """The name of a leaf in ``like``, and whether it was translated from Hugging Face's.

    A path without a layer's number belongs to a stacked leaf, whose name has ``{}`` in its place.
    """
    name = dotted(path).removeprefix("params.")
    if path in like.tensors or name in like.tensors:
        return (path if path in like.tensors else name), False
    module, _, kind = name.rpartition(".")
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
            f"leaf {path!r}: {like.path} is a {architecture!r}, and names are built in for "
            f"{', '.join(_ARCHITECTURES)} alone; give `names`"
        )
    return f"{found}.{kind}", True


def row_order(name: str, rows: int, like: GGUFFile) -> np.ndarray | None:
    """For each row of a tensor, the index of Hugging Face's row; None if the order is the same."""
    if like.metadata.get("general.architecture") != "llama":
        return None
    for part, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
        if f".{part}." in name:
            heads = like.metadata.get(f"llama.attention.{key}")
            heads = heads or like.metadata.get("llama.attention.head_count", 0)
            if isinstance(heads, list):
                heads = heads[int(name.split(".")[1])]
            if not heads or rows % (2 * heads):
                raise ValueError(
                    f"{like.path}: {rows} rows of {name!r} cannot be those of {heads} heads (its "
                    f"metadata, llama.attention.{key})"
                )
            return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return None
