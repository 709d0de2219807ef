"""Fashion-MNIST at 1 to 8 bits per weight: one net per width, with the same initial values and batches.

Each quantized net is exported, saved and loaded again; the table shows the accuracy of the loaded
file, which is exactly that of the params in training.

    python examples/fashion_mnist.py                              # a small convolutional net
    python examples/fashion_mnist.py --model mlp                  # 784-512-256-10
    python examples/fashion_mnist.py --widths float ternary 4 --epochs 3
    python examples/fashion_mnist.py --data-dir ~/fashion-mnist   # the four IDX files

Without --data-dir the images come from Debian's package dataset-fashion-mnist if it is installed, else
from OpenML.
"""

import argparse
import dataclasses
import functools
import gzip
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.ticker
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table
from flax.training.train_state import TrainState

from optax_clipquant import (
    Binary,
    Quantizer,
    Ternary,
    Uniform,
    Uses,
    bits_per_param,
    clip_by_value,
    dequantize_params,
    export_params,
    load,
    plots,
    quantize_weights,
    save,
    softness_schedule,
    trace_weights,
)

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
REPORT = 20  # steps between two updates of the progress bar
WIDTHS: dict[str, Quantizer | None] = {
    "float": None,
    "1": Binary(),
    # As in tests/benchmarks/lowbit.py: better for the MLP, and no worse for the CNN.
    "ternary": Ternary(scale_rule="absmax"),
    "2": Uniform(bits=2, scale_rule="absmax"),
    "3": Uniform(bits=3),
    "4": Uniform(bits=4),
    "8": Uniform(bits=8),
}

# Accuracies of other libraries on the net of --model mlp in 5 epochs, from tests/benchmarks/lowbit.py.
PEERS: dict[str, dict[str, float]] = {
    "torchao PARQ": {"1": 0.8726, "ternary": 0.8815, "2": 0.8821, "3": 0.8832, "4": 0.8836},
    "qwix": {"2": 0.8790, "3": 0.8822, "4": 0.8835},
}

Data = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class MLP(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1).astype(jnp.float32) / 255
        for width in (512, 256):
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        # The mean and the standard deviation of the training pixels.
        x = (images[..., None].astype(jnp.float32) / 255 - 0.286) / 0.353
        x = nn.relu(nn.Conv(32, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


@dataclasses.dataclass(frozen=True)
class Setting:
    model: nn.Module
    rate: float
    batch: int
    epochs: int


SETTINGS = {"cnn": Setting(CNN(), 2e-3, 128, 6), "mlp": Setting(MLP(), 1e-3, 256, 5)}


def read_idx(path: pathlib.Path) -> np.ndarray:
    """An IDX file of bytes, gzipped or not."""
    packed = path.with_name(path.name + ".gz")
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes")
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", axes, 4)
    if len(raw) != 4 + 4 * axes + np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} is cut short")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def load_data(folder: pathlib.Path | None, limit: int | None) -> Data:
    """Training and test images (bytes, 28 x 28) and labels."""
    if folder is None and DEBIAN.is_dir():
        folder = DEBIAN
    arrays = fetch_openml() if folder is None else read_folder(folder)
    train_x, train_y, test_x, test_y = (jnp.asarray(array) for array in arrays)
    return train_x[:limit], train_y[:limit], test_x[:limit], test_y[:limit]


def read_folder(folder: pathlib.Path) -> list[np.ndarray]:
    missing = [n for n in FILES if not any((folder / (n + end)).exists() for end in ("", ".gz"))]
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)} (each may end in .gz)")
    try:
        return [read_idx(folder / name) for name in FILES]
    except (ValueError, EOFError, OSError) as error:
        raise SystemExit(f"cannot read the data: {error}") from error


