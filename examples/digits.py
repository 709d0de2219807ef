"""The main use case: a small convolutional net on scikit-learn's digits, trained on a 4-bit grid.

Trains a float net and a quantized one side by side, exports and saves both, then loads and evaluates the
quantized file, whose accuracy is exactly that of the params in training.

    python examples/digits.py                       # 4 bits
    python examples/digits.py --bits 2 --seed 1
    python examples/digits.py --quantizer ternary
    python examples/digits.py --in-place            # the article's plain form, which stalls
"""

import argparse
import functools
import pathlib
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from optax_clipquant import (
    Binary,
    Quantizer,
    Ternary,
    Uniform,
    Uses,
    ZScore,
    bits_per_param,
    clip_by_value,
    dequantize_params,
    export_params,
    latent_params,
    load,
    plots,
    quantize_params,
    quantize_weights,
    round_weights,
    save,
    summarize,
    trace_weights,
)

EVERY = 50  # steps between two points of the plot


class Net(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(images[..., None]))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


@functools.cache
def uses_of_net() -> Uses:
    """The uses of the params: which are kernels, and which of their axes are contracted."""
    images = jax.ShapeDtypeStruct((1, 8, 8), jnp.float32)
    params = jax.eval_shape(Net().init, jax.random.key(0), images)["params"]
    return trace_weights(lambda p, x: Net().apply({"params": p}, x), params, images)


