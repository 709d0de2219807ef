"""A reader of the files of ``save``, written from ``optax_clipquant/formats/FORMAT.md`` alone."""

import hashlib
import json
import struct
import zlib

import ml_dtypes
import numpy as np

# The reader uses NumPy, ml_dtypes for bfloat16, and nothing of optax_clipquant.
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
