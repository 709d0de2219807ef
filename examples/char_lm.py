"""A character-level language model: automatic clipping bounds, and optimizer state in 8 and 4 bits.

A small transformer, whose blocks are scanned over stacked weights, learns a text, first with SGD with
momentum at a learning rate that is too high for it, with four kinds of clipping; then with AdamW at a good
learning rate, with the state in float, in 8 and in 4 bits per number, and with the weights on a 4-bit grid
too. All runs of a seed share initial values and batches.

    python examples/char_lm.py                      # the topics of Python's help(), one seed
    python examples/char_lm.py --text FILE --seeds 3
    python examples/char_lm.py --part state --steps 200
"""

import argparse
import dataclasses
import functools
import pathlib
import pydoc_data
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
from flax.training.train_state import TrainState

from optax_clipquant import (
    Uniform,
    Uses,
    clip_by_quantile,
    clip_by_value,
    clip_by_zscore,
    clip_fractions,
    dequantize_params,
    export_params,
    load,
    plots,
    quantize_params,
    quantize_state,
    quantize_weights,
    save,
    softness_schedule,
    trace_weights,
)

LENGTH = 96  # characters in a window
COMMON = 95  # characters that get separate codes
WIDTH, HEADS, BLOCKS = 128, 4, 2
GRID = Uniform(bits=4)
REPORT = 10  # steps between two updates of the progress bar


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        attention = nn.MultiHeadDotProductAttention(num_heads=HEADS)
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(hidden), None


