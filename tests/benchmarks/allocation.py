"""Which weights of a language model need more bits: predictions beside the measured KL, and allocations by them.

SmolLM2 as ``language_model.py`` has it (see there for what to install, and for the options that this script
takes too), with the matrices of each layer apart: 210 leaves. First each leaf alone is quantized to 3 bits with
calibrated scales, and the KL to the float model is measured on the first chunk of the evaluation. Beside it stand
predictions from the leaf's rounding error e:

* the sum of ``e**2``;
* the same weighted by ``E[x**2]`` of the calibration, the error of the leaf's own output;
* by ``E[g**2]`` of each weight, where ``g`` is the gradient of the log-likelihood of a token that is drawn from the
  model's own distribution: the diagonal of the Fisher information;
* by ``E[x**2]``, times a number for each leaf, the mean square of the gradient at its output.

Then ``allocate_bits`` spends budgets on the leaves with the last of these as sensitivity, and chooses among
allocations by the KL on a chunk that calibrates (``evaluate=``). The KL of its choice is measured on
the evaluation, beside uniform widths of at least the same size: with calibrated scales, and with
``quantize_calibrated``.

    python tests/benchmarks/allocation.py --evaluation TEXT --calibration TEXT
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import language_model
import numpy as np
import rich.box
import rich.markup
import rich.progress
import rich.table
import scipy.stats
import smollm2
from figures import note

from optax_clipquant import (
    Calibration,
    allocate_bits,
    bits_per_param,
    calibrate,
    dequantize_params,
    quantize_calibrated,
    quantize_params,
    squared_gradients,
    trace_weights,
)

PyTree = Any
CHOICES = (2, 3, 4, 5, 6)
PARTS = ("leaves", "budgets")


def unstacked(blocks: PyTree, layers: int) -> list[PyTree]:
    return [{name: blocks[name][i] for name in smollm2.MATRICES} for i in range(layers)]


def stacked(blocks: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)


def likelihood(config: smollm2.Config, params: PyTree, batch: tuple[jax.Array, jax.Array]) -> Any:
    """The negative log-likelihood of tokens that are drawn from the model's own distribution."""
    key, tokens = batch
    log_p = smollm2.log_probabilities(config, params, tokens)
    drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_p))
    return -jnp.sum(jnp.take_along_axis(log_p, drawn[:, None], axis=1)) / len(tokens) ** 0.5


@functools.partial(jax.jit, static_argnums=(0, 1))
def divergence_with(
    config: smollm2.Config,
    name: str,
    params: PyTree,
    levels: jax.Array,
    layer: jax.Array,
    tokens: jax.Array,
    expected: jax.Array,
) -> jax.Array:
    """The KL if one layer of ``name`` has the weights ``levels``."""
    leaf = params["blocks"][name].at[layer].set(levels)
    found = smollm2.log_probabilities(
        config, params | {"blocks": params["blocks"] | {name: leaf}}, tokens
    )
    return smollm2.divergence(expected, found)


def predictions(
    work: language_model.Work, calibration: Calibration, fisher: PyTree, levels: PyTree
) -> tuple[dict[str, dict[tuple[str, int], float]], dict[tuple[str, int], float]]:
    """By name, the prediction for each leaf; and the mean square of the gradient at its output."""
    found: dict[str, dict[tuple[str, int], float]] = {
        name: {} for name in ("e**2", "E[x**2] e**2", "E[g**2] e**2", "E[x**2] e**2, by output")
    }
    outputs = {}
    for name in smollm2.MATRICES:
        squares = jnp.square(levels[name] - work.params["blocks"][name])
        moments = calibration.moments[f"blocks/{name}"]
        for i in range(len(squares)):
            # The sum over inputs and outputs of E[x_i**2] E[d_j**2] is about that of E[g_ij**2].
            outputs[name, i] = float(
                jnp.sum(fisher[name][i]) / (jnp.sum(moments[i]) * squares.shape[2])
            )
            weighted = float(jnp.sum(moments[i] * squares[i]))
            for key, value in zip(
                found,
                (
                    float(jnp.sum(squares[i])),
                    weighted,
                    float(jnp.sum(fisher[name][i] * squares[i])),
                    weighted * outputs[name, i],
                ),
                strict=True,
            ):
                found[key][name, i] = value
    return found, outputs


def measured(work: language_model.Work, levels: PyTree) -> dict[tuple[str, int], float]:
    """The KL of each leaf alone."""
    cases = [(name, i) for name in smollm2.MATRICES for i in range(len(levels[name]))]
    return {
        (name, i): float(
            divergence_with(
                work.config, name, work.params, levels[name][i], jnp.int32(i),
                work.evaluation[0], work.expected[0],
            )
        )
        for name, i in rich.progress.track(cases, "leaves", console=language_model.console())
    }  # fmt: skip


