"""Memory and traffic of programs compiled for a TPU, which need not be present."""

import importlib.util
import json
import pathlib
import re

import pytest
from helpers import run_python

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot (libtpu)"
    ),
    pytest.mark.xdist_group("tpu"),  # in a single worker, so that it compiles once
]

BENCHMARK = pathlib.Path(__file__).parents[1] / "benchmarks" / "accelerator.py"


def steps(size: int, *names: str) -> dict[str, dict[str, float]]:
    """What the benchmark finds for steps of two leaves, in bytes a weight."""
    process = run_python(BENCHMARK, "--json", "--size", str(size), *names)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    return {
        name: {key: x / costs["weights"] for key, x in costs.items()}
        for name, costs in found.items()
    }


# Of float Adam, in bytes a weight, for leaves of this size (libtpu 0.0.52).
ADAM = {"hbm": 26.25, "arguments": 12.25}


def test_clips_and_quantized_state_cost_no_more_than_float_adam():
    """Leaves that fit into the chip's fast memory; the others are in the slow test."""
    found = steps(2048, "clip_by_value", "8-bit state")
    clip, state = found["clip_by_value"], found["8-bit state"]
    assert clip["hbm"] <= 1.02 * ADAM["hbm"]
    assert clip["temporaries"] <= 0.1
    assert state["hbm"] <= 0.6 * ADAM["hbm"]
    assert state["arguments"] + state["temporaries"] <= 0.75 * ADAM["arguments"]


@pytest.mark.slow
def test_steps_of_large_leaves_meet_their_targets():
    limits = {
        "clip_by_quantile": (30.5, 0.1),
        "4 bits": (46.5, 0.3),
        "4 bits, 8-bit residual": (44.5, 2.1),
        "8-bit state": (33.0, 2.3),
        "4-bit state": (30.1, 2.3),
    }
    for name, costs in steps(8192, *limits).items():
        hbm, temporaries = limits[name]
        assert costs["hbm"] <= hbm, name
        assert costs["temporaries"] <= temporaries, name


@pytest.mark.slow
def test_embeddings_and_large_vectors_cost_less_than_in_float():
    rows = ("50,257 rows of 768", "50,304 rows of 768", "a vector of 8,388,608")
    process = run_python(BENCHMARK, "--part", "state", *rows, timeout=900, COLUMNS="160")
    # Every row has a target, below float's peak; the exit status tells whether all are met.
    assert process.returncode == 0, process.stdout + process.stderr
    assert all(row in process.stdout for row in rows)


@pytest.mark.slow
def test_products_read_codes_packed_and_write_no_weights():
    quantizers = ("8 bits", "4 bits", "4 bits, groups of 32", "2 bits", "ternary")
    rows = [f"{name}: in x out" for name in quantizers]
    process = run_python(BENCHMARK, "--part", "serving", *rows, timeout=900, COLUMNS="160")
    # The target of every row: codes and scales are read once, within 10%.
    assert process.returncode == 0, process.stdout + process.stderr
    # Three batches, the bytes of a weight, and temporaries: none.
    for row in rows:
        assert re.search(rf"^ {row}(?: +[\d.]+){{4}} +0\.00 ", process.stdout, re.M), process.stdout
