"""``cli/FILES.md`` lists what the commands say about each kind of file.

``PYTHONPATH=tests python tests/cli/test_kinds_of_files.py`` rewrites the page.
"""

import contextlib
import gzip
import io
import json
import os
import pathlib
import re
import struct
import sys
import tempfile
from collections.abc import Callable

import foreign_files
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from optax_clipquant.cli.main import main
from optax_clipquant.formats.safetensors import writing

PAGE = pathlib.Path(__file__).parents[2] / "optax_clipquant" / "cli" / "FILES.md"
W = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)


def write(path: pathlib.Path, **tensors: np.ndarray) -> None:
    named = {name.replace("__", "."): x for name, x in tensors.items()}
    specs = {name: (x.dtype, x.shape) for name, x in named.items()}
    with writing(path, specs, {}) as file:
        for name, x in named.items():
            file.put(name, x)


def content(**tensors: np.ndarray) -> bytes:
    return safetensors.numpy.save(tensors)


def small(path: pathlib.Path) -> None:
    """A file that ``compress`` wrote."""
    write(path.with_name("float"), w=W)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["compress", str(path.with_name("float")), str(path)]) == 0
    path.with_name("float").unlink()


def altered(place: Callable[[bytes], int]) -> Callable[[pathlib.Path], None]:
    """A file that ``compress`` wrote, with one byte altered."""

    def make(path: pathlib.Path) -> None:
        small(path)
        data = bytearray(path.read_bytes())
        data[place(bytes(data))] ^= 1
        path.write_bytes(data)

    return make


def folder(path: pathlib.Path, missing: bool = False) -> None:
    path.mkdir()
    write(path / "a.safetensors", v=W)
    if not missing:
        write(path / "b.safetensors", w=W)
    index = {"weight_map": {"v": "a.safetensors", "w": "b.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def compressed_tensors(path: pathlib.Path) -> None:
    path.mkdir()
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": args}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}  # fmt: skip
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    packed = np.zeros((64, 16), np.int32)
    shape = np.array([64, 64])
    write(path / "model.safetensors", m__weight_packed=packed, m__weight_scale=W[:, :1], m__weight_shape=shape)  # fmt: skip


def gguf(name: bytes = b"w") -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", len(name)) + name
    header += struct.pack("<IQQIQ", 2, 64, 64, 0, 0)
    return header + bytes(-len(header) % 32) + W.tobytes()


F8 = ml_dtypes.float8_e4m3fn
NAN = np.where(W > 0.99, np.nan, W)
# For each kind a function that writes such a file, or its bytes.
KINDS: dict[str, Callable[[pathlib.Path], object] | bytes] = {
    "float weights": lambda path: write(path, w=W, norm=W[0]),
    "float weights in shards": folder,
    "weights of `compress`": small,
    "float8 with scales of blocks": lambda path: write(path, m__weight=W.astype(F8), m__weight_scale_inv=W[:1, :1], n__weight=W),
    "MLX": lambda path: write(path, m__weight=np.zeros((64, 8), np.uint32), m__scales=W[:, :1], m__biases=W[:, :1], n__weight=W),
    "bitsandbytes": lambda path: write(path, m__weight=np.zeros((2048, 1), np.uint8), m__weight__absmax=W[0], m__weight__quant_map=W[0, :16], n__weight=W),
    "GPTQ": lambda path: write(path, m__qweight=np.zeros((8, 64), np.int32), m__qzeros=np.zeros((1, 8), np.int32), m__scales=W[:1].astype(np.float16)),
    "a folder of compressed-tensors": compressed_tensors,
    "a dtype that NumPy lacks": lambda path: path.write_bytes((lambda h: struct.pack("<Q", len(h)) + h + bytes(8))(b'{"x":{"dtype":"F4","shape":[2,8],"data_offsets":[0,8]}}')),
    "norms and biases alone": lambda path: write(path, norm=W[0]),
    "weights that are NaN": lambda path: write(path, w=NAN.astype(np.float32)),
    "GGUF": gguf(),
    "GGUF, cut off": gguf()[:-1],
    "NumPy, `.npy`": foreign_files.NPY,
    "NumPy, `.npz`": foreign_files.NPZ,
    "PyTorch, `.pt` or `.bin`": foreign_files.TORCH,
    "PyTorch before 1.6, or a pickle": foreign_files.PICKLE,
    "Keras, `.h5`": foreign_files.HDF5,
    "compressed by gzip": gzip.compress(content(w=W), mtime=0),
    "a pointer of Git LFS": foreign_files.LFS_POINTER,
    "a failed download": foreign_files.HTML,
    "an empty file": b"",
    "float weights, cut off": content(w=W)[:-1],
    "of `compress`, a weight altered": altered(lambda data: len(data) - 200),
    "of `compress`, the header altered": altered(lambda data: data.index(b"grids") - 20),
    "an index without its shards": lambda path: folder(path, missing=True),
    "a folder without a checkpoint": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "nothing": lambda path: None,
}  # fmt: skip
COMMANDS = {
    "inspect": ["inspect"],
    "compress": ["compress"],
    "decompress": ["decompress"],
    "convert --to safetensors": ["convert", "--to", "safetensors"],
}


def answer(kind: str, command: str) -> str:
    """The exit status and the message."""
    with tempfile.TemporaryDirectory() as place:
        path, out = pathlib.Path(place) / "IN", pathlib.Path(place) / "OUT"
        make = KINDS[kind]
        path.write_bytes(make) if isinstance(make, bytes) else make(path)
        args = [*COMMANDS[command], str(path), *([] if command == "inspect" else [str(out)])]
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = main(args)
        told = stderr.getvalue()
        assert told.count("\n") == (code != 0), told
        assert out.exists() == (code == 0 and command != "inspect")
        if code == 0:
            kept = re.search(r"kept unchanged: (.*)", stdout.getvalue())
            return "done" + (f"; kept unchanged: {kept[1]}" if kept else "")
        text = told.removeprefix("optax-clipquant: error: ").strip()
        return f"{code}: " + text.replace(str(path), "IN").replace(str(out), "OUT")


def section(kind: str) -> str:
    said: dict[str, list[str]] = {}
    for command in COMMANDS:
        said.setdefault(answer(kind, command), []).append(f"`{command}`")
    rows = [f"| {', '.join(names)} | {text.replace('|', chr(92) + '|')} |" for text, names in said.items()]  # fmt: skip
    return "\n".join([f"### {kind[0].upper()}{kind[1:]}", "", "| command | says |", "|---|---|", *rows, ""])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_page_quotes_the_commands(kind):
    assert section(kind) in PAGE.read_text()


def test_page_lists_no_other_kinds():
    assert PAGE.read_text().count("### ") == len(KINDS)


INTRO = """# What the commands say about each kind of file

`IN` is the file, `OUT` a new one. "Done" means exit status 0; otherwise the status precedes the message, which is
one line on stderr, and no `OUT` is written. `tests/cli/test_kinds_of_files.py` makes each kind of file, runs the
commands, and compares this page with their output.

"""

if __name__ == "__main__":
    PAGE.write_text(INTRO + "\n".join(map(section, KINDS)))
    sys.exit()
