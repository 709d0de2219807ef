"""Validation of files with right checksums over wrong contents."""

import hashlib
import json
import pathlib
import re
import zlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from format_page import read

from optax_clipquant import load
from optax_clipquant.cli import main as cli

GRID = [4, -8, 7, 0.0, [-2, 4], "float32", 0]
TENSORS = {
    "a": np.arange(24, dtype=np.uint8),  # [8, 6] in groups of 4 along the first axis
    "~s0": np.ones((2, 6), ml_dtypes.bfloat16),
    "b": np.ones(3, np.float32),
}


def write(path: pathlib.Path, tensors=None, grid=None, shape=(8, 6), nodes=None, **edits) -> None:
    """Writes a file with right checksums and any contents. ``grid`` replaces items of the grid by index."""
    tensors = TENSORS if tensors is None else tensors
    static = GRID.copy()
    for index, value in (grid or {}).items():
        static[index] = value
    content = {
        "version": 1,
        "leaves": [[crc("a", "~s0", "~z0", "~m0", of=tensors), 0, list(shape)], crc("b", of=tensors)],
        "grids": [static],
        "nodes": nodes or {},
    } | edits  # fmt: skip
    texts = {"optax_clipquant": json.dumps(content)}
    listed = sorted([name, x.dtype.name, list(x.shape)] for name, x in tensors.items())
    signed = json.dumps([sorted(texts.items()), listed]).encode()
    texts["optax_clipquant.sha256"] = hashlib.sha256(signed).hexdigest()
    safetensors.numpy.save_file(tensors, path, texts)


def crc(*names: str, of: dict[str, np.ndarray]) -> int:
    return zlib.crc32(b"".join(of[name].tobytes() for name in names if name in of))


def with_(**changes) -> dict[str, np.ndarray]:
    """``TENSORS`` with some replaced; ``s``, ``z`` and ``m`` are the parts of ``a``."""
    tensors = TENSORS | {f"~{k}0" if len(k) == 1 and k in "szm" else k: v for k, v in changes.items()}  # fmt: skip
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def plain(*names: str) -> dict:
    """A file of plain arrays with these names."""
    tensors = {name: np.ones(2, np.float32) for name in names}
    return {"tensors": tensors, "leaves": [crc(name, of=tensors) for name in sorted(names)], "grids": []}  # fmt: skip


def book(*levels) -> dict:
    return {"grid": {1: 0, 2: len(levels) - 1, 6: list(levels)}, "tensors": with_(a=np.zeros(24, np.uint8))}  # fmt: skip


