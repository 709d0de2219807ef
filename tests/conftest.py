"""Settings for all tests: eight host devices, strict dtype promotion, and every available platform."""

import gc
import importlib.util
import itertools
import os
import pathlib
import signal

# A shell that runs the tests in the background lets them, and the commands they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Set before jax is imported, since it reads this once. With HOST_DEVICES=1, as most users have it, tests
# that need eight skip themselves. Two thirds of the tests' time goes into XLA's compiler. Of its CPU seconds
# for a training step, optimized as by default, LLVM's optimizations take a quarter, the emitters that lower
# each fusion through MLIR another half, and the split of a small program into parts for several threads
# a tenth. Slow tests of arithmetic run with the first two, as users have them (see .ci/run).
os.environ["XLA_FLAGS"] = " ".join(
    [
        f"--xla_force_host_platform_device_count={os.environ.get('HOST_DEVICES', 8)}",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import hypothesis
import jax
import pytest

# Benchmarks are run by hand.
collect_ignore = ["benchmarks"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time goes into compilation, much of it of the same programs, in both workers of a run. jax
# writes to the folder without a lock: a worker that reads half a program warns (see pyproject.toml) and
# compiles it.
_cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Examples include compilations; a deadline would test the compiler.
hypothesis.settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_collection_finish() -> None:
    """Freezes imports and tests, which stay, so that the collector need not walk them at every trace."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the example of ``to_qwix`` where qwix, an extra, is not installed."""
    if importlib.util.find_spec("qwix") is None:
        for item in items:
            if isinstance(item, pytest.DoctestItem) and item.path.name == "qwix.py":
                item.add_marker(pytest.mark.skip(reason="needs qwix"))


_tests = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Forgets programs now and then: 1.4 MB each, and 200 of them make any compilation 4 ms slower (32 ms without)."""
    if next(_tests) % 100 == 0:
        jax.clear_caches()


def _platforms() -> list[str]:
    found = []
    for platform in ("cpu", "gpu", "tpu"):
        try:
            jax.devices(platform)
        except RuntimeError:
            continue
        found.append(platform)
    return found


@pytest.fixture(params=_platforms())
def platform(request: pytest.FixtureRequest):
    """Runs the test on each platform that jax finds, such as a TPU on Colab."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


@pytest.fixture(params=["jit", pytest.param("eager", marks=pytest.mark.slow)])
def variant(request: pytest.FixtureRequest):
    """``jax.jit`` or the identity, as chex.variants does for absl's test classes."""
    return jax.jit if request.param == "jit" else lambda fn: fn
