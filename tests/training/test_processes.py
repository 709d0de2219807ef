"""Two processes that train together match one process, and resume bit for bit after one is killed.

Checkpoints are Orbax's, of which each process writes its part.
"""

import contextlib
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills"),
]

STEPS = 16
TRAIN = f"""
import os, pathlib, sys, time
folder, process, processes, port, pause = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:5]), float(sys.argv[5])
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if processes > 1:
    jax.distributed.initialize(
        f"localhost:{{port}}", processes, process, initialization_timeout=60, heartbeat_timeout_seconds=10
    )
import jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint as ocp
from optax_clipquant import Uniform, clip_by_value, quantize_weights

assert jax.device_count() == 4 and jax.process_count() == processes
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere, split = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
tx = optax.chain(clip_by_value(0.01), optax.adam(1e-2), quantize_weights(Uniform(bits=4)))


def loss(params, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) - jnp.sin(x)))


@jax.jit
def step(params, state, x):
    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state


def batch(i):
    x = np.random.default_rng(i).standard_normal((32, 16)).astype(np.float32)
    return jax.make_array_from_callback(x.shape, split, lambda index: x[index])


def start():
    params = {{"w": 0.3 * jax.random.normal(jax.random.key(0), (16, 16))}}
    return params, tx.init(params)


carry, done = jax.jit(start, out_shardings=everywhere)(), 0
options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
    if manager.latest_step() is not None:
        done = manager.latest_step()
        carry = manager.restore(done, args=ocp.args.StandardRestore(carry))
    for i in range(done, {STEPS}):
        carry = step(*carry, batch(i))
        jax.block_until_ready(carry)
        time.sleep(pause)
        if i % 4 == 3:
            manager.save(i + 1, args=ocp.args.StandardSave(carry))
leaves = [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(carry)]
np.savez(folder / f"end{{process}}.npz", *leaves)
print(done)
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def started(folder: pathlib.Path, processes: int, pause: float = 0.0):
    """Starts the processes, and kills those that are left at the end."""
    folder.mkdir(exist_ok=True)
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    port = free_port()
    running = []
    try:
        for process in range(processes):
            args = map(str, (folder, process, processes, port, pause))
            with (folder / f"log{process}").open("w") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-c", TRAIN, *args], stdout=log, stderr=log, env=env
                    )
                )
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def ends(folder: pathlib.Path, processes: int) -> tuple[list[list[np.ndarray]], int]:
    """The end state of each process, and the step that they started from."""
    with started(folder, processes) as running:
        for index, process in enumerate(running):
            assert process.wait(timeout=120) == 0, (folder / f"log{index}").read_text()[-3000:]
    begun = int((folder / "log0").read_text().split()[-1])
    found = [np.load(folder / f"end{i}.npz") for i in range(processes)]
    return [[file[name] for name in file.files] for file in found], begun


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """The common end state of two processes that are not killed."""
    (first, second), begun = ends(tmp_path_factory.mktemp("pair"), 2)
    assert_same(first, second)
    assert begun == 0
    return first


def test_two_processes_train_as_one_does(tmp_path, expected):
    """Weights agree bit for bit, and the rest up to the order in which four gradients are summed."""
    (alone,), _ = ends(tmp_path, 1)
    assert_same(alone[:1], expected[:1])
    for found, want in zip(alone[1:], expected[1:], strict=True):
        assert found.dtype == want.dtype
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_resumes_bit_for_bit_after_a_kill(tmp_path, expected):
    rng = random.Random(0)
    with started(tmp_path, 2, pause=0.2) as running:
        end = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "4").exists():
            assert time.monotonic() < end, "no checkpoint"
            assert running[0].poll() is None, (tmp_path / "log0").read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        running[1].send_signal(signal.SIGKILL)
        assert running[1].wait(timeout=10) == -signal.SIGKILL
    assert not (tmp_path / "end0.npz").exists()
    found, begun = ends(tmp_path, 2)
    assert 4 <= begun < STEPS
    for each in found:
        assert_same(each, expected)
