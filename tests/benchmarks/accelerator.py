"""HBM traffic and memory on a TPU v5e, from compilation alone: no TPU is needed. Or times on a real device.

    pip install -e '.[tpu-aot]'
    python tests/benchmarks/accelerator.py                      # a training step of each transform
    python tests/benchmarks/accelerator.py --leaves 8 --size 2048 "8-bit state" "4-bit state"
    python tests/benchmarks/accelerator.py --part state         # other leaves, other optimizers
    python tests/benchmarks/accelerator.py --part serving       # products with quantized weights
    python tests/benchmarks/accelerator.py --part recipe        # a scanned transformer of a billion weights
    python tests/benchmarks/accelerator.py --device gpu         # seconds of each step on a device that is present

The traffic is read off the scheduled HLO; the peak is what arguments and XLA's temporaries take together, with
params and state donated. A leaf of 2048 x 2048 fits into the chip's fast memory, and one of 8192 x 8192 does not:
look at both. The exit status is 1 if a row is above its target.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

if "--device" not in sys.argv:
    import tpu  # before jax, see there

import jax
import jax.numpy as jnp
import optax
import rich.box
import rich.console
import rich.markup
import rich.progress
import rich.table
import transformer
from figures import note, verdict

from optax_clipquant import (
    Binary,
    NormalFloat,
    Ternary,
    Uniform,
    ZScore,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    narrow,
    quantize_state,
    quantize_weights,
    trace_weights,
)

PyTree = Any
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
      cells: the first names the row.
      limits: the target of a column, by its number.
    """

    cells: tuple[str | float, ...]
    limits: dict[int, float] = dataclasses.field(default_factory=dict)


def show(title: str, columns: list[str], rows: Iterator[Row], total: int, caption: str) -> bool:
    """Prints the rows as they are found, and returns whether all targets are met."""
    table = rich.table.Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate([*columns, "target"]):
        table.add_column(column, justify="right" if i else "left")
    met = True
    for row in rich.progress.track(rows, total=total, description="compiling", transient=True):
        said = []
        for i, limit in row.limits.items():
            value = float(row.cells[i])
            note(f"v5e, {columns[i]}", str(row.cells[0]), value, limit)
            met &= value <= limit
            said.append(f"{limit:g} {verdict(value, limit)}")
        cells = [f"{x:.2f}" if isinstance(x, float) else x for x in row.cells]
        table.add_row(*cells, ", ".join(said))
    rich.console.Console().print(table)
    return met


# A training step of each transform.


