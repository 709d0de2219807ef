"""What compiling a language model's step costs: seconds and memory, relative to the float step.

30 blocks in the shapes of SmolLM2-135M, each with leaves for itself: 272 leaves, 210 of them matrices in
four shapes. Everything on: ``clip_by_quantile``, 8-bit state, 4-bit weights with an 8-bit residual. Nothing is run but
``quantize_params``. Each case has a process to itself, and its seconds are those of the processor, tracing
included, for what else the machine does adds less to them.

    python tests/benchmarks/compile.py
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.table
from figures import note, verdict

from optax_clipquant import (
    Uniform,
    clip_by_quantile,
    clip_by_value,
    quantize_params,
    quantize_state,
    quantize_weights,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import smollm2

WIDTH, KV, HIDDEN, VOCABULARY, LENGTH = 576, 192, 1536, 49152, 128
BLOCK = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, KV), "attn_v": (WIDTH, KV),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH),
    "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
}  # fmt: skip
CONFIG = smollm2.Config(heads=9, kv_heads=3, epsilon=1e-5, base=1e4)
STEPS = {
    "float": optax.adam(1e-3),
    "clip_by_value": optax.chain(clip_by_value(1.0), optax.adam(1e-3)),
    "clip_by_quantile": optax.chain(clip_by_quantile(), optax.adam(1e-3)),
    "8-bit state": quantize_state(optax.adam(1e-3)),
    "4 bits": optax.chain(optax.adam(1e-3), quantize_weights(Uniform(4))),
    "4 bits, 8-bit residual": optax.chain(
        optax.adam(1e-3), quantize_weights(Uniform(4), residual_bits=8)
    ),
    "everything": optax.chain(
        clip_by_quantile(),
        quantize_state(optax.adam(1e-3)),
        quantize_weights(Uniform(4), residual_bits=8),
    ),
}
# Name, and the target for its ratio of seconds; that for memory is MEMORY.
CASES: dict[str, float | None] = {
    **dict.fromkeys(STEPS),
    "everything": 3.0,
    "everything, init": 1.5,
    "quantize_params": 1.5,
}
MEMORY = 1.5


def shapes(layers: int) -> Any:
    params = {
        "token_embd": (VOCABULARY, WIDTH),
        "blocks": [dict(BLOCK) for _ in range(layers)],
        "output_norm": (WIDTH,),
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def step_of(tx: optax.GradientTransformation) -> Any:
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["token_embd"][tokens[:-1]]
        for weights in params["blocks"]:
            x = smollm2.block(CONFIG, x, weights)
        logits = smollm2.normalised(CONFIG, x, params["output_norm"]) @ params["token_embd"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def work(case: str, layers: int) -> None:
    """Compiles ``case``, and tells seconds and bytes on stdout."""
    params, tokens = shapes(layers), jax.ShapeDtypeStruct((LENGTH + 1,), jnp.int32)
    name = case.removesuffix(", init")
    jax.jit(lambda x: x + 1)(jnp.zeros(3))  # loads the compiler
    if case == "quantize_params":
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    begin, wall = time.process_time(), time.perf_counter()
    if case == "quantize_params":
        jax.block_until_ready(quantize_params(params, Uniform(4)))
    elif case != name:
        jax.jit(STEPS[name].init).lower(params).compile()
    else:
        state = jax.eval_shape(STEPS[name].init, params)
        lowered = step_of(STEPS[name]).lower(params, state, tokens)
        traced = time.process_time() - begin
        program = lowered.compile()
        print(f"traced {traced:.1f}", program.memory_analysis(), file=sys.stderr)
        if path := os.environ.get("HLO"):
            pathlib.Path(path).write_text(program.as_text())
    seconds = time.process_time() - begin, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([*seconds, peak]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--work", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.layers)
        return
    console = rich.console.Console()
    table = rich.table.Table(
        title=f"compiling a language model of {args.layers} blocks, {os.cpu_count()} cores, jax {jax.__version__}"
    )
    for column in ("program", "CPU s", "s", "ratio", "target", "", "peak GB", "ratio"):
        table.add_column(column, justify="left" if column == "program" else "right")
    found: dict[str, tuple[float, float, float]] = {}
    for case in ["float", *(case for case in args.cases if case != "float")]:
        command = [sys.executable, __file__, "--work", case, "--layers", str(args.layers)]
        result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found[case] = cpu, wall, peak = json.loads(result.stdout)
        ratio, target = cpu / found["float"][0], CASES[case]
        memory = peak / found["float"][2]
        if case != "float":
            note("compiling a language model, to float", case, ratio, target)
            note("memory to compile a language model, to float", case, memory, MEMORY)
        table.add_row(
            case, f"{cpu:.1f}", f"{wall:.1f}", f"{ratio:.2f}", f"{target or ''}", verdict(ratio, target),
            f"{peak / 1e9:.2f}", f"{memory:.2f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
