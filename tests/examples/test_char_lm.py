"""examples/char_lm.py runs as a user would run it, in a quick mode."""

import pathlib
import re

import pytest
from helpers import EXAMPLES, compiled, refusal, run_example, run_python

# One block less, which halves the compile time.
SMALL = """
import sys
sys.path.insert(0, sys.argv[1])
import char_lm
char_lm.BLOCKS = 1
char_lm.main(sys.argv[2:])
"""


@pytest.fixture
def text(tmp_path: pathlib.Path) -> pathlib.Path:
    """A text that is easy to learn, so that learning shows in a few steps."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} and {i + 1} are two. " for i in range(4000)))
    return path


@pytest.mark.slow
def test_trains_on_the_grid_and_ships(tmp_path: pathlib.Path, text: pathlib.Path):
    process = run_example(
        "char_lm.py",
        "--text", str(text), "--part", "state", "--steps", "30", "--batch", "4", "--out", str(tmp_path)
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


@pytest.mark.slow
def test_clipping_part_compares_bounds(tmp_path: pathlib.Path, text: pathlib.Path):
    process = run_python(
        *("-c", SMALL, EXAMPLES, "--text", text, "--part", "clipping", "--steps", "12"),
        *("--warmup", "1", "--batch", "4", "--out", tmp_path),
        COLUMNS="160",
        **compiled(),
    )
    assert process.returncode == 0, process.stderr
    # Bits per character, the worst jump, the clipped fraction, and the bound of transforms that adapt one.
    rows = {
        # What is no number any more is worse than any.
        name: [float(x.replace("nan", "inf")) for x in rest.replace("%", "").split()]
        for name, rest in re.findall(
            r"(?m)^ (no clipping|clip_by_\S+)  +([\d.%naif -]+) *$", process.stdout
        )
    }
    plain, by_value = rows["no clipping"], rows["clip_by_value(0.01)"]
    by_quantile, by_zscore = rows["clip_by_quantile()"], rows["clip_by_zscore()"]
    assert plain[2:] == [0], process.stdout
    assert len(by_value) == 3
    assert 5 < by_value[2] < 95
    assert 0 < by_quantile[2] < 5
    assert by_zscore[2] == 100
    assert 0.01 < by_quantile[3] < 10
    assert 0.1 < by_zscore[3] < 10
    # At this learning rate the loss rises, except with bounds that are tight from the start.
    for tight in (by_value, by_zscore):
        assert tight[0] < plain[0] / 2
        assert tight[1] < plain[1]
    assert by_quantile[0] != plain[0]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (
            ["--steps", "10", "--warmup", "10"],
            2,
            "--warmup must be from 0 to below --steps, got 10",
        ),
        (["--steps", "1", "--warmup", "0"], 2, "--steps must be at least 2, got 1"),
        (["--out", "/dev/null/x"], 2, "--out: "),
        (["--text", "short.txt"], 1, "9 characters are too few"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    code: int,
    message: str,
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("short.txt").write_text("too short")
    stopped, found = refusal(capsys, "char_lm.py", *args)
    assert stopped == code
    assert message in found