@dataclasses.dataclass(frozen=True)
class Step:
    """A chain, and the targets for the HBM traffic and the temporaries of its step.

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
    "adam": Step(_ADAM),
    "optax.clip": Step(optax.chain(optax.clip(1.0), _ADAM)),
    "clip_by_value": Step(optax.chain(clip_by_value(1.0), _ADAM), 30.5, 0.1),
    "clip_by_quantile": Step(optax.chain(clip_by_quantile(), _ADAM), 30.5, 0.1),
    "optax.clip_by_global_norm": Step(optax.chain(optax.clip_by_global_norm(1.0), _ADAM)),
    "clip_by_zscore": Step(optax.chain(clip_by_zscore(), _ADAM), 38.2, 4.1),
    "4 bits": Step(optax.chain(_ADAM, quantize_weights(Uniform(4))), 46.5, 0.3),
    "4 bits, groups of 32": Step(
        optax.chain(_ADAM, quantize_weights(Uniform(4, group_size=32))), 51.5, 0.3
    ),
    "3 bits, least squares": Step(optax.chain(_ADAM, quantize_weights(Uniform(3))), 50.5, 0.3),
    "ternary": Step(optax.chain(_ADAM, quantize_weights(Ternary())), 50.5, 0.3),
    "4 bits, 8-bit residual": Step(
        optax.chain(_ADAM, quantize_weights(Uniform(4), residual_bits=8)), 44.5, 2.1
    ),
    "8-bit state": Step(quantize_state(_ADAM, min_size=0), 33.0, 2.3),
    "4-bit state": Step(quantize_state(_ADAM, bits=4, min_size=0), 33.0, 2.3),
}


def dense(params: PyTree, x: jax.Array) -> jax.Array:
    """Square layers with tanh in between, and the mean squared error."""
    for kernel in params.values():
        x = jnp.tanh(x @ kernel)
    return jnp.mean(jnp.square(x - 0.5))


Loss = Callable[[PyTree, Any], jax.Array]


def step_of(tx: optax.GradientTransformation, loss: Loss) -> Callable[..., tuple[PyTree, PyTree]]:
    def step(params: PyTree, state: PyTree, x: Any) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


def square(leaves: int, size: int, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    return {f"k{i}": jax.ShapeDtypeStruct((size, size), dtype) for i in range(leaves)}


def training_step(
    tx: optax.GradientTransformation,
    params: PyTree,
    x: Any,
    loss: Loss = dense,
) -> "tpu.Program":
    """A compiled training step; params and state are donated."""
    return tpu.measure(step_of(tx, loss), params, jax.eval_shape(tx.init, params), x, donate=(0, 1))


def batch(size: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((BATCH, size), dtype)


def steps(names: list[str], leaves: int, size: int) -> Iterator[Row]:
    weights = leaves * size**2
    for name in names:
        step = STEPS[name]
        program = training_step(step.tx, square(leaves, size), batch(size))
        costs = (program.hbm, program.temporaries, program.arguments)
        limits = {1: step.hbm, 2: step.temporaries}
        yield Row(
            (name, *(x / weights for x in costs), program.seconds),
            {i: limit for i, limit in limits.items() if limit is not None},
        )


# The peak memory of quantized state, relative to the float state's.


def vectors(params: PyTree, x: jax.Array) -> jax.Array:
    for scale in params.values():
        x = jnp.tanh(x * scale)
    return jnp.mean(jnp.square(x - 0.5))


def convolutions(params: PyTree, x: jax.Array) -> jax.Array:
    for kernel in params.values():
        layout = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        x = jnp.tanh(
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
        )
    return jnp.mean(jnp.square(x - 0.5))


def heads(params: PyTree, x: jax.Array) -> jax.Array:
    for kernel in params.values():
        x = jnp.einsum("bhk,dhk->bd", jnp.tanh(jnp.einsum("bd,dhk->bhk", x, kernel)), kernel)
    return jnp.mean(jnp.square(x - 0.5))


def tied(params: PyTree, tokens: jax.Array) -> jax.Array:
    logits = params["embedding"][tokens] @ params["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def _many(count: int, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {f"w{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(count)}


# Params, input and loss. The token batch is small, so that logits do not hide the state.
LEAVES: dict[str, tuple[PyTree, Any, Loss]] = {
    "8 of 2048 x 2048": (square(8, 2048), batch(2048), dense),
    "the same in bfloat16": (square(8, 2048, jnp.bfloat16), batch(2048, jnp.bfloat16), dense),
    "2 of 8192 x 8192": (square(2, 8192), batch(8192), dense),
    "64 vectors of 16,384": (_many(64, 16384), jax.ShapeDtypeStruct((8, 16384), jnp.float32), vectors),
    "a vector of 8,388,608": (_many(1, 2**23), jax.ShapeDtypeStruct((1,), jnp.float32), vectors),
    "8 convolutions of 3 x 3 x 512 x 512": (
        _many(8, 3, 3, 512, 512),
        jax.ShapeDtypeStruct((4, 16, 16, 512), jnp.float32),
        convolutions,
    ),
    "8 of 2048 x 12 x 128": (_many(8, 2048, 12, 128), batch(2048), heads),
    **{
        f"{rows:,} rows of 768": (
            {"embedding": jax.ShapeDtypeStruct((rows, 768), jnp.float32)},
            jax.ShapeDtypeStruct((64,), jnp.int32),
            tied,
        )
        for rows in (50257, 50304)
    },
    "10,000 x 4000": (_many(1, 10000, 4000), batch(10000), dense),
    "convolution of 3 x 3 x 1000 x 1000": (
        _many(1, 3, 3, 1000, 1000),
        jax.ShapeDtypeStruct((4, 16, 16, 1000), jnp.float32),
        convolutions,
    ),
}  # fmt: skip
# With one slot for each weight, two, three, or factored ones, which stay float.
OPTIMIZERS = {
    "adam": _ADAM,
    "lion": optax.lion(1e-4),
    "sgd, momentum": optax.sgd(1e-3, momentum=0.9),
    "adafactor": optax.adafactor(1e-3),
    "muon": optax.contrib.muon(1e-3),
    "ademamix": optax.contrib.ademamix(1e-3),
}
TWO_SLOTS = ("adam", "ademamix")


def states(names: list[str]) -> Iterator[Row]:
    """Peaks in bytes per weight; the target is at most .75 with two slots or more, and 1 with others."""
    cases = {name: (_ADAM, *LEAVES[name]) for name in LEAVES} | {
        f"{name}, 8 of 2048 x 2048": (tx, *LEAVES["8 of 2048 x 2048"])
        for name, tx in OPTIMIZERS.items()
        if name != "adam"
    }
    for name, (tx, params, x, loss) in cases.items():
        if names and name not in names:
            continue
        weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        plain = training_step(tx, params, x, loss).peak
        cells, limits = [name, plain / weights], {}
        limit = 0.75 if tx is _ADAM or name.split(",")[0] in TWO_SLOTS else 1.0
        for bits in (8, 4):
            peak = training_step(quantize_state(tx, bits=bits), params, x, loss).peak
            limits[len(cells) + 1] = limit
            cells += [peak / weights, peak / plain]
        yield Row(tuple(cells), limits)


# Products with quantized weights.

SIDE = 4096
QUANTIZERS = {
    "8 bits": Uniform(8),
    "6 bits": Uniform(6),
    "5 bits": Uniform(5),
    "4 bits": Uniform(4),
    "4 bits, groups of 32": Uniform(4, group_size=32),
    "4 bits affine": Uniform(4, symmetric=False),
    "4 bits affine, groups of 32": Uniform(4, group_size=32, symmetric=False),
    "3 bits": Uniform(3),
    "3 bits, groups of 32": Uniform(3, group_size=32),
    "2 bits": Uniform(2),
    "1 bit": Binary(),
    "ternary": Ternary(),
    "z-scores, R=7": ZScore(7),
    "normal float, groups of 64": NormalFloat(4),
}


def into(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w.astype(x.dtype)


def out_of(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w.astype(x.dtype).T


def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer.astype(x.dtype)), None), x, w)[0]


def rows_of(w: jax.Array, x: jax.Array) -> jax.Array:
    return w[x].astype(jnp.bfloat16)


def taken(w: jax.Array, x: jax.Array) -> jax.Array:
    """As Flax's embeddings do."""
    return jnp.take(w, x, axis=0).astype(jnp.bfloat16)


