"""``compress``: which tensors are quantized, how, and what is reported of the others."""

import contextlib
import json
import os
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import weights

from optax_clipquant import NormalFloat, QArray, Ternary, Uniform, load
from optax_clipquant.cli import main as cli
from optax_clipquant.cli.arguments import rule, size
from optax_clipquant.cli.rules import Rule, choose
from optax_clipquant.cli.search import scales as search
from optax_clipquant.formats.native.description import LeafSpec


def run(*args) -> int:
    return cli.main([str(arg) for arg in args])


def write(path, tensors) -> None:
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a=4", ("a", {"bits": 4})),
        ("a=b=4", ("a=b", {"bits": 4})),
        ("a=keep", ("a", None)),
        ("a=ternary,group=256", ("a", {"quantizer": "ternary", "group_size": 256})),
        ("x=4,axis=1,group=8", ("x", {"bits": 4, "channel_axis": 1, "group_size": 8})),
        ("x=3,axis=none,scale=mse,quantizer=affine", ("x", {"bits": 3, "channel_axis": None, "scale_rule": "mse", "quantizer": "affine"})),
        ("x{1,2}=4,group=none", ("x{1,2}", {"bits": 4, "group_size": None})),
    ],
)  # fmt: skip
def test_rules_are_parsed(text, wanted):
    assert rule(text) == wanted


def test_sizes_are_parsed():
    assert [size(x) for x in ("5GB", "1.5kb", "2MiB", "7", "3g")] == [5 * 10**9, 1500, 2**21, 7, 3 * 10**9]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "quantizer"),
    [
        ("--quantizer normal-float --group-size 8", NormalFloat(4, channel_axis=0, group_size=8)),
        ("--quantizer affine --bits 4", Uniform(4, symmetric=False, channel_axis=0)),
        ("--quantizer ternary", Ternary(channel_axis=0)),
        ("--rule w=4,axis=1,group=8", Uniform(4, channel_axis=1, group_size=8)),
    ],
)
def test_each_quantizer_matches_the_library(tmp_path, options, quantizer):
    w = weights((16, 24))
    write(tmp_path / "in", {"w": w, "v": w})
    assert run("compress", tmp_path / "in", tmp_path / "small", *options.split()) == 0
    found, wanted = load(tmp_path / "small")["w"], quantizer.quantize(jnp.asarray(w))
    assert found.grid.levels == wanted.grid.levels
    np.testing.assert_array_equal(found.qvalue, wanted.qvalue)
    np.testing.assert_array_equal(found.scale, wanted.scale)


@pytest.mark.parametrize(
    ("options", "quantizer"),
    [
        ("--bits 1", Uniform(1, channel_axis=0)),
        ("--bits 2 --group-size 40", Uniform(2, channel_axis=0, group_size=40)),
        ("--bits 2 --channel-axis none", Uniform(2, channel_axis=None)),
        ("--bits 3 --channel-axis -1", Uniform(3, channel_axis=-1)),
        ("--bits 3 --channel-axis 1 --group-size 36", Uniform(3, channel_axis=1, group_size=36)),
        ("--bits 3 --quantizer affine", Uniform(3, symmetric=False, channel_axis=0)),
    ],
)  # fmt: skip
def test_tensors_that_share_programs_match_the_library(tmp_path, monkeypatch, options, quantizer):
    """Rows of many lengths, groups of which the last is shorter or longer than ``FEW``, and no rows."""
    monkeypatch.setattr(search, "_BLOCK", 2**11)
    shapes = [(70, 48), (33, 90), (16, 75), (24, 12, 3, 3), (3, 1200), (500, 8), (0, 8), (8, 0)]
    tree = {f"w{i}": weights(shape, seed=i) for i, shape in enumerate(shapes)}
    write(tmp_path / "in", tree)
    assert run("compress", tmp_path / "in", tmp_path / "small", *options.split()) == 0
    found = load(tmp_path / "small")
    for name, w in tree.items():
        wanted = quantizer.quantize(jnp.asarray(w))
        if isinstance(found[name], QArray):
            assert found[name].grid.levels == wanted.grid.levels
            np.testing.assert_array_equal(found[name].scale, wanted.scale, name)
            np.testing.assert_array_equal(found[name].qvalue, wanted.qvalue, name)


def specs(**tensors) -> dict:
    """Specs by name, from dtypes and shapes; ``__`` in a name stands for a dot."""
    return {
        name.replace("__", "."): (np.dtype(getattr(ml_dtypes, dtype, dtype)), shape)
        for name, (dtype, shape) in tensors.items()
    }