NAN = float("nan")
WRONG = {
    **{f"dtype {x}": {"grid": {5: x}} for x in ("object", "int64", "U4", ">f4", "int4", "complex64", "f4", None, 1, ["float32"])},
    **{f"bits {x}": {"grid": {0: x}} for x in (True, 1.5, -1, 9, "4", None, [4], NAN, 3, 10**400)},
    **{f"lower {x}": {"grid": {1: x}} for x in ("-8", [], NAN, 1e300, 300, -129, 8, True, None)},
    **{f"upper {x}": {"grid": {2: x}} for x in ("7", [], NAN, 128, -9, 7.0, True, None)},
    **{f"offset {x}": {"grid": {3: x}} for x in ("0", [], NAN, 1e300, -0.5, True, None)},
    **{f"group {x}": {"grid": {4: x}} for x in ([-2, 0], [-2, -4], [-3, 4], [1, 4], [-2], [-2, 4, 1], [-2, 4.0], [-1, 4], [-2, 3], 1, None, "x", True, [-2, 2**70])},
    "a codebook that is short": {"grid": {6: [0, 1]}},
    "a codebook of text": {"grid": {6: ["a"] * 16}},
    "a codebook that is long": {"grid": {6: [0.0] * 100_000}},
    "a codebook that falls": book(0, 2, 1, 3),
    "a codebook with NaN": book(0, 1, NAN, 3),
    "a codebook too fine for float32": book(0, 1e-9, 1, 2),
    "a codebook too large for float32": book(0, 1, 2, 2**40),
    "a codebook and zero points": book(0, 1, 2, 3) | {"tensors": with_(z=np.zeros((2, 6), np.int8))},
    "a grid of six items": {"grids": [GRID[:6]]},
    "a grid that is no list": {"grids": ["x"]},
    "no grids": {"grids": []},
    "grids that are no list": {"grids": {"0": GRID}},
    **{f"grid {x}": {"leaves": [[crc("a", "~s0", of=TENSORS), x, [8, 6]], crc("b", of=TENSORS)]} for x in (-1, 1, True, None, 0.0)},
    **{f"shape {x}": {"shape": x} for x in ((6, 8), (48,), (8, 7), (-8, -6), (8.0, 6), (True, 48), ("8", 6), (2**62, 2**62), (1,) * 100_000, (0, 6), (0, 2**62, 2**62))},
    "scales that broadcast": {"tensors": with_(s=np.ones((2, 1, 1), np.float32))},
    "scales of another rank": {"tensors": with_(s=np.ones(6, np.float32))},
    "scales that are too few": {"tensors": with_(s=np.ones((1, 6), np.float32))},
    "scales that are too many": {"tensors": with_(s=np.ones((8, 6), np.float32))},
    "scales for half of the channels": {"tensors": with_(s=np.ones((2, 3), np.float32))},
    "no scales": {"tensors": with_(s=None)},
    **{f"scales of {t}": {"tensors": with_(s=np.ones((2, 6), t))} for t in ("uint8", "bool", "complex64", "int32", "float64", "float16")},
    **{f"zero points of {t}": {"tensors": with_(z=np.ones((2, 6), t))} for t in ("uint8", "complex64", "int32", "bool")},
    **{f"zero points {n}": {"tensors": with_(z=np.ones(n, np.int8))} for n in ((2, 3), (6,), (1, 6), (1, 1))},
    **{f"bounds of {t}": {"tensors": with_(m=np.ones((2, 6), t))} for t in ("complex64", "float32", "uint8")},
    "bounds of another shape": {"tensors": with_(m=np.ones((1, 1), np.int32))},
    "codes of another dtype": {"tensors": with_(a=np.arange(24, dtype=np.int8))},
    "codes with two axes": {"tensors": with_(a=np.zeros((4, 6), np.uint8))},
    "codes that are too few": {"tensors": with_(a=np.zeros(23, np.uint8))},
    "codes that are too many": {"tensors": with_(a=np.zeros(25, np.uint8))},
    "a code above the largest": {"grid": {2: 5}, "tensors": with_(a=np.full(24, 255, np.uint8))},
    "a ternary byte above 242": {"grid": {0: 0, 1: -1, 2: 1}, "shape": (10, 12), "tensors": with_(a=np.full(24, 243, np.uint8), s=np.ones((3, 12), np.float32))},
    "a part that belongs to none": {"tensors": TENSORS | {"~s7": np.ones((2, 6), np.float32)}},
    "a part with no number": {"tensors": TENSORS | {"~sx": np.ones(1, np.float32)}},
    "bounds of an array": {"tensors": TENSORS | {"~m1": np.ones(1, np.int32)}},
    **{f"checksum {x}": {"leaves": [[crc("a", "~s0", of=TENSORS), 0, [8, 6]], x]} for x in (-1, 2**32, True, None, "1", 1.0, [1, 0])},
    "a checksum that is true": {"leaves": [[True, 0, [8, 6]], crc("b", of=TENSORS)]},
    **{f"leaves {x}": {"leaves": x} for x in ([], [1], [1, 2, 3], {}, None, "ab")},
    **{f"nodes {x}": {"nodes": x} for x in ([1], {"c": "set"}, {"c": 1}, {"c": None}, {"~": "list"}, {"~": "int"}, {"~": "none"}, {"a": "none"}, {"a/c": "none"}, {"b": "dict"}, {"c~": "none"}, {"c~2": "none"}, {"__metadata__": "none"}, {"/".join("x" * 20_000): "none"})},
    "a leaf under a leaf": plain("a", "a/b"),
    "a leaf under none": plain("a/b") | {"nodes": {"a": "none"}},
    "a leaf in an empty dict": plain("a/b") | {"nodes": {"a": "dict"}},
    "integers that collide": plain("a/1", "a/01") | {"nodes": {"a": "int"}},
    **{f"the integer {x}": plain(f"a/{x}") | {"nodes": {"a": "int"}} for x in ("-0", "+1", "1.0", " 1", "", "x", "٣", "1_0")},
    "a list that lacks 0": plain("a/1", "a/2") | {"nodes": {"a": "list"}},
    "a list with 00": plain("a/00") | {"nodes": {"a": "list"}},
    "an escape that is none": plain("a~2b"),
    "an escape that ends": plain("a~"),
    "the tree and a leaf": plain("~", "a"),
    "20,000 keys": plain("/".join("x" * 20_000)),
    **{f"version {x}": {"version": x} for x in (0, 2, True, "1", None, 1.0)},
}  # fmt: skip


def test_valid_contents_are_read(tmp_path):
    write(tmp_path / "file")
    loaded, wanted = load(tmp_path / "file"), read(tmp_path / "file")
    np.testing.assert_array_equal(np.asarray(loaded["a"]), wanted["a"])
    np.testing.assert_array_equal(np.asarray(loaded["b"]), wanted["b"])


@pytest.mark.parametrize("what", WRONG)
def test_wrong_contents_with_right_checksums_are_refused(tmp_path, capsys, what):
    path = tmp_path / "model.safetensors"
    write(path, **WRONG[what])
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as error:
        load(path)
    assert len(str(error.value)) < 1000
    needs_codes = "a code above" in what or "above 242" in what
    commands = [["decompress", path, tmp_path / "out"]]
    commands += [] if needs_codes else [["inspect", path]]
    for command in commands:
        assert cli.main(list(map(str, command))) == 1, command
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert str(path) in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("what", "name"),
    [("scales of uint8", "a"), ("a part that belongs to none", "~s7"), ("shape (48,)", "a")],
)
def test_error_names_the_tensor(tmp_path, what, name):
    write(tmp_path / "file", **WRONG[what])
    with pytest.raises(ValueError, match=f"tensor '{name}'"):
        load(tmp_path / "file")
