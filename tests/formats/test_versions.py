"""Stored files of format version 1 keep loading, to the same arrays."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from format_page import read

from optax_clipquant import load
from optax_clipquant.quant.qarray import is_qarray

FOLDER = pathlib.Path(__file__).parent / "version1"


@pytest.mark.parametrize(
    "kind", ["uniform", "groups", "ternary", "normal_float", "zscore", "half", "root"]
)
def test_files_of_version_1_load(kind):
    path = FOLDER / f"{kind}.safetensors"
    loaded = load(path)
    if kind == "root":
        np.testing.assert_array_equal(np.asarray(loaded), read(path)["~"])
        return
    assert loaded["q"].keys() == loaded["expected"].keys()
    stored = read(path)
    for name, q in loaded["q"].items():
        assert is_qarray(q)
        expected = np.asarray(loaded["expected"][name])
        for found in (np.asarray(q.dequantize()), stored[f"q/{name}"]):
            assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes()), name


def test_tree_structures_of_version_1_load():
    loaded = load(FOLDER / "nodes.safetensors")
    ones = jnp.ones
    wanted = {
        "list": [ones(2), [None, (jnp.zeros((0, 3)),)]],
        "tuple": (jnp.arange(3), ()),
        "empty": {},
        "ints": {5: {"int": jnp.array(True)}, -1: ones(1)},
        "half": [ones(3, t) for t in ("bfloat16", "float16", "float8_e4m3fn")] + [ones(2, "float8_e5m2")],
        "wide": [np.array([1 + 2.0**-40]), np.array(2**40)],
        "complex": ones(2, jnp.complex64),
        "a/b": ones(1),
        "a~1b": ones(4),
        "": {"": ones(5)},
        "~": ones(3),
        "~s0": ones(2),
        "__metadata__": ones(6),
    }  # fmt: skip
    assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    with safetensors.safe_open(FOLDER / "nodes.safetensors", "numpy") as file:
        assert file.metadata()["note"] == "ünï"
