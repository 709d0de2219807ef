"""Chooses ``c`` and ``R`` by a grid search that trains and validates in one compiled program.

The model is an MLP on scikit-learn's digits, trained by the article's method: gradients clamped to ``[-c,
c]``, weights on z-score grids with codes up to ``R``. A third of the images are for validation.

    python examples/sweep.py
    python examples/sweep.py --c 0.01 0.1 1 --R 1 2 4 --width 64 --steps 1000

An interrupted run resumes where it stopped, from a JSON file of results in --out.
"""

import argparse
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from optax_clipquant import Sweep, ZScore, clip_by_value, plots, quantize_weights, sweep

GRID = {"c": [0.001, 0.003, 0.01, 0.03, 0.1], "R": [1, 2, 3, 5, 7]}


class Task:
    """Training and validation of one point, as a whole or step by step."""

    def __init__(self, steps: int, batch: int, width: int) -> None:
        images, labels = load_digits(return_X_y=True)
        images = images.astype(np.float32) / 16
        parts = train_test_split(images, labels, test_size=1 / 3, stratify=labels, random_state=0)
        self.train_x, self.valid_x, self.train_y, self.valid_y = map(jnp.asarray, parts)
        rng = np.random.default_rng(0)
        self.batches = jnp.asarray(rng.integers(0, len(self.train_x), (steps, batch)))
        sizes, self.params = (64, width, width, 10), {}
        for i, (n, m) in enumerate(itertools.pairwise(sizes)):
            kernel = rng.standard_normal((n, m)) * np.sqrt(2 / n)
            self.params[f"layer{i}"] = {
                "kernel": jnp.asarray(kernel, jnp.float32),
                "bias": jnp.zeros(m),
            }

    def optimizer(self, c: Any, R: Any) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(2e-3, len(self.batches))
        last = quantize_weights(ZScore(R, resolution=2.0))
        return optax.chain(clip_by_value(c), optax.adam(schedule), last)

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        for layer in list(params.values())[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params["layer2"]["kernel"] + params["layer2"]["bias"]

    def loss(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = self.logits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(self, tx: optax.GradientTransformation, carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(self.loss)(params, self.train_x[batch], self.train_y[batch])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def validate(self, params: Any) -> dict[str, jax.Array]:
        right = jnp.argmax(self.logits(params, self.valid_x), -1) == self.valid_y
        return {
            "accuracy": jnp.mean(right),
            "loss": self.loss(params, self.valid_x, self.valid_y),
        }

    def evaluate(self, c: Any, R: Any) -> dict[str, jax.Array]:
        tx = self.optimizer(c, R)
        carry = self.params, tx.init(self.params)
        (params, _), _ = jax.lax.scan(
            lambda carry, batch: (self.step(tx, carry, batch), None), carry, self.batches
        )
        return self.validate(params)


def plot(path: pathlib.Path, found: Sweep) -> None:
    figure, (left, right) = plots.subplots(2, width=5.6)
    plots.heat_map(left, found.rows, "c", "R", "loss", mode="min")
    left.set_title("Validation loss (nats); framed: the least")
    series: dict[str, list[tuple[float, float]]] = {}
    for row in found.rows:
        if not row["failed"]:
            bits = float(np.log2(2 * row["R"] + 1))
            series.setdefault(f"c = {row['c']}", []).append((bits, 100 * row["accuracy"]))
    plots.against_bits(right, series, ylabel="validation accuracy (%)")
    right.set_xlabel("bits per weight, log2(2 R + 1)")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--c", type=float, nargs="+", default=GRID["c"])
    parser.add_argument("--R", type=int, nargs="+", default=GRID["R"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="units of both hidden layers")
    parser.add_argument("--batch-size", type=int, help="points that run together (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/sweep"))
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if min(args.c) <= 0 or not 1 <= min(args.R) <= max(args.R) <= 127:
        parser.error("--c must be positive and --R from 1 to 127")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    task = Task(args.steps, args.batch, args.width)
    found = sweep(
        task.evaluate,
        {"c": sorted(set(args.c)), "R": sorted(set(args.R))},
        batch_size=args.batch_size,
        path=args.out / f"sweep-{args.steps}-{args.batch}-{args.width}.json",
    )
    console = rich.console.Console()
    console.print(found)
    best = found.best("loss", mode="min")
    console.print(
        f"Least validation loss: {best['loss']:.4f} (accuracy {best['accuracy']:.4f}) at c = {best['c']}, "
        f"R = {best['R']}."
    )
    front = {row["R"]: row["accuracy"] for row in found.pareto("R", "accuracy")}
    console.print(
        "Best accuracy with fewest levels: "
        + ", ".join(f"{accuracy:.4f} with R = {R}" for R, accuracy in front.items())
    )
    plot(args.out / "sweep.png", found)
    console.print(f"Results and plot: {args.out}")


if __name__ == "__main__":
    main()
