import functools
import io
import itertools
import json
import math
import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from helpers import batch, cases, make_step, mlp_loss, mlp_params, run_python

from optax_clipquant import Sweep, ZScore, clip_by_value, quantize_weights, sweep

GRID = {"c": [0.01, 1.0], "R": [1, 2, 4]}


def train(c, R):
    tx = optax.chain(
        clip_by_value(c), optax.sgd(0.05, momentum=0.9), quantize_weights(ZScore(R, resolution=2.0))
    )
    params, step = mlp_params(), make_step(tx)

    def body(carry, data):
        params, state, loss = step(*carry, *data)
        return (params, state), loss

    x, y = batch(0)
    data = jnp.broadcast_to(x, (20, *x.shape)), jnp.broadcast_to(y, (20, *y.shape))
    (params, _), losses = jax.lax.scan(body, (params, tx.init(params)), data)
    return {"loss": mlp_loss(params, *batch(1)), "first": losses[0]}


@functools.cache
@functools.cache
def separate_runs() -> list[dict]:
    run = jax.jit(train)
    return [
        {"c": c, "R": R} | jax.tree.map(float, run(jnp.float32(c), jnp.int32(R)))
        for c, R in itertools.product(GRID["c"], GRID["R"])
    ]


def assert_same_run(row: dict, expected: dict) -> None:
    # Summing in another order may move a code by one.
    np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-3)
    np.testing.assert_allclose(row["first"], expected["first"], rtol=1e-5)


def test_traced_hyperparameters_train_like_fixed_ones():
    """One point suffices: the runs that sweeps are compared with trace their hyperparameters too."""
    expected = next(row for row in separate_runs() if (row["c"], row["R"]) == (0.01, 2))
    assert_same_run(jax.jit(functools.partial(train, 0.01, 2))(), expected)


@pytest.mark.parametrize("batch_size", cases([None, 1, 4, 100], [4]))
def test_equals_separate_runs_and_traces_once(batch_size):
    traces = []

    def evaluate(c, R):
        traces.append((c, R))
        return train(c, R)

    result = sweep(evaluate, GRID, batch_size=batch_size, progress=False)
    assert len(traces) == 1
    assert len(result.rows) == 6
    for row, expected in zip(result.rows, separate_runs(), strict=True):
        assert (row["c"], row["R"], row["failed"]) == (expected["c"], expected["R"], False)
        assert_same_run(row, expected)
    losses = [row["loss"] for row in result.rows]
    assert len(set(losses)) == 6
    assert result.best("loss", "min") == result.rows[int(np.argmin(losses))]


def test_compiles_once(caplog):
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        sweep(lambda c: {"loss": c}, {"c": [1.0, 2.0, 3.0]}, batch_size=2, progress=False)
    compiled = [r for r in caplog.messages if r.startswith("Finished XLA compilation")]
    assert len(compiled) == 1, caplog.messages


def test_columns_accept_numbers_of_every_kind():
    seen = {}

    def evaluate(**point):
        seen.update({name: (x.dtype, x.shape, x.weak_type) for name, x in point.items()})
        return {"all": sum(x.astype(jnp.float32) for x in point.values())}

    grid = {
        "int": [2, 3],
        "float": (0.5, 1.5),
        "mixed": [1, 0.5],
        "numpy int": np.arange(1, 3),
        "numpy float": np.array([0.25, 4.0]),
        "uint8": np.array([7], np.uint8),
        "jnp": jnp.array([0.5, 2.0], jnp.bfloat16),
        "jnp int": jnp.arange(2, dtype=jnp.int8),
        "scalars": [np.float16(0.5), np.float32(2)],
        "0-d": [jnp.asarray(1), jnp.asarray(2)],
        "inf": [math.inf],
    }
    result = sweep(evaluate, grid, progress=False)
    integers = {"int", "numpy int", "uint8", "jnp int", "0-d"}
    for name, (dtype, shape, weak) in seen.items():
        assert dtype == (jnp.int32 if name in integers else jnp.float32)
        assert (shape, weak) == ((), False)
        assert type(result.rows[0][name]) is (int if name in integers else float)
    assert len(result.rows) == 2**9
    last = [3, 1.5, 0.5, 2, 4.0, 7, 2.0, 1, 2.0, 2, math.inf]
    assert list(result.rows[-1].values())[:11] == last
    assert list(result.rows[-1])[:11] == list(grid)


def test_rows_hold_python_numbers():
    def evaluate(x):
        return {
            "half": x.astype(jnp.bfloat16),
            "count": jnp.int32(3),
            "yes": x > 0,
            "plain": 0.5,
            "numpy": np.float64(0.25),
        }

    (row,) = sweep(evaluate, {"x": [0.1]}, progress=False).rows
    assert row["x"] == 0.1  # as given, not as float32
    assert row["half"] == float(jnp.bfloat16(0.1))
    assert (row["count"], row["yes"], row["plain"], row["numpy"]) == (3, True, 0.5, 0.25)
    assert {type(value) for value in row.values()} == {int, float, bool}


