"""The table of optimizers in the benchmarks' README is complete and true."""

import pathlib
import re
import sys

import pytest
from helpers import cases

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import optimizers  # noqa: E402

README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
TABLE = dict(re.findall(r"^\| `([\w.]+)` +\| (fine|worse|refused) +\|", README, re.MULTILINE))
PARTS = re.findall(r"^\| `([\w.]+)` +\| (\w+) with (\S+) in float", README, re.MULTILINE)


def test_table_lists_every_optax_optimizer():
    assert set(TABLE) == optimizers.optimizers() == set(optimizers.OPTIMIZERS)
    assert {name: part for name, _, part in PARTS} == optimizers.IN_FLOAT


@pytest.mark.parametrize(
    "name", cases(optimizers.OPTIMIZERS, ["adam", "lbfgs", "contrib.dadapt_adamw"])
)
def test_verdicts_match_training(name):
    result = optimizers.measure(name)
    assert result.verdict == TABLE[name], result


@pytest.mark.slow
@pytest.mark.parametrize(("name", "verdict", "in_float"), PARTS)
def test_verdicts_match_training_with_a_part_in_float(name, verdict, in_float):
    result = optimizers.measure(name, in_float)
    assert result.verdict == verdict, result
