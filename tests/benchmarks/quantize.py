"""The time of each quantizer on a 170 MB tree, as a ratio to a NumPy copy of it, and of qwix.

All candidates run in one process and take turns, so that other load on the machine affects all equally.
The shortest time counts. Freed memory is kept: glibc would return it to the system or not by the sizes that a
candidate happens to allocate, and fresh memory is mostly page faults (3 bits with zero points, in training: 67 ms
instead of 36).

    python tests/benchmarks/quantize.py
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
import rich.console
import rich.progress
import rich.table
from figures import note, verdict
from train_step import take_turns

from optax_clipquant import (
    Binary,
    Grid,
    NormalFloat,
    Quantizer,
    Ternary,
    Uniform,
    ZScore,
    quantize_params,
)

KEPT = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "10000000000"}
SHAPES = [(1024, 4096), (4096, 1024), (1024, 1024)] * 4 + [(4992, 1024)]

# For the layout of PyTorch's linear layers, whose rows are channels.
ROWS = Uniform(bits=3, channel_axis=0, group_size=32)

# Name, quantizer, target ratio to the copy, and whether it starts from the scale of the previous step.
OURS: list[tuple[str, Quantizer, float | None, bool]] = [
    ("8 bits, channel", Uniform(bits=8), 1.5, False),
    ("8 bits, channel, zero point", Uniform(bits=8, symmetric=False), 1.5, False),
    ("4 bits, channel", Uniform(bits=4), 1.5, False),
    ("4 bits, groups of 32", Uniform(bits=4, group_size=32), 1.5, False),
    ("3 bits, absmax, channel", Uniform(bits=3, scale_rule="absmax"), 1.5, False),
    ("1 bit, channel", Binary(), 1.5, False),
    ("1 bit, groups of 32", Binary(group_size=32), 1.5, False),
    ("normal float, groups of 64", NormalFloat(), 1.5, False),
    ("z-score, tensor", ZScore(), None, False),
    ("3 bits, mse, channel", Uniform(bits=3), 6, False),
    ("3 bits, mse, groups of 32", Uniform(bits=3, group_size=32), 6, False),
    ("2 bits, mse, channel", Uniform(bits=2), 6, False),
    ("4 bits, mse, groups of 32", Uniform(bits=4, group_size=32, scale_rule="mse"), 6, False),
    ("ternary, channel", Ternary(), 6, False),
    ("ternary, groups of 32", Ternary(group_size=32), 6, False),
    ("3 bits, mse, groups of 32, last axis", ROWS, 6, False),
    ("3 bits, mse, channel, in training", Uniform(bits=3), 1.5, True),
    ("3 bits, mse, groups of 32, in training", Uniform(bits=3, group_size=32), 1.5, True),
    ("3 bits, mse, zero point, in training", Uniform(bits=3, symmetric=False), 1.5, True),
    ("2 bits, mse, channel, in training", Uniform(bits=2), 1.5, True),
    ("ternary, channel, in training", Ternary(), 1.5, True),
    ("ternary, groups of 32, in training", Ternary(group_size=32), 1.5, True),
]
# Searched with and without an importance of the inputs; the first may take at most 4 times as long.
WEIGHTED = {
    "3 bits, mse, groups of 32": Uniform(bits=3, group_size=32),
    "4 bits, mse, groups of 32": Uniform(bits=4, group_size=32, scale_rule="mse"),
    "ternary, groups of 32": Ternary(group_size=32),
}
QWIX = [
    ("qwix 8 bits, channel", jnp.int8, None),
    ("qwix 4 bits, channel", jnp.int4, None),
    ("qwix 4 bits, groups of 32", jnp.int4, 32),
]


def ours(quantizer: Quantizer, warm: bool, tree: dict[str, jax.Array]) -> Callable[[], Any]:
    if not warm:
        fn = jax.jit(lambda tree: quantize_params(tree, quantizer))
        return lambda: fn(tree)

    @jax.jit
    def step(tree: dict[str, jax.Array], grids: dict[str, Grid]) -> Any:
        grids = {name: quantizer.fit(w, start=grids[name]) for name, w in tree.items()}
        return {name: (grids[name].encode(w), grids[name]) for name, w in tree.items()}

    grids = {name: quantizer.fit(w) for name, w in tree.items()}
    return lambda: step(tree, grids)


def by_importance(quantizer: Quantizer, tree: dict[str, jax.Array]) -> Callable[[], Any]:
    importance = {name: jnp.linspace(0.01, 1, len(w))[:, None] for name, w in tree.items()}
    fn = jax.jit(lambda tree, importance: quantize_params(tree, quantizer, importance=importance))
    return lambda: fn(tree, importance)


def theirs(qtype: Any, group: int | None, tree: dict[str, jax.Array]) -> Callable[[], Any]:
    tiled = {} if group is None else {0: group}
    fn = jax.jit(
        lambda tree: {
            name: qwix.quantize(w, qtype, channelwise_axes=(1,), tiled_axes=tiled)
            for name, w in tree.items()
        }
    )
    return lambda: fn(tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if not KEPT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.standard_normal(s, np.float32) for i, s in enumerate(SHAPES)}
    tree = {name: jnp.asarray(w) for name, w in arrays.items()}
    nbytes = sum(w.nbytes for w in arrays.values())

    held = {name: np.zeros_like(w) for name, w in arrays.items()}
    candidates: dict[str, Callable[[], Any]] = {
        "numpy copy": lambda: [np.copyto(held[name], w) for name, w in arrays.items()],
    }
    targets = {}
    for name, quantizer, target, warm in OURS:
        candidates[name] = ours(quantizer, warm, tree)
        targets[name] = target
    for name, quantizer in WEIGHTED.items():
        candidates[f"{name}, by importance"] = by_importance(quantizer, tree)
    for name, qtype, group in QWIX:
        candidates[name] = theirs(qtype, group, tree)
    turns = rich.progress.track(range(args.repeats + 1), "turns")
    times = take_turns(candidates, turns, calls=1)

    copy = min(times["numpy copy"])
    table = rich.table.Table(
        title=f"{nbytes / 1e6:.0f} MB of float32, {os.cpu_count()} cores, jax {jax.__version__}"
    )
    for column in ("scheme", "ms", "copies", "target", ""):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for name, values in times.items():
        ratio = min(values) / copy
        target = targets.get(name)
        note("quantizing, to a copy", name, ratio, target)
        table.add_row(
            name,
            f"{1e3 * min(values):.1f}",
            f"{ratio:.2f}",
            f"{target or ''}",
            verdict(ratio, target),
        )
    console = rich.console.Console()
    console.print(table)
    for name in WEIGHTED:
        ratio = min(times[f"{name}, by importance"]) / min(times[name])
        note("weighted search, to least squares", name, ratio, 4)
        console.print(f"{name}: by importance {ratio:.2f} times least squares {verdict(ratio, 4)}")


if __name__ == "__main__":
    main()