def flaky(broken, calls):
    """Metrics computed through a host callback, which fails from point ``broken`` on."""

    def host(x):
        if x >= broken:
            raise RuntimeError("interrupted")
        calls.append(int(x))
        return np.float32(1 / (4 - x) if x != 4 else np.inf)

    def evaluate(x, y):
        out = jax.ShapeDtypeStruct((), jnp.float32)
        return {"m": jax.pure_callback(host, out, x, vmap_method="sequential"), "n": 0 * y}

    return evaluate


def test_resumes_where_it_was_interrupted(tmp_path):
    path, grid = tmp_path / "sweep.json", {"x": list(range(7)), "y": [0.5]}
    calls = []
    with pytest.raises(Exception, match="interrupted"):
        sweep(flaky(4, calls), grid, batch_size=3, path=path, progress=False)
    assert len(json.loads(path.read_text())["rows"]) == 3
    calls.clear()
    result = sweep(flaky(99, calls), grid, batch_size=3, path=path, progress=False)
    assert set(calls) == {3, 4, 5, 6}
    fresh = sweep(flaky(99, []), grid, progress=False)
    assert result == fresh
    assert [row["failed"] for row in result.rows] == [x == 4 for x in range(7)]

    # A complete file: nothing runs, and the file is not written.
    calls.clear()
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert sweep(flaky(99, calls), grid, path=path, progress=False) == fresh
    assert not calls
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert os.listdir(tmp_path) == ["sweep.json"]


