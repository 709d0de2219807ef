"""The table of optimizers in the benchmarks' README is complete and true."""

import pathlib
import re
import sys

import pytest
from helpers import cases

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import optimizers  # noqa: E402

ROW = re.compile(r"^\| `([\w.]+)` +\| (fine|worse|refused|not tried)", re.MULTILINE)
TABLE = dict(ROW.findall((BENCHMARKS / "README.md").read_text(encoding="utf-8")))


def test_table_lists_every_optax_optimizer():
    assert set(TABLE) == optimizers.optimizers()
    not_tried = {name for name, verdict in TABLE.items() if verdict == "not tried"}
    assert not_tried == set(optimizers.NOT_TRIED)


@pytest.mark.parametrize(
    "name", cases(optimizers.OPTIMIZERS, ["adam", "lbfgs", "contrib.dadapt_adamw"])
)
def test_verdicts_match_training(name):
    result = optimizers.measure(name)
    assert result.verdict == TABLE[name], result
