"""Each optimizer of optax and optax.contrib, with its state in 8 bits and in float, on one problem.

A least-squares problem with a matrix of 64 x 32 unknowns and inputs of unequal size, in 60 steps on the
whole data. "Fine" is an optimizer whose loss falls as in float, "worse" one whose loss ends more than a
tenth higher (see ``verdict_of``), and "refused" one that ``quantize_state`` refuses because its state
holds iterates. Prints a table, or with --markdown the one in the README.

    python tests/benchmarks/optimizers.py
"""

import argparse
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
from optax import contrib

from optax_clipquant import quantize_state

STEPS = 60

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adabelief": lambda: optax.adabelief(0.03),
    "adadelta": lambda: optax.adadelta(30.0),
    "adafactor": lambda: optax.adafactor(0.03, momentum=0.9, min_dim_size_to_factor=8),
    "adagrad": lambda: optax.adagrad(0.2),
    "adam": lambda: optax.adam(0.03),
    "adamax": lambda: optax.adamax(0.03),
    "adamaxw": lambda: optax.adamaxw(0.03),
    "adamw": lambda: optax.adamw(0.03),
    "adan": lambda: optax.adan(0.03),
    "amsgrad": lambda: optax.amsgrad(0.03),
    "fromage": lambda: optax.fromage(0.03),
    "lamb": lambda: optax.lamb(0.03),
    "lars": lambda: optax.lars(30.0),
    "lbfgs": lambda: optax.lbfgs(memory_size=4),
    "lion": lambda: optax.lion(0.01),
    "lookahead": lambda: optax.lookahead(optax.adam(0.03), 5, 0.5),
    "nadam": lambda: optax.nadam(0.03),
    "nadamw": lambda: optax.nadamw(0.03),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, eta=1e-6, key=jax.random.key(0)),
    "novograd": lambda: optax.novograd(0.03),
    "optimistic_adam": lambda: optax.optimistic_adam(0.03),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(0.03),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.1),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "radam": lambda: optax.radam(0.03),
    "rmsprop": lambda: optax.rmsprop(0.01, momentum=0.9),
    "rprop": lambda: optax.rprop(0.01),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "sign_sgd": lambda: optax.sign_sgd(0.01),
    "signum": lambda: optax.signum(0.01),
    "sm3": lambda: optax.sm3(0.1),
    "yogi": lambda: optax.yogi(0.03),
    "contrib.acprop": lambda: contrib.acprop(0.03),
    "contrib.ademamix": lambda: contrib.ademamix(0.01),
    "contrib.adopt": lambda: contrib.adopt(0.03),
    "contrib.cocob": lambda: contrib.cocob(),
    "contrib.dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "contrib.dog": lambda: contrib.dog(),
    "contrib.dowg": lambda: contrib.dowg(),
    "contrib.dpsgd": lambda: contrib.dpsgd(0.1, 4.0, 1e-3, 0, momentum=0.9),
    "contrib.galore": lambda: contrib.galore(0.1, rank=16, update_proj_gap=20),
    "contrib.madgrad": lambda: contrib.madgrad(0.03),
    "contrib.mechanize": lambda: contrib.mechanize(optax.adam(0.03)),
    "contrib.momo": lambda: contrib.momo(),
    "contrib.momo_adam": lambda: contrib.momo_adam(0.03),
    "contrib.muon": lambda: contrib.muon(0.03),
    "contrib.prodigy": lambda: contrib.prodigy(),
    "contrib.reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.03), contrib.reduce_on_plateau(patience=5)
    ),
    "contrib.sam": lambda: contrib.sam(optax.adam(0.03), optax.sgd(0.01), sync_period=2),
    "contrib.schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "contrib.schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.03),
    "contrib.schedule_free_sgd": lambda: contrib.schedule_free_sgd(0.1),
    "contrib.simplified_ademamix": lambda: contrib.simplified_ademamix(0.001, alpha=1.0),
    "contrib.sophia": lambda: contrib.sophia(0.03),
}

NEED_VALUE = {"polyak_sgd", "contrib.momo", "contrib.momo_adam", "contrib.reduce_on_plateau"}

# They take a gradient for each example, with the examples along the first axis.
PER_EXAMPLE = {"contrib.dpsgd"}

# What to leave in float where 8 bits of all arrays are not enough.
IN_FLOAT = {"contrib.acprop": "/nu"}

PARTS = {  # members of contrib that are not optimizers
    "differentially_private_aggregate",
    "hutchinson_estimator_diag_hessian",
    "normalize",
    "schedule_free_eval_params",
    "split_real_and_imaginary",
}


