"""examples/char_lm.py runs as a user would run it, in a quick mode."""

import pathlib
import re

import pytest
from helpers import EXAMPLES, run_example, run_python

# A block fewer, which takes half of the time to compile.
SMALL = """
import sys
sys.path.insert(0, sys.argv[1])
import char_lm
char_lm.BLOCKS = 1
char_lm.main(sys.argv[2:])
"""


@pytest.fixture
def text(tmp_path: pathlib.Path) -> pathlib.Path:
    """A text that is easy to learn, to see that it is learnt."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} and {i + 1} are two. " for i in range(4000)))
    return path


def test_char_lm(tmp_path: pathlib.Path, text: pathlib.Path):
    process = run_example(
        "char_lm.py",
        "--text", str(text), "--part", "state", "--steps", "40", "--batch", "8", "--out", str(tmp_path)
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    rows = {
        name.strip(): [float(x) for x in rest.split()]
        for name, rest in re.findall(r"(?m)^ (\S.*?)  +([\d. ]+) *$", process.stdout)
    }
    for name in ("8-bit state", "4-bit state", "the same, annealed"):
        assert abs(rows[name][0] - rows["float"][0]) < 0.3, process.stdout
        assert rows[name][0] < 3
    assert rows["float"][1] == 8
    assert rows["8-bit state"][1] < 2.3
    assert rows["4-bit state"][1] < 1.3
    assert rows["the same, annealed"][2] < 7.4
    assert (tmp_path / "char_lm.png").stat().st_size > 10_000
    assert (tmp_path / "char-lm-4-bits.safetensors").exists()


def test_clipping(tmp_path: pathlib.Path, text: pathlib.Path):
    process = run_python(
        *("-c", SMALL, EXAMPLES, "--text", text, "--part", "clipping", "--steps", "3"),
        *("--warmup", "1", "--batch", "4", "--out", tmp_path),
        COLUMNS="160",
    )
    assert process.returncode == 0, process.stderr
    for name in ("no clipping", "clip_by_value(0.01)", "clip_by_quantile()", "clip_by_zscore()"):
        assert name in process.stdout


def test_bad_arguments_are_refused(tmp_path: pathlib.Path):
    process = run_example("char_lm.py", "--steps", "10", "--warmup", "10")
    assert process.returncode == 2
    assert "--warmup must be from 0 to below --steps, got 10" in process.stderr
    process = run_example("char_lm.py", "--steps", "1", "--warmup", "0")
    assert "--steps must be at least 2, got 1" in process.stderr
    process = run_example("char_lm.py", "--out", "/dev/null/x")
    assert process.returncode == 2
    assert "--out: " in process.stderr
    short = tmp_path / "short.txt"
    short.write_text("too short")
    process = run_example("char_lm.py", "--text", str(short))
    assert process.returncode == 1
    assert "9 characters are too few" in process.stderr