def allocated(
    work: language_model.Work, calibration: Calibration, outputs: dict[tuple[str, int], float]
) -> dict[float, tuple[float, dict[str, float], dict[int, int]]]:
    """For each budget, the size, the KL of each method and the number of leaves of each width."""
    layers = len(work.params["blocks"]["attn_norm"])
    rest = {"norms": {k: v for k, v in work.params["blocks"].items() if k not in smollm2.MATRICES}}
    rest |= {name: leaf for name, leaf in work.params.items() if name != "blocks"}

    def restacked(params: PyTree) -> PyTree:
        blocks = stacked(dequantize_params(params)["blocks"]) | rest["norms"]
        return work.params | {"blocks": blocks}

    def forward(params: PyTree, tokens: jax.Array) -> jax.Array:
        x = rest["token_embd"][tokens]
        for i, w in enumerate(params["blocks"]):
            norms = {name: leaf[i] for name, leaf in rest["norms"].items()}
            x = smollm2.block(work.config, x, w | norms)
        return x

    params = {"blocks": unstacked(work.params["blocks"], layers)}
    uses = trace_weights(forward, params, work.calibration[0])
    moments = {
        f"blocks/{i}/{name}": calibration.moments[f"blocks/{name}"][i] for name, i in outputs
    }
    by_output = {f"blocks/{i}/{name}": moments[f"blocks/{i}/{name}"] * outputs[name, i] for name, i in outputs}  # fmt: skip
    chunk = work.calibration[-1]
    expected = smollm2.log_probabilities(work.config, work.params, chunk)

    def evaluate(qparams: PyTree) -> float:
        found = smollm2.log_probabilities(work.config, restacked(qparams), chunk)
        return float(smollm2.divergence(expected, found))

    found = {}
    for budget in work.args.budgets:
        rules = allocate_bits(
            params,
            Calibration(uses, by_output),
            bits_per_param=budget,
            choices=CHOICES,
            quantizer=lambda bits: smollm2.grid(bits),
            evaluate=evaluate,
        )
        qparams = quantize_params(params, rules, calibration=Calibration(uses, moments))
        rounded = quantize_calibrated(forward, params, work.calibration, rules, uses=uses)
        kl = {
            "calibration=": work.scores(restacked(qparams)).kl,
            "quantize_calibrated": work.scores(restacked(rounded)).kl,
        }
        widths = [rule.bits for rule in rules.values()]
        counts = {bits: widths.count(bits) for bits in sorted(set(widths))}
        found[budget] = bits_per_param(qparams), kl, counts
    return found


def correlations(
    predicted: dict[str, dict[tuple[str, int], float]], kl: dict[tuple[str, int], float]
) -> rich.table.Table:
    """How well each prediction agrees with the measured KL."""
    table = rich.table.Table(
        box=rich.box.MARKDOWN, title=f"KL of {len(kl)} leaves alone at 3 bits, and predictions"
    )
    for column in ("prediction", "rank correlation", "correlation of logarithms"):
        table.add_column(column, justify="left" if column == "prediction" else "right")
    y = np.array([kl[leaf] for leaf in kl])
    for name, of_leaf in predicted.items():
        x = np.array([of_leaf[leaf] for leaf in kl])
        rank = scipy.stats.spearmanr(x, y).statistic
        logs = np.corrcoef(np.log(x), np.log(np.maximum(y, 1e-9)))[0, 1]
        table.add_row(rich.markup.escape(name), f"{rank:.2f}", f"{logs:.2f}")
        note("language model, prediction of KL, rank correlation", name, rank)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="also the options of language_model.py"
    )
    parser.add_argument("--budgets", type=float, nargs="*", default=[3.5, 4.5])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    own, others = parser.parse_known_args()
    args = language_model.parse(others)
    args.budgets = own.budgets
    work = language_model.Work(args)
    calibration = calibrate(work.fn, work.params, work.calibration)
    keys = jax.random.split(jax.random.key(0), len(work.calibration))
    fisher = squared_gradients(
        lambda blocks, batch: likelihood(work.config, work.params | {"blocks": blocks}, batch),
        work.params["blocks"],
        zip(keys, work.calibration, strict=True),
    )
    qparams = {
        bits: quantize_params(
            work.params, language_model.rules(bits), uses=work.uses, calibration=calibration
        )
        for bits in sorted({3, *(int(budget) for budget in args.budgets)})
    }
    levels = dequantize_params(qparams[3])["blocks"]
    predicted, outputs = predictions(work, calibration, fisher, levels)
    console = rich.console.Console(width=120)
    if "leaves" in own.parts:
        console.print(correlations(predicted, measured(work, levels)))
    if "budgets" not in own.parts:
        return
    uniform = {
        bits: {
            "calibration=": work.scores(q).kl,
            "quantize_calibrated": work.scores(language_model.calibrated(work, bits)).kl,
        }
        for bits, q in qparams.items()
    }
    table = rich.table.Table(box=rich.box.MARKDOWN, title="Budgets")
    for column in ("budget", "method", "bits per weight", "KL", "KL, uniform", "leaves by width"):
        table.add_column(column, justify="right")
    for budget, (size, found, widths) in allocated(work, calibration, outputs).items():
        counts = ", ".join(f"{count} at {bits}" for bits, count in widths.items())
        for method, kl in found.items():
            reference = uniform[int(budget)][method]
            table.add_row(
                f"{budget}", method, f"{size:.3f}", f"{kl:.4f}", f"{reference:.4f}", counts
            )
            note("language model, KL of an allocation", f"{method}, {budget} bits", kl, reference)
    console.print(table)


if __name__ == "__main__":
    main()
