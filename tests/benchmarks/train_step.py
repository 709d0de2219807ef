"""The whole jitted training step with and without clip and quantize, as ratios in one run.

Only timings are taken, on random data of the shape of Fashion-MNIST. The candidates take turns, so that other
load on the machine affects all equally. A ratio is the median over turns of a candidate's time to that of its
reference in the same turn; two runs of the same program differ by 1 to 2%.

    python tests/benchmarks/train_step.py
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import rich.console
import rich.progress
import rich.table
from figures import note, verdict

from optax_clipquant import (
    Ternary,
    Uniform,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    quantize_weights,
    softness_schedule,
)

MODELS = {"784-512-256-10": (512, 256), "784-2048-2048-10": (2048, 2048)}
CALLS = 20  # steps in one timing


class Net(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def stepper(
    model: nn.Module,
    tx: optax.GradientTransformation,
    x: jax.Array,
    y: jax.Array,
    calls: int = CALLS,
) -> Callable[[], Any]:
    """A function that runs ``calls`` steps, with params and state donated."""
    params = model.init(jax.random.key(0), x)["params"]
    state = tx.init(params)

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    held = [(params, state)]

    def run() -> Any:
        for _ in range(calls):
            held[0] = compiled(*held[0])
        return held[0]

    return run


def take_turns(
    runs: dict[str, Callable[[], Any]], turns: Iterable[int], calls: int = CALLS
) -> dict[str, list[float]]:
    """Seconds per step of each run, which does ``calls`` steps; the first turn, 0, compiles."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in turns:
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                times[name].append((time.perf_counter() - begin) / calls)
    return times


def candidates(
    widths: tuple[int, ...], x: jax.Array, y: jax.Array
) -> dict[str, tuple[Callable[[], Any], str, float | None]]:
    """The runner of each candidate, its reference, and the target for the ratio."""
    net, adam = Net(widths), optax.adam(1e-3)
    rule = qwix.QtRule(module_path=".*", weight_qtype="int4", act_qtype=None)
    qat = qwix.quantize_model(Net(widths), qwix.QtProvider([rule]))

    def make(*transforms: optax.GradientTransformation) -> Callable[[], Any]:
        return stepper(net, optax.chain(*transforms), x, y)

    return {
        "adam": (make(adam), "adam", None),
        "optax.clip": (make(optax.clip(1.0), adam), "adam", None),
        "clip_by_value": (make(clip_by_value(1.0), adam), "optax.clip", 1.02),
        "clip_by_value, no telemetry": (make(clip_by_value(1.0, telemetry=False), adam), "optax.clip", 1.0),
        "clip_by_quantile": (make(clip_by_quantile(), adam), "optax.clip", None),
        "clip_by_zscore": (make(clip_by_zscore(), adam), "optax.clip_by_global_norm", None),
        "optax.clip_by_global_norm": (make(optax.clip_by_global_norm(1.0), adam), "adam", None),
        "4 bits": (make(adam, quantize_weights(Uniform(bits=4))), "adam", 1.10),
        "4 bits, groups of 32": (make(adam, quantize_weights(Uniform(bits=4, group_size=32))), "adam", 1.10),
        "3 bits (mse)": (make(adam, quantize_weights(Uniform(bits=3))), "adam", 1.10),
        "ternary": (make(adam, quantize_weights(Ternary())), "adam", 1.10),
        "4 bits, softness": (make(adam, quantize_weights(Uniform(bits=4), softness=softness_schedule(0, 10**6))), "adam", 1.10),
        "4 bits, 8-bit residual": (make(adam, quantize_weights(Uniform(bits=4), residual_bits=8)), "adam", None),
        "clip_by_value, 4 bits": (make(clip_by_value(1.0), adam, quantize_weights(Uniform(bits=4))), "optax.clip", 1.10),
        "qwix QAT, 4-bit weights": (stepper(qat, adam, x, y), "adam", None),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((args.batch, 784), np.float32))
    y = jnp.asarray(rng.integers(0, 10, args.batch))
    for name, widths in MODELS.items():
        runs = candidates(widths, x, y)
        times = take_turns(
            {candidate: run for candidate, (run, _, _) in runs.items()},
            rich.progress.track(range(args.repeats + 1), name),
        )
        table = rich.table.Table(
            title=f"MLP {name}, batch {args.batch}, {os.cpu_count()} cores, jax {jax.__version__}"
        )
        for column in ("step", "ms", "ratio", "to", "target", ""):
            table.add_column(column, justify="left" if column in ("step", "to") else "right")
        for candidate, (_, reference, target) in runs.items():
            ratio = float(np.median(np.array(times[candidate]) / np.array(times[reference])))
            if candidate != reference:
                note(f"training step, {name}", f"{candidate}, to {reference}", ratio, target)
            table.add_row(
                candidate, f"{1e3 * np.median(times[candidate]):.2f}", f"{ratio:.3f}", reference,
                f"{target or ''}", verdict(ratio, target),
            )  # fmt: skip
        rich.console.Console().print(table)


if __name__ == "__main__":
    main()