# How a weight is used, its shape, and whether the input is tokens.
FORMS: dict[str, tuple[Callable[[Any, jax.Array], jax.Array], tuple[int, ...], bool]] = {
    "in x out": (into, (SIDE, SIDE), False),
    "out x in": (out_of, (SIDE, SIDE), False),
    "scanned": (scanned, (4, SIDE, SIDE), False),
    "w[tokens]": (rows_of, (8 * SIDE, 1024), True),
    "jnp.take": (taken, (8 * SIDE, 1024), True),
    "tied logits": (out_of, (8 * SIDE, 1024), False),
}
PRODUCTS = {
    f"{name}: {form}": (quantizer, form) for name, quantizer in QUANTIZERS.items() for form in FORMS
}
BATCHES = (1, 8, 512)


def served(quantizer: Any, form: str, rows: int) -> tuple["tpu.Program", float, float]:
    """The program, the bytes of codes and scales, and those of input and result."""
    fn, shape, tokens = FORMS[form]
    width = shape[0] if fn is into else shape[-1]
    x = jax.ShapeDtypeStruct((rows,), jnp.int32) if tokens else jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)  # fmt: skip
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    use = trace_weights(lambda p, x: fn(p["w"], x), {"w": w}, x)["w"]
    q = jax.eval_shape(lambda w: narrow(quantizer.quantize(w, use=use)), w)
    program = tpu.measure(fn, q, x)
    held = sum(a.size * jax.dtypes.itemsize_bits(a.dtype) / 8 for a in jax.tree.leaves(q))
    out = jax.eval_shape(fn, q, x)
    around = sum(a.size * a.dtype.itemsize for a in (x, out))
    return program, held, around


