"""The command ``optax-clipquant`` on checkpoints of 1 and 2 GB: time relative to ``cp``, and memory.

The candidates take turns with the file in the page cache; the shortest time counts. Compressing reads the
whole file, and writes a fraction of it and syncs that to the disk, which ``cp`` does not do while its output
fits in memory. Start-up is the time of ``--help``.

    python tests/benchmarks/cli.py
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
import rich.console
import rich.progress
import rich.table
from figures import note, verdict

from optax_clipquant.formats.safetensors import writing

TIME, ROOM = 3.0, 300e6  # targets: time in copies; bytes beyond 3 times the largest tensor


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder: about 51 MB per layer, and 131 MB of embeddings."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, 1024)}
    for i in range(layers):
        at = f"model.layers.{i}"
        for name in "qkvo":
            found[f"{at}.self_attn.{name}_proj.weight"] = (1024, 1024)
        found[f"{at}.mlp.gate_proj.weight"] = (2816, 1024)
        found[f"{at}.mlp.up_proj.weight"] = (2816, 1024)
        found[f"{at}.mlp.down_proj.weight"] = (1024, 2816)
        found[f"{at}.input_layernorm.weight"] = (1024,)
    return found


def write_checkpoint(path: pathlib.Path, layers: int) -> int:
    """Writes float32 weights; returns the bytes of the largest tensor."""
    rng = np.random.default_rng(0)
    specs = {name: (np.dtype(np.float32), shape) for name, shape in shapes(layers).items()}
    with writing(path, specs, {"format": "pt"}) as file:
        for name, (_, shape) in rich.progress.track(specs.items(), "making the file"):
            file.put(name, 0.02 * rng.standard_normal(shape, np.float32))
    return max(4 * int(np.prod(shape)) for shape in shapes(layers).values())


# A process's peak includes the memory of its parent, so the parent must be small.
LAUNCHER = """
import resource, subprocess, sys, time
begin = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def run(command: Sequence[str]) -> tuple[float, float]:
    """The time in seconds, and the peak of resident memory in bytes."""
    launcher = [sys.executable, "-S", "-c", LAUNCHER, *command]
    seconds, kilobytes = subprocess.check_output(launcher).split()
    return float(seconds), 1024.0 * float(kilobytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[17, 36], help="17 are 1 GB")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            compare(pathlib.Path(folder), layers, args.repeats)


def compare(folder: pathlib.Path, layers: int, repeats: int) -> None:
    source = folder / "model.safetensors"
    largest = write_checkpoint(source, layers)
    tool = (sys.executable, "-m", "optax_clipquant.cli.main")

    def compress(bits: int, *options: str) -> list[str]:
        return [*tool, "compress", *options, "--bits", str(bits), str(source)]

    # The path of a new file is appended to each, except for the start-up, which writes none.
    candidates = {
        "cp": ["cp", str(source)],
        "start-up": [*tool, "--help"],
        "compress, 8 bits": compress(8),
        "compress, 4 bits": compress(4),
        "compress, 4 bits, groups of 32": compress(4, "--group-size", "32"),
        "compress, 4 bits, mse": compress(4, "--scale", "mse"),
        "compress, 3 bits": compress(3),
        "decompress, 8 bits": [*tool, "decompress", str(folder / "compress, 8 bits")],
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    peaks: dict[str, float] = {}
    for _ in rich.progress.track(range(repeats), "turns"):
        for name, command in candidates.items():
            output = folder / name
            output.unlink(missing_ok=True)  # freeing an overwritten file would take time
            os.sync()  # so that the next candidate does not pay for pending writes
            seconds, peaks[name] = run([*command, str(output)])
            times[name].append(seconds)

    copy, start = min(times["cp"]), min(times["start-up"])
    limit, size = 3 * largest + ROOM, source.stat().st_size / 1e6
    table = rich.table.Table(
        title=f"{size:.0f} MB, the largest tensor {largest / 1e6:.0f} MB, "
        f"{os.cpu_count()} cores; ratios to cp"
    )
    for column in (
        "",
        "seconds",
        "ratio",
        "without start-up",
        "target",
        "",
        "peak MB",
        "limit",
        "",
    ):
        table.add_column(column, justify="right" if column else "left")
    for name, values in times.items():
        best = min(values)
        work = (best - start) / copy
        timed = name == "compress, 8 bits"
        bounded = "compress" in name
        if bounded:
            note(f"file of {size:.0f} MB, to cp", name, best / copy, TIME if timed else None)
            note(f"file of {size:.0f} MB, peak MB", name, peaks[name] / 1e6, limit / 1e6)
        table.add_row(
            name,
            f"{best:.2f}",
            f"{best / copy:.2f}",
            f"{work:.2f}" if bounded else "",
            f"{TIME}" if timed else "",
            verdict(best / copy, TIME if timed else None),
            f"{peaks[name] / 1e6:.0f}",
            f"{limit / 1e6:.0f}" if bounded else "",
            verdict(peaks[name], limit if bounded else None),
        )  # fmt: skip
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
