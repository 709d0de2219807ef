"""Errors of 4-bit quantization for weights of many shapes, and which leaves of a net stay float.

    python tests/benchmarks/shapes.py

The first table shows the signal-to-noise ratio in dB of weights drawn from Student's t with 4 degrees of freedom,
whose layers, experts or channels differ in magnitude, for the whole leaf and for its worst slice (a layer, an
expert, an output channel). "Reach" is the number of decoded values that change when one weight grows. "Possible"
is what NumPy reaches with a scale for every 32 neighbouring weights of one output channel.

The second table is for a net whose gains, shifts, tables and buffers have the names and ranks of kernels.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table
from figures import note

from optax_clipquant import QArray, Uniform, quantize_params, trace_weights

BITS, GROUP = 4, 32
LEAST = 14  # dB, in each layer of the scanned stack


def weights(shape: tuple[int, ...], magnitudes: np.ndarray, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_t(4, shape)
    return (drawn * magnitudes).astype(np.float32)


def decades(count: int, shape: tuple[int, ...], span: float, axis: int) -> np.ndarray:
    """Magnitudes from 1 down to ``10**-span`` along ``axis`` of an array of ``len(shape)`` axes."""
    along = [1] * len(shape)
    along[axis] = count
    return np.logspace(0, -span, count).reshape(along)


Case = tuple[np.ndarray, Callable[..., jax.Array], jax.Array, tuple[int, ...]]


def cases() -> dict[str, Case]:
    """For each case the leaf, a function of it and of data, the data, and the axes of its slices."""

    def conv(w: jax.Array, x: jax.Array, groups: int = 1) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w)[0]

    shapes = {
        "convolution": (3, 3, 64, 64),
        "depthwise convolution": (3, 3, 1, 64),
        "experts": (8, 128, 64),
        "scanned stack, layers 10^4 apart": (5, 128, 128),
        "heads": (128, 8, 16),
        "embedding, rows 10^2 apart": (512, 64),
    }
    spans = [(1, -1), (1, -1), (2, 0), (4, 0), (1, 1), (2, 0)]
    arrays = {
        name: weights(shape, decades(shape[axis], shape, span, axis), seed)
        for seed, ((name, shape), (span, axis)) in enumerate(
            zip(shapes.items(), spans, strict=True)
        )
    }
    image = jnp.ones((1, 4, 4, 64))
    rows = jnp.ones((2, 128))
    uses = [
        (conv, image, (3,)),
        (lambda w, x: conv(w, x, 64), image, (3,)),
        (lambda w, x: jnp.einsum("td,edf->tef", x, w), rows, (0,)),
        (scanned, rows, (0,)),
        (lambda w, x: jnp.einsum("td,dhk->thk", x, w), rows, (1,)),
        (lambda w, x: w[x], jnp.arange(3), (0,)),
    ]
    return {name: (w, *use) for (name, w), use in zip(arrays.items(), uses, strict=True)}


def decibels(w: np.ndarray, found: np.ndarray, axes: tuple[int, ...] | None = None) -> float:
    """The signal-to-noise ratio of the worst slice along ``axes``, or of the whole leaf."""
    w, found = w.astype(np.float64), found.astype(np.float64)
    rest = None if axes is None else tuple(i for i in range(w.ndim) if i not in axes)
    error = np.sum((w - found) ** 2, axis=rest)
    with np.errstate(divide="ignore"):
        return float(np.min(10 * np.log10(np.sum(w**2, axis=rest) / error)))


def reach(w: np.ndarray, quantize: Callable[[np.ndarray], QArray]) -> int:
    """The number of decoded values that change when the first weight grows."""
    grown = w.copy()
    grown.flat[0] = 100 * np.abs(w).max()
    return int(np.sum(np.asarray(quantize(grown)) != np.asarray(quantize(w))))


def possible(w: np.ndarray, contracted: tuple[int, ...]) -> np.ndarray:
    """Absmax quantization of 32 neighbours of one output channel, in NumPy: 16 levels, the largest on -8."""
    kept = tuple(i for i in range(w.ndim) if i not in contracted)
    channels = w.transpose(*kept, *contracted).reshape(
        -1, math.prod(w.shape[i] for i in contracted)
    )
    found = np.empty_like(channels)
    for start in range(0, channels.shape[1], GROUP):
        part = channels[:, start : start + GROUP]
        largest = np.take_along_axis(part, np.abs(part).argmax(1)[:, None], 1)
        scale = np.where(largest == 0, 1, largest / -8)
        found[:, start : start + GROUP] = np.clip(np.round(part / scale), -8, 7) * scale
    order = np.argsort((*kept, *contracted))
    return found.reshape([w.shape[i] for i in (*kept, *contracted)]).transpose(order)


def shapes_table() -> rich.table.Table:
    table = rich.table.Table(
        title=f"{BITS} bits: SNR in dB, worst slice, reach", box=rich.box.MARKDOWN
    )
    for column in ("leaf", "shape", "channels,\nno uses", "channels,\nuses", f"groups of {GROUP},\nno uses", f"groups of {GROUP},\nuses", "possible"):  # fmt: skip
        table.add_column(column)
    for name, (w, fn, x, slices) in cases().items():
        use = trace_weights(lambda p, x, fn=fn: fn(p["w"], x), {"w": w}, x)
        row = []
        for group in (None, GROUP):
            for uses in (None, use):

                def quantize(w: np.ndarray, group: Any = group, uses: Any = uses) -> QArray:
                    with warnings.catch_warnings():  # of lost layers
                        warnings.simplefilter("ignore")
                        return quantize_params({"w": jnp.asarray(w)}, Uniform(BITS, group_size=group), uses=uses)["w"]  # fmt: skip

                found = np.asarray(quantize(w))
                worst = decibels(w, found, slices)
                row.append(f"{decibels(w, found):.1f}, {worst:.1f}, {reach(w, quantize)}")
                if uses is not None and name.startswith("scanned"):
                    note("shapes", f"{name}, worst layer (dB)", worst, LEAST, least=True)
        best = possible(w, use["w"].reduced(w.ndim))
        row.append(f"{decibels(w, best):.1f}, {decibels(w, best, slices):.1f}")
        table.add_row(name, "x".join(map(str, w.shape)), *row)
    return table


def net() -> tuple[dict[str, jax.Array], Callable[..., jax.Array], jax.Array]:
    """Two scanned layers with LoRA and a tied embedding, under misleading names."""
    shapes = {
        "embed/bias": (32, 16),
        "weight/kernel": (2, 16, 16),
        "weight/scale": (2, 16, 16),
        "kernel (gain of a norm)": (2, 16),
        "weight (gain of a 2-D norm)": (2, 4, 4),
        "gamma/kernel (shift)": (2, 16),
        "running_mean/weight": (16,),
        "weight_scale_inv": (4, 16),
        "rotary/kernel": (8, 16),
        "lora_a/kernel": (16, 2),
        "lora_b/kernel": (2, 16),
    }
    params = {name: jnp.asarray(weights(shape, np.ones(()), i)) for i, (name, shape) in enumerate(shapes.items())}  # fmt: skip

    def forward(p: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        x = p["embed/bias"][tokens] + p["rotary/kernel"][: len(tokens)]
        x = (x - p["running_mean/weight"]) / p["weight_scale_inv"][: len(tokens)]
        stacked = [name for name, shape in shapes.items() if shape[0] == 2 and len(shape) > 1 and "lora" not in name]  # fmt: skip

        def block(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            y = x * layer["kernel (gain of a norm)"] + layer["gamma/kernel (shift)"]
            y = (y.reshape(-1, 4, 4) * layer["weight (gain of a 2-D norm)"]).reshape(-1, 16)
            return x + jnp.tanh(y @ layer["weight/kernel"]) @ layer["weight/scale"].T, None

        x, _ = jax.lax.scan(block, x, {name: p[name] for name in stacked})
        x = x @ p["weight/kernel"][0] + x @ p["lora_a/kernel"] @ p["lora_b/kernel"]
        return x @ p["embed/bias"].T

    return params, forward, jnp.arange(4)


def leaves_table() -> rich.table.Table:
    params, forward, tokens = net()
    uses = trace_weights(forward, params, tokens)
    by_use = quantize_params(params, Uniform(BITS), uses=uses)
    asked = quantize_params(params, Uniform(BITS), uses=uses, where=lambda path, _: "lora" in path)
    plain = quantize_params(params, Uniform(BITS))

    def verdict(tree: Any, path: str) -> str:
        leaf = tree[path]
        return (
            f"scales {'x'.join(map(str, leaf.scale.shape))}"
            if isinstance(leaf, QArray)
            else "float"
        )

    table = rich.table.Table(title="Which leaves are quantized", box=rich.box.MARKDOWN)
    for column in ("leaf", "shape", "use", "no uses", "uses", "LoRA asked for"):
        table.add_column(column)
    for path, leaf in params.items():
        use = ", ".join(sorted(uses[path].kinds)) + " (adapter)" * uses[path].adapter
        row = (verdict(tree, path) for tree in (plain, by_use, asked))
        table.add_row(path, "x".join(map(str, leaf.shape)), use, *row)
    return table


def main() -> None:
    console = rich.console.Console(width=200)
    console.print(shapes_table())
    console.print(leaves_table())


if __name__ == "__main__":
    main()