def serving(names: list[str]) -> Iterator[Row]:
    """For each form and batch, the HBM traffic over the bytes of codes and scales."""
    for name in names:
        quantizer, form = PRODUCTS[name]
        cells: list[str | float] = [rich.markup.escape(name)]
        limits = {}
        held, temporaries = math.nan, math.nan
        for rows in BATCHES:
            try:
                program, held, around = served(quantizer, form, rows)
            except jax.errors.JaxRuntimeError as error:
                if "is not supported" not in str(error):
                    raise
                # By libtpu, which has no such access to codes below a byte.
                cells.append("refused")
                continue
            cells.append((program.hbm - around) / held)
            limits[len(cells) - 1], temporaries = 1.1, program.temporaries
        size = math.prod(FORMS[form][1])
        yield Row((*cells, held / size, temporaries / size), limits)


# A scanned transformer.


def recipe(layers: int) -> Iterator[Row]:
    """Peaks are in GiB; a program that does not fit into the chip's 15.75 GiB has no other figure.

    Compile time is the processor's. It hardly depends on the number of layers, so that with fewer layers, which
    fit in float too, it can be compared.
    """
    params, tokens = transformer.shapes(layers), jax.ShapeDtypeStruct((8, 1025), jnp.int32)
    uses = trace_weights(transformer.loss, params, tokens)
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    adam = optax.adamw(1e-3)
    on_grid = quantize_weights(Uniform(4), uses=uses, residual_bits=8)
    chains = {
        "float AdamW": adam,
        "8-bit state": quantize_state(adam),
        "with 4-bit weights, 8-bit residual": optax.chain(quantize_state(adam), on_grid),
    }  # fmt: skip
    first_peak, first_seconds = math.nan, math.nan
    for name, tx in chains.items():
        begin = time.process_time()
        try:
            program = training_step(tx, params, tokens, transformer.loss)
        except jax.errors.JaxRuntimeError as error:
            if (needed := re.search(r"total memory required .*?\((.*?)G\)", str(error))) is None:
                raise
            peak, costs, fits = float(needed[1]), ("does not fit", "", ""), False
        else:
            peak, fits = program.peak / 2**30, True
            costs = tuple(
                x / weights for x in (program.arguments, program.temporaries, program.hbm)
            )
        seconds = time.process_time() - begin
        if tx is adam:
            first_peak, first_seconds = peak, seconds if fits else math.inf
        limits = {2: 0.75, 6: 3.0} if name.startswith("with") else {}
        yield Row((name, peak, peak / first_peak, *costs, seconds / first_seconds), limits)


# Times on a device that is present.


