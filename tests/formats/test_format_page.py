"""The page on the file format suffices: a reader written from it alone reads what ``save`` writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from format_page import read
from helpers import QUANTIZERS, cases, weights

from optax_clipquant import Uniform, ZScore, dequantize_params, load, save


def check(path, tree):
    save(path, tree, metadata={"note": 'ünï "quoted" \n'})
    found = read(path)
    # An independent check of the order of codes: `save` and `load` might share a mistake.
    for wanted in (dequantize_params(load(path)), dequantize_params(tree)):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            array = np.asarray(array)
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (jnp.float32, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((jnp.bfloat16, 1), (jnp.float16, 1e-3), (jnp.float16, 2e-5))
        ),
    ],
)  # fmt: skip
def test_reads_every_quantizer(tmp_path, dtype, size):
    w = jnp.asarray(weights((33, 7)) * np.float32(size)).astype(dtype)
    tree = jax.jit(lambda w: {name: q.quantize(w) for name, q in QUANTIZERS.items()})(w)
    check(tmp_path / "file", tree | {"b": jnp.ones(7, dtype), "scalar": jnp.array(3)})


@pytest.mark.parametrize("bits", cases(range(1, 9), [1, 3]))
def test_reads_every_width(tmp_path, bits):
    shapes = [(13, 5), (7,), (2, 3, 9), (0, 4)]
    tree = {str(s): Uniform(bits, group_size=4).quantize(jnp.asarray(weights(s))) for s in shapes}
    check(tmp_path / "file", tree)


def test_reads_traced_bounds_constants_and_clipped_levels(tmp_path):
    w = jnp.asarray(weights((6, 5)))
    check(
        tmp_path / "file",
        {
            "traced": jax.jit(lambda w, R: ZScore(R=R).quantize(w))(w, 5),
            "constant": ZScore().quantize(jnp.full((3, 2), 0.3)),
            "huge": Uniform(4, symmetric=False).quantize((w * 2e4).astype(jnp.float16)),
            "nan": Uniform(4).quantize(w.at[0, 0].set(jnp.nan)),
        },
    )


def test_reader_notices_damage(tmp_path):
    path = tmp_path / "file"
    save(path, {"w": Uniform(4).quantize(jnp.asarray(weights((6, 5))))})
    content = bytearray(path.read_bytes())
    for position in (-1, content.index(b"leaves")):
        altered = content.copy()
        altered[position] ^= 1
        path.write_bytes(altered)
        with pytest.raises(AssertionError):
            read(path)
