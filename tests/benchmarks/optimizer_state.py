"""Adam with its state in 8 and 4 bits: bytes, step time, and how closely it follows float Adam.

Closeness is measured as in bitsandbytes' own test: 50 steps on normal gradients of size .01, params of
size .1, learning rate 1e-3; the error of the params after each step from common params, and after 50
independent steps. The same is done with gradients whose rows or columns span 4 decades, and with those of an
embedding, few of whose rows have a gradient in a step (Zipf's law). With --torch-python, bitsandbytes and
torchao do the same.

    python tests/benchmarks/optimizer_state.py
    python -m venv torchenv && torchenv/bin/pip install torch torchao bitsandbytes
    python tests/benchmarks/optimizer_state.py --torch-python torchenv/bin/python
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
from figures import note
from train_step import Net, stepper, take_turns

from optax_clipquant import Uniform, clip_by_quantile, quantize_state, quantize_weights

WIDTHS = (2048, 2048, 2048)
BATCHES = {256: 4, 1024: 2, 4096: 1}  # and the steps in one timing
SHAPE, STEPS, SEEDS = (1024, 1024), 50, 3
RATE = 1e-3
OPTIMIZERS = {
    "float": optax.adam(RATE),
    "8 bits": quantize_state(optax.adam(RATE)),
    "4 bits": quantize_state(optax.adam(RATE), bits=4, block_size=128),
}
# The largest error of the params after 50 steps.
PARITY = {"8 bits": 1.5e-4, "4 bits": 2e-3}
ALL_THREE = optax.chain(
    clip_by_quantile(),
    quantize_state(optax.adamw(RATE)),
    quantize_weights(Uniform(bits=4), residual_bits=8),
)


def gradient_of(kind: str, key: jax.Array, step: jax.Array) -> jax.Array:
    """Normal gradients of size up to .01. The magnitudes of rows and columns stay the same over the steps."""
    rows, columns = SHAPE
    g = 0.01 * jax.random.normal(jax.random.fold_in(key, step), SHAPE)
    if kind == "rows":
        return g * 10 ** -jax.random.uniform(key, (rows, 1), maxval=4)
    if kind == "columns":
        return g * 10 ** -jax.random.uniform(key, (1, columns), maxval=4)
    if kind == "Zipf rows":
        rank = jax.random.permutation(key, rows)
        tokens = jax.random.categorical(
            jax.random.fold_in(key, step), -jnp.log1p(jnp.arange(rows)), shape=(256,)
        )
        return g * jnp.any(rank[:, None] == tokens[None], axis=1, keepdims=True)
    return g


KINDS = ("normal", "rows", "columns", "Zipf rows")


def nearness(
    tx: optax.GradientTransformation, seed: int, together: bool, kind: str = "normal"
) -> tuple[float, float]:
    """The mean error of the params, and the mean relative error.

    If ``together``, of the largest and of the median step, else after the last step.
    """
    exact = OPTIMIZERS["float"]

    def step(carry: Any, i: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        found, state, params, exact_state = carry
        grads = gradient_of(kind, keys[1], i)
        updates, state = tx.update(grads, state, found)
        found = optax.apply_updates(found, updates)
        updates, exact_state = exact.update(grads, exact_state, params)
        params = optax.apply_updates(params, updates)
        error = jnp.abs(found - params)
        relative = jnp.mean(error / (jnp.abs(params) + 1e-9))
        return (params if together else found, state, params, exact_state), (error.mean(), relative)

    def run(params: jax.Array) -> Any:
        start = (params, tx.init(params), params, exact.init(params))
        return jax.lax.scan(step, start, jnp.arange(STEPS))[1]

    keys = jax.random.split(jax.random.key(seed))
    errors, relatives = jax.jit(run)(0.1 * jax.random.normal(keys[0], SHAPE))
    if together:
        return float(errors.max()), float(jnp.median(relatives))
    return float(errors[-1]), float(relatives[-1])


def times(progress: rich.progress.Progress, repeats: int) -> dict[int, dict[str, list[float]]]:
    """Seconds per step of each candidate, in turns."""
    rng = np.random.default_rng(0)
    found = {}
    for batch, calls in BATCHES.items():
        x = jnp.asarray(rng.standard_normal((batch, 784), np.float32))
        y = jnp.asarray(rng.integers(0, 10, batch))
        runs = {name: stepper(Net(WIDTHS), tx, x, y, calls) for name, tx in OPTIMIZERS.items()}
        turns = progress.track(range(repeats + 1), description=f"step time, batch {batch}")
        found[batch] = take_turns(runs, turns, calls)
    return found


def bytes_a_weight(tx: optax.GradientTransformation) -> float:
    params = jax.eval_shape(Net(WIDTHS).init, jax.random.key(0), jnp.zeros((1, 784)))["params"]
    weights = sum(p.size for p in jax.tree.leaves(params))
    state = jax.eval_shape(tx.init, params)
    # int4 arrays are packed on a device.
    bits = sum(x.size * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(state))
    return bits / 8 / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="a Python with torch, torchao and bitsandbytes")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    console = rich.console.Console()
    with rich.progress.Progress(console=console) as progress:
        seconds = times(progress, args.repeats)
        near = {}
        for name, tx in progress.track(list(OPTIMIZERS.items())[1:], description="nearness"):
            near[name] = [
                np.mean([nearness(tx, seed, together) for seed in range(SEEDS)], axis=0)
                for together in (True, False)
            ]
        parity = {
            (name, kind): np.mean(
                [nearness(OPTIMIZERS[name], i, False, kind)[0] for i in range(SEEDS)]
            )
            for name, kind in progress.track(
                list(itertools.product(PARITY, KINDS)), description="kinds of gradients"
            )
        }
    peers = {}
    if args.torch_python:
        script = pathlib.Path(__file__).with_name("optimizer_state_torch.py")
        out = subprocess.run(
            [args.torch_python, script], capture_output=True, text=True, check=True
        )
        peers = json.loads(out.stdout.splitlines()[-1])
    table = rich.table.Table(
        title=f"Adam, MLP 784-2048-2048-2048-10, {os.cpu_count()} cores, jax {jax.__version__}",
        caption="Step times are ratios to float's. Errors are means over 3 seeds.",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("state")
    for column in (
        "bytes a\nweight",
        *(f"batch\n{batch}" for batch in BATCHES),
        *("error of\na step", "relative\n(median)", "after 50\nsteps"),
    ):
        table.add_column(column, justify="right")
    for name, tx in OPTIMIZERS.items():
        ratios = [
            np.median(np.array(found[name]) / np.array(found["float"]))
            for found in seconds.values()
        ]
        shown = [f"{r:.2f}" if name != "float" else f"{1e3 * np.median(f[name]):.0f} ms" for r, f in zip(ratios, seconds.values(), strict=True)]  # fmt: skip
        limit = 2.1 if "8" in name else 1.2
        note("state, bytes per weight", name, bytes_a_weight(tx), limit if name in near else None)
        for batch, ratio in zip(BATCHES, ratios, strict=True):
            if name in near:
                note("training step, 10 million weights", f"{name}, batch {batch}", ratio, 1.15)
        errors = ["", "", ""]
        if name in near:
            (step, relative), (last, _) = near[name]
            errors = [f"{step:.1e}", f"{relative:.1e}", f"{last:.1e}"]
            note("error of a step", name, step, 6e-5 if "8" in name else None)
        table.add_row(name, f"{bytes_a_weight(tx):.2f}", *shown, *errors)
    for name, (size, step, relative, last) in peers.items():
        note("error of a step", name, step)
        table.add_row(name, f"{size:.2f}", *[""] * len(BATCHES), f"{step:.1e}", f"{relative:.1e}", f"{last:.1e}")  # fmt: skip
    table.add_row("targets", "2.1, 1.2", *["1.15"] * len(BATCHES), "6.0e-05", "6.0e-04", "")
    console.print(table)
    table = rich.table.Table(
        title="Mean error of the params after 50 steps, by what the gradients are like",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("state", *KINDS, "target"):
        table.add_column(column, justify="left" if column == "state" else "right")
    for name, target in PARITY.items():
        errors = [parity[name, kind] for kind in KINDS]
        for kind, error in zip(KINDS, errors, strict=True):
            note("error after 50 steps", f"{name}, {kind}", error, target)
        table.add_row(name, *(f"{error:.1e}" for error in errors), f"{target:.1e}")
    console.print(table)
    weights = 4 + bytes_a_weight(ALL_THREE)
    note("bytes per weight", "params, 8-bit state, 8-bit latent weights", weights, 7.2)
    console.print(
        f"Params, 8-bit state of AdamW and latent weights in 8 bits: {weights:.2f} bytes per weight "
        "(target 7.2), of 12 for AdamW in float."
    )


if __name__ == "__main__":
    main()