def fetch_openml() -> list[np.ndarray]:
    import sklearn.datasets

    try:
        # Without pandas, which would be needed for the faster parser.
        images, labels = sklearn.datasets.fetch_openml(
            "Fashion-MNIST", version=1, return_X_y=True, as_frame=False, parser="liac-arff"
        )
    except OSError as error:
        raise SystemExit(
            f"No Fashion-MNIST: {DEBIAN} does not exist, and OpenML cannot be reached ({error}).\n"
            "Install Debian's package dataset-fashion-mnist, or pass --data-dir with a folder that "
            f"holds {', '.join(FILES)} (each may end in .gz)."
        ) from error
    images, labels = images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.uint8)
    return [images[:60000], labels[:60000], images[60000:], labels[60000:]]


@functools.partial(jax.jit, static_argnums=0)
def hits(model: nn.Module, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(jnp.argmax(model.apply({"params": params}, images), -1) == labels)


def accuracy(model: nn.Module, params: Any, images: jax.Array, labels: jax.Array) -> float:
    parts = range(0, len(images), 1000)
    found = [hits(model, params, images[i : i + 1000], labels[i : i + 1000]) for i in parts]
    return int(sum(found)) / len(images)


# Not a scan over batches: XLA's CPU backend runs convolutions 15 times slower inside a loop.
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


def batches_of(seed: int, images: int, batch: int, epochs: int) -> np.ndarray:
    """The batches of all epochs, each in a new order and without an incomplete last batch."""
    rng = np.random.default_rng(seed)
    steps = images // batch
    orders = [rng.permutation(images)[: steps * batch] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, batch)


def train(
    width: str, args: argparse.Namespace, data: Data, progress: rich.progress.Progress
) -> tuple[TrainState, float]:
    """The trained state and the mean fraction of clamped gradients."""
    setting = SETTINGS[args.model]
    batches = batches_of(args.seed, len(data[0]), min(args.batch, len(data[0])), args.epochs)
    params = setting.model.init(jax.random.key(args.seed), data[0][:1])["params"]
    schedule = optax.cosine_decay_schedule(setting.rate, len(batches))
    uses = trace_weights(lambda p, x: setting.model.apply({"params": p}, x), params, data[0][:1])
    last = on_the_grid(width, len(batches), args.hard, uses)
    tx = optax.chain(clip_by_value(args.c), optax.adam(schedule), last)
    state = TrainState.create(apply_fn=setting.model.apply, params=params, tx=tx)
    task = progress.add_task(name_of(width), total=len(batches), note="")
    fractions = []
    for at, batch in enumerate(batches, 1):
        state, loss, fraction = train_step(state, data[0], data[1], batch)
        fractions.append(fraction)
        if at % REPORT == 0 or at == len(batches):  # reading the loss waits for the step
            progress.update(task, completed=at, note=f"loss {float(loss):.4f}")
    return state, float(jnp.mean(jnp.array(fractions)))


def on_the_grid(width: str, steps: int, hard: bool, uses: Uses) -> optax.GradientTransformation:
    """The last transform of the chain. At 3 bits and below, the weights approach the levels gradually."""
    quantizer = WIDTHS[width]
    if quantizer is None:
        return optax.identity()
    # It takes about three steps on the levels until the params equal them exactly.
    end = min(round(0.75 * steps), steps - 5)
    if hard or width in ("4", "8") or end < 1:
        return quantize_weights(quantizer, uses=uses)
    return quantize_weights(quantizer, softness=softness_schedule(0, end), uses=uses)


def name_of(width: str) -> str:
    return width if not width.isdigit() else f"{width} bit{'s' * (width != '1')}"


@dataclasses.dataclass(frozen=True)
class Result:
    width: str
    accuracy: float
    clipped: float
    bits: float
    size: int


def run(
    width: str, args: argparse.Namespace, data: Data, progress: rich.progress.Progress
) -> Result:
    """Trains, saves, loads and evaluates, and checks that the file holds exactly the trained params."""
    model = SETTINGS[args.model].model
    state, clipped = train(width, args, data, progress)
    quantized = WIDTHS[width] is not None
    exported = export_params(state.params, state.opt_state) if quantized else state.params
    path = args.out / f"fashion-{args.model}-{name_of(width).replace(' ', '-')}.safetensors"
    save(path, exported)
    loaded = load(path)
    for a, b in zip(
        jax.tree.leaves(dequantize_params(loaded)), jax.tree.leaves(state.params), strict=True
    ):
        assert np.array_equal(a, b), f"{path} does not hold the params"
    of_file = accuracy(model, loaded, *data[2:])
    of_params = accuracy(model, state.params, *data[2:])
    assert of_file == of_params, f"{of_file} of the file, {of_params} of the params"
    return Result(width, of_file, clipped, bits_per_param(exported), path.stat().st_size)


def tabulate(args: argparse.Namespace, results: list[Result], count: int) -> rich.table.Table:
    table = rich.table.Table(
        title=f"Fashion-MNIST, {args.model}, {count:,} weights, {args.epochs} epochs, "
        f"c = {args.c:g}, seed {args.seed}"
    )
    table.add_column("weights")
    for column in ("test accuracy", "clipped", "bits per weight", "file bytes", "ratio"):
        table.add_column(column, justify="right")
    floats = [result.size for result in results if result.width == "float"]
    for result in results:
        ratio = f"{floats[0] / result.size:.2f}x" if floats else ""
        table.add_row(
            name_of(result.width), f"{result.accuracy:.4f}", f"{result.clipped:.5f}",
            f"{result.bits:.2f}", f"{result.size:,}", ratio,
        )  # fmt: skip
    return table


def plot(path: pathlib.Path, args: argparse.Namespace, results: list[Result]) -> None:
    figure, (axes,) = plots.subplots(width=7, height=4.5)
    quantized = [result for result in results if result.width != "float"]
    series = {"optax_clipquant": [(result.bits, 100 * result.accuracy) for result in quantized]}
    if (args.model, args.epochs, args.batch, args.limit) == ("mlp", 5, 256, None):
        for name, peer in PEERS.items():
            series[f"{name}, mean of 5 seeds"] = [
                (result.bits, 100 * peer[result.width])
                for result in quantized
                if result.width in peer
            ]
    floats = [100 * result.accuracy for result in results if result.width == "float"]
    plots.against_bits(
        axes, series, ylabel="test accuracy (%)", reference=floats[0] if floats else None
    )
    for result in quantized:
        left = result.width == "ternary"  # the label of 2 bits is to its right
        axes.annotate(
            name_of(result.width), (result.bits, 100 * result.accuracy), (-7, 5) if left else (7, -11),
            textcoords="offset points", ha="right" if left else "left", color=plots.BLUE,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8, 10.5)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_title(f"Fashion-MNIST, {args.model}, {args.epochs} epochs, seed {args.seed}")
    axes.margins(y=0.15)
    figure.savefig(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder with the four IDX files")
    parser.add_argument("--model", choices=list(SETTINGS), default="cnn")
    parser.add_argument("--widths", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--epochs", type=int, help="default: 6 (cnn), 5 (mlp)")
    parser.add_argument("--batch", type=int, help="default: 128 (cnn), 256 (mlp)")
    parser.add_argument("--c", type=float, default=1.0, help="bound on each gradient (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hard",
        action="store_true",
        help="keep params on the levels from the start, at every width",
    )
    parser.add_argument("--limit", type=int, help="use only this many training and test images")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for files and plot"
    )
    args = parser.parse_args(argv)
    for name in ("epochs", "batch"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(SETTINGS[args.model], name))
    for name in ("epochs", "batch", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    try:
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
    data = load_data(args.data_dir, args.limit)
    columns = (
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        "{task.fields[note]}",
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        results = [run(width, args, data, progress) for width in args.widths]
    shapes = jax.eval_shape(SETTINGS[args.model].model.init, jax.random.key(0), data[0][:1])
    console.print(tabulate(args, results, sum(leaf.size for leaf in jax.tree.leaves(shapes))))
    plot(args.out / f"fashion-{args.model}.png", args, results)
    console.print(f"Files and plot: {args.out}/")


if __name__ == "__main__":
    main()
