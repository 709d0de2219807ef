"""Processes killed at any moment: training resumes bit for bit, and a file is whole or absent.

The script forks its workers from a process that has imported everything but started no backend, so that
a kill is as cheap as possible.
"""

import os
import pathlib

import pytest
from helpers import run_python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]

COMMON = """
import math, os, pathlib, pickle, random, shutil, signal, sys, time, warnings
import jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint as ocp
from optax_clipquant import *

folder, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
# Workers that began again and again would mostly compile.
jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
warnings.filterwarnings("ignore", message="os.fork")
rng = random.Random(0)


def forked(work, seconds=math.inf, after=None):
    \"\"\"Whether the work came to its end within the seconds, or was killed.

    They count from when the file ``after`` is there, or from the start.
    \"\"\"
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    while after is not None and not after.exists():
        time.sleep(0.005)
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"a worker failed: {status}"
            return True
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.005)
"""

TRAINING = (
    COMMON
    + """
STEPS = 40
tx = optax.chain(
    clip_by_quantile(),
    quantize_state(optax.adam(1e-2), min_size=64, block_size=16),
    quantize_weights(Uniform(4), residual_bits=8),
)


def train(where):
    @jax.jit
    def step(params, state, i):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (16, 16))
        grads = jax.grad(lambda p: jnp.mean(jnp.square(jnp.tanh(x @ p["w"]) - jnp.sin(x))))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def start():
        params = {"w": jax.random.normal(jax.random.key(0), (16, 16))}
        return params, tx.init(params)

    # One program: a worker that is killed as it starts tests little.
    carry, done = jax.jit(start)(), 0
    with ocp.CheckpointManager(where, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        if manager.latest_step() is not None:
            done = manager.latest_step()
            carry = manager.restore(done, args=ocp.args.StandardRestore(carry))
        for i in range(done, STEPS):
            carry = step(*carry, i)
            if i % 4 == 3:
                manager.save(i + 1, args=ocp.args.StandardSave(carry))
    with open(where.with_suffix(".tmp"), "wb") as file:
        for leaf in jax.tree.leaves(carry):
            file.write(np.asarray(leaf).tobytes())
    os.replace(where.with_suffix(".tmp"), where.with_suffix(".bytes"))


assert forked(lambda: train(folder / "first"))  # compiles
begin = time.monotonic()
assert forked(lambda: train(folder / "whole"))
whole = time.monotonic() - begin  # kills fall within it, however fast the machine is
expected = (folder / "whole.bytes").read_bytes()
killed = ended = resumed = 0
where = folder / "killed"
while killed < kills or not ended:
    before = where.exists() and any(p.name.isdigit() for p in where.iterdir())
    resumed += before
    if not forked(lambda: train(where), rng.uniform(0.1, 1) * whole if killed < kills else math.inf):
        killed += 1
        continue
    ended += 1
    assert where.with_suffix(".bytes").read_bytes() == expected, "another end than without a kill"
    shutil.rmtree(where)
    where.with_suffix(".bytes").unlink()
print(killed, ended, resumed)
"""
)

SAVING = (
    COMMON
    + """
path = folder / "model.safetensors"


def tree(seed):
    w = np.random.default_rng(seed).standard_normal((400, 500)).astype(np.float32)
    return {"w": w, "q": jax.tree.map(np.asarray, quantize_params({"a": jnp.asarray(w)}, Uniform(4))["a"])}


def prepare():
    for seed in (0, 1):
        (folder / f"tree{seed}").write_bytes(pickle.dumps(tree(seed)))
        save(folder / f"whole{seed}", tree(seed))


def work():
    (folder / "ready").touch()
    for i in range(10**6):
        save(path, trees[i % 2])


def check():
    expected = [jax.tree.leaves(dequantize_params(tree)) for tree in trees]
    found = jax.tree.leaves(dequantize_params(load(path)))
    same = [all(np.array_equal(a, b) for a, b in zip(found, e, strict=True)) for e in expected]
    assert any(same), "the file holds neither tree"


# Trees of NumPy's arrays, so that a worker need not start a backend.
assert forked(prepare)
trees = [pickle.loads((folder / f"tree{seed}").read_bytes()) for seed in (0, 1)]
whole = [(folder / f"whole{seed}").read_bytes() for seed in (0, 1)]
begin = time.monotonic()
for _ in range(20):
    save(folder / "whole0", trees[0])
saving = (time.monotonic() - begin) / 20
killed = 0
while killed < kills:
    # From when it saves, not from when it starts.
    (folder / "ready").unlink(missing_ok=True)
    assert not forked(work, rng.uniform(0.2, 8) * saving, after=folder / "ready")
    killed += 1
    if path.exists():
        assert path.read_bytes() in whole, "the file holds neither tree"
assert forked(check)
print(killed, len([p for p in folder.iterdir() if p.name.startswith((path.name, "." + path.name))]) - 1)
"""
)


def run(script: str, folder: pathlib.Path, kills: int) -> list[str]:
    process = run_python("-c", script, folder, str(kills), timeout=1500, JAX_PLATFORMS="cpu")
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout.split()


def test_training_resumes_bit_for_bit(tmp_path: pathlib.Path):
    killed, ended, resumed = map(int, run(TRAINING, tmp_path, 20))
    assert killed == 20
    assert ended >= 1
    assert resumed >= 5  # many began from a checkpoint


def test_killed_save_leaves_a_whole_file(tmp_path: pathlib.Path):
    killed, left = run(SAVING, tmp_path, 200)
    assert killed == "200"
    # Each save removes the files of killed ones; those of the last, also killed, may stay.
    assert int(left) <= 2