def in_turns(
    runs: dict[str, Callable[[], Any]], calls: int, repeats: int = 7
) -> dict[str, tuple[float, float]]:
    """Milliseconds of a call, and relative to the first run: medians over turns in which all take part.

    So what else the machine does hits all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in rich.progress.track(range(repeats + 1), description="measuring", transient=True):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(calls - 1):
                run()
            jax.block_until_ready(run())
            if turn:  # the first compiles
                seconds[name].append((time.perf_counter() - begin) / calls)
    base = next(iter(seconds.values()))
    return {
        name: (
            statistics.median(found) * 1e3,
            statistics.median(a / b for a, b in zip(found, base, strict=True)),
        )
        for name, found in seconds.items()
    }


def timed(names: list[str], leaves: int, size: int) -> list[Row]:
    shapes = square(leaves, size)
    x = jax.random.normal(jax.random.key(0), (BATCH, size))
    runs, peaks = {}, {}
    for name in names:
        tx = STEPS[name].tx
        params = {
            k: jax.random.normal(jax.random.key(i), s.shape) / size**0.5
            for i, (k, s) in enumerate(shapes.items())
        }
        program = jax.jit(step_of(tx, dense), donate_argnums=(0, 1))
        held = [(params, jax.jit(tx.init)(params))]
        memory = program.lower(*held[0], x).compile().memory_analysis()
        peaks[name] = memory.argument_size_in_bytes + memory.temp_size_in_bytes

        def run(program: Any = program, held: list[Any] = held) -> Any:
            held[0] = program(*held[0], x)
            return held[0]

        runs[name] = run
    found = in_turns(runs, calls=10)
    return [Row((name, *found[name], peaks[name] / (leaves * size**2))) for name in names]


def served_in_time(size: int) -> list[Row]:
    """``x @ w`` beside bfloat16 and qwix."""
    import qwix

    w = (jax.random.normal(jax.random.key(0), (size, size)) / size**0.5).astype(jnp.bfloat16)
    how = {
        "bfloat16": w,
        "8 bits": narrow(Uniform(8).quantize(w)),
        "4 bits": narrow(Uniform(4).quantize(w)),
        "4 bits, groups of 32": narrow(Uniform(4, group_size=32).quantize(w)),
        "qwix int8": qwix.quantize(w, jnp.int8, channelwise_axes=[1]),
        "qwix int4": qwix.quantize(w, jnp.int4, channelwise_axes=[1]),
    }

    @jax.jit
    def product(w: Any, x: jax.Array) -> jax.Array:
        return x @ (qwix.dequantize(w) if isinstance(w, qwix.QArray) else w.astype(x.dtype))

    rows = []
    for count in BATCHES:
        x = jnp.ones((count, size), jnp.bfloat16)
        runs = {name: functools.partial(product, weight, x) for name, weight in how.items()}
        found = in_turns(runs, calls=20)
        rows += [Row((f"{count}: {name}", *times)) for name, times in found.items()]
    return rows


def on_device(platform: str, names: list[str], leaves: int, size: int) -> None:
    device = jax.devices(platform)[0]
    caption = f"{device.device_kind}, jax {jax.__version__}"
    with jax.default_device(device):
        rows = timed(names, leaves, size)
        show(
            f"One step, {leaves} leaves of {size} x {size}",
            ["step", "ms", "relative", "peak, bytes per weight"],
            iter(rows),
            len(rows),
            caption,
        )
        rows = served_in_time(size)
        columns = ["rows: weight", "ms", "relative"]
        show(f"x @ w, {size} x {size}", columns, iter(rows), len(rows), caption)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="only these rows")
    parser.add_argument("--part", choices=("steps", "state", "serving", "recipe"), default="steps")
    parser.add_argument("--leaves", type=int, default=2, help="of the steps")
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of a leaf")
    parser.add_argument("--layers", type=int, default=14, help="of the recipe's transformer")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="measure on this instead")
    parser.add_argument("--json", action="store_true", help="print the steps as JSON in one line")
    args = parser.parse_args()
    known = {"steps": STEPS, "state": None, "serving": PRODUCTS, "recipe": {}}[args.part]
    if known is not None and (unknown := [name for name in args.names if name not in known]):
        parser.error(f"no row named {', '.join(unknown)}; there are {', '.join(known)}")
    names = args.names or list(known or {})
    if args.device:
        if args.part != "steps":
            parser.error("--device measures steps and products at once, and takes no --part")
        on_device(args.device, names, args.leaves, args.size)
        return
    if args.json:
        weights = args.leaves * args.size**2
        found = {
            name: dataclasses.asdict(
                training_step(STEPS[name].tx, square(args.leaves, args.size), batch(args.size))
            )
            | {"weights": weights}
            for name in names
        }
        print(json.dumps(found))
        return
    caption = tpu.versions()
    if args.part == "steps":
        met = show(
            f"One step on a TPU v5e, {args.leaves} leaves of {args.size} x {args.size}, bytes per weight",
            ["step", "HBM", "temporaries", "arguments", "compile s"],
            steps(names, args.leaves, args.size),
            len(names),
            caption,
        )
    elif args.part == "state":
        met = show(
            "Peak memory of a step on a TPU v5e, bytes per weight, and relative to float state",
            ["leaves", "float", "8 bits", "relative 8", "4 bits", "relative 4"],
            states(args.names),
            len(args.names) or len(LEAVES) + len(OPTIMIZERS) - 1,
            caption,
        )
    elif args.part == "serving":
        met = show(
            "HBM traffic of a product on a TPU v5e, relative to codes and scales",
            ["weight", *(f"{rows} rows" for rows in BATCHES), "bytes per weight", "temporaries"],
            serving(names),
            len(names),
            caption,
        )
    else:
        met = show(
            f"A step of a scanned transformer on a TPU v5e, {args.layers} layers, 8 x 1024 tokens, bytes per weight",
            ["optimizer", "peak, GiB", "relative", "arguments", "temporaries", "HBM", "compile time"],
            recipe(args.layers),
            3,
            caption,
        )  # fmt: skip
    sys.exit(int(not met))


if __name__ == "__main__":
    main()
