"""The plots of ``how_it_works.md``: a grid, training on it, and calibration.

A multilayer perceptron learns scikit-learn's digits, in float and on a grid of 3 bits; then the float net is
quantized with and without data. About a minute on two cores.

    python examples/how_it_works.py                 # writes the three plots beside this file
    python examples/how_it_works.py --out FOLDER
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
from sklearn.datasets import load_digits

from optax_clipquant import (
    Uniform,
    bits_per_param,
    calibrate,
    clip_by_value,
    dequantize_params,
    latent_params,
    plots,
    quantize_calibrated,
    quantize_params,
    quantize_weights,
    summarize,
    trace_weights,
)

GRID = Uniform(bits=3)
STEPS, BATCH = 400, 128
WIDTHS = (2, 3, 4, 6)
WATCHED = 3  # weights whose path is drawn


def forward(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["first"])
    x = jax.nn.relu(x @ params["second"])
    return x @ params["third"]


def init(key: jax.Array) -> dict[str, jax.Array]:
    shapes = {"first": (64, 96), "second": (96, 96), "third": (96, 10)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) * np.sqrt(2 / shape[0])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def train(
    optimizer: optax.GradientTransformation, x: jax.Array, y: jax.Array, quantized: bool
) -> Any:
    """The final params, and the served and latent values of the watched weights at each step."""
    last = quantize_weights(GRID) if quantized else optax.identity()
    tx = optax.chain(clip_by_value(1.0), optimizer, last)
    watched = np.arange(WATCHED) * 7

    def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

    @jax.jit
    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, Any]:
        grads = jax.grad(loss_of)(params, x[batch], y[batch])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        latent = latent_params(params, state) if quantized else params
        return params, state, (params["second"][watched, 0], latent["second"][watched, 0])

    params = init(jax.random.key(0))
    state = tx.init(params)
    batches = np.random.default_rng(0).integers(0, len(x), (STEPS, BATCH))
    seen = []
    for batch in rich.progress.track(batches, "on the grid" if quantized else "in float"):
        params, state, values = step(params, state, batch)
        seen.append(values)
    return params, jax.device_get(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder for the plots")  # fmt: skip
    folder = parser.parse_args().out
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    train_x, train_y, test_x = x[:1200], y[:1200], x[1200:]

    params, _ = train(optax.adam(2e-3), train_x, train_y, quantized=False)
    _, seen = train(optax.adam(2e-3), train_x, train_y, quantized=True)

    figure, (axes,) = plots.subplots(width=6.5)
    plots.weight_histogram(axes, params["second"], quantize_params(params, GRID)["second"])
    figure.savefig(folder / "how_it_works_grid.png")

    figure, (axes,) = plots.subplots(width=6.5)
    served, latent = (np.array(values).T for values in zip(*seen, strict=True))
    plots.curves(axes, {"latent weights": latent, "served weights": served}, ylabel="weight")
    figure.savefig(folder / "how_it_works_training.png")

    wanted = forward(params, test_x)
    batches = jnp.split(train_x, 4)
    uses = trace_weights(forward, params, train_x)
    calibration = calibrate(forward, params, batches, progress=False)
    points: dict[str, list[tuple[float, float]]] = {}
    for bits in rich.progress.track(WIDTHS, "quantizing"):
        quantizer = Uniform(bits, scale_rule="mse")
        for name, qparams in {
            "least squares": quantize_params(params, quantizer, uses=uses),
            "calibration=": quantize_params(params, quantizer, calibration=calibration),
            "quantize_calibrated": quantize_calibrated(
                forward, params, batches, quantizer, progress=False
            ),
        }.items():
            error = forward(dequantize_params(qparams), test_x) - wanted
            db = 10 * np.log10(jnp.sum(wanted**2) / jnp.sum(error**2))
            points.setdefault(name, []).append((bits_per_param(qparams), float(db)))
    figure, (axes,) = plots.subplots(width=6.5)
    plots.against_bits(axes, points, ylabel="SNR of the logits (dB)")
    figure.savefig(folder / "how_it_works_calibration.png")

    table = rich.table.Table(title="SNR of the logits of held-out digits (dB)", box=rich.box.SIMPLE)
    table.add_column("bits")
    for name in points:
        table.add_column(name, justify="right")
    for i, bits in enumerate(WIDTHS):
        table.add_row(str(bits), *(f"{series[i][1]:.1f}" for series in points.values()))
    console = rich.console.Console()
    console.print(table)
    print(summarize(params, quantize_params(params, GRID)))


if __name__ == "__main__":
    main()
