"""Ctrl-C and SIGTERM, at any time, end the command quietly with 130 and 143."""

import os

import numpy as np
import pytest
import safetensors.numpy
from helpers import run_python

INTERRUPTED = "optax-clipquant: interrupted; nothing is left half-written\n"
BEGIN = """
import atexit, os, signal, sys

def stop():
    os.kill(os.getpid(), signal.{signal})

class OnImport:
    def __init__(self, name):
        self.name = name
    def find_spec(self, name, path, target=None):
        if name == self.name:
            self.name = None
            stop()

class OnDeletion:
    def __del__(self):
        stop()
        sum(range(10))  # the handler runs here, and its exception is ignored

def while_writing(act):
    from optax_clipquant.formats.safetensors import Writer
    def putting(self, name, pieces, real=Writer.putting):
        yield from real(self, name, pieces)
        act()
    Writer.putting = putting

def lasting(act):
    act()
    for _ in range(10**6):
        stop()
"""
END = "\nfrom optax_clipquant.cli.main import main\nsys.exit(main())"
TIMES = {
    "as the commands are imported": ("sys.meta_path.insert(0, OnImport('optax_clipquant.cli.convert'))", ""),
    # Its C code would report the exception as an ImportError of its own.
    "as NumPy is imported": ("sys.meta_path.insert(0, OnImport('datetime'))", ""),
    "as JAX is imported": ("sys.meta_path.insert(0, OnImport('jax._src.lax.lax'))", INTERRUPTED),
    "while a file is written": ("while_writing(stop)", INTERRUPTED),
    "many times": ("while_writing(lambda: lasting(stop))", INTERRUPTED),
    "where exceptions are ignored": ("while_writing(lambda: lasting(OnDeletion))", INTERRUPTED),
    "at the end": ("atexit.register(stop)", ""),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "when"),
    [*(("SIGINT", when) for when in TIMES), ("SIGTERM", "as NumPy is imported"), ("SIGTERM", "where exceptions are ignored")],
)  # fmt: skip
def test_signal_ends_the_command_quietly(tmp_path, name, when):
    source = tmp_path / "in"
    safetensors.numpy.save_file({"w": np.ones((64, 64), np.float32)}, source)
    prepare, told = TIMES[when]
    bits = "3" if "JAX" in when else "8"
    args = ("compress", source, tmp_path / "out", "--bits", bits)
    process = run_python("-c", BEGIN.format(signal=name) + prepare + END, *args)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert process.stderr == told
    assert sorted(os.listdir(tmp_path)) == (["in", "out"] if when == "at the end" else ["in"])


def test_little_is_imported_before_the_command_takes_signals_over():
    code = (
        "import collections.abc, re, signal, sys; before = {*sys.modules}; import optax_clipquant.cli.main; "
        "print(*sorted(sys.modules.keys() - before))"
    )
    process = run_python("-c", code)
    assert process.stdout.split() == [
        "optax_clipquant", "optax_clipquant.cli", "optax_clipquant.cli.main"
    ], process.stderr  # fmt: skip