class Result(NamedTuple):
    verdict: str
    initial: float
    plain: float
    quantized: float | None  # None: refused


def optimizers() -> set[str]:
    """The names of all optimizers in the installed optax and optax.contrib."""
    aliases = optax.adam.__module__
    found = {name for name, fn in vars(optax).items() if getattr(fn, "__module__", "") == aliases}
    found |= {"lookahead", "nadam", "nadamw"}  # defined elsewhere
    for name, fn in vars(contrib).items():
        if inspect.isfunction(fn) and not name.startswith("scale_by_") and name not in PARTS:
            found.add(f"contrib.{name}")
    return found


@functools.cache
def problem() -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inputs, the outputs, and the initial params."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 64)) * np.geomspace(1, 0.3, 64)
    w = rng.normal(size=(64, 32)) * 0.3
    y = x @ w + rng.normal(size=(256, 32)) * 0.1
    start = rng.normal(size=(64, 32)) * 0.1
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, y, start))


def loss_of(w: Any, example: int | slice = slice(None)) -> jax.Array:
    x, y, _ = problem()
    return jnp.mean(jnp.square(x[example] @ w - y[example]))


def extra_of(name: str, value: jax.Array, grad: jax.Array) -> dict[str, Any]:
    """The extra arguments that the optimizer needs besides gradients and params."""
    if name == "contrib.sophia":
        return {"obj_fn": loss_of}
    if name == "lbfgs":
        return {"value": value, "grad": grad, "value_fn": loss_of}
    return {"value": value} if name in NEED_VALUE else {}


def train(name: str, tx: optax.GradientTransformation) -> float:
    tx, lookahead = optax.with_extra_args_support(tx), name == "lookahead"
    start = problem()[2]
    params = optax.LookaheadParams.init_synced(start) if lookahead else start

    def fast(params: Any) -> Any:
        return params.fast if lookahead else params

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        value, grad = jax.value_and_grad(loss_of)(fast(params))
        if name in PER_EXAMPLE:
            examples = jnp.arange(len(problem()[0]))
            grad = jax.vmap(jax.grad(loss_of), (None, 0))(params, examples)
        updates, state = tx.update(grad, state, params, **extra_of(name, value, grad))
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS)[0])
    params, _ = run((params, tx.init(params)))
    return float(loss_of(params.slow if lookahead else params))


def verdict_of(initial: float, plain: float, quantized: float) -> str:
    """The verdict: "fine" if quantized state loses at most 2% of the fall in loss and ends at most 10% above float."""
    if not plain < 0.9 * initial:
        return "does not train"
    near = quantized <= plain + 0.02 * (initial - plain) and quantized <= 1.1 * plain
    return "fine" if near else "worse"


def measure(name: str, in_float: str | None = None) -> Result:
    """With all arrays of the state in 8 bits, or with those whose path holds ``in_float`` left in float."""
    where = None if in_float is None else lambda path, leaf: in_float not in path
    # Some optimizers of optax do not work under strict promotion.
    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "quantize_state: .* nothing is quantized")
        warnings.filterwarnings(
            "ignore", category=DeprecationWarning
        )  # optax warns of its deprecated names
        initial = float(loss_of(problem()[2]))
        plain = train(name, OPTIMIZERS[name]())
        try:
            quantized = train(name, quantize_state(OPTIMIZERS[name](), min_size=0, where=where))
        except ValueError as error:
            if "of the optimizer's state holds" not in str(error):
                raise
            return Result("refused", initial, plain, None)
        return Result(verdict_of(initial, plain, quantized), initial, plain, quantized)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--markdown", action="store_true", help="as in the README")
    args = parser.parse_args()
    style = {"box": rich.box.MARKDOWN} if args.markdown else {}
    table = rich.table.Table("optimizer", "verdict", **style)
    for title in ("loss, float state", "loss, quantized"):
        table.add_column(title, justify="right")
    for name in rich.progress.track(args.names, transient=True):
        for in_float in (None, IN_FLOAT[name]) if name in IN_FLOAT else (None,):
            result = measure(name, in_float)
            quantized = "-" if result.quantized is None else f"{result.quantized:.3g}"
            verdict = (
                result.verdict if in_float is None else f"{result.verdict} with {in_float} in float"
            )
            table.add_row(f"`{name}`", verdict, f"{result.plain:.3g}", quantized)
    rich.console.Console(width=120).print(table)


if __name__ == "__main__":
    main()
