"""Eight host devices, strict dtypes, and each platform that is there."""

import os
import pathlib

# Before jax is imported: it reads this once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import pytest

# Run by hand.
collect_ignore = ["benchmarks"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time goes into compiling, much of it the same programs again, in both workers of a run.
# jax writes to the folder without a lock: who reads half of a program warns (see pyproject.toml), and
# compiles it.
_cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Examples include compilations; a deadline would test the compiler.
hypothesis.settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("default")


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
    """Runs the test on each platform that jax finds: on Colab's TPU, on the TPU too."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


@pytest.fixture(params=["jit", "eager"])
def variant(request: pytest.FixtureRequest):
    """``jax.jit`` or the identity, as chex.variants does for absl's test classes."""
    return jax.jit if request.param == "jit" else lambda fn: fn
