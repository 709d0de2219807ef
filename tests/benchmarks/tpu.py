"""Compiles for one chip of a TPU v5e, which need not be present, and reads off what a program costs there.

Import this before jax: libtpu reads its settings when it starts.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

# With these, libtpu describes machines that are not present.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
from jax.experimental import topologies

PyTree = Any
_WIDTHS = {"pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}  # fmt: skip
# Instructions that only name or view results of others, and the ends of copies, which are counted at their start.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "copy-done", "slice-done", "after-all", "custom-call"}  # fmt: skip
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")


@dataclasses.dataclass(frozen=True)
class Program:
    """The costs of a compiled program, in bytes, and its compile time, in seconds of the processor.

    Attributes:
      hbm: the traffic to and from HBM.
      temporaries: the memory besides arguments and results.
      arguments: the memory of the arguments.
      seconds: the compile time, of the processor.
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
    start = time.process_time()
    program = lowered.compile()
    seconds = time.process_time() - start
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


def versions() -> str:
    """The versions of the packages that determine the figures."""
    return f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
