"""Sharded checkpoints, recognition of other file types by their first bytes, and unknown dtypes."""

import json
import os
import struct
import time
import tracemalloc

import foreign_files
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import weights

from optax_clipquant import load
from optax_clipquant.cli import main as cli
from optax_clipquant.formats.safetensors import Reader

TENSORS = {f"layer.{i}.weight": weights((16, 8), seed=i) for i in range(5)} | {"norm": np.ones(8, np.float32)}  # fmt: skip


def run(*args) -> int:
    return cli.main([str(arg) for arg in args])


def raw(path, header: dict, content: bytes = b"") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    names = list(TENSORS)
    weight_map = {}
    for index, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-{index:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({n: TENSORS[n] for n in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("named", ["folder", "index"])
@pytest.mark.parametrize("limit", [None, "700B"], ids=["one file", "shards"])
def test_shards_are_compressed_as_one_model(tmp_path, shards, capsys, named, limit):
    source = shards if named == "folder" else shards / "model.safetensors.index.json"
    options = [] if limit is None else ["--max-shard-size", limit]
    small, plain = tmp_path / "small", tmp_path / "plain"
    assert run("compress", source, small, "--bits", 4, *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in report["tensors"]] == list(TENSORS)
    assert report["quantized"] == 5
    assert small.is_dir() == (limit is not None)
    assert run("decompress", small, plain, *options) == 0
    # The same as from one file.
    safetensors.numpy.save_file(TENSORS, tmp_path / "whole", {"format": "pt"})
    assert run("compress", tmp_path / "whole", tmp_path / "one", "--bits", 4) == 0
    wanted = {name: np.asarray(leaf) for name, leaf in load(tmp_path / "one").items()}
    found = {name: np.asarray(leaf) for name, leaf in load(small).items()}
    files = [plain] if limit is None else sorted(plain.glob("*.safetensors"))
    stored = {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}
    assert found.keys() == stored.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].tobytes() == stored[name].tobytes() == array.tobytes()
    if limit is not None:
        assert len(files) > 1
        assert run("inspect", small, "--against", source) == 0
        assert run("compress", source, small, *options) == 1  # it exists
        before = set(small.iterdir())
        assert run("compress", source, small, *options, "--force") == 0
        assert not before & set(small.glob("*-of-*"))  # new shards, and the old ones are gone
        assert load(small).keys() == wanted.keys()


def test_load_of_plain_shards_returns_arrays(shards):
    found = load(shards)
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"layer.0.weight": "../model-00001-of-00002.safetensors"}, "is not the name of a file"),
        (lambda m: m | {"layer.0.weight": "none.safetensors"}, "the shard 'none.safetensors' is not there"),
        (lambda m: m | {"layer.0.weight": m["norm"]}, "tensor 'layer.0.weight' is not in"),
        (lambda m: m | {"more": m["norm"]}, "tensor 'more' is not in"),
        (lambda m: m | {"more": 5}, "is not the name of a file"),
        (lambda m: [], "not the index of a checkpoint"),
    ],
)  # fmt: skip
def test_inconsistent_index_is_refused(shards, capsys, change, message):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": change(content["weight_map"])}))
    assert run("inspect", shards) == 1
    assert message in (text := capsys.readouterr().err)
    assert text.count("\n") == 1


def test_another_json_file_is_told_from_an_index(shards, capsys):
    (shards / "config.json").write_text("{}")
    assert run("inspect", shards / "config.json") == 1
    assert "no 'weight_map'; name the folder or its *.index.json" in capsys.readouterr().err


def test_output_over_a_shard_of_the_input_is_refused(shards, capsys):
    shard = shards / "model-00001-of-00002.safetensors"
    before = shard.read_bytes()
    assert run("compress", shards, shard, "--force") == 1
    assert f"OUT {shard} is a file of the checkpoint IN, {shards};" in capsys.readouterr().err
    assert shard.read_bytes() == before


