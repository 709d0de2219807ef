"""The errors that ``--budget`` chooses by, against those of the quantizers."""

import signal
import time
import types

import numpy as np
import pytest
import safetensors.numpy
from helpers import weights

from optax_clipquant import Uniform, allocate_bits, load, quantize_params
from optax_clipquant.cli.main import main
from optax_clipquant.cli.rules import Rule
from optax_clipquant.cli.search import budget
from optax_clipquant.cli.search.rows import Key, common_lengths
from optax_clipquant.formats.checkpoint import Checkpoint


def squared_error(tree, rules) -> float:
    q = quantize_params(tree, rules)
    return sum(
        float(np.sum(np.square(np.asarray(q[name].dequantize(), np.float64) - w)))
        for name, w in tree.items()
    )


# A shorter last group, runs along a convolution's axes, columns, and a whole tensor, which is sampled.
LAYOUTS = {
    "channels": ((300, 64), {"channel_axis": 0}, 1e-5),
    "groups": ((200, 90), {"channel_axis": 0, "group_size": 40}, 1e-5),
    "convolution": ((64, 24, 3, 3), {"channel_axis": 0, "group_size": 36}, 1e-5),
    "columns": ((48, 300), {"channel_axis": -1}, 1e-5),
    "tensor": ((300, 500), {"channel_axis": None}, 0.03),
}


@pytest.mark.filterwarnings("ignore:all weights become zero")  # small channels, that share a scale
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_match_the_quantizer(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(budget, "_BLOCK", 2**10)
    monkeypatch.setattr(budget, "_LONGEST", 2**14)
    shape, where, tolerance = LAYOUTS[layout]
    # Channels of very different magnitude in one file: each must count by its magnitude.
    w = weights(shape) * np.exp(weights((shape[0],) + (1,) * (len(shape) - 1), seed=1))
    tree = {"w": w.astype(np.float32)}
    safetensors.numpy.save_file(tree, tmp_path / "in")
    with Checkpoint(tmp_path / "in") as source:
        (found,) = budget.measure(source, {"w": Rule(4, **where)}, lambda n: None)["w"]
    wanted = squared_error(tree, Uniform(4, **where))
    assert found == pytest.approx(wanted, rel=tolerance)


def test_rows_are_extended_to_few_lengths(tmp_path, monkeypatch):
    tree = {f"w{n}": weights((400, n), seed=n) for n in (7, 50, 64, 70)}
    safetensors.numpy.save_file(tree, tmp_path / "in")
    lowered = set()
    lower = Key.lower
    monkeypatch.setattr(Key, "lower", lambda key, fn: lowered.add(key.length) or lower(key, fn))
    rules = dict.fromkeys(tree, Rule())
    with Checkpoint(tmp_path / "in") as source:
        found = budget.measure(source, rules, lambda n: None)
    assert lowered == {7, 70}
    for name, w in tree.items():
        wanted = [squared_error({name: w}, Uniform(n, channel_axis=0)) for n in (2, 3, 4, 6, 8)]
        assert found[name] == pytest.approx(wanted, rel=1e-4)


def test_lengths_are_merged_where_that_saves_time():
    few, many = 10**5, 10**9
    assert common_lengths({64: few, 70: few, 4096: few}) == {64: 4096, 70: 4096, 4096: 4096}
    assert common_lengths({64: many, 70: few, 4096: many}) == {64: 64, 70: 4096, 4096: 4096}
    # Shorter rows are searched otherwise, and longer ones would take too much memory.
    assert common_lengths({3: few, 31: few, 32: few}) == {3: 31, 31: 31, 32: 32}
    assert common_lengths({64: 64, 2**24: 2**24}) == {64: 64, 2**24: 2**24}
    assert common_lengths({}) == {}


def test_ctrl_c_waits_for_no_further_compilation(tmp_path, monkeypatch):
    compiled = []
    program = types.SimpleNamespace(compile=lambda: compiled.append(time.sleep(0.1)))
    monkeypatch.setattr(Key, "lower", lambda key, fn: program)
    monkeypatch.setattr(Checkpoint, "read", lambda *args: signal.raise_signal(signal.SIGINT))
    safetensors.numpy.save_file({f"w{n}": weights((8, 40)) for n in range(2, 9)}, tmp_path / "in")
    with Checkpoint(tmp_path / "in") as source, pytest.raises(KeyboardInterrupt):
        budget.measure(source, {f"w{n}": Rule(n) for n in range(2, 9)}, lambda n: None)
    assert len(compiled) <= 4


def test_large_tensors_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_BLOCK", 2**10)
    monkeypatch.setattr(budget, "_SAMPLE", 2**13)
    # Rows of four magnitudes in turn.
    w = weights((1600, 64)) * np.tile([1.0, 10.0, 0.1, 5.0], 400)[:, None]
    tree = {"w": w.astype(np.float32)}
    safetensors.numpy.save_file(tree, tmp_path / "in")
    with Checkpoint(tmp_path / "in") as source:
        (found,) = budget.measure(source, {"w": Rule(4)}, lambda n: None)["w"]
    assert found == pytest.approx(squared_error(tree, Uniform(4, channel_axis=0)), rel=0.05)


def test_rows_that_are_not_finite_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_BLOCK", 2**10)
    w = weights((1600, 64))
    w[:7, 3], w[-9:, 5] = np.nan, -np.inf
    safetensors.numpy.save_file({"w": w, "lost": w[:7]}, tmp_path / "in")
    wanted = squared_error({"w": w[7:-9]}, Uniform(2, channel_axis=0))
    for sample in (2**20, 2**15):
        monkeypatch.setattr(budget, "_SAMPLE", sample)
        with Checkpoint(tmp_path / "in") as source:
            found = budget.measure(source, {"w": Rule(2), "lost": Rule(2)}, lambda n: None)
        assert found["w"] == pytest.approx([wanted], rel=1e-4 if sample == 2**20 else 0.05)
        assert found["lost"] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [None, 32])