class Transformer(nn.Module):
    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next character, at each position."""
        x = nn.Embed(self.vocabulary, WIDTH)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))[None]
        mask = nn.make_causal_mask(tokens)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=BLOCKS,
        )
        x, _ = blocks(name="blocks")(x, mask)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


@dataclasses.dataclass(frozen=True)
class Text:
    training: np.ndarray
    validation: np.ndarray  # windows of LENGTH + 1 characters
    vocabulary: int
    title: str


def load_text(path: pathlib.Path | None) -> Text:
    """Loads a text as codes, with the last tenth for validation."""
    title = "the topics of Python's help()" if path is None else path.name
    source = path or pathlib.Path(pydoc_data.__path__[0]) / "topics.py"
    text = source.read_text(encoding="utf-8", errors="replace")
    found, counts = np.unique(np.array(list(text)), return_counts=True)
    common = found[np.argsort(-counts, kind="stable")[:COMMON]]
    code = {c: i + 1 for i, c in enumerate(common)}  # 0: any other
    codes = np.array([code.get(c, 0) for c in text], np.int32)
    cut = len(codes) * 9 // 10
    windows = (len(codes) - cut) // (LENGTH + 1)
    if windows < 32:
        raise SystemExit(f"{source}: {len(text):,} characters are too few; give 40,000 and more")
    validation = codes[cut : cut + windows * (LENGTH + 1)].reshape(windows, LENGTH + 1)
    return Text(codes[:cut], validation[:: max(windows // 512, 1)], len(common) + 1, title)


def batches(text: Text, size: int, steps: int, seed: int) -> np.ndarray:
    """Random windows of the training part: (steps, size, LENGTH + 1)."""
    starts = np.random.default_rng(seed).integers(
        0, len(text.training) - LENGTH - 1, (steps, size, 1)
    )
    return text.training[starts + np.arange(LENGTH + 1)]


def loss_of(apply_fn: Callable[..., jax.Array], params: Any, windows: jax.Array) -> jax.Array:
    """The loss in bits per character."""
    logits = apply_fn({"params": params}, windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return jnp.mean(losses) / jnp.log(2)


@functools.cache
def model_of(vocabulary: int) -> Transformer:
    """The model, cached so that all runs share its compiled programs."""
    return Transformer(vocabulary)


@functools.cache
def uses_of(vocabulary: int) -> Uses:
    """How the model uses its params, so that each layer of the stacked kernels gets separate scales."""
    model, tokens = model_of(vocabulary), jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return trace_weights(lambda p, tokens: model.apply({"params": p}, tokens), params, tokens)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, windows: jax.Array) -> tuple[TrainState, jax.Array]:
    loss, grads = jax.value_and_grad(lambda p: loss_of(state.apply_fn, p, windows))(state.params)
    return state.apply_gradients(grads=grads), loss


@functools.partial(jax.jit, static_argnums=0)
def validate(apply_fn: Callable[..., jax.Array], params: Any, windows: jax.Array) -> jax.Array:
    return loss_of(apply_fn, params, windows)


@dataclasses.dataclass(frozen=True)
class Run:
    """An optimizer, as a function of the learning rate schedule."""

    name: str
    make: Callable[[optax.Schedule], optax.GradientTransformation]
    on_grid: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    losses: np.ndarray
    bits: float  # per character, on the validation part
    clipped: float  # the mean clip fraction, or the fraction of steps that were rescaled
    bound: float  # the last bound, of transforms that adapt it
    bytes: float  # per weight, of the float32 params and the state
    state_bytes: float
    seconds: float


def clipping_runs(c: float) -> list[Run]:
    def then_sgd(*first: optax.GradientTransformation) -> Any:
        return lambda schedule: optax.chain(*first, optax.sgd(schedule, momentum=0.9))

    return [
        Run("no clipping", then_sgd()),
        Run(f"clip_by_value({c:g})", then_sgd(clip_by_value(c))),
        Run("clip_by_quantile()", then_sgd(clip_by_quantile())),
        Run("clip_by_zscore()", then_sgd(clip_by_zscore())),
    ]


def state_runs(steps: int, uses: Uses) -> list[Run]:
    def shrunk(bits: int) -> Any:
        return lambda schedule: optax.chain(
            clip_by_quantile(), quantize_state(optax.adamw(schedule), bits=bits, block_size=128)
        )

    def all_three(schedule: optax.Schedule, softness: optax.Schedule | None = None) -> Any:
        return optax.chain(
            clip_by_quantile(),
            quantize_state(optax.adamw(schedule), block_size=128),
            quantize_weights(GRID, softness=softness, uses=uses, residual_bits=8),
        )

    annealed = functools.partial(all_three, softness=softness_schedule(0, steps * 3 // 4))
    return [
        Run("float", lambda s: optax.chain(clip_by_quantile(), optax.adamw(s))),
        Run("8-bit state", shrunk(8)),
        Run("4-bit state", shrunk(4)),
        Run("8-bit state, 4-bit weights", all_three, on_grid=True),
        Run("the same, annealed", annealed, on_grid=True),
    ]


def train(
    run: Run, text: Text, rate: float, seed: int, args: argparse.Namespace, progress: Any
) -> Result:
    started = time.perf_counter()
    model = model_of(text.vocabulary)
    params = model.init(jax.random.key(seed), text.validation[:1, :-1])["params"]
    if run.on_grid:
        params = dequantize_params(quantize_params(params, GRID, uses=uses_of(text.vocabulary)))
    schedule = optax.warmup_cosine_decay_schedule(0, rate, args.warmup, args.steps)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=run.make(schedule))
    losses, fractions = [], []
    for step, windows in enumerate(batches(text, args.batch, args.steps, seed), 1):
        state, loss = train_step(state, windows)
        losses.append(loss)
        fractions.append(clip_fraction_of(state.opt_state))
        if step % REPORT == 0 or step == args.steps:
            recent = np.mean([float(x) for x in losses[-REPORT:]])
            note = f"{run.name}, seed {seed}: {recent:.3f} bits per character"
            progress.update(args.task, advance=(step - 1) % REPORT + 1, note=note)
    params = state.params
    if run.on_grid:
        params = through_file(state, args.out / "char-lm-4-bits.safetensors")
    weights = sum(p.size for p in jax.tree.leaves(state.params))
    # Not nbytes, which counts a whole byte for an int4 number.
    state_bits = (
        x.size * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(state.opt_state)
    )
    state_bytes = sum(state_bits) / 8
    threshold = [x for _, x in optax.tree.get_all_with_path(state.opt_state, "threshold")]
    return Result(
        losses=np.array(jax.device_get(losses)),
        bits=float(validate(model.apply, params, text.validation)),
        clipped=float(np.mean(jax.device_get(fractions))),
        bound=float(threshold[0]) if threshold else np.nan,
        bytes=4 + state_bytes / weights,
        state_bytes=state_bytes / weights,
        seconds=time.perf_counter() - started,
    )


def clip_fraction_of(opt_state: Any) -> jax.Array | float:
    """The clip fraction; for ``clip_by_zscore``, whether it rescaled."""
    rescaled = [x for _, x in optax.tree.get_all_with_path(opt_state, "clipped")]
    return (clip_fractions(opt_state) or rescaled or [0.0])[0]


def through_file(state: TrainState, file: pathlib.Path) -> Any:
    """The params loaded from the file, checked to equal the trained ones bit for bit."""
    save(file, export_params(state.params, state.opt_state))
    loaded = load(file)
    for a, b in zip(
        jax.tree.leaves(dequantize_params(loaded)), jax.tree.leaves(state.params), strict=True
    ):
        assert np.array_equal(a, b), "the file does not hold the params"
    return loaded


Results = dict[str, list[Result]]


def run_all(
    runs: list[Run], text: Text, rate: float, args: argparse.Namespace, progress: Any
) -> Results:
    return {
        run.name: [train(run, text, rate, seed, args, progress) for seed in range(args.seeds)]
        for run in runs
    }


def smooth(losses: np.ndarray) -> np.ndarray:
    """A running mean over 20 losses."""
    return np.array([losses[max(0, end - 20) : end].mean() for end in range(1, len(losses) + 1)])


def worst_jump(losses: np.ndarray) -> float:
    """The largest excess of a step's loss over the mean of the 20 before it, or of all if there are fewer."""
    first = min(20, len(losses) - 1)
    return float(np.max(losses[first:] - smooth(losses)[first - 1 : -1])) if first else np.nan


