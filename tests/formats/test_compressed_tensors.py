import json

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from helpers import weights

from optax_clipquant import (
    Binary,
    Grid,
    NormalFloat,
    QArray,
    Ternary,
    Uniform,
    ZScore,
    dequantize_params,
    from_compressed_tensors,
    quantize_params,
    quantize_weights,
    to_compressed_tensors,
)


def write_like(folder, shapes, *, shards=1, **config):
    """A Hugging Face folder of zeros."""
    folder.mkdir()
    names = list(shapes)
    files = {
        f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)
    }
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {"metadata": {}, "weight_map": {n: f for f, held in files.items() for n in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, held in files.items():
        tensors = {name: np.zeros(shapes[name], np.float32) for name in held}
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors_in(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def unpacked(words, count, bits):
    """The ``count`` codes of each row, unpacked bit by bit."""
    rows = [sum(int(word) % 2**32 << 32 * i for i, word in enumerate(row)) for row in words]
    codes = [[row >> bits * i & 2**bits - 1 for i in range(count)] for row in rows]
    return np.array(codes, np.int64) - 2 ** (bits - 1)


def decoded(tensors, module, bits):
    """The weight of a layer, decoded as the format defines it, in the dtype of its scales."""
    parts = {part: tensors.get(f"{module}.weight_{part}") for part in ("packed", "scale", "shape", "zero_point")}  # fmt: skip
    outputs, length = parts["shape"]
    levels = unpacked(parts["packed"], length, bits)
    scales = parts["scale"].astype(np.float32)
    run = length // scales.shape[1]
    if parts["zero_point"] is not None:
        zeros = unpacked(parts["zero_point"].T, outputs, bits).T
        levels = levels - np.repeat(zeros, run, 1)
    # Below 2**24 the product of the code and the scale is exact in float32, so it is rounded once.
    return (levels * np.repeat(scales, run, 1)).astype(parts["scale"].dtype)


def as_float32(x):
    return np.asarray(x).astype(np.float32)


QUANTIZERS = [
    (Uniform(4, group_size=32), 4),
    (Uniform(4), 4),
    (Uniform(8, group_size=16, scale_rule="mse"), 8),
    (Uniform(8), 8),
    (Uniform(4, symmetric=False, group_size=32), 4),
    (Uniform(8, symmetric=False), 8),
    (Uniform(3, group_size=48), 4),
    (Uniform(2, channel_axis=None), 4),
    (Binary(), 4),
    (Ternary(group_size=32), 4),
    (Uniform(5), 8),
]
# Every grid in float32; in the other dtypes, one with and one without zero points.
CASES = [
    (quantizer, bits, dtype)
    for quantizer, bits in QUANTIZERS
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    if dtype == jnp.float32 or quantizer in (QUANTIZERS[2][0], QUANTIZERS[4][0])
]


@pytest.mark.parametrize(("quantizer", "bits", "dtype"), CASES, ids=str)
def test_decoded_weights_equal_the_grid(tmp_path, quantizer, bits, dtype):
    q = quantizer.quantize(jnp.asarray(weights((96, 5)), dtype))
    like = write_like(tmp_path / "like", {"a.weight": (5, 96)})
    assert to_compressed_tensors(tmp_path / "out", {"a": {"kernel": q}}, like=like) == {"a.weight": f"int{bits}"}  # fmt: skip
    tensors = tensors_in(tmp_path / "out")
    found = decoded(tensors, "a", bits)
    assert found.dtype == q.dtype
    np.testing.assert_array_equal(as_float32(found), as_float32(q.dequantize()).T)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == jnp.dtype(dtype).name
    tree, again = from_compressed_tensors(tmp_path / "out")
    assert again == config
    np.testing.assert_array_equal(as_float32(tree["a.weight"]), as_float32(found))
    assert tree["a.weight"].dtype == q.dtype
    assert (tree["a.weight"].zero_point is None) == (q.zero_point is None)


def test_rows_of_one_group_are_channels(tmp_path):
    # 32 contracted weights share a scale, so that the grid has no groups.
    q = Uniform(4, group_size=32).quantize(jnp.asarray(weights((32, 5))))
    assert q.grid.group is None
    like = write_like(tmp_path / "like", {"a.weight": (5, 32)})
    assert to_compressed_tensors(tmp_path / "out", {"a": {"kernel": q}}, like=like) == {"a.weight": "int4"}  # fmt: skip
    np.testing.assert_array_equal(decoded(tensors_in(tmp_path / "out"), "a", 4), q.dequantize().T)


@hypothesis.given(
    rows=st.integers(1, 9),
    runs=st.integers(1, 3),
    run=st.sampled_from([1, 3, 8, 32]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_shape_round_trips(tmp_path_factory, rows, runs, run, bits, symmetric, seed):
    rng = np.random.default_rng(seed)
    lower, upper = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grid = Grid(
        jnp.asarray(rng.integers(-255, 256, (rows, runs)).astype(np.float32)),
        None if symmetric else jnp.asarray(rng.integers(lower, upper + 1, (rows, runs)), jnp.int8),
        **{"bits": bits, "lower": lower, "upper": upper, "group": (-1, run)},
    )
    q = QArray(jnp.asarray(rng.integers(lower, upper + 1, (rows, runs * run), dtype=np.int8)), grid)
    folder = tmp_path_factory.mktemp("ct")
    like = write_like(folder / "like", {"a.weight": q.shape})
    hypothesis.assume(run > 1 or runs == 1)
    to_compressed_tensors(folder / "out", {"a.weight": q}, like=like)
    wanted = (as_float32(q.qvalue) - np.repeat(as_float32(0 if symmetric else grid.zero_point) * np.ones((rows, runs)), run, 1)) * np.repeat(as_float32(grid.scale), run, 1)  # fmt: skip
    np.testing.assert_array_equal(decoded(tensors_in(folder / "out"), "a", bits), wanted)
    again = from_compressed_tensors(folder / "out")[0]["a.weight"]
    np.testing.assert_array_equal(again.qvalue, q.qvalue)
    np.testing.assert_array_equal(again.dequantize(), wanted)


def test_remaining_tensors_come_from_like(tmp_path):
    shapes = {
        "model.embed_tokens.weight": (7, 32),
        "model.layers.0.mlp.up_proj.weight": (8, 32),
        "model.layers.0.mlp.down_proj.weight": (32, 8),
        "model.layers.1.mlp.up_proj.weight": (8, 32),
        "model.layers.1.mlp.down_proj.weight": (32, 8),
        "model.norm.weight": (32,),
    }
    like = write_like(tmp_path / "like", shapes, shards=2, hidden_size=32)
    (like / "pytorch_model.bin").write_text("not copied")
    up = jnp.asarray(weights((2, 32, 8)))
    params = {
        "model": {
            "embed_tokens": {"embedding": jnp.asarray(weights((7, 32), seed=1))},
            "layers": {"mlp": {"up_proj": {"kernel": up}}},
            "norm": {"scale": jnp.arange(32.0, dtype=jnp.bfloat16)},
        }
    }
    q = quantize_params(params, Uniform(4, channel_axis=(0, -1), group_size=16))
    kinds = to_compressed_tensors(tmp_path / "out", q, like=like)
    assert kinds == {
        "model.embed_tokens.weight": "float32",
        "model.layers.0.mlp.up_proj.weight": "int4",
        "model.layers.1.mlp.up_proj.weight": "int4",
        "model.norm.weight": "bfloat16",
    }
    out = tmp_path / "out"
    assert (out / "tokenizer.json").exists()
    assert not (out / "pytorch_model.bin").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_size"] == 32
    found = config["quantization_config"]
    assert found["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert found["config_groups"]["group_0"]["weights"]["group_size"] == 16
    assert sorted(found["ignore"]) == sorted(
        ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    )
    tensors, values = tensors_in(out), dequantize_params(q)["model"]
    for layer in range(2):
        np.testing.assert_array_equal(
            decoded(tensors, f"model.layers.{layer}.mlp.up_proj", 4),
            values["layers"]["mlp"]["up_proj"]["kernel"][layer].T,
        )
    np.testing.assert_array_equal(
        tensors["model.embed_tokens.weight"], values["embed_tokens"]["embedding"]
    )
    np.testing.assert_array_equal(tensors["model.norm.weight"], params["model"]["norm"]["scale"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(out / file)


def test_a_single_shard_keeps_its_index(tmp_path):
    """Without an index, readers only look for model.safetensors."""
    like = write_like(tmp_path / "like", {"a.weight": (8, 32)})
    shard = "model-00001-of-00001.safetensors"
    (like / "model.safetensors").rename(like / shard)
    index = {"metadata": {}, "weight_map": {"a.weight": shard}}
    (like / "model.safetensors.index.json").write_text(json.dumps(index))
    q = Uniform(4, channel_axis=0).quantize(jnp.asarray(weights((8, 32))))
    to_compressed_tensors(tmp_path / "out", {"a.weight": q}, like=like)
    found = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(found["weight_map"].values()) == {shard}
    again, _ = from_compressed_tensors(tmp_path / "out")
    np.testing.assert_array_equal(again["a.weight"], q.dequantize())


def test_mixed_grids_name_their_layers(tmp_path):
    like = write_like(tmp_path / "like", {"a.weight": (8, 32), "b.weight": (8, 32)})
    w = jnp.asarray(weights((32, 8)))
    tree = {"a": {"kernel": Uniform(4, group_size=32).quantize(w)}, "b": {"kernel": Uniform(8).quantize(w)}}  # fmt: skip
    to_compressed_tensors(tmp_path / "out", tree, like=like)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = {tuple(g["targets"]): g["weights"]["num_bits"] for g in config["config_groups"].values()}  # fmt: skip
    assert groups == {("a",): 4, ("b",): 8}
    again, _ = from_compressed_tensors(tmp_path / "out")
    for name, leaf in tree.items():
        np.testing.assert_array_equal(again[f"{name}.weight"], leaf["kernel"].dequantize().T)
        assert again[f"{name}.weight"].bits == leaf["kernel"].bits


def test_training_from_a_folder_starts_from_its_codes(tmp_path):
    quantizer = Uniform(4, channel_axis=0, group_size=16)
    q = quantizer.quantize(jnp.asarray(weights((8, 32))))
    like = write_like(tmp_path / "like", {"a.weight": (8, 32)})
    to_compressed_tensors(tmp_path / "out", {"a.weight": q}, like=like)
    tree, _ = from_compressed_tensors(tmp_path / "out")
    params = dequantize_params(tree)
    tx = optax.chain(optax.sgd(0.0), quantize_weights(quantizer))
    state = tx.init(params)
    np.testing.assert_array_equal(state[-1].grid["a.weight"].encode(params["a.weight"]), q.qvalue)
    updates, _ = tx.update({"a.weight": jnp.zeros((8, 32))}, state, params)
    np.testing.assert_array_equal(params["a.weight"] + updates["a.weight"], q.dequantize())


W = jnp.asarray(weights((64, 32)))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (lambda: NormalFloat(4).quantize(W), r"codebook.*Uniform\(4\)"),
        (lambda: ZScore(R=20).quantize(W), r"fractional zero points.*Uniform\(8\)"),
        (lambda: Uniform(4, group_size=48).quantize(W), "groups of 48 along axis -2, which do not divide"),
        (lambda: Uniform(4, channel_axis=0, group_size=16).quantize(W), "groups of 16 along axis -1"),
        (lambda: Uniform(4).quantize((1e-6 * W).astype(jnp.float16)), "a scale of .*float16"),
        (lambda: Uniform(4).quantize(W * jnp.inf), "a scale of"),
        (lambda: jnp.ones((3, 32)), r"has shape \(3, 32\), but tensor '.*' in .* has \(32, 64\)"),
    ],
)  # fmt: skip
def test_unsupported_grids_are_named_and_nothing_is_written(tmp_path, leaf, message):
    like = write_like(tmp_path / "like", {"a.weight": (32, 64)})
    with pytest.raises(ValueError, match=f"leaf 'a/kernel' .*{message}"):
        to_compressed_tensors(tmp_path / "out", {"a": {"kernel": leaf()}}, like=like)
    assert [path.name for path in tmp_path.iterdir()] == ["like"]


def test_invalid_folders_are_refused(tmp_path):
    like = write_like(tmp_path / "like", {"a.weight": (32, 64)})
    tree = {"a": {"kernel": Uniform(4).quantize(W)}}
    with pytest.raises(FileExistsError, match="like exists; name a new folder"):
        to_compressed_tensors(like, tree, like=like)
    with pytest.raises(NotADirectoryError, match="not a folder"):
        to_compressed_tensors(tmp_path / "out", tree, like=like / "config.json")
    with pytest.raises(ValueError, match=r"has no tensor 'b\.weight'; the nearest are"):
        to_compressed_tensors(tmp_path / "out", {"b": tree["a"]}, like=like)
    to_compressed_tensors(tmp_path / "out", tree, like=like)
    with pytest.raises(ValueError, match="quantized already"):
        to_compressed_tensors(tmp_path / "more", tree, like=tmp_path / "out")
    with pytest.raises(ValueError, match="like is not quantized by compressed-tensors"):
        from_compressed_tensors(like)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=32), "weight_scale is"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=8), "weight_packed is"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(symmetric=False), "do not fit"),
        (lambda c: c["config_groups"]["group_0"].update(targets=["b"]), "in no group"),
        (lambda c: c.update(format="marlin-24"), "is marlin-24 of 4 bits"),
    ],
)  # fmt: skip
def test_inconsistent_folder_is_named(tmp_path, change, message):
    like = write_like(tmp_path / "like", {"a.weight": (32, 64)})
    q = Uniform(4, group_size=16).quantize(W)
    to_compressed_tensors(tmp_path / "out", {"a": {"kernel": q}}, like=like)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"out: layer 'a'.*{message}"):
        from_compressed_tensors(tmp_path / "out")


@pytest.mark.parametrize(("quantizer", "bits", "dtype"), CASES, ids=str)
def test_compressed_tensors_decodes_the_levels(tmp_path, quantizer, bits, dtype):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from safetensors.torch import load_file

    # With up to 8 outputs, compressed-tensors 0.20 fails to unpack its own zero points, too.
    q = quantizer.quantize(jnp.asarray(weights((96, 12)), dtype))
    like = write_like(tmp_path / "like", {"a.weight": (12, 96)})
    to_compressed_tensors(tmp_path / "out", {"a": {"kernel": q}}, like=like)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = library.quantization.QuantizationConfig(**config)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    parts = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
    found = PackedQuantizationCompressor.decompress(parts, config.config_groups["group_0"])
    assert found["weight"].dtype == getattr(torch, q.dtype.name)
    np.testing.assert_array_equal(found["weight"].float().numpy(), as_float32(q.dequantize()).T)