def test_allocation_is_as_good_as_the_exact_one(tmp_path, group_size):
    shapes = [(64, 48), (32, 24, 3, 3), (17, 300), (128, 27)]
    rng = np.random.default_rng(0)
    tree = {
        f"w{i}": (rng.standard_t(5, shape) * np.exp(rng.normal())).astype(np.float32)
        for i, shape in enumerate(shapes * 4)
    }
    safetensors.numpy.save_file(tree, tmp_path / "in")
    rules = dict.fromkeys(tree, Rule(group_size=group_size))
    for limit in (3.5, 4.5, 6.0):
        with Checkpoint(tmp_path / "in") as source:
            found = budget.allocate_rules(source, rules, limit, lambda n: None)
        ours = {f"^{n}$": Uniform(r.width, channel_axis=0, group_size=group_size) for n, r in found.items()}  # fmt: skip
        ones = {name: np.ones((1,) * w.ndim, np.float32) for name, w in tree.items()}
        exact = allocate_bits(
            tree,
            ones,
            bits_per_param=limit,
            quantizer=lambda bits: Uniform(bits, channel_axis=0, group_size=group_size),
        )
        assert squared_error(tree, ours) <= 1.01 * squared_error(tree, exact)


def test_a_budget_chooses_among_the_widths_of_normal_float(tmp_path):
    """They are fewer than those of other quantizers."""
    tree = {f"w{i}": 10.0**-i * weights((64, 32), seed=i) for i in range(3)}
    safetensors.numpy.save_file(tree, tmp_path / "in")
    command = ["compress", str(tmp_path / "in"), str(tmp_path / "out"), "--budget", "4.2"]
    assert main([*command, "--quantizer", "normal-float"]) == 0
    found = load(tmp_path / "out")
    assert [found[name].bits for name in tree] == [4, 4, 3]


def test_a_budget_keeps_what_would_not_be_smaller(tmp_path, capsys):
    tree = {"large": (64, 64), "pairs": (64, 2), "column": (64, 1)}
    half = {name: weights(shape).astype(np.float16) for name, shape in tree.items()}
    safetensors.numpy.save_file(half, tmp_path / "in")
    assert main(["compress", str(tmp_path / "in"), str(tmp_path / "out"), "--budget", "8.5"]) == 0
    assert "kept unchanged: 2 not smaller when quantized" in capsys.readouterr().out
    found = load(tmp_path / "out")
    for name in ("pairs", "column"):
        np.testing.assert_array_equal(found[name], half[name])


@pytest.mark.parametrize("embedding", ["table", "model.embed_tokens"])
def test_bits_of_a_language_model_stay_within_one_of_uniform(tmp_path, capsys, embedding):
    tree = {
        f"{embedding}.weight": weights((128, 64)),
        "large.weight": 8 * weights((128, 64), seed=1),
        "small.weight": 1e-3 * weights((256, 64), seed=2),
    }
    safetensors.numpy.save_file(tree, tmp_path / "in")
    command = ["compress", str(tmp_path / "in"), str(tmp_path / "out"), "--budget", "4.2"]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert "counted every weight alike" in printed.err
    assert ("within one of uniform" in printed.err) == (embedding != "table")
    found = {leaf.bits for leaf in load(tmp_path / "out").values()}
    assert max(found) > 4 if embedding == "table" else found <= {2, 3, 4}  # all fit at 3 bits