FOREIGN = {
    "a GGUF file: use": b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64),
    "arrays of NumPy, .npz": foreign_files.NPZ,
    "a PyTorch file, .pt or .bin": foreign_files.TORCH,
    "a pickle, such as PyTorch's .pt": foreign_files.PICKLE,
    "an array of NumPy, .npy": foreign_files.NPY,
    "an HDF5 file": foreign_files.HDF5,
    "run `git lfs pull`": foreign_files.LFS_POINTER,
    "a page of HTML": foreign_files.HTML,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_file_types_are_named(tmp_path, capsys, kind):
    path = tmp_path / "model.bin"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(ValueError, match=r"model\.bin is not a safetensors file, but") as error:
        load(path)
    assert kind in str(error.value)
    for args in (["inspect", path], *([c, path, tmp_path / "out"] for c in ("compress", "decompress"))):  # fmt: skip
        assert run(*args) == 1
        assert kind in capsys.readouterr().err


def test_unknown_dtypes_are_carried_byte_for_byte(tmp_path, capsys):
    content = bytes(range(36)) + weights((8, 8)).tobytes()
    tensors = {"e": ("F8_E8M0", [4], 4), "f": ("F4", [2, 8], 8), "g": ("F6_E2M3", [8], 6), "h": ("X9", [2, 3], 18), "w": ("F32", [8, 8], 256)}  # fmt: skip
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw(tmp_path / "in", header, content)
    assert run("inspect", tmp_path / "in") == 0
    assert run("compress", tmp_path / "in", tmp_path / "small") == 0
    assert run("decompress", tmp_path / "small", tmp_path / "out") == 0
    with Reader(tmp_path / "in") as before, Reader(tmp_path / "out") as after:
        assert before.specs == {k: after.specs[k] for k in before.specs}
        for name in "efgh":
            assert before.read(name).tobytes() == after.read(name).tobytes()
    loaded = load(tmp_path / "small")
    assert loaded["f"].shape == (2, 4)
    assert loaded["e"].dtype == ml_dtypes.float8_e8m0fnu


@pytest.mark.parametrize(
    "header",
    [
        {"/".join(["x"] * 20_000): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        {"w": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 0]}},
        {"w": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {str(i): {"dtype": "F32", "shape": [0, i], "data_offsets": [0, 0]} for i in range(20_000)},
    ],
    ids=["slashes", "axes", "zero size", "names"],
)
def test_memory_for_headers_is_linear_in_their_size(tmp_path, header):
    raw(tmp_path / "in", header)
    tracemalloc.start()
    begin = time.process_time()
    run("inspect", tmp_path / "in", "--json")
    seconds = time.process_time() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 * (tmp_path / "in").stat().st_size + 20e6
    assert seconds < 30


@pytest.mark.parametrize("what", ["weights", "index", "config", "like", "names", "GGUF"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_that_might_never_end_are_refused(tmp_path, shards, capsys, what, kind):
    """A pipe waits for a writer, and ``/dev/zero`` fills the memory."""
    path = tmp_path / "never"
    path.symlink_to("/dev/zero") if kind == "device" else os.mkfifo(path)
    place = {"index": "model.safetensors.index.json", "config": "config.json"}.get(what)
    if place:
        (shards / place).unlink(missing_ok=True)
        (shards / place).symlink_to(path)
    if what == "names":  # --like is read first
        (shards / "config.json").write_text("{}")
    convert = ["convert", shards, tmp_path / "out", "--bits", 4, "--to"]
    args = {
        "weights": ["inspect", path],
        "index": ["inspect", shards],
        "config": [*convert, "compressed-tensors", "--like", shards],
        "like": [*convert, "gguf", "--like", path],
        "names": [*convert, "compressed-tensors", "--like", shards, "--names", path],
        "GGUF": ["convert", path, tmp_path / "out", "--to", "safetensors"],
    }
    assert run(*args[what]) == 1
    assert "is not a regular file; name " in capsys.readouterr().err
