"""HBM traffic and memory of a training step on a TPU v5e, from compilation alone: no TPU is needed.

    pip install -e '.[tpu-aot]'
    python tests/benchmarks/accelerator.py
    python tests/benchmarks/accelerator.py --leaves 8 --size 2048 "8-bit state" "4-bit state"
    python tests/benchmarks/accelerator.py --json adam

The columns, in bytes per weight and step, are the traffic to and from HBM, read off the scheduled HLO, and XLA's
temporaries and arguments at the peak. A leaf of 2048 x 2048 fits into the chip's fast memory, and one of 8192 x 8192
does not: look at both. The exit status is 1 if a row is above its target.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

# libtpu reads these when it starts, and then describes machines that are not present.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
from figures import note
from jax.experimental import topologies

from optax_clipquant import (
    Ternary,
    Uniform,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    quantize_state,
    quantize_weights,
)

PyTree = Any
BATCH = 256
_WIDTHS = {"pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}  # fmt: skip
# Instructions that only name or view results of others, and the ends of copies, which are counted at their start.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "copy-done", "slice-done", "after-all", "custom-call"}  # fmt: skip
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")


@dataclasses.dataclass(frozen=True)
class Program:
    """The costs of a compiled program, in bytes, and its compile time, in seconds.

    Attributes:
      hbm: the traffic to and from HBM.
      temporaries: the memory besides arguments and results.
      arguments: the memory of the arguments.
      seconds: the compile time.
    """

    hbm: float
    temporaries: float
    arguments: float
    seconds: float

    @property
    def peak(self) -> float:
        """The memory of arguments, most of which are donated, and temporaries."""
        return self.arguments + self.temporaries


def measure(fn: Callable[..., Any], *args: PyTree, donate: tuple[int, ...] = ()) -> Program:
    """Compiles ``fn`` for one chip of a v5e.

    Args:
      fn: a function of arrays.
      *args: trees of arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes are used.
      donate: the numbers of the arguments that may be overwritten.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    here = jax.NamedSharding(jax.sharding.Mesh(topology.devices[:1], ("x",)), jax.P())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), args)
    lowered = jax.jit(fn, donate_argnums=donate).lower(*args)
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    return Program(
        hbm_bytes(program.as_text()),
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        seconds,
    )