def load_data() -> tuple[jax.Array, ...]:
    """1,797 images of 8 x 8 pixels, a third of them for testing."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    parts = train_test_split(images, labels, test_size=1 / 3, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = map(jnp.asarray, parts)
    return train_x, train_y, test_x, test_y


def make_quantizer(name: str, bits: int | None, group_size: int | None) -> Quantizer:
    """The quantizer for the arguments. Raises ``ValueError`` if one is out of range or does not apply."""
    if name in ("binary", "ternary") and bits is not None:
        raise ValueError(f"--bits does not apply to --quantizer {name}; leave it out")
    bits = 4 if bits is None else bits
    if name == "zscore" and group_size is not None:
        raise ValueError("--group-size does not apply to --quantizer zscore; leave it out")
    if name == "zscore" and not 2 <= bits <= 8:
        raise ValueError(f"--bits must be 2 to 8 for --quantizer zscore, got {bits}")
    return {
        "uniform": lambda: Uniform(bits=bits, group_size=group_size),
        "binary": lambda: Binary(group_size=group_size),
        "ternary": lambda: Ternary(group_size=group_size),
        "zscore": lambda: ZScore(R=2 ** (bits - 1) - 1),
    }[name]()


@jax.jit
def accuracy(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(Net().apply({"params": params}, images), -1) == labels)


# Not a scan over batches: XLA's CPU backend runs convolutions many times slower inside a loop.
@functools.partial(jax.jit, donate_argnums=0)
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array, batch: jax.Array
) -> tuple[TrainState, jax.Array, jax.Array]:
    """The state after a step, the loss and the fraction of clamped gradients."""

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    state = state.apply_gradients(grads=grads)
    return state, value, optax.tree.get(state.opt_state, "clip_fraction")


def run(
    name: str,
    args: argparse.Namespace,
    last: optax.GradientTransformation,
    quantizer: Quantizer | None,
    data: tuple[jax.Array, ...],
    progress: rich.progress.Progress,
) -> tuple[TrainState, list[float], float]:
    """The trained state, the test accuracy during training, and the mean clip fraction."""
    train_x, train_y, test_x, test_y = data
    params = Net().init(jax.random.key(args.seed), train_x[:1])["params"]
    if quantizer is not None:
        params = dequantize_params(quantize_params(params, quantizer, uses=uses_of_net()))
    schedule = optax.cosine_decay_schedule(2e-3, args.steps)
    tx = optax.chain(clip_by_value(args.c), optax.adamw(schedule), last)
    state = TrainState.create(apply_fn=Net().apply, params=params, tx=tx)
    rng = np.random.default_rng(args.seed)
    batches = rng.integers(0, len(train_x), (args.steps, args.batch))
    curve, losses, fractions = [], [], []
    task = progress.add_task(name, total=args.steps, note="")
    for count, batch in enumerate(batches, 1):
        state, loss, fraction = train_step(state, train_x, train_y, batch)
        losses.append(loss)
        fractions.append(fraction)
        if count % EVERY == 0 or count == args.steps:  # reading waits for the step
            curve.append(float(accuracy(state.params, test_x, test_y)))
            note = f"loss {np.mean(losses[-EVERY:]):.4f}, test accuracy {curve[-1]:.4f}"
            progress.update(task, completed=count, note=note)
    return state, curve, float(np.mean(fractions))


def plot(
    path: pathlib.Path,
    steps: int,
    curves: dict[str, list[float]],
    state: TrainState,
    exported: Any,
    name: str,
) -> None:
    figure, (left, right) = plots.subplots(2)
    at = np.minimum(np.arange(1, len(next(iter(curves.values()))) + 1) * EVERY, steps)
    percent = {label: 100 * np.array(curve) for label, curve in curves.items()}
    plots.curves(left, percent, x=at, ylabel="test accuracy (%)")
    left.set_title("Accuracy in training")
    latent = latent_params(state.params, state.opt_state)["Dense_0"]["kernel"]
    plots.weight_histogram(right, latent, exported["Dense_0"]["kernel"])
    right.xaxis.get_major_locator().set_params(integer=True)  # levels are whole steps
    right.set_title(f"Dense_0/kernel: {name}")
    figure.savefig(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, help="bits per weight, 1 to 8 (default 4)")
    parser.add_argument(
        "--group-size", type=int, help="weights that share a scale (default: a channel)"
    )
    parser.add_argument(
        "--c", type=float, default=0.01, help="bound on each gradient (default 0.01)"
    )
    parser.add_argument(
        "--quantizer", choices=["uniform", "binary", "ternary", "zscore"], default="uniform"
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for files and plot"
    )
    parser.add_argument(
        "--in-place", action="store_true", help="round in place: the article's plain form"
    )
    args = parser.parse_args(argv)
    for name, least in (("steps", 1), ("batch", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    try:
        args.made = make_quantizer(args.quantizer, args.bits, args.group_size)
        clip_by_value(args.c)
    except ValueError as error:
        parser.error(str(error))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    console = rich.console.Console()
    data = load_data()
    label = (
        args.quantizer
        if args.quantizer in ("binary", "ternary")
        else f"{args.bits or 4} bits, {args.quantizer}"
    )
    runs: dict[str, tuple[optax.GradientTransformation, Quantizer | None]] = {
        "float": (optax.identity(), None),
        label: (quantize_weights(args.made, uses=uses_of_net()), args.made),
    }
    if args.in_place:
        runs[f"{label}, in place"] = (round_weights(args.made, uses=uses_of_net()), args.made)

    table = rich.table.Table(
        title=f"scikit-learn digits, {args.steps} steps, c = {args.c}, seed {args.seed}",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("params")
    for column in (
        "test accuracy",
        "of the file",
        "clip fraction",
        "bits per weight",
        "file bytes",
        "ratio",
    ):
        table.add_column(column, justify="right")
    curves, exports, states, sizes = {}, {}, {}, {}
    columns = (
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        "{task.fields[note]}",
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        for name, (last, quantizer) in runs.items():
            state, curves[name], fraction = run(name, args, last, quantizer, data, progress)
            exported = (
                state.params if quantizer is None else export_params(state.params, state.opt_state)
            )
            exports[name], states[name] = exported, state
            file = args.out / f"digits-{'-'.join(name.replace(',', '').split())}.safetensors"
            save(file, exported)
            loaded = load(file)
            for a, b in zip(
                jax.tree.leaves(dequantize_params(loaded)),
                jax.tree.leaves(state.params),
                strict=True,
            ):
                assert np.array_equal(a, b), "the file does not hold the params"
            of_params = float(accuracy(state.params, *data[2:]))
            of_file = float(accuracy(loaded, *data[2:]))
            assert of_file == of_params, f"{of_file} of the file, {of_params} of the params"
            sizes[name] = size = file.stat().st_size
            table.add_row(
                name, f"{of_params:.4f}", f"{of_file:.4f}", f"{fraction:.4f}",
                f"{bits_per_param(exported):.2f}", f"{size:,}", f"{sizes['float'] / size:.2f}x",
            )  # fmt: skip
    console.print(table)
    state = states[label]
    console.print("Against the latent weights:")
    console.print(summarize(latent_params(state.params, state.opt_state), exports[label]))
    plot(args.out / "digits.png", args.steps, curves, state, exports[label], label)
    console.print(f"Files and plot: {args.out}/")


if __name__ == "__main__":
    main()
