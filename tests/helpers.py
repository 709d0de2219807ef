"""Test data, float64 references and subprocess helpers, shared by several test files."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import types
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clipquant import (
    Binary,
    NormalFloat,
    Ternary,
    Uniform,
    ZScore,
    clip_by_value,
    dequantize_params,
    export_params,
    quantize_params,
)

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

# Every kind of grid: mid-rise, mid-tread, affine, groups with a shorter last one, per tensor.
QUANTIZERS = {
    "binary": Binary(),
    "binary-groups": Binary(group_size=5),
    "ternary": Ternary(),
    "ternary-groups": Ternary(group_size=5),
    "ternary-absmax": Ternary(scale_rule="absmax"),
    "uniform2": Uniform(bits=2),
    "uniform2-groups": Uniform(bits=2, group_size=4),
    "uniform3": Uniform(bits=3),
    "uniform3-absmax": Uniform(bits=3, scale_rule="absmax"),
    "uniform4": Uniform(bits=4),
    "uniform4-groups": Uniform(bits=4, group_size=5),
    "uniform4-mse": Uniform(bits=4, scale_rule="mse"),
    "uniform4-tensor": Uniform(bits=4, channel_axis=None),
    "uniform4-asymmetric": Uniform(bits=4, symmetric=False),
    "uniform2-asymmetric": Uniform(bits=2, symmetric=False),
    "uniform8": Uniform(bits=8),
    "uniform8-first": Uniform(bits=8, channel_axis=0),
    "zscore7": ZScore(R=7),
    "zscore3-fine": ZScore(R=3, resolution=2.0),
    "zscore1": ZScore(R=1),
    "normalfloat3-groups": NormalFloat(bits=3, group_size=5),
}

# One of each kind, for tests that compile a lot: levels on both sides of zero only, least squares with and
# without a codebook, largest magnitudes, groups, zero points, moments.
CORE = [
    *("binary", "ternary", "uniform3", "zscore7"),
    *("uniform4-groups", "uniform4-asymmetric", "normalfloat3-groups"),
]

# One quantizer for each formula of decoding.
FORMULAS = ["uniform4-groups", "ternary", "uniform4-asymmetric", "zscore7"]


def _case(*values, gate: bool, id: str | None = None):
    return pytest.param(*values, marks=() if gate else pytest.mark.slow, id=id)


def cases(values: Iterable[Any], gate: Collection[Any]) -> list[Any]:
    """A case for each value; those not in ``gate`` are marked slow."""
    return [_case(value, gate=value in gate) for value in values]


def case_rows(rows: Iterable[tuple[Any, ...]], gate: Collection[Any]) -> list[Any]:
    """``cases`` for tests of several arguments."""
    return [_case(*row, gate=row in gate) for row in rows]


# Each quantizer; the gate runs one of each kind.
NAMES = [_case(name, gate=name in CORE, id=name) for name in QUANTIZERS]

# Each quantizer, and one for each formula in half precision.
DTYPED = [
    *(_case(name, jnp.float32, gate=name in CORE) for name in QUANTIZERS),
    *(
        _case(name, dtype, gate=name in FORMULAS)
        for dtype in (jnp.bfloat16, jnp.float16)
        for name in FORMULAS
    ),
]

# Each quantizer under jit, and one for each formula run op by op.
VARIANTS = [
    *(_case(jax.jit, name, gate=name in CORE, id=f"jit-{name}") for name in QUANTIZERS),
    *(
        _case(lambda fn: fn, name, gate=name == "uniform4-groups", id=f"eager-{name}")
        for name in FORMULAS
    ),
]


def weights(shape: tuple[int, ...], kind: str = "normal", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    draw = {
        "normal": lambda: rng.standard_normal(shape),
        "laplace": lambda: rng.laplace(size=shape),
        "heavy": lambda: rng.standard_t(1.5, size=shape),
        "student3": lambda: rng.standard_t(3, size=shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "skewed": lambda: rng.exponential(size=shape) - 0.3,
    }[kind]
    return draw().astype(np.float32)


def squared_error(quantizer, w: np.ndarray, axis=None) -> np.ndarray:
    """The squared error of quantization, in float64."""
    dequantized = np.asarray(quantizer.quantize(jnp.asarray(w)).dequantize(), np.float64)
    return np.sum((dequantized - w.astype(np.float64)) ** 2, axis=axis)


def mlp_params(seed: int = 0, dtype=jnp.float32) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "Dense_0": {
            "kernel": jax.random.normal(keys[0], (12, 10), dtype) * 0.3,
            "bias": jnp.zeros(10, dtype),
        },
        "Dense_1": {
            "kernel": jax.random.normal(keys[1], (10, 4), dtype) * 0.3,
            "bias": jnp.zeros(4, dtype),
        },
    }


def mlp_loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    out = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]
    return jnp.mean((out - y) ** 2)


def batch(seed: int = 0, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(100 + seed), (32, 12), dtype)
    return x, jnp.tanh(x[:, :4] * 2 - x[:, 4:8])


def optimizer(*last):
    return optax.chain(clip_by_value(1.0), optax.sgd(0.05, momentum=0.9), *last)


def projected(quantizer, seed: int = 0, dtype=jnp.float32):
    params = mlp_params(seed, dtype)
    return dequantize_params(quantize_params(params, quantizer))


def make_step(tx):
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(mlp_loss)(params, x, y)
        # apply_updates adds float32 updates to bfloat16 params.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

    return step


def assert_on_grid(params, state):
    """Asserts that params equal their levels bit for bit, with the sign of zero, and export does not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported = export_params(params, state)
    dequantized = dequantize_params(exported)
    chex.assert_trees_all_equal(dequantized, params)
    for a, b in zip(jax.tree.leaves(dequantized), jax.tree.leaves(params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def run_python(
    *args: str | pathlib.Path, timeout: float | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python in another process, with ``env`` and without the 8 devices of this one."""
    outer = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        check=False,
        env=outer | env,
        timeout=timeout,
    )


def run_example(script: str, *args: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    return run_python(EXAMPLES / script, *args, COLUMNS="160", **compiled())


def compiled() -> dict[str, str]:
    """Environment variables with which a subprocess compiles as quickly as this one (see conftest.py)."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return {
        "XLA_FLAGS": " ".join(flags),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@functools.cache
def _example(script: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(pathlib.Path(script).stem, EXAMPLES / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(capsys: pytest.CaptureFixture[str], script: str, *args: object) -> tuple[int, str]:
    """The exit code and the message of an example that rejects its arguments.

    Runs in this process, since a subprocess would spend its time importing.
    """
    with pytest.raises(SystemExit) as stopped:
        _example(script).main([str(arg) for arg in args])
    code, message = stopped.value.code, capsys.readouterr().err
    # Given a string as exit code, Python prints it and exits with 1.
    return (1, message + code) if isinstance(code, str) else (code, message)
