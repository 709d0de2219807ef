import contextlib
import json
import math
import re
import sys

import numpy as np
import pytest
import safetensors.numpy
from helpers import weights

from optax_clipquant import QArray, Uniform, from_compressed_tensors, load, quantize_params, save
from optax_clipquant.cli import compress, convert
from optax_clipquant.cli.main import main

gguf = pytest.importorskip("gguf")

SHAPES = {
    "model.embed_tokens.weight": (12, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.v_proj.weight": (32, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.norm.weight": (64,),
}
NAMES = ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight", "output_norm.weight"]  # fmt: skip
# For each row of the queries of two heads, the index of the row in Hugging Face's order.
ORDER = np.arange(64).reshape(2, 2, 16).swapaxes(1, 2).ravel()


@pytest.fixture
def files(tmp_path):
    """A float model as a Hugging Face folder, and a GGUF file with the same shapes."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {name: weights(shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    writer = gguf.GGUFWriter(tmp_path / "like.gguf", "llama")
    writer.add_head_count(2)
    for name, shape in zip(NAMES, SHAPES.values(), strict=True):
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def run(*args):
    return main([str(arg) for arg in args])


def read(path):
    """The type and values of each tensor, read with the gguf package."""
    return {
        tensor.name: (tensor.tensor_type.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_float_checkpoint_is_quantized_and_written_as_gguf(files, capsys):
    assert run("compress", files / "model", files / "small.safetensors", "--bits", 4, "--group-size", 32, "--rule", "embed=8") == 0  # fmt: skip
    capsys.readouterr()
    options = ("--to", "gguf", "--like", files / "like.gguf")
    quantized = ("--bits", 4, "--rule", "embed=8", "--json")
    assert run("convert", files / "model", files / "a.gguf", *options, *quantized) == 0
    told = json.loads(capsys.readouterr().out)["tensors"]
    assert {item["name"]: item["out"] for item in told} == dict(zip(NAMES, ["Q8_0", "Q4_0", "Q4_0", "Q4_0", "F32"], strict=True))  # fmt: skip
    wanted = load(files / "small.safetensors")
    found = read(files / "a.gguf")
    for theirs, ours in zip(NAMES, SHAPES, strict=True):
        order = ORDER if "attn_q" in theirs else slice(None)
        np.testing.assert_array_equal(found[theirs][1], np.asarray(wanted[ours])[order])
    assert run("convert", files / "small.safetensors", files / "b.gguf", *options) == 0
    out = capsys.readouterr().out
    assert "blk.0.attn_v.weight" in out
    assert "Q4_0" in out
    assert (files / "b.gguf").read_bytes() == (files / "a.gguf").read_bytes()
    assert sorted(path.name for path in files.iterdir()) == ["a.gguf", "b.gguf", "like.gguf", "model", "small.safetensors"]  # fmt: skip
    assert run("convert", files / "a.gguf", files / "back.safetensors", "--to", "safetensors") == 0
    back = load(files / "back.safetensors")
    for name in NAMES:
        np.testing.assert_array_equal(np.asarray(back[name]), found[name][1])
    assert (back["blk.0.attn_v.weight"].qvalue == wanted["model.layers.0.self_attn.v_proj.weight"].qvalue).all()  # fmt: skip


def test_saved_tree_is_converted_to_compressed_tensors_with_names(files):
    tree = {"v": weights((64, 32)), "norm": weights((64,))}
    q = quantize_params(tree, Uniform(4, group_size=16))
    save(files / "tree.safetensors", q)
    names = {"v": ["model.layers.0.self_attn.v_proj.weight", True], "norm": None}
    (files / "names.json").write_text(json.dumps(names))
    options = ("--to", "compressed-tensors", "--like", files / "model")
    more = ("--names", files / "names.json")
    assert run("convert", files / "tree.safetensors", files / "out", *options, *more) == 0
    found, _ = from_compressed_tensors(files / "out")
    np.testing.assert_array_equal(
        found["model.layers.0.self_attn.v_proj.weight"], q["v"].dequantize().T
    )


def test_files_of_other_runtimes_are_read(files):
    """A float folder to compressed-tensors, to GGUF, and to compressed-tensors again, with equal codes."""
    model, like = files / "model", ("--like", files / "like.gguf")
    quantized = ("--bits", 4, "--to", "compressed-tensors", "--like", model)
    assert run("convert", model, files / "ct", *quantized) == 0
    assert run("convert", files / "ct", files / "a.gguf", "--to", "gguf", *like) == 0
    back = ("--to", "compressed-tensors", "--like", model)
    assert run("convert", files / "a.gguf", files / "again", *back) == 0
    wanted, _ = from_compressed_tensors(files / "ct")
    found, _ = from_compressed_tensors(files / "again")
    values = {name: value for name, (_, value) in read(files / "a.gguf").items()}
    for theirs, ours in zip(NAMES, SHAPES, strict=True):
        original = np.asarray(wanted[ours])
        order = ORDER if "attn_q" in theirs else slice(None)
        np.testing.assert_array_equal(values[theirs], original[order])
        np.testing.assert_array_equal(np.asarray(found[ours]), original)
    name = "model.layers.0.self_attn.v_proj.weight"
    np.testing.assert_array_equal(found[name].qvalue, wanted[name].qvalue)
    # Names for one tensor leave the others' as they are without names.
    (files / "names.json").write_text(json.dumps({"blk.0.attn_v.weight": None}))
    more = ("--names", files / "names.json")
    assert run("convert", files / "a.gguf", files / "less", *back, *more) == 0
    less, _ = from_compressed_tensors(files / "less")
    np.testing.assert_array_equal(less.pop(name), weights(SHAPES[name], seed=2))  # from `like`
    for ours, leaf in less.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted[ours]))


def test_compressed_tensors_keeps_float_what_it_cannot_hold_as_codes(files):
    """Quantizing it would cost accuracy and save no byte."""
    names = {"model.layers.0.mlp.down_proj.weight": "model.layers.0.mlp.down_proj.weight"}
    (files / "names.json").write_text(json.dumps(names))
    options = ("--to", "compressed-tensors", "--like", files / "model", "--bits", 3)
    more = ("--rule", "embed=2", "--names", files / "names.json")
    assert run("convert", files / "model", files / "ct", *options, *more) == 0
    found, _ = from_compressed_tensors(files / "ct")
    original = safetensors.numpy.load_file(files / "model" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        np.testing.assert_array_equal(found[name], original[name])
    assert found["model.layers.0.mlp.down_proj.weight"].bits == 4  # 3 fit into 4


def test_a_budget_counts_the_bytes_of_the_written_format(files, capsys):
    options = (
        "--like",
        files / "like.gguf",
        "--to",
        "gguf",
        "--rule",
        "down=2,group=32",
        "--group-size",
        64,
    )
    assert run("convert", files / "model", files / "a.gguf", *options, "--budget", 5, "--rule", "embed=keep", "--json") == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)["tensors"]
    kinds = {item["name"]: item["out"] for item in told}
    written = [item for item in told if item["out"].startswith("Q")]
    assert sorted(kinds.values()) == ["F32", "F32", "Q4_0", "Q5_0", "Q5_0"]
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"  # 2 bits take 4
    assert sum(8 * item["bytes"] for item in written) <= 5 * sum(
        math.prod(item["shape"]) for item in written
    )
    folder = ("--like", files / "model", "--to", "compressed-tensors", "--budget")
    assert run("convert", files / "model", files / "ct", *folder, 4.9) == 1
    assert "the smallest choices take 5.000" in capsys.readouterr().err  # scales of 4 bytes
    assert run("convert", files / "model", files / "ct", *folder, 9) == 0
    found = from_compressed_tensors(files / "ct")[0].values()
    assert {leaf.bits for leaf in found if isinstance(leaf, QArray)} == {8}


def test_a_missing_package_is_told_in_one_line(files, capsys, monkeypatch):
    data = gguf.quantize(weights((4, 64)), gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(files / "q4_1.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run("convert", files / "q4_1.gguf", files / "out", "--to", "safetensors") == 1
    error = capsys.readouterr().err
    assert "'w' is Q4_1, whose decoding needs the package gguf: pip install" in error
    assert error.count("\n") == 1


def test_progress_counts_the_bytes_of_the_float_model(files, monkeypatch):
    counted = []

    @contextlib.contextmanager
    def counting(text, total):
        counted.append((text, total))
        yield lambda count: counted.append(count)

    monkeypatch.setattr(convert, "progress", counting)
    size = sum(4 * math.prod(shape) for shape in SHAPES.values())
    for to, like in (("gguf", "like.gguf"), ("compressed-tensors", "model")):
        counted.clear()
        arguments = (files / "model", files / to, "--to", to, "--like", files / like, "--bits", 8)
        assert run("convert", *arguments) == 0
        assert counted.pop(0) == ("converting", size)
        assert sum(counted) == size


def test_wrong_arguments_are_named_and_nothing_is_written(files, capsys, monkeypatch):
    model, like, out = files / "model", files / "like.gguf", files / "out.gguf"
    save(files / "odd.safetensors", quantize_params({"token_embd.weight": weights((12, 64))}, Uniform(4, symmetric=False, channel_axis=0)))  # fmt: skip
    (files / "list.json").write_text("[]")
    before = sorted(files.iterdir())
    to = ("--to", "gguf", "--like", like)
    ct = ("--to", "compressed-tensors", "--like")

    def quantized_first(*args):
        raise AssertionError("the model was quantized before its arguments were checked")

    monkeypatch.setattr(compress, "quantize", quantized_first)
    cases = [
        ((model, out, "--to", "gguf"), "--to gguf needs --like MODEL"),
        ((model, like, *to), "like.gguf exists; overwrite it with --force"),
        ((like, like, *to), "IN and OUT are the same"),
        ((like, out, *to, "--bits", 4), "is a GGUF file, which is converted as it is; leave out --bits"),
        ((model, out, "--to", "safetensors"), "`compress` quantizes it"),
        ((like, out, "--to", "safetensors", "--like", like), "--like has no use"),
        ((model, out, *to, "--names", files / "list.json"), "is not a JSON object"),
        ((files / "odd.safetensors", out, *to), "leaf 'token_embd.weight' .* zero points"),
        ((files / "none.safetensors", out, *to), "none.safetensors"),
        ((model, files, *ct, model, "--bits", 4), "exists; name a new folder"),
        ((model, files / "none" / "ct", *ct, model, "--bits", 4), "there is no folder .*none$"),
        ((model, files / "ct", *ct, like, "--bits", 4), "like.gguf is not a folder"),
        ((model, out, "--to", "gguf", "--like", model, "--bits", 4), "model is a folder; name a GGUF file"),
        ((model, files / "ct", *ct, model), "model: no tensor is quantized; .* pass --bits"),
        ((model, out, *to, "--bits", 4, "--names", files / "list.json"), "is not a JSON object"),
    ]  # fmt: skip
    for args, message in cases:
        assert run("convert", *args) == 1
        assert re.search(message, capsys.readouterr().err), args
        assert sorted(files.iterdir()) == before
    assert run("convert", files / "odd.safetensors", out, *to, "--otherwise", "float16") == 0
    assert read(out)["token_embd.weight"][0] == "F16"
