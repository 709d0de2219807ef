"""The README's page on the file format is enough: a reader written from it alone."""

import hashlib
import json
import struct
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import QUANTIZERS, cases, weights

from optax_clipquant import Uniform, ZScore, dequantize_params, load, save

# The reader: NumPy, ml_dtypes for bfloat16, and the page. Nothing of optax_clipquant.
DTYPES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I32": "int32", "F16": "float16", "F32": "float32", "BF16": "bfloat16"}  # fmt: skip


def read(path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    texts = (header := json.loads(raw[8:start])).pop("__metadata__")
    specs = sorted([name, DTYPES[t["dtype"]], t["shape"]] for name, t in header.items())
    digest, content = texts.pop("optax_clipquant.sha256"), json.loads(texts["optax_clipquant"])
    signed = hashlib.sha256(json.dumps([sorted(texts.items()), specs]).encode())
    assert (signed.hexdigest(), content["version"]) == (digest, 1)
    types, shapes = {n: np.dtype(t) for n, t, _ in specs}, {n: s for n, _, s in specs}
    stored = {n: raw[start:][slice(*t["data_offsets"])] for n, t in header.items()}
    names = sorted(name for name in header if name[:2] not in ("~s", "~z", "~m"))
    found, k = {}, 0
    for name, leaf in zip(names, content["leaves"], strict=True):
        crc, grid, shape = leaf if isinstance(leaf, list) else (leaf, None, shapes[name])
        parts = [name] + [f"~{x}{k}" for x in "szm" if grid is not None and f"~{x}{k}" in stored]
        assert zlib.crc32(b"".join(stored[part] for part in parts)) == crc
        arrays = {p[:2]: np.frombuffer(stored[p], types[p]).reshape(shapes[p]) for p in parts}
        if grid is not None:
            arrays[name[:2]] = decode(stored[name], content["grids"][grid], shape, arrays)
        found[name], k = arrays[name[:2]], k + (grid is not None)
    return found


def decode(packed, static, shape, arrays) -> np.ndarray:
    bits, lower, _, offset, group, dtype, book = static
    byte, i = np.frombuffer(packed + b"\0", np.uint8).astype(int), np.arange(int(np.prod(shape)))
    if bits == 0:
        digits = byte[i // 5] // 3 ** (i % 5) % 3
    else:
        at = i * bits // 8
        digits = (byte[at] + 256 * byte[at + 1]) >> i * bits % 8 & 2**bits - 1
    parts = {k: a.astype(np.float32) for k, a in arrays.items() if k in ("~s", "~z")}
    if group:  # (axis, size); the last group may be shorter
        (axis, size), cut = group, range(shape[group[0]])
        parts = {k: a.repeat(size, axis).take(cut, axis) for k, a in parts.items()}
    level = np.array(book)[digits] if book else digits + lower + offset
    level = level.astype(np.float32).reshape(shape)
    value = (level - parts.get("~z", np.float32(0))) * parts["~s"]
    if "~z" in parts:
        top = np.float32(ml_dtypes.finfo(dtype).max)
        value = np.where(np.isfinite(parts["~s"]), value.clip(-top, top), value)
    return value.astype(dtype) + np.dtype(dtype).type(0)


def check(path, tree):
    save(path, tree, metadata={"note": 'ünï "quoted" \n'})
    found = read(path)
    # Were codes written in another order, `load` might read them in that order too.
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
        (jnp.float16, 2e-5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((jnp.bfloat16, 1), (jnp.float16, 1), (jnp.float16, 1e-3))
        ),
    ],
)  # fmt: skip
def test_every_quantizer(tmp_path, dtype, size):
    w = jnp.asarray(weights((33, 7)) * np.float32(size)).astype(dtype)
    tree = {name: q.quantize(w) for name, q in QUANTIZERS.items()}
    check(tmp_path / "file", tree | {"b": jnp.ones(7, dtype), "scalar": jnp.array(3)})


@pytest.mark.parametrize("bits", cases(range(1, 9), [1, 3, 4, 7]))
def test_every_width(tmp_path, bits):
    shapes = [(13, 5), (7,), (2, 3, 9), (0, 4)]
    tree = {str(s): Uniform(bits, group_size=4).quantize(jnp.asarray(weights(s))) for s in shapes}
    check(tmp_path / "file", tree)


def test_bounds_constants_and_zero_points_beyond_the_dtype(tmp_path):
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


def test_the_reader_checks(tmp_path):
    path = tmp_path / "file"
    save(path, {"w": Uniform(4).quantize(jnp.asarray(weights((6, 5))))})
    content = bytearray(path.read_bytes())
    for position in (-1, content.index(b"leaves")):
        altered = content.copy()
        altered[position] ^= 1
        path.write_bytes(altered)
        with pytest.raises(AssertionError):
            read(path)