def test_survives_a_kill(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys
import jax, jax.numpy as jnp, numpy as np
from optax_clipquant import sweep

def host(x):
    if x >= int(sys.argv[2]):
        os._exit(9)
    print(int(x))
    return np.float32(x)

def evaluate(x):
    out = jax.ShapeDtypeStruct((), jnp.float32)
    return {"m": jax.pure_callback(host, out, x, vmap_method="sequential")}

sweep(evaluate, {"x": list(range(5))}, batch_size=2, path=sys.argv[1], progress=False)
""")
    path = tmp_path / "sweep.json"
    assert run_python(script, path, "3").returncode == 9
    assert len(json.loads(path.read_text())["rows"]) == 2
    second = run_python(script, path, "9")
    assert second.returncode == 0, second.stderr
    assert set(second.stdout.split()) == {"2", "3", "4"}
    assert [row["m"] for row in json.loads(path.read_text())["rows"]] == [0, 1, 2, 3, 4]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path, grid = tmp_path / "sweep.json", {"x": list(range(4)), "y": [0.5]}
    calls, writes = [], []

    def full(descriptor, fsync=os.fsync):
        if calls:  # while rows are written
            writes.append(path.read_bytes())
        if len(calls) > 2:
            raise OSError("the disk is full")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        sweep(flaky(99, calls), grid, batch_size=2, path=path, progress=False)
    assert path.read_bytes() == writes[-1]
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert os.listdir(tmp_path) == ["sweep.json"]


def test_file_is_plain_json(tmp_path):
    path = tmp_path / "sweep.json"

    def evaluate(c, R):
        return {"loss": jnp.where(R > 1, jnp.nan, c), "bound": c, "low": -c}

    grid = {"c": [0.1, math.inf], "R": [1, 2]}
    result = sweep(evaluate, grid, path=path, progress=False)

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    f = float(np.float32(0.1))
    assert content == {
        "grid": {"c": [0.1, "inf"], "R": [1, 2]},
        "rows": [
            {"c": 0.1, "R": 1, "bound": f, "loss": f, "low": -f, "failed": False},
            {"c": 0.1, "R": 2, "bound": f, "loss": "nan", "low": -f, "failed": True},
            {"c": "inf", "R": 1, "bound": "inf", "loss": "inf", "low": "-inf", "failed": True},
            {"c": "inf", "R": 2, "bound": "inf", "loss": "nan", "low": "-inf", "failed": True},
        ],
    }
    assert type(content["rows"][0]["R"]) is int
    again = sweep(evaluate, grid, path=path, progress=False)
    assert repr(again) == repr(result)  # nan is not equal to itself


@pytest.mark.parametrize(
    "grid",
    [{"c": [1.0, 3.0]}, {"c": [1, 2]}, {"c": [1.0]}, {"d": [1.0, 2.0]}, {"c": [1.0, 2.0, 3.0]}],
)
def test_file_of_another_grid_is_refused(tmp_path, grid):
    path = tmp_path / "sweep.json"
    sweep(lambda c: {"loss": c}, {"c": [1.0, 2.0]}, path=path, progress=False)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"sweep\.json: its grid is .*another path, or delete"):
        sweep(lambda **point: {"loss": 0}, grid, path=path, progress=False)
    assert path.read_bytes() == before


def test_file_with_other_metrics_is_refused(tmp_path):
    path, grid = tmp_path / "sweep.json", {"c": [1.0, 2.0]}
    sweep(lambda c: {"loss": c}, grid, path=path, progress=False)
    with pytest.raises(ValueError, match=r"sweep\.json: its rows have .*'loss'.*another path"):
        sweep(lambda c: {"loss": c, "more": c}, grid, path=path, progress=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"grid": {"c": [1.0, 2.0]}}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": 3}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": [3]}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": [{}]}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": [{"c": 2.0, "loss": 1.0, "failed": false}]}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": [{"c": 1.0, "loss": "x", "failed": false}]}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": [{"c": 1.0}, {"c": 2.0}, {"c": 2.0}]}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": [{"c": 1.0, "loss": null, "failed": false}]}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": [{"c": 1.0, "loss": NaN, "failed": true}]}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": [{"c": 1.0, "loss": "nan", "failed": false}]}',
        '{"grid": {"c": [1.0, 2.0]}, "rows": [{"c": 1.0, "loss": 0.5, "failed": true}]}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / "sweep.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        ValueError, match=r"sweep\.json: damaged, or not written by sweep .*or delete"
    ):
        sweep(lambda c: {"loss": c}, {"c": [1.0, 2.0]}, path=path, progress=False)


def test_missing_folder_is_refused_before_the_runs(tmp_path):
    calls = []
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        sweep(flaky(99, calls), {"x": [1], "y": [1.0]}, path=tmp_path / "no/x.json", progress=False)
    assert not calls


def test_non_finite_runs_are_marked_failed():
    def diverging(lr):
        w = jax.lax.fori_loop(0, 200, lambda _, w: w - lr * 2 * w, jnp.ones(()))
        return {"loss": w**2, "score": 1 - w, "cost": jnp.where(jnp.isfinite(w), 5.0, 0.0)}

    result = sweep(diverging, {"lr": [0.1, 2.0, 1e6, 0.4]}, progress=False)
    assert [row["failed"] for row in result.rows] == [False, True, True, False]
    for mode in ("min", "max"):
        assert result.best("loss", mode)["lr"] in (0.1, 0.4)
        assert {row["lr"] for row in result.pareto("cost", "score", mode)} <= {0.1, 0.4}
    assert str(result).count("failed") == 2
    broken = sweep(diverging, {"lr": [1e6, 2e6]}, progress=False)
    assert broken.pareto("cost", "loss") == []
    with pytest.raises(ValueError, match=r"best: all 2 runs failed.*smaller learning rate"):
        broken.best("loss")


def rows(values):
    return tuple(
        {"i": i, "cost": a, "metric": b, "failed": math.isnan(b)} for i, (a, b) in enumerate(values)
    )


few = st.sampled_from([0.0, 1.0, 2.0, 3.5])


@hypothesis.given(
    st.lists(st.tuples(few, few | st.just(math.nan)), min_size=1, max_size=12),
    st.sampled_from(["max", "min"]),
)
@hypothesis.settings(max_examples=500)
def test_pareto_and_best_against_brute_force(values, mode):
    result = Sweep(rows(values))
    sign = 1 if mode == "max" else -1
    sound = [row for row in result.rows if not math.isnan(row["metric"])]

    def beats(a, b):
        cheaper, better = b["cost"] - a["cost"], sign * (a["metric"] - b["metric"])
        return cheaper >= 0 and better >= 0 and (cheaper > 0 or better > 0)

    front = [row for row in sound if not any(beats(other, row) for other in sound)]
    assert result.pareto("cost", "metric", mode) == sorted(front, key=lambda row: row["cost"])
    if sound:
        extreme = (max if sign == 1 else min)(row["metric"] for row in sound)
        first = next(row for row in sound if row["metric"] == extreme)
        assert result.best("metric", mode) == first


def test_max_is_the_default():
    result = Sweep(rows([(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)]))
    assert result.best("metric")["i"] == 1
    assert [row["i"] for row in result.pareto("cost", "metric")] == [0, 1]
    assert [row["i"] for row in result.pareto("i", "cost", "min")] == [0]


def test_unknown_names_are_refused():
    result = Sweep(rows([(1.0, 1.0)]))
    known = r"there is no 'loss'; choose from \['i', 'cost', 'metric'\]"
    with pytest.raises(ValueError, match=f"best: {known}"):
        result.best("loss")
    for names in (("loss", "metric"), ("cost", "loss")):
        with pytest.raises(ValueError, match=f"pareto: {known}"):
            result.pareto(*names)
    with pytest.raises(ValueError, match="no 'failed'"):
        result.best("failed")
    with pytest.raises(ValueError, match=r'best: mode must be "max" or "min", got \'low\''):
        result.best("metric", "low")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, r"grid must map names to values, .* got \{\}"),
        ([("c", [1.0])], "grid must map names to values"),
        ({"c": []}, r"grid\['c'\] is empty; give values, or leave it out"),
        ({"c": [1.0], "R": np.zeros(0)}, r"grid\['R'\] is empty"),
        ({"c": 0.1}, r"grid\['c'\] must be a sequence of real numbers, got 0.1"),
        ({"c": "12"}, r"grid\['c'\] must be a sequence of real numbers, got '12'"),
        ({"c": ["a", 1]}, r"grid\['c'\] must be a sequence of real numbers"),
        ({"c": [None]}, r"grid\['c'\] must be a sequence of real numbers"),
        ({"c": [True]}, r"grid\['c'\] must be a sequence of real numbers"),
        ({"c": [1j]}, r"grid\['c'\] must be a sequence of real numbers"),
        ({"c": [[1.0], [2.0, 3.0]]}, r"grid\['c'\] must be a sequence of real numbers"),
        ({"c": np.ones((2, 2))}, r"grid\['c'\] must be a sequence of real numbers"),
        ({"c": [1.0, math.nan]}, r"grid\['c'\] has nan, which float32 cannot represent"),
        ({"c": [1e300]}, r"grid\['c'\] has 1e\+300, which float32 cannot represent"),
        ({"c": [1e-40]}, r"grid\['c'\] has 1e-40, which float32 cannot represent"),
        ({"c": [1, 2**31]}, r"grid\['c'\] has 2147483648, which int32 cannot represent"),
        ({"c": [2**70]}, r"grid\['c'\] must be a sequence of real numbers"),
        ({"failed": [1.0]}, r"grid has a column 'failed', which is reserved; rename it"),
    ],
)
def test_bad_grids_are_refused(grid, message):
    with pytest.raises(ValueError, match=f"sweep: {message}"):
        sweep(lambda **point: {"loss": 0.0}, grid, progress=False)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda c: c, r"evaluate returned .*; it must return a dict of scalars"),
        (lambda c: {}, r"evaluate returned \{\}; it must return a dict of scalars"),
        (lambda c: None, r"evaluate returned None; it must return a dict of scalars"),
        (lambda c: {"a": c, "b": jnp.ones(3)}, r"'b' as float32\(3,\); it must be a real scalar"),
        (lambda c: {"b": c[None]}, r"'b' as float32\(1,\); it must be a real scalar"),
        (lambda c: {"b": jax.lax.complex(c, c)}, r"'b' as complex64\(\); it must be a real"),
        (lambda c: {"b": None}, r"'b' as None; it must be a real scalar"),
        (lambda c: {"b": "high"}, r"'b' as 'high'; it must be a real scalar"),
        (lambda c: {"b": {"x": c}}, r"'b' as \{'x': .*; it must be a real scalar"),
        (lambda c: {"c": c}, r"a metric 'c', which is the name of a column"),
        (lambda c: {"failed": c}, r"a metric 'failed'"),
        (lambda c: {3: c}, r"a metric 3, .*not a string; rename it"),
    ],
)
def test_bad_metrics_are_refused(found, message):
    with pytest.raises(ValueError, match=f"sweep: .*{message}"):
        sweep(found, {"c": [1.0, 2.0, 3.0]}, progress=False)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_bad_batch_size_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"must be an integer of at least 1, .*got {batch_size}"):
        sweep(lambda c: {"loss": c}, {"c": [1.0]}, batch_size=batch_size, progress=False)


def test_sweep_prints_as_a_table():
    result = sweep(
        lambda c, R: {"loss": c / 3, "size": R}, {"c": [0.1, 1.0], "R": [100000]}, progress=False
    )
    lines = str(result).strip().splitlines()
    assert lines[0].split() == ["c", "R", "loss", "size"]
    assert [line.split() for line in lines[-2:]] == [
        ["0.1", "100000", "0.033333", "100000"],
        ["1", "100000", "0.33333", "100000"],
    ]
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(result)
    assert console.export_text().strip() == str(result).strip()


def test_progress_is_shown_on_stderr(capsys):
    sweep(lambda c: {"loss": c}, {"c": [1.0, 2.0, 3.0]}, batch_size=2)
    assert "3/3" in capsys.readouterr().err  # stdout is for results
    sweep(lambda c: {"loss": c}, {"c": [1.0, 2.0, 3.0]}, progress=False)
    assert capsys.readouterr() == ("", "")


def test_pipe_as_sweep_file_is_refused(tmp_path):
    from optax_clipquant.tuning import sweep_file

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        sweep_file.read(tmp_path / "pipe", {}, [])
