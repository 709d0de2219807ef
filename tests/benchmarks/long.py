"""Long and large runs: 10,000 steps, and nets of up to 1,000 leaves.

Memory must not grow and the step time must not drift over the steps; the time to trace and compile a
training step must grow with the number of leaves as for the plain optimizer. It takes 20 minutes on two
cores, mostly for 1,000 leaves, where the last line needs more than 22 GB: a killed process is shown as such.

    python tests/benchmarks/long.py
"""

import argparse
import concurrent.futures.process
import math
import multiprocessing
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
from figures import note

from optax_clipquant import (
    Uniform,
    clip_by_quantile,
    clip_by_value,
    quantize_state,
    quantize_weights,
)


def by_hand() -> optax.GradientTransformation:
    """Weights on a 4-bit grid with the least possible code: nothing is checked, and nothing is exact."""

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.copy, params)

    def update(updates: Any, latent: Any, params: Any = None) -> tuple[Any, Any]:
        latent = optax.apply_updates(latent, updates)

        def move(w: jax.Array, p: jax.Array) -> jax.Array:
            scale = jnp.max(jnp.abs(w), axis=0, keepdims=True) / 7
            return jnp.round(w / scale) * scale - p

        return jax.tree.map(move, latent, params), latent

    return optax.GradientTransformation(init, update)


GRID = quantize_weights(Uniform(bits=4))
TRANSFORMS = {
    "adam": optax.adam(1e-3),
    # The cost of one reduction per leaf.
    "optax.clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "clip_by_value": optax.chain(clip_by_value(1.0), optax.adam(1e-3)),
    "4 bits, by hand": optax.chain(optax.adam(1e-3), by_hand()),
    "4 bits": optax.chain(optax.adam(1e-3), GRID),
    "clip_by_value, 4 bits": optax.chain(clip_by_value(1.0), optax.adam(1e-3), GRID),
    "clip_by_quantile, 8-bit state, 4 bits, residual": optax.chain(
        clip_by_quantile(),
        quantize_state(optax.adam(1e-3), min_size=0),
        quantize_weights(Uniform(bits=4), residual_bits=8),
    ),
}
LEAVES = (10, 100, 1000)
TARGET = 1.3


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def net_of(leaves: int) -> dict[str, jax.Array]:
    return {f"kernel_{i}": jnp.full((32, 32), 0.1, jnp.float32) for i in range(leaves)}


def step_of(tx: optax.GradientTransformation) -> Any:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return jnp.mean(jnp.square(x - 0.5))

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def compile_seconds(name: str, leaves: int) -> float:
    """The shortest of several times, in a separate process, since a program of 1,000 leaves keeps gigabytes."""
    tx = TRANSFORMS[name]
    found = []
    for count in (1, *[leaves] * (5 if leaves <= 100 else 1)):  # the first one loads the compiler
        jax.clear_caches()
        params = net_of(count)
        state = jax.eval_shape(tx.init, params)
        step = step_of(tx)
        begin = time.perf_counter()
        step.lower(params, state, jnp.ones((8, 32))).compile()
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--leaves", type=int, nargs="+", default=list(LEAVES))
    args = parser.parse_args()
    console = rich.console.Console()
    name, tx = list(TRANSFORMS.items())[-1]
    params = net_of(6)
    state, step, x = tx.init(params), step_of(tx), jnp.ones((64, 32))
    params, state = step(params, state, x)
    part = max(args.steps // 10, 1)
    fastest, memory = [], []
    for _ in rich.progress.track(range(10), description=f"{args.steps} steps", console=console):
        times = []
        for _ in range(part):
            begin = time.perf_counter()
            params, state = step(params, state, x)
            jax.block_until_ready(params)
            times.append(time.perf_counter() - begin)
        fastest.append(min(times))  # other load on the machine only adds to the time
        memory.append(resident_bytes())
    console.print(
        f"{name}: {args.steps} steps; the fastest step takes {1e3 * fastest[0]:.2f} ms in the first tenth and "
        f"{1e3 * fastest[-1]:.2f} in the last ({fastest[-1] / fastest[0]:.2f}x); memory after them "
        f"{memory[0] / 1e6:.1f} and {memory[-1] / 1e6:.1f} MB; compiled {step._cache_size()} time(s)."
    )
    table = rich.table.Table(
        title="seconds to trace and compile a training step, and as a ratio to adam's",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("step")
    for leaves in args.leaves:
        table.add_column(f"{leaves} leaves", justify="right")
    rows: dict[str, list[float]] = {name: [] for name in TRANSFORMS}
    total = [(leaves, name) for leaves in args.leaves for name in TRANSFORMS]
    context = multiprocessing.get_context("spawn")
    for leaves, name in rich.progress.track(total, description="compiling", console=console):
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
            try:
                seconds = process.submit(compile_seconds, name, leaves).result()
            except concurrent.futures.process.BrokenProcessPool:
                seconds = math.inf
        rows[name].append(seconds)
    note("10,000 steps", "last tenth's time to the first's", fastest[-1] / fastest[0], 1.05)
    note("10,000 steps", "last tenth's memory to the first's", memory[-1] / memory[0], 1.01)
    for name, found in rows.items():
        for leaves, s, plain in zip(args.leaves, found, rows["adam"], strict=True):
            if name != "adam":
                note(f"compiling, {leaves} leaves, to adam", name, s / plain, TARGET)
        cells = [
            f"{s:.1f} ({s / plain:.2f}x)" if s < math.inf else "killed"
            for s, plain in zip(found, rows["adam"], strict=True)
        ]
        table.add_row(name, *cells)
    table.add_row("target", *[f"{TARGET}x"] * len(args.leaves))
    console.print(table)


if __name__ == "__main__":
    main()
