"""Memory and traffic of programs compiled for a TPU, which need not be present."""

import importlib.util
import json
import pathlib

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


SIZE = 4096
# In a subprocess, since libtpu reads its settings when it starts.
SCRIPT = """
import json
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
from optax_clipquant import *

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
sharding = jax.NamedSharding(mesh, jax.P())


def compiled(fn, *args):
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    program = jax.jit(fn).lower(*args).compile()
    memory = program.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "accessed": program.cost_analysis()["bytes accessed"],
    }


n = %d
w = jax.ShapeDtypeStruct((n, n), jnp.float32)
x = jax.ShapeDtypeStruct((64, n), jnp.bfloat16)
found = {}
for name, quantizer in {
    "8": Uniform(8), "4": Uniform(4), "4, groups": Uniform(4, group_size=128), "2": Uniform(2),
    "ternary": Ternary(),
}.items():
    q = jax.eval_shape(lambda w: narrow(quantize_params({"kernel": w}, quantizer)), w)
    found[name] = compiled(lambda q, x: x @ q["kernel"].astype(jnp.bfloat16), q, x)

print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    process = run_python(
        "-c",
        SCRIPT % SIZE,
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        JAX_PLATFORMS="cpu",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # this process may have loaded it to look for a TPU
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits", "scales"),
    [("8", 8, SIZE), ("4", 4, SIZE), ("4, groups", 4, SIZE * 32), ("2", 2, SIZE), ("ternary", 2, SIZE)],
)  # fmt: skip
def test_codes_are_read_packed_and_dequantized_in_the_matmul(found, name, bits, scales):
    codes, x = SIZE * SIZE * bits / 8, 2 * 64 * SIZE
    program = found[name]
    assert program["temporaries"] == 0
    # Scales of a single row are padded to up to 16 rows of a tile.
    assert program["arguments"] <= 1.01 * codes + 2 * 16 * scales + x
    # The codes are read once, and x, the scales and the result a few times.
    assert program["accessed"] <= 1.01 * codes + 10 * (2 * scales + 2 * x)