def mean_and_spread(values: list[float]) -> str:
    if not np.all(np.isfinite(values)):
        return f"diverged ({np.sum(~np.isfinite(values))} of {len(values)})"
    digits = ".3f" if np.mean(values) < 1e4 else ".0e"
    spread = f" ±{np.std(values, ddof=1):{digits}}" if len(values) > 1 else ""
    return f"{np.mean(values):{digits}}{spread}"


def clipping_table(results: Results, rate: float, args: argparse.Namespace) -> rich.table.Table:
    table = make_table(f"Learning rate {rate:g}, {args.steps} steps", args)
    for column in (
        "bits per character,\nvalidation",
        "worst jump\nof the loss",
        "clipped",
        "last c",
    ):
        table.add_column(column, justify="right")
    for name, found in results.items():
        jumps = [worst_jump(r.losses) for r in found]
        bound = np.mean([r.bound for r in found])
        table.add_row(
            name,
            mean_and_spread([r.bits for r in found]),
            f"{np.max(jumps):.2f}" if np.all(np.isfinite(jumps)) else "",
            f"{np.mean([r.clipped for r in found]):.2%}",
            f"{bound:.2g}" if np.isfinite(bound) else "",
        )
    return table


def state_table(results: Results, rate: float, args: argparse.Namespace) -> rich.table.Table:
    table = make_table(f"Learning rate {rate:g}, {args.steps} steps", args)
    for column in (
        *("bits per character,\nvalidation", "state, bytes\nper weight"),
        *("with params,\nbytes per weight", "seconds\nper run"),
    ):
        table.add_column(column, justify="right")
    for name, found in results.items():
        table.add_row(
            name,
            mean_and_spread([r.bits for r in found]),
            f"{found[0].state_bytes:.2f}",
            f"{found[0].bytes:.2f}",
            f"{np.mean([r.seconds for r in found]):.0f}",
        )
    return table


def make_table(title: str, args: argparse.Namespace) -> rich.table.Table:
    seeds = "seed 0" if args.seeds == 1 else f"seeds 0 to {args.seeds - 1}, mean and spread"
    table = rich.table.Table(
        title=f"{title}, {seeds}", box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("run")
    return table


def plot(path: pathlib.Path, parts: dict[str, Results]) -> None:
    figure, axes = plots.subplots(len(parts), width=5.5, height=4.2)
    for axis, (title, results) in zip(axes, parts.items(), strict=True):
        curves = {
            name: np.array([smooth(result.losses) for result in found])
            for name, found in results.items()
        }
        plots.curves(axis, curves, ylabel="training loss, bits per character")
        # Diverging curves leave the plot, whose top is near the initial loss.
        every = np.concatenate(list(curves.values()))
        early = every[:, every.shape[1] // 10]
        first = next(iter(results.values()))[0].losses[0]
        axis.set_ylim(
            np.nanmin(every) - 0.1, min(np.max(early[np.isfinite(early)], initial=0), first)
        )
        axis.set_title(title)
    figure.savefig(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=pathlib.Path, help="a text file, instead of Python's help")
    parser.add_argument("--part", choices=("clipping", "state"), help="run only this part")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default 1)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--warmup", type=int, default=20, help="steps in which the learning rate rises"
    )
    parser.add_argument("--batch", type=int, default=24, help="windows per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--high-rate", type=float, default=0.5, help="learning rate of SGD")
    parser.add_argument("--c", type=float, default=1e-2, help="the bound of clip_by_value")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for file and plot"
    )
    args = parser.parse_args(argv)
    if args.text and not args.text.is_file():
        parser.error(f"--text: there is no file {args.text}")
    for name in ("seeds", "steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}")
    if not 0 <= args.warmup < args.steps:
        parser.error(f"--warmup must be from 0 to below --steps, got {args.warmup}")
    for name in ("rate", "high_rate", "c"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    text = load_text(args.text)
    console = rich.console.Console()
    columns = (
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        "{task.fields[note]}",
    )
    plans = {
        "clipping": ("SGD at a rate that is too high", clipping_runs(args.c), args.high_rate),
        "state": (
            "AdamW with its state in bytes",
            state_runs(args.steps, uses_of(text.vocabulary)),
            args.rate,
        ),
    }
    parts = {name: plan for name, plan in plans.items() if args.part in (None, name)}
    total = sum(len(runs) for _, runs, _ in parts.values()) * args.seeds * args.steps
    found = {}
    with rich.progress.Progress(*columns, console=console) as progress:
        args.task = progress.add_task("", total=total, note="")
        for name, (_, runs, rate) in parts.items():
            found[name] = run_all(runs, text, rate, args, progress)
    console.print(
        f"{text.title}: {len(text.training):,} characters to learn from; validation on "
        f"{text.validation[:, 1:].size:,} others."
    )
    for name, make in (("clipping", clipping_table), ("state", state_table)):
        if name in parts:
            console.print(make(found[name], parts[name][2], args))
    plot(args.out / "char_lm.png", {parts[name][0]: results for name, results in found.items()})
    console.print(f"Plot: {args.out}/char_lm.png")


if __name__ == "__main__":
    main()