def hbm_bytes(text: str) -> float:
    """Bytes to and from HBM in a scheduled HLO module.

    Each instruction reads its operands and writes its results, unless they live in VMEM (memory space 1). Where a
    fusion only slices an operand, it reads the slices. Loops count as often as they run.
    """
    computations, entry = _computations(text)
    return _moved(entry, computations)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?.*\{$", line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def _parts(shape: str) -> list[tuple[float, bool]]:
    """The size of each array in a shape, and whether it lives in HBM."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)
    return [
        (
            math.prod(int(n) for n in dims.split(",") if n) * _WIDTHS.get(dtype, 4),
            "S(1)" not in layout,
        )
        for dtype, dims, layout in arrays
    ]


def _moved(name: str, computations: dict[str, list[str]]) -> float:
    sizes: dict[str, list[tuple[float, bool]]] = {}
    total = 0.0
    for line in computations[name]:
        if not (m := _INSTRUCTION.match(line)):
            continue
        result, shape, op, rest = m.groups()
        sizes[result] = parts = _parts(shape)
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        if op == "while" and (body := re.search(r"body=%?([\w.\-]+)", rest)):
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            total += int(times[1] if times else 1) * _moved(body[1], computations)
        elif op in ("copy-start", "slice-start"):
            size, in_hbm = parts[1 if op == "slice-start" else 0]
            total += size * (in_hbm + any(h for o in operands for _, h in sizes.get(o, [])))
        elif op in ("call", "async-start") and (called := re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", rest)):  # fmt: skip
            total += _moved(called[1], computations)
        elif op not in _FREE:
            fused = re.search(r"calls=%?([\w.\-]+)", rest)
            slices, update = _sliced(computations.get(fused[1], []) if fused else [line])
            if update is not None and len(parts) == 1:
                parts = [(update, parts[0][1])]
            total += sum(size for size, in_hbm in parts if in_hbm)
            for i, operand in enumerate(operands):
                known = sizes.get(operand, [])
                total += sum(slices.get(i, size) for size, in_hbm in known if in_hbm)
    return total


def _sliced(lines: list[str]) -> tuple[dict[int, float], float | None]:
    """The bytes that a fusion reads of operands that it only slices or updates in part, and the bytes it writes."""
    made: dict[str, tuple[str, float, list[str]]] = {}
    uses: dict[str, list[tuple[str, int]]] = {}
    numbers, root = {}, ""
    for line in lines:
        if not (m := _INSTRUCTION.match(line)):
            continue
        name, shape, op, rest = m.groups()
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        made[name] = op, sum(size for size, _ in _parts(shape)), operands
        if op == "parameter":
            numbers[name] = int(rest.split(")")[0])
        for position, operand in enumerate(operands):
            uses.setdefault(operand, []).append((name, position))
        root = name if "ROOT" in line else root

    def read(name: str) -> float | None:
        total = 0.0
        for user, position in uses.get(name, []):
            op, size, _ = made[user]
            if op in ("dynamic-slice", "slice") and position == 0:
                total += size
            elif op == "bitcast" and (part := read(user)) is not None:
                total += part
            elif op != "dynamic-update-slice" or position:
                return None
        return total

    found = {i: part for name, i in numbers.items() if (part := read(name)) is not None}
    while root and made[root][0] == "bitcast":
        root = made[root][2][0]
    if root and made[root][0] == "dynamic-update-slice" and made[root][2][1] in made:
        return found, made[made[root][2][1]][1]
    return found, None


def training_step(
    tx: optax.GradientTransformation, leaves: int, size: int, batch: int = BATCH
) -> Program:
    """A training step of square layers with tanh in between and mean squared error; params and state are donated."""

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return jnp.mean(jnp.square(x - 0.5))

    def step(params: PyTree, state: PyTree, x: jax.Array) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    kernel = jax.ShapeDtypeStruct((size, size), jnp.float32)
    params = {f"k{i}": kernel for i in range(leaves)}
    x = jax.ShapeDtypeStruct((batch, size), jnp.float32)
    return measure(step, params, jax.eval_shape(tx.init, params), x, donate=(0, 1))


@dataclasses.dataclass(frozen=True)
class Row:
    """A transform, and the targets for the HBM traffic and the temporaries of its step.

    Attributes:
      tx: the whole chain.
      hbm: bytes per weight and step for two leaves of 8192 x 8192.
      temporaries: bytes per weight.
    """

    tx: optax.GradientTransformation
    hbm: float | None = None
    temporaries: float | None = None


_ADAM = optax.adam(1e-3)
STEPS = {
    "adam": Row(_ADAM),
    "optax.clip": Row(optax.chain(optax.clip(1.0), _ADAM)),
    "clip_by_value": Row(optax.chain(clip_by_value(1.0), _ADAM), 30.5, 0.1),
    "clip_by_quantile": Row(optax.chain(clip_by_quantile(), _ADAM), 30.5, 0.1),
    "optax.clip_by_global_norm": Row(optax.chain(optax.clip_by_global_norm(1.0), _ADAM)),
    "clip_by_zscore": Row(optax.chain(clip_by_zscore(), _ADAM), 38.2, 4.1),
    "4 bits": Row(optax.chain(_ADAM, quantize_weights(Uniform(4))), 46.5, 0.3),
    "4 bits, groups of 32": Row(
        optax.chain(_ADAM, quantize_weights(Uniform(4, group_size=32))), 51.5, 0.3
    ),
    "3 bits, least squares": Row(optax.chain(_ADAM, quantize_weights(Uniform(3))), 50.5, 0.3),
    "ternary": Row(optax.chain(_ADAM, quantize_weights(Ternary())), 50.5, 0.3),
    "4 bits, 8-bit residual": Row(
        optax.chain(_ADAM, quantize_weights(Uniform(4), residual_bits=8)), 44.5, 2.1
    ),
    "8-bit state": Row(quantize_state(_ADAM, min_size=0), 33.0, 2.3),
    "4-bit state": Row(quantize_state(_ADAM, bits=4, min_size=0), 33.0, 2.3),
}


def versions() -> str:
    """The versions of the packages that determine the figures."""
    return f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--leaves", type=int, default=2)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument(
        "--json", action="store_true", help="print JSON in one line instead of a table"
    )
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in STEPS]:
        parser.error(f"no step named {', '.join(unknown)}; there are {', '.join(STEPS)}")
    names = args.names or list(STEPS)
    weights = args.leaves * args.size**2
    console = rich.console.Console(stderr=args.json)
    table = rich.table.Table(
        title=f"One step on a TPU v5e, {args.leaves} leaves of {args.size} x {args.size}, bytes a weight",
        caption=versions(),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("step")
    for column in ("HBM", "temporaries", "arguments", "compile s", "target"):
        table.add_column(column, justify="right")
    found, missed = {}, False
    for name in rich.progress.track(names, console=console, description="compiling"):
        row = STEPS[name]
        program = training_step(row.tx, args.leaves, args.size)
        found[name] = dataclasses.asdict(program) | {"weights": weights}
        hbm, held, given = (
            x / weights for x in (program.hbm, program.temporaries, program.arguments)
        )
        note("HBM bytes a weight on a v5e", name, hbm, row.hbm)
        note("temporaries a weight on a v5e", name, held, row.temporaries)
        target = ""
        if row.hbm is not None and row.temporaries is not None:
            above = hbm > row.hbm or held > row.temporaries
            missed |= above
            target = f"{row.hbm:g} / {row.temporaries:g} {'missed' if above else 'met'}"
        table.add_row(
            name, f"{hbm:.2f}", f"{held:.2f}", f"{given:.2f}", f"{program.seconds:.1f}", target
        )
    if args.json:
        print(json.dumps(found))
    else:
        console.print(table)
        sys.exit(int(missed))


if __name__ == "__main__":
    main()