F, H = ("float32", (8, 8)), ("float16", (8, 8))


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("GPTQ or AWQ", {"m__qweight": ("int32", (8, 8)), "m__qzeros": ("int32", (1, 8)), "m__scales": H, "m__g_idx": ("int32", (8,))}),
        ("compressed-tensors", {"m__weight_packed": ("int32", (8, 8)), "m__weight_scale": H, "m__weight_shape": ("int64", (2,))}),
        ("float8 in blocks", {"m__weight": ("float8_e4m3fn", (8, 8)), "m__weight_scale_inv": F}),
        ("MLX", {"m__weight": ("uint32", (8, 8)), "m__scales": H, "m__biases": H}),
        ("bitsandbytes", {"m__weight": ("uint8", (32, 1)), "m__weight__absmax": F, "m__weight__quant_map": ("float32", (16,))}),
        ("HQQ", {"m__W_q": ("uint8", (8, 8)), "m__scale": H, "m__zero": H}),
    ],
)  # fmt: skip
def test_quantized_modules_pass_through(program, module):
    found = specs(**module, n__weight=F)
    rules, kept = choose(found, Rule(), [])
    assert list(rules) == ["n.weight"]
    told = {kept[name] for name, (_, shape) in found.items() if name in kept and len(shape) > 1}
    assert any(program in reason for reason in told)
    with pytest.raises(ValueError, match="already quantized"):
        choose(specs(**module), Rule(), [])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model__layers__input_layernorm__weight", "of a norm"),
        ("ln_1__g", "of a norm"),
        ("h__bn2__weight", "of a norm"),
        ("attn__rotary_emb__cos_cached", "a rotary table"),
        ("bn__running_var", "a running statistic"),
        ("h__bias", "named bias or scale"),
    ],
)
def test_tensors_not_named_like_weights_are_kept(name, reason):
    found = specs(**{name: F}, w=F, normal__weight=F, kiln__proj=F)
    rules, kept = choose(found, Rule(), [])
    assert kept == {name.replace("__", "."): reason}
    assert rules.keys() >= {"w", "normal.weight"}
    if reason != "named bias or scale":
        assert name.replace("__", ".") in choose(found, Rule(), [(".", {"bits": 4})])[0]


def test_tensors_left_unquantized_are_summed_up_in_one_line(tmp_path, capsys):
    write(tmp_path / "in", {"w": weights((16, 16)), "b": np.ones(3, np.float32), "i": np.ones((2, 2), np.int32), "thin": weights((50, 1))})  # fmt: skip
    assert run("compress", tmp_path / "in", tmp_path / "small", "--rule=thin=8,axis=0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("kept unchanged: ")
    for reason in ("1 with fewer than 2 axes", "1 of int32"):
        assert reason in lines[1]


@pytest.mark.parametrize(
    "options", [[], ["--bits", "2"], ["--budget", "4"]], ids=["numpy", "jax", "budget"]
)
def test_non_finite_weights_are_reported(tmp_path, capsys, options):
    w = weights((16, 16))
    w[1, 2], w[3, 4] = np.nan, np.inf
    write(tmp_path / "in", {"w": w, "v": weights((16, 16)), "mask": np.full(3, -np.inf, np.float32)})  # fmt: skip
    args = ("compress", tmp_path / "in", tmp_path / "small", *options)
    assert run(*args) == 1
    assert "2 weights are infinite or NaN: 2 in 'w'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in"]
    assert run(*args, "--allow-non-finite") == 0
    assert "2 in 'w'" in capsys.readouterr().err
    assert not np.isfinite(np.asarray(load(tmp_path / "small")["w"])[1]).any()
    assert run("inspect", tmp_path / "small", "--against", tmp_path / "in", "--json") == 0
    json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(text))


def test_float8_is_quantized_through_float32(tmp_path):
    w = (400 * weights((16, 16)) / 4).astype(ml_dtypes.float8_e4m3fn)
    write(tmp_path / "in", {"w": np.ones((4, 4), np.float32)})
    from optax_clipquant.formats.safetensors import writing

    with writing(tmp_path / "in", {"w": (w.dtype, w.shape)}, {}) as file:
        file.put("w", w)
    assert run("compress", tmp_path / "in", tmp_path / "small", "--bits", 4) == 0
    found = load(tmp_path / "small")["w"]
    assert isinstance(found, QArray)
    wanted = Uniform(4, channel_axis=0).quantize(jnp.asarray(w.astype(np.float32)))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    assert np.isfinite(np.asarray(found)).all()


def test_names_are_escaped_on_a_terminal(tmp_path, capsys):
    write(tmp_path / "in", {"a\x1b]0;evil\x07\u202eb": weights((8, 8))})
    assert run("inspect", tmp_path / "in") == 0
    assert run("compress", tmp_path / "in", tmp_path / "out", "--rule=zzz=4") == 1
    assert run("compress", tmp_path / "in", tmp_path / "out", "--channel-axis=5") == 1
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert not set("\x1b\x07\u202e") & set(text)
    assert "\\x1b" in captured.out + captured.err


def test_dtypes_are_escaped_on_a_terminal(tmp_path, capsys):
    header = json.dumps({
        "w": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]},
        "x": {"dtype": "\x1b[31m\n", "shape": [2, 2], "data_offsets": [256, 260]},
    }).encode()  # fmt: skip
    (tmp_path / "in").write_bytes(len(header).to_bytes(8, "little") + header + bytes(260))
    assert run("compress", tmp_path / "in", tmp_path / "out") == 0
    kept = capsys.readouterr().out.splitlines()[1:]
    assert kept == ["kept unchanged: 1 of \\x1b[31m\\n"]


@pytest.mark.parametrize("part", ["a/", "a.", "_", "norm", "norm1", "_ln_", "weight.", "bn"])
def test_time_is_linear_in_the_length_of_names(part):
    """Squares of these lengths would take minutes."""
    module = part * 200_000
    names = ("qweight", "scales", "x_blocks", "x_scales", "w-")
    found = {f"{module}.{name}": (np.dtype(np.float32), (8, 8)) for name in names}
    begin = time.process_time()
    with contextlib.suppress(ValueError):  # none is left
        choose(found, Rule(), [])
    assert time.process_time() - begin < 2


def test_work_per_tensor_does_not_grow_with_their_number(tmp_path, monkeypatch):
    calls = []
    spec = LeafSpec.spec.fget
    monkeypatch.setattr(LeafSpec, "spec", property(lambda leaf: calls.append(leaf) or spec(leaf)))
    write(tmp_path / "in", {f"w{i}": weights((8, 8)) for i in range(300)})
    assert run("compress", tmp_path / "in", tmp_path / "small") == 0
    assert len(calls) < 10 * 300
