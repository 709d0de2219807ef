"""A 5 x 5 sweep of ``c`` and ``R`` against 25 separate runs, and against Optuna's GridSampler.

The model is an MLP on scikit-learn's digits, its params on a z-score grid, with a third of the data for
validation. All candidates time the same training, a ``lax.scan`` over its steps: in ``sweep``; as one jitted
function of ``c`` and ``R``, called 25 times; and with ``c`` and ``R`` as constants, jitted for each pair.
"25 jitted steps" is the usual loop: steps from Python, with the step jitted for each pair. Each candidate
runs in a separate process, which has already imported jax and run something; compile time counts. Candidates
take turns, and the median counts.

    pip install optuna
    python tests/benchmarks/sweep.py
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import rich.console
import rich.progress
import rich.table
from figures import note, verdict

from optax_clipquant import Sweep, sweep

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
from sweep import GRID, Task

TARGET = 5.0


class Timed(Task):
    """The example's task, with the other ways to run it."""

    def whole(self, c: float, R: int) -> dict[str, float]:
        return floats(jax.jit(functools.partial(self.evaluate, c, R))())

    def traced(self) -> Callable[..., dict[str, float]]:
        compiled = jax.jit(self.evaluate)
        return lambda c, R: floats(compiled(c, R))

    def by_steps(self, c: float, R: int) -> dict[str, float]:
        tx = self.optimizer(c, R)
        step = jax.jit(functools.partial(self.step, tx), donate_argnums=0)
        carry = jax.tree.map(jnp.copy, self.params), tx.init(self.params)
        for batch in np.asarray(self.batches):
            carry = step(carry, batch)
        return floats(jax.jit(self.validate)(carry[0]))


def floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def swept(task: Timed, batch_size: int | None = None) -> Sweep:
    return sweep(task.evaluate, GRID, batch_size=batch_size, progress=False)


def separate(run: Callable[..., dict[str, float]]) -> Sweep:
    return Sweep(
        tuple({"c": c, "R": R, **run(c, R), "failed": False} for c in GRID["c"] for R in GRID["R"])
    )


def with_optuna(task: Timed) -> Sweep:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []

    def objective(trial: optuna.Trial) -> float:
        point = {name: trial.suggest_categorical(name, values) for name, values in GRID.items()}
        metrics = task.whole(**point)
        rows.append({**point, **metrics, "failed": False})
        return metrics["loss"]

    study = optuna.create_study(sampler=optuna.samplers.GridSampler(GRID), direction="minimize")
    study.optimize(objective, n_trials=25)
    return Sweep(tuple(rows))


CANDIDATES: dict[str, Callable[[Timed], Sweep]] = {
    "sweep": swept,
    "sweep, batches of 5": lambda task: swept(task, 5),
    "one jitted run": lambda task: separate(task.traced()),
    "25 jitted runs": lambda task: separate(task.whole),
    "25 jitted steps": lambda task: separate(task.by_steps),
    "Optuna, 25 jitted runs": with_optuna,
}


def measure(name: str, sizes: tuple[int, int, int], pipe: Any) -> None:
    """Sends the time of a candidate, its compile time, and its rows."""
    task = Timed(*sizes)
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) @ x.T)(task.train_x))
    compiling = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile"):  # tracing, lowering, compiling
            compiling.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    begin = time.perf_counter()
    found = CANDIDATES[name](task)
    pipe.send((time.perf_counter() - begin, sum(compiling), json.dumps(found.rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    args = parser.parse_args()
    sizes = (args.steps, args.batch, args.width)
    context = multiprocessing.get_context("spawn")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in args.only}
    found: dict[str, Sweep] = {}
    turns = [name for _ in range(args.repeats) for name in args.only]
    for name in rich.progress.track(turns, "turns"):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(name, sizes, sender))
        process.start()
        sender.close()
        seconds, compiling, rows = receiver.recv()
        process.join()
        times[name].append((seconds, compiling))
        found[name] = Sweep(tuple(json.loads(rows)))

    console = rich.console.Console()
    console.print(found[args.only[0]])
    table = rich.table.Table(
        title=f"MLP 64-{args.width}-{args.width}-10, {args.steps} steps of {args.batch}; "
        f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}, jax {jax.__version__}"
    )
    for column in ("25 points", "seconds", "compiling", "ratio", "target", "", "best c", "R", "loss"):  # fmt: skip
        table.add_column(column, justify="left" if column == "25 points" else "right")
    ours = np.array(times[args.only[0]])[:, 0]
    for name in args.only:
        seconds, compiling = np.median(np.array(times[name]), 0)
        ratio = float(np.median(np.array(times[name])[:, 0] / ours))
        target = TARGET if "25" in name else None
        row = found[name].best("loss", mode="min")
        if name != args.only[0]:
            note("25 points, to sweep", name, ratio, target, least=True)
        table.add_row(
            name, f"{seconds:.2f}", f"{compiling:.2f}", f"{ratio:.2f}", f"{target or ''}",
            verdict(ratio, target, least=True), f"{row['c']}",
            f"{row['R']}", f"{row['loss']:.4f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
