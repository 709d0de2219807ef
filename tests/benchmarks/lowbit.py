"""Accuracy and step time at 1 to 4 bits per weight, against torchao's PARQ and qwix, paired by seed.

Fashion-MNIST, an MLP 784-512-256-10, 5 epochs in batches of 256, Adam with a cosine schedule from
1e-3, gradients clamped to [-1, 1]. Every framework gets the same initial values, batches and order,
and quantizes all three kernels with a scale for each output channel.

    python -m venv torchenv && torchenv/bin/pip install torch torchao numpy
    python tests/benchmarks/lowbit.py --torch-python torchenv/bin/python --data-dir DIR
    python tests/benchmarks/lowbit.py --torch-python torchenv/bin/python --data-dir DIR --time

Each run is a file in --out, so a call resumes an earlier one, and --methods, --widths and --seeds split the
work. --tune compares settings on the last 5,000 training images, with seeds from 100, which the table does
not use.
"""

import argparse
import collections
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys
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
from figures import note

from optax_clipquant import (
    Binary,
    Quantizer,
    Ternary,
    Uniform,
    clip_by_value,
    dequantize_params,
    export_params,
    quantize_weights,
    softness_schedule,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
from fashion_mnist import batches_of, load_data

LAYERS = (784, 512, 256, 10)
BATCH, EPOCHS = 256, 5
WIDTHS = ("float", "1", "ternary", "2", "3", "4")
TARGETS = {"1": 1.1, "ternary": 0.45, "2": 0.15, "3": 0.15, "4": 0.15}  # points below float
QWIX_TYPES = {"2": "int2", "3": "int3", "4": "int4"}
VALIDATION, FIRST_TUNING_SEED = 5000, 100

# The settings of a run besides its width and seed. "anneal" is start and end as fractions of the training, and
# steepness: PARQ's scripts anneal from the start to three quarters, its README with a steepness of
# 20, and with that quantizer. For this library, --tune found no schedule that is better at all widths.
Spec = dict[str, Any]


def same(**spec: Any) -> dict[str, Spec]:
    """One spec for all quantized widths."""
    return {width: spec for width in WIDTHS[1:]}


# The larger scale of absmax is better for ternary and 2 bits, on the validation images of --tune.
ANNEALED = same(anneal=(0.0, 0.75, 20)) | {
    width: {"anneal": (0.0, 0.75, 20), "rule": "absmax"} for width in ("ternary", "2")
}
METHODS: dict[str, dict[str, Spec]] = {
    "float": {"float": {}},
    "ours, hard": same(),
    "ours, annealed": ANNEALED,
    "ours, 8-bit latent": {width: spec | {"residual_bits": 8} for width, spec in ANNEALED.items()},
    "qwix": {width: {} for width in QWIX_TYPES},
    "torch float": {"float": {}},
    "PARQ, hard": same(quantizer="uniform"),
    "PARQ, annealed": same(quantizer="uniform", anneal=(0.0, 0.75, 20)),
}
TORCH = ("torch float", "PARQ, hard", "PARQ, annealed")

ANNEALINGS = (
    (0.0, 0.5, 20),
    (0.0, 0.75, 20),
    (0.0, 0.9, 10),
    (0.25, 0.9, 20),
    (0.5, 0.9, 20),
)


def variants(method: str, width: str) -> list[Spec]:
    """The settings that --tune compares."""
    if method.startswith("PARQ"):
        anneal = METHODS[method][width].get("anneal")
        # At 2 bits "max" has 3 levels, and at 1 bit one.
        names = ("uniform", "lsbq", "max") if width in ("3", "4") else ("uniform", "lsbq")
        return [{"quantizer": name} | ({"anneal": anneal} if anneal else {}) for name in names]
    other = [{"rule": "mse" if width == "4" else "absmax"}] if width != "1" else []
    if method == "ours, annealed":
        best = METHODS[method][width]["anneal"]
        return [{"anneal": a} for a in ANNEALINGS] + [rule | {"anneal": best} for rule in other]
    return [{}, *other, {"channel_axis": None}] if method == "ours, hard" else []


class MLP(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 255
        for width in LAYERS[1:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(LAYERS[-1])(x)


def initial(seed: int) -> dict[str, np.ndarray]:
    """He normal kernels, zero biases."""
    rng = np.random.default_rng(seed)
    params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(LAYERS)):
        kernel = rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)
        params[f"kernel{i}"] = kernel.astype(np.float32)
        params[f"bias{i}"] = np.zeros(columns, np.float32)
    return params


def as_linen(params: dict[str, np.ndarray]) -> dict[str, dict[str, jax.Array]]:
    return {
        f"Dense_{i}": {name: jnp.asarray(params[f"{name}{i}"]) for name in ("kernel", "bias")}
        for i in range(len(LAYERS) - 1)
    }


def make_quantizer(width: str, spec: Spec) -> Quantizer:
    axis = spec.get("channel_axis", -1)
    if width == "1":
        return Binary(channel_axis=axis)
    if width == "ternary":
        return Ternary(channel_axis=axis, scale_rule=spec.get("rule", "mse"))
    return Uniform(bits=int(width), channel_axis=axis, scale_rule=spec.get("rule"))


def qat(width: str, model: nn.Module) -> nn.Module:
    rule = qwix.QtRule(module_path=".*", weight_qtype=QWIX_TYPES[width], act_qtype=None)
    return qwix.quantize_model(model, qwix.QtProvider([rule]))


def setting(
    method: str, width: str, spec: Spec, steps: int
) -> tuple[nn.Module, optax.GradientTransformation]:
    model, last = MLP(), optax.identity()
    if method == "qwix":
        model = qat(width, model)
    elif method.startswith("ours"):
        softness = None
        if spec.get("anneal"):
            start, end, steepness = spec["anneal"]
            softness = softness_schedule(
                round(start * steps), round(end * steps), steepness=steepness
            )
        last = quantize_weights(
            make_quantizer(width, spec), softness=softness, residual_bits=spec.get("residual_bits")
        )
    schedule = optax.cosine_decay_schedule(1e-3, steps)
    return model, optax.chain(clip_by_value(1.0), optax.adam(schedule), last)


def stepper(model: nn.Module, tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(carry: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def trainer(method: str, width: str, spec: Spec, data: list[np.ndarray]) -> Callable[..., Any]:
    """A function from initial values and batches to accuracy and levels; it compiles once."""
    train_x, train_y, test_x, test_y = map(jnp.asarray, data)
    steps = len(train_x) // BATCH * EPOCHS
    model, tx = setting(method, width, spec, steps)
    step = stepper(model, tx)

    @jax.jit
    def run(params: Any, batches: jax.Array, train_x: jax.Array, train_y: jax.Array) -> Any:
        carry, _ = jax.lax.scan(
            lambda carry, batch: (step(carry, train_x[batch], train_y[batch]), None),
            (params, tx.init(params)),
            batches,
        )
        return carry

    def train(params: dict[str, np.ndarray], batches: np.ndarray) -> tuple[float, int]:
        trained, state = run(as_linen(params), jnp.asarray(batches), train_x, train_y)
        if method.startswith("ours"):
            shipped = dequantize_params(export_params(trained, state))
            assert jax.tree.all(jax.tree.map(np.array_equal, shipped, trained)), "off the grid"
        found = jnp.argmax(model.apply({"params": trained}, test_x), -1)
        return float(jnp.mean(found == test_y)), levels(method, width, trained)

    return train


def levels(method: str, width: str, params: Any) -> int:
    """The largest number of distinct weights in an output channel, as the forward pass sees them."""
    most = 0
    for layer in params.values():
        kernel = layer["kernel"]
        if method == "qwix":
            # An identity input reveals the weights that qwix serves.
            dense = qat(width, nn.Dense(kernel.shape[1], use_bias=False))
            kernel = dense.apply({"params": {"kernel": kernel}}, jnp.eye(kernel.shape[0]))
        most = max(most, *(len(np.unique(column)) for column in np.asarray(kernel).T))
    return most


def jobs_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run that the arguments ask for, done or not."""
    jobs = []
    first = FIRST_TUNING_SEED if args.tune else args.first_seed
    for method in args.methods:
        for width in args.widths:
            specs = variants(method, width) if args.tune else [METHODS[method].get(width)]
            for spec in specs:
                if spec is None or (args.tune and width == "float"):
                    continue
                for seed in range(first, first + args.seeds):
                    jobs.append(job_of(method, width, seed, spec, split_of(args)))
    return jobs


def split_of(args: argparse.Namespace) -> str:
    """The folder of the results; those on few images are kept apart."""
    return ("validation" if args.tune else "test") + (f"-{args.limit}" if args.limit else "")


def job_of(method: str, width: str, seed: int, spec: Spec, split: str) -> dict[str, Any]:
    told = "_".join(f"{k}-{v}" for k, v in sorted(spec.items()))
    name = f"{method}_{width}_{told}_{seed}.json"
    for old, new in ((" ", "-"), (",", ""), ("(", ""), (")", "")):
        name = name.replace(old, new)
    return {
        "method": method, "width": width, "seed": seed, **spec,
        "result": f"{split}/{name}", "start": f"{split}/start-{seed}.npz",
    }  # fmt: skip


def spec_of(job: dict[str, Any]) -> Spec:
    names = ("quantizer", "anneal", "rule", "channel_axis", "residual_bits")
    return {name: job[name] for name in names if name in job}


def write_starts(args: argparse.Namespace, jobs: list[dict[str, Any]], images: int) -> None:
    """Writes the initial values and batches of each seed, which all frameworks share."""
    for job in jobs:
        path = args.out / job["start"]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            batches = batches_of(job["seed"], images, BATCH, EPOCHS).astype(np.int32)
            np.savez(path, batches=batches, **initial(job["seed"]))


def read_start(path: pathlib.Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    with np.load(path) as arrays:
        params = {name: arrays[name] for name in arrays.files if name != "batches"}
        return params, arrays["batches"]


def split_data(args: argparse.Namespace) -> list[np.ndarray]:
    arrays = [np.array(array) for array in load_data(args.data_dir, args.limit)]
    train_x, train_y, test_x, test_y = arrays
    train_x, test_x = (x.reshape(len(x), -1) for x in (train_x, test_x))
    if args.tune:
        return [train_x[:-VALIDATION], train_y[:-VALIDATION],
                train_x[-VALIDATION:], train_y[-VALIDATION:]]  # fmt: skip
    return [train_x, train_y, test_x, test_y]


def run_jax(
    args: argparse.Namespace, jobs: list[dict[str, Any]], data: list[np.ndarray], advance: Any
) -> None:
    by_program = collections.defaultdict(list)
    for job in jobs:
        by_program[job["method"], job["width"], str(spec_of(job))].append(job)
    for (method, width, _), group in by_program.items():
        train = trainer(method, width, spec_of(group[0]), data)
        for job in group:
            begin = time.perf_counter()
            accuracy, count = train(*read_start(args.out / job["start"]))
            seconds = time.perf_counter() - begin
            result = {**job, "accuracy": accuracy, "levels": count, "seconds": seconds}
            (args.out / job["result"]).write_text(json.dumps(result))
            advance(job, accuracy)


def torch_command(args: argparse.Namespace, request: dict[str, Any]) -> list[str]:
    path = args.out / "request.json"
    path.write_text(json.dumps(request))
    return [args.torch_python, str(pathlib.Path(__file__).with_name("lowbit_torch.py")), str(path)]


def run_torch(
    args: argparse.Namespace, jobs: list[dict[str, Any]], data: list[np.ndarray], advance: Any
) -> None:
    if not jobs:
        return
    split = pathlib.Path(jobs[0]["result"]).parent
    names = ("train_x", "train_y", "test_x", "test_y")
    np.savez(args.out / split / "data.npz", **dict(zip(names, data, strict=True)))
    request = {"data": f"{split}/data.npz", "jobs": jobs, "threads": args.threads}
    command = torch_command(args, request)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for job, line in zip(jobs, process.stdout, strict=False):
            advance(job, float(line.split()[-1]))
    if process.returncode:
        raise SystemExit(f"the torch side failed: {' '.join(command)}")


def check_torch(python: str) -> str | None:
    """The reason why there is no torch side, or None."""
    if not python:
        return "no --torch-python given"
    try:
        code = "import torch, torchao.prototype.parq"
        subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        return f"{python} cannot be used: {last}"
    return None


def accuracies(results: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    found: dict[tuple[str, str], dict[int, float]] = collections.defaultdict(dict)
    for result in results:
        found[result["method"], result["width"]][result["seed"]] = result["accuracy"]
    return found


def spread(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def new_table(title: str, first: str, columns: Iterable[str]) -> rich.table.Table:
    table = rich.table.Table(title=title)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", min_width=11)
    return table


def table_of(
    title: str, args: argparse.Namespace, methods: Iterable[str], cell: Callable[[str, str], str]
) -> rich.table.Table:
    table = new_table(title, "", args.widths)
    for method in methods:
        table.add_row(method, *(cell(method, width) for width in args.widths))
    return table


def report(args: argparse.Namespace, results: list[dict[str, Any]]) -> list[rich.table.Table]:
    found = accuracies(results)
    level = {(result["method"], result["width"]): result["levels"] for result in results}

    def mean(method: str, width: str) -> str:
        values = np.array(list(found.get((method, width), {}).values()))
        if not len(values):
            return "-"
        some = "" if len(values) == args.seeds else f" (n={len(values)})"
        return f"{100 * values.mean():.2f} ±{100 * spread(values):.2f}{some}"

    def difference(ours: str, method: str, width: str) -> str:
        a, b = found.get((ours, width), {}), found.get((method, width), {})
        both = np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])
        if method == ours or not len(both):
            return "-"
        error = spread(both) / np.sqrt(len(both))
        return f"{100 * both.mean():+.2f} ±{100 * error:.2f}"

    floats = list(found.get(("float", "float"), {}).values())
    for (method, width), values in found.items():
        if floats and width != "float":
            below = 100 * (np.mean(floats) - np.mean(list(values.values())))
            target = TARGETS[width] if method == "ours, annealed" else None
            note("accuracy, points below float", f"{method}, {width}", below, target)
    tables = [
        table_of(f"test accuracy (%), mean and std of {args.seeds} seeds", args, args.methods, mean)
    ]
    for ours in ("ours, annealed", "ours, hard"):
        if any(method == ours for method, _ in found):
            cell = functools.partial(difference, ours)
            title = f"{ours} less each, in points, and the paired standard error"
            tables.append(table_of(title, args, args.methods, cell))
    tables.append(
        table_of(
            "most distinct weights in a channel", args, args.methods,
            lambda method, width: f"{level.get((method, width), '-')}",
        )
    )  # fmt: skip
    return tables


def report_tuning(args: argparse.Namespace, results: list[dict[str, Any]]) -> rich.table.Table:
    title = f"validation accuracy (%), mean of {args.seeds} seeds from {FIRST_TUNING_SEED}"
    table = new_table(title, "setting", args.widths)
    rows: dict[str, dict[str, list[float]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for result in results:
        told = ", ".join(f"{k} {v}" for k, v in spec_of(result).items()) or "default"
        rows[f"{result['method']}: {told}"][result["width"]].append(result["accuracy"])
    for name, row in rows.items():
        cells = (f"{100 * np.mean(row[w]):.2f}" if row[w] else "-" for w in args.widths)
        table.add_row(name, *cells)
    return table


def time_jax(jobs: list[dict[str, Any]], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Seconds per step of each job in each round; the jobs take turns. Annealing takes a round."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 255, (BATCH, LAYERS[0])), jnp.uint8)
    labels = jnp.asarray(rng.integers(0, LAYERS[-1], BATCH))
    params = as_linen(initial(0))
    programs = []
    for job in jobs:
        model, tx = setting(job["method"], job["width"], spec_of(job), steps)
        programs.append((jax.jit(stepper(model, tx), donate_argnums=0), jax.jit(tx.init)))
    times: list[list[float]] = [[] for _ in jobs]
    for turn in rich.progress.track(range(rounds + 1), "jax"):
        for (step, init), found in zip(programs, times, strict=True):
            carry = (jax.tree.map(jnp.array, params), init(params))
            jax.block_until_ready(carry)
            begin = time.perf_counter()
            for _ in range(steps):
                carry = step(carry, images, labels)
            jax.block_until_ready(carry)
            if turn:  # the first compiles
                found.append((time.perf_counter() - begin) / steps)
    return [{**job, "times": found} for job, found in zip(jobs, times, strict=True)]


def run_time(args: argparse.Namespace, jobs: list[dict[str, Any]]) -> rich.table.Table:
    jobs = [job | {"start": "time/start.npz"} for job in jobs]
    write_starts(args, jobs, BATCH)
    results = time_jax([j for j in jobs if j["method"] not in TORCH], args.rounds, args.steps)
    torch_jobs = [job for job in jobs if job["method"] in TORCH]
    if torch_jobs:  # run separately, since they would share the cores
        request = {
            "jobs": torch_jobs, "rounds": args.rounds, "steps": args.steps, "threads": args.threads,
            "result": "times.json",
        }  # fmt: skip
        subprocess.run(torch_command(args, request), check=True)
        results += json.loads((args.out / "times.json").read_text())
    times = {(r["method"], r["width"]): np.array(r["times"]) for r in results}

    def ratio(method: str, width: str) -> str:
        own = times.get(("torch float" if method in TORCH else "float", "float"))
        if own is None or (method, width) not in times:
            return "-"
        if width == "float":
            return f"{1e3 * np.median(own):.2f} ms"
        return f"{np.median(times[method, width] / own):.2f}"

    title = f"step time, as a ratio to the same framework's float step, {args.rounds} rounds"
    return table_of(title, args, args.methods, ratio)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=pathlib.Path, help="as of examples/fashion_mnist.py")
    parser.add_argument(
        "--torch-python", default="", help="the Python of an environment with torch"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="compare settings, on a validation set")
    parser.add_argument("--time", action="store_true", help="time the steps: on a quiet machine")
    parser.add_argument("--rounds", type=int, default=7, help="of --time")
    parser.add_argument("--steps", type=int, default=100, help="in a round of --time")
    # With more threads than idle cores, OpenMP's barriers make torch slower by far.
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--limit", type=int, help="use only this many training and test images")
    parser.add_argument("--report", action="store_true", help="only print what there is")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/lowbit"))
    return parser.parse_args()


def main() -> None:
    args = parse()
    console = rich.console.Console(width=max(110, rich.console.Console().width))
    if any(method in TORCH for method in args.methods) and not args.report:
        missing = check_torch(args.torch_python)
        if missing:
            console.print(f"Without PARQ: {missing}. How to make the environment: --help.")
            args.methods = [method for method in args.methods if method not in TORCH]
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(args)
    if args.time:
        first = [job for job in jobs if job["seed"] == args.first_seed]
        console.print(run_time(args, first))
        return
    left = [] if args.report else [j for j in jobs if not (args.out / j["result"]).exists()]
    if left:
        data = split_data(args)
        write_starts(args, left, len(data[0]))
        columns = (rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
                   rich.progress.TimeElapsedColumn(), "{task.description}")  # fmt: skip
        with rich.progress.Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(left))

            def advance(job: dict[str, Any], accuracy: float) -> None:
                told = f"{job['method']} {job['width']} seed {job['seed']}: {accuracy:.4f}"
                progress.update(task, advance=1, description=told)

            run_jax(args, [j for j in left if j["method"] not in TORCH], data, advance)
            run_torch(args, [j for j in left if j["method"] in TORCH], data, advance)
    paths = [args.out / job["result"] for job in jobs]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "qwix"))
    console.print(f"{os.cpu_count()} cores, {versions}")
    for table in [report_tuning(args, results)] if args.tune else report(args, results):
        console.print(table)


if __name__ == "__main__":
    main()
