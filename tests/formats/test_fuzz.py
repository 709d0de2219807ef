"""Randomly altered files, with wrong and with right checksums: exact data or a ``ValueError``."""

import hashlib
import json
import pathlib
import random
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from format_page import read
from helpers import weights

from optax_clipquant import NormalFloat, Ternary, Uniform, ZScore, load, save

COUNTS = [150, pytest.param(10_000, marks=pytest.mark.slow)]
NASTY = [None, True, False, -1, 0, 1, 2, 9, 300, 2**31, 2**63, 10**400, 0.5, 1.5, 1e300, "", "x", "list", "none", "float64", [], [0], [-1, 2], {}, {"a": 1}]  # fmt: skip


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    w = jnp.asarray(weights((9, 4)))
    tree = {
        "u": [Uniform(3, group_size=4, scale_rule="absmax").quantize(w), None],
        "t": Ternary(scale_rule="absmax").quantize(w),
        "n": {"4": NormalFloat(3).quantize(w)},
        "z": ZScore().quantize(w),
        "b": (jnp.ones(3), jnp.arange(2)),
    }
    path = tmp_path_factory.mktemp("fuzz") / "file"
    save(path, tree)
    return path.read_bytes()


def split(content: bytes) -> tuple[dict, bytes]:
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


def joined(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def put(path: pathlib.Path, content: bytes) -> None:
    """Writes a new file: ext4 flushes one that is cut to nothing and rewritten, in ten times as long."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def leaf(tree, name: str):
    if name == "~":
        return tree
    for key in name.split("/"):
        tree = tree[key] if isinstance(tree, dict) and key in tree else tree[int(key)]
    return tree


def exact_or_refused(path: pathlib.Path) -> bool:
    """Whether the file was read, in which case the data must be what the page says."""
    try:
        tree = load(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        return False
    with np.errstate(all="ignore"):
        expected = read(path)
    for name, wanted in expected.items():
        array = leaf(tree, name)
        with jax.enable_x64(array.dtype == np.float64):  # which jax would truncate, with a warning
            found = np.asarray(array)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        if found.dtype.kind != "f" and found.dtype.name != "bfloat16":
            assert found.tobytes() == wanted.tobytes()
            continue
        found, wanted = (np.where(np.abs(x.astype(np.float64)) < 2.0**-120, 0, x.astype(np.float64)) for x in (found, wanted))  # fmt: skip
        np.testing.assert_array_equal(found, wanted)
    return True


@pytest.mark.parametrize("count", COUNTS)
def test_altered_bytes_are_found_or_harmless(tmp_path, content, count):
    path, rng = tmp_path / "file", random.Random(count)
    wanted = {name: array.tobytes() for name, array in read_of(path, content).items()}
    for _ in range(count):
        altered = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8])):
            where = rng.randrange(len(altered))
            action = rng.randrange(3)
            if action == 0:
                altered[where] ^= 1 << rng.randrange(8)
            elif action == 1:
                del altered[where : where + rng.randrange(1, 9)]
            else:
                altered[where:where] = rng.randbytes(rng.randrange(1, 9))
        put(path, altered)
        try:
            load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # only the padding of the header was altered
            assert {name: array.tobytes() for name, array in read(path).items()} == wanted


def read_of(path: pathlib.Path, content: bytes) -> dict[str, np.ndarray]:
    path.write_bytes(content)
    return read(path)


def mutate(x, rng: random.Random):
    """``x`` with one part replaced."""
    if isinstance(x, dict) and x and rng.random() < 0.85:
        key = rng.choice(list(x))
        if rng.random() < 0.1:
            return {k: v for k, v in x.items() if k != key}
        return x | {key: mutate(x[key], rng)}
    if isinstance(x, list) and x and rng.random() < 0.85:
        index = rng.randrange(len(x))
        if rng.random() < 0.1:
            return x[:index] + x[index + 1 :]
        return [*x[:index], mutate(x[index], rng), *x[index + 1 :]]
    if type(x) is int and rng.random() < 0.5:
        return x + rng.choice([-1, 1])
    return rng.choice(NASTY)


@pytest.mark.parametrize("count", COUNTS)
def test_altered_contents_with_right_checksums_are_exact_or_refused(tmp_path, content, count):
    path, rng = tmp_path / "file", random.Random(count)
    header, data = split(content)
    texts = header["__metadata__"]
    loaded = 0
    for _ in range(count):
        stored, described = bytearray(data), json.loads(texts["optax_clipquant"])
        specs = {k: dict(v) for k, v in header.items() if k != "__metadata__"}
        if (action := rng.randrange(3)) == 0:
            stored[rng.randrange(len(stored))] ^= 1 << rng.randrange(8)
        elif action == 1:
            described = mutate(described, rng)
        else:
            name = rng.choice(list(specs))
            spec = specs.pop(name)
            if rng.random() < 0.5:
                name = rng.choice(["~s9", "u", "b/0/x", "~", "b/2", "~m0", "~z0", "x~", "t"])
            elif rng.random() < 0.5:
                spec["dtype"] = rng.choice(["I8", "U8", "F16", "BF16", "F32", "BOOL"])
            else:
                spec["shape"] = spec["shape"][::-1] + rng.choice([[], [1], [1, 1]])
            specs[name] = spec
        put(path, joined({"__metadata__": signed(described, specs, stored)} | specs, bytes(stored)))  # fmt: skip
        loaded += exact_or_refused(path)
    assert loaded > count / 10  # other bits of codes and scales are valid contents


def signed(described, specs: dict, data: bytes) -> dict[str, str]:
    """The metadata with checksums that match the content."""
    dtypes = {"U8": "uint8", "I8": "int8", "I32": "int32", "F16": "float16", "F32": "float32", "BF16": "bfloat16", "BOOL": "bool"}  # fmt: skip
    if isinstance(described, dict) and isinstance(described.get("leaves"), list):
        names = sorted(n for n in specs if n == "~" or n[:2] not in ("~s", "~z", "~m"))
        k = 0
        for index, (name, item) in enumerate(zip(names, described["leaves"], strict=False)):
            parts = [name]
            if isinstance(item, list):
                parts += [f"~{x}{k}" for x in "szm" if f"~{x}{k}" in specs]
                k += 1
            crc = zlib.crc32(b"".join(bytes(data[slice(*specs[p]["data_offsets"])]) for p in parts))
            if isinstance(item, list) and item and type(item[0]) is int:
                described["leaves"][index] = [crc, *item[1:]]
            elif type(item) is int:
                described["leaves"][index] = crc
    texts = {"optax_clipquant": json.dumps(described)}
    listed = sorted([n, dtypes[s["dtype"]], s["shape"]] for n, s in specs.items())
    text = json.dumps([sorted(texts.items()), listed])
    return texts | {"optax_clipquant.sha256": hashlib.sha256(text.encode()).hexdigest()}
