"""Runs the benchmarks and writes a Markdown table of their figures, with targets where there are any.

    pip install -e '.[dev]' optuna
    python tests/benchmarks/figures.py --quick
    python tests/benchmarks/figures.py --torch-python torchenv/bin/python --data-dir DIR

Without --data-dir, lowbit.py is left out, and without --torch-python, the measurements in PyTorch (see
lowbit.py for both). Compile times are for 10 and 100 leaves; with --all also for 1,000, which takes more
than 22 GB of memory (a killed process gives "inf"). It takes up to an hour on two cores, and a few minutes
with --quick, whose figures say little. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import jax

_FILE = "BENCHMARK_FIGURES"  # in the environment: where note() writes
HERE = pathlib.Path(__file__).parent


def note(
    benchmark: str, case: str, value: float, target: float | None = None, *, least: bool = False
) -> None:
    """Adds a figure to the table, if one is being written.

    Args:
      benchmark: the name of the benchmark.
      case: the case.
      value: the measured value, mostly a ratio.
      target: the upper limit of the value, or with ``least`` the lower limit.
      least: see ``target``.
    """
    if path := os.environ.get(_FILE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([benchmark, case, float(value), target, least]) + "\n")


def verdict(value: float, target: float | None, least: bool = False) -> str:
    if target is None:
        return ""
    return "met" if (value >= target if least else value <= target) else "missed"


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    quick = args.quick
    leaves = [] if args.all else ["--leaves", "10", "100"]
    torch = ["--torch-python", args.torch_python] if args.torch_python else []
    found = {
        "quantize": ["--repeats", "2"] if quick else [],
        "train_step": ["--repeats", "2"] if quick else [],
        "optimizer_state": [*(["--repeats", "1"] if quick else []), *torch],
        "cli": ["--layers", "2", "--repeats", "1"] if quick else [],
        "sweep": ["--steps", "30", "--repeats", "1"] if quick else [],
        "shapes": [],
        "compile": ["--layers", "2"] if quick else [],
        "long": ["--steps", "200", "--leaves", "10"] if quick else leaves,
    }
    if args.data_dir and not quick:
        found["lowbit"] = ["--data-dir", args.data_dir, *torch, *([] if torch else ["--methods", "float", "ours, hard", "ours, annealed", "ours, 8-bit latent", "qwix"])]  # fmt: skip
    return found


def table(lines: list[str], failed: list[str]) -> str:
    rows = [
        f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}, jax {jax.__version__}, "
        f"{time.strftime('%Y-%m-%d')}",
        "",
        "| benchmark | case | measured | target | |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        benchmark, case, value, target, least = json.loads(line)
        aim = "" if target is None else f"{'at least' if least else 'at most'} {target:.3g}"
        rows.append(
            f"| {benchmark} | {case} | {value:.3g} | {aim} | {verdict(value, target, least)} |"
        )
    return "\n".join([*rows, *(f"\n{name}.py failed." for name in failed), ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", help="a Python with torch, torchao and bitsandbytes")
    parser.add_argument("--data-dir", help="as of examples/fashion_mnist.py")
    parser.add_argument("--all", action="store_true", help="also long.py with 1,000 leaves")
    parser.add_argument("--quick", action="store_true", help="see that all of them run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/benchmarks.md"))
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "figures")
        path.touch()
        for name, options in commands(args).items():
            print(f"## {name}.py {' '.join(options)}", flush=True)
            process = subprocess.run(
                [sys.executable, HERE / f"{name}.py", *options],
                env=os.environ | {_FILE: str(path)},
                check=False,
            )
            if process.returncode:
                failed.append(name)
        text = table(path.read_text().splitlines(), failed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed")


if __name__ == "__main__":
    main()
