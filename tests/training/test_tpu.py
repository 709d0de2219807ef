"""Memory and traffic of programs compiled for a TPU, which need not be present."""

import importlib.util
import json

import pytest
from helpers import run_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot (libtpu)"
    ),
    pytest.mark.xdist_group("tpu"),  # in a single worker, so that it compiles once
]

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


def compiled(fn, *args, donate=()):
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    program = jax.jit(fn, donate_argnums=donate).lower(*args).compile()
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

params = {"a": w, "b": w}
batch = jax.ShapeDtypeStruct((256, n), jnp.float32)


def step_of(tx):
    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.mean(jnp.square(jax.nn.relu(x @ p["a"]) @ p["b"])))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return compiled(step, params, jax.eval_shape(tx.init, params), batch, donate=(0, 1))


adam, grid = optax.adam(1e-3), quantize_weights(Uniform(4))
for name, transforms in {
    "adam": [adam],
    "optax.clip": [optax.clip(1.0), adam],
    "clip": [clip_by_value(1.0, telemetry=False), adam],
    "on a grid": [adam, grid],
    "clip, on a grid": [clip_by_value(1.0, telemetry=False), adam, grid],
}.items():
    found[name] = step_of(optax.chain(*transforms))
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


def test_a_step_reads_the_latent_weights_twice_and_the_params_once(found):
    """Latent weights are read a second time to round them, once the scales are known; params are read to
    detect edits outside the chain.
    """
    latent = 2 * SIZE * SIZE * 4
    for plain, program in (("adam", "on a grid"), ("optax.clip", "clip, on a grid")):
        extra = found[program]["accessed"] - found[plain]["accessed"]
        assert extra <= 4.05 * latent, program
        assert found[program]["temporaries"] <= 0.01 * latent
        arguments = found[program]["arguments"] - found[plain]["arguments"]
        assert latent <= arguments <= 1.01 * latent


def test_clip_without_telemetry_costs_what_optax_clip_costs(found):
    assert found["clip"] == found["optax.clip"]
