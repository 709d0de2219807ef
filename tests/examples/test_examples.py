"""Each example runs as a user would run it, in a quick mode."""

import pathlib
import re

import pytest
from helpers import refusal, run_example


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "rows"),
    [
        (["--in-place"], ["float", "4 bits, uniform", "4 bits, uniform, in place"]),
        (["--quantizer", "ternary", "--group-size", "32"], ["float", "ternary"]),
    ],
)
def test_digits_runs(tmp_path: pathlib.Path, args: list[str], rows: list[str]):
    process = run_example(
        "digits.py", "--steps", "60", "--batch", "16", "--out", str(tmp_path), *args
    )
    assert process.returncode == 0, process.stderr
    out = process.stdout
    accuracies = {}
    for row in rows:
        match = re.search(rf"^ *{row} +([\d.]+) +([\d.]+) ", out, re.MULTILINE)
        assert match, out
        accuracies[row] = float(match[1])
        assert match[1] == match[2]
    assert accuracies["float"] > 0.6
    assert len(list(tmp_path.glob("*.safetensors"))) == len(rows)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sweep_runs_and_resumes(tmp_path: pathlib.Path):
    args = ("--steps", "60", "--c", "0.1", "0.01", "--R", "1", "7", "--out", str(tmp_path))
    for _ in range(2):  # the second run reads the results of the first
        process = run_example("sweep.py", *args)
        assert process.returncode == 0, process.stderr
        rows = re.findall(r"(?m)^ *(0.01|0.1) +([17]) +([\d.]+) +([\d.]+) *$", process.stdout)
        assert [row[:2] for row in rows] == [
            ("0.01", "1"),
            ("0.01", "7"),
            ("0.1", "1"),
            ("0.1", "7"),
        ]
        least = min(rows, key=lambda row: float(row[3]))
        assert f"at c = {least[0]}, R = {least[1]}" in process.stdout
        assert float(least[2]) > 0.5
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_refuses_bad_arguments(capsys: pytest.CaptureFixture[str]):
    code, message = refusal(capsys, "sweep.py", "--R", "0")
    assert code == 2
    assert "R" in message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "9"], "bits must be an integer from 1 to 8"),
        (["--c", "-1"], "c must be positive"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--quantizer", "ternary", "--bits", "2"], "--bits does not apply"),
        (["--quantizer", "zscore", "--group-size", "8"], "--group-size does not apply"),
        (["--quantizer", "zscore", "--bits", "1"], "--bits must be 2 to 8"),
        (["--out", "/dev/null/x"], "--out: "),
    ],
)
def test_digits_refuses_bad_arguments(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    code, found = refusal(capsys, "digits.py", *args)
    assert code == 2
    assert message in found
