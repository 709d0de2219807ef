import contextlib
import math
import re
import struct

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
    from_gguf,
    narrow,
    quantize_params,
    quantize_weights,
    to_gguf,
)
from optax_clipquant.formats.gguf.container import GGUFFile
from optax_clipquant.formats.gguf.names import gguf_name

gguf = pytest.importorskip("gguf")

# For each type: the smallest and the largest code, and the bits.
GRIDS = {
    "TQ2_0": (-1, 1, math.log2(3)),
    "Q4_0": (-8, 7, 4),
    "Q5_0": (-16, 15, 5),
    "Q8_0": (-128, 127, 8),
}


def write_like(path, shapes, arch="llama", heads=(4, 2), **tensors):
    """A GGUF file of zeros, written with the gguf package, with metadata of each kind."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_uint32(f"{arch}.attention.head_count", heads[0])
    writer.add_uint32(f"{arch}.attention.head_count_kv", heads[1])
    writer.add_float32(f"{arch}.rope.freq_base", 1e5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "<s>"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    for name, (content, kind) in tensors.items():
        writer.add_tensor(name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    """The type and values of each tensor, read with the gguf package."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = tensor.tensor_type.name, np.array(values)
    return found


def random_array(rng, kind, rows, blocks, *, dtype=np.float32, offset=0.0):
    """A ``QArray`` ``[rows, columns]`` of random codes, with scales from end to end of the exact range."""
    lower, upper, bits = GRIDS[kind]
    size = 256 if kind == "TQ2_0" else 32
    codes = rng.integers(lower, upper + 1, (rows, blocks * size), dtype=np.int8)
    mantissa = rng.integers(128, 256, (rows, blocks)) / 128
    scales = np.ldexp(mantissa, rng.integers(-17, 16, (rows, blocks)))
    scales *= rng.choice([-1, 1], scales.shape)
    scales.flat[:3] = np.array([2.0**-17, 65280, 0])[: scales.size]
    grid = Grid(
        jnp.asarray(scales, jnp.float32),
        **{"bits": bits, "lower": lower, "upper": upper, "offset": offset, "dtype": dtype},
        group=(-1, size),
    )
    return QArray(jnp.asarray(codes), grid)


@hypothesis.given(
    kind=st.sampled_from(list(GRIDS)),
    shape=st.sampled_from([(1, 1), (3, 2), (5, 3)]),
    seed=st.integers(0, 2**32),
)
def test_gguf_package_decodes_the_levels(tmp_path_factory, kind, shape, seed):
    q = random_array(np.random.default_rng(seed), kind, *shape)
    folder = tmp_path_factory.mktemp("gguf")
    like = write_like(folder / "like.gguf", {"w": q.shape})
    assert to_gguf(folder / "out.gguf", {"w": q}, like=like) == {"w": kind}
    found, values = read(folder / "out.gguf")["w"]
    assert found == kind
    np.testing.assert_array_equal(values, q.dequantize())
    tree, _ = from_gguf(folder / "out.gguf")
    np.testing.assert_array_equal(tree["w"].qvalue, q.qvalue)
    np.testing.assert_array_equal(tree["w"].scale, q.scale)
    assert (tree["w"].bits, tree["w"].grid.group) == (q.bits, q.grid.group)


@pytest.mark.parametrize(
    ("quantizer", "kind", "dtype"),
    [
        (Uniform(4, group_size=32), "Q4_0", jnp.float32),
        (Uniform(4, group_size=32), "Q4_0", jnp.bfloat16),
        (Uniform(4, group_size=32), "Q4_0", jnp.float16),
        (Uniform(4, group_size=128, scale_rule="mse"), "Q4_0", jnp.float32),
        (Uniform(4), "Q4_0", jnp.float32),
        (Uniform(3, group_size=32), "Q4_0", jnp.float32),
        (Uniform(2, group_size=64), "Q4_0", jnp.float32),
        (Uniform(6, channel_axis=None), "Q8_0", jnp.float32),
        (Ternary(group_size=32), "Q4_0", jnp.float32),
        (Ternary(), "TQ2_0", jnp.float32),
        (Binary(group_size=256), "TQ2_0", jnp.float32),
    ],
    ids=str,
)
def test_smallest_type_that_holds_a_grid_is_chosen(tmp_path, quantizer, kind, dtype):
    q = quantizer.quantize(jnp.asarray(weights((256, 5)), dtype))
    like = write_like(tmp_path / "like.gguf", {"w": (5, 256)})
    assert to_gguf(tmp_path / "out.gguf", {"w": q}, like=like) == {"w": kind}
    found = jnp.asarray(read(tmp_path / "out.gguf")["w"][1]).astype(dtype)
    np.testing.assert_array_equal(found, q.dequantize().T)


def as_float32(x):
    return np.asarray(x).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_arrays_keep_their_dtype_and_norms_are_float32(tmp_path, dtype):
    tree = {
        "w": jnp.asarray(weights((6, 4)), dtype),
        "norm": jnp.asarray(weights((4,)), dtype),
        "quantized_norm": Uniform(4).quantize(jnp.asarray(weights((4,)), dtype)),
    }
    shapes = {"w": (4, 6), "norm": (4,), "quantized_norm": (4,)}
    like = write_like(tmp_path / "like.gguf", shapes)
    kinds = to_gguf(tmp_path / "out.gguf", tree, like=like)
    wide = {jnp.float32: "F32", jnp.bfloat16: "BF16", jnp.float16: "F16"}[dtype]
    assert kinds == {"w": wide, "norm": "F32", "quantized_norm": "F32"}
    found = read(tmp_path / "out.gguf")
    np.testing.assert_array_equal(found["w"][1], as_float32(tree["w"]).T)
    np.testing.assert_array_equal(found["norm"][1], as_float32(tree["norm"]))
    np.testing.assert_array_equal(
        found["quantized_norm"][1], as_float32(tree["quantized_norm"].dequantize())
    )


def test_missing_tensors_come_from_like(tmp_path):
    rng = np.random.default_rng(0)
    kept = rng.integers(0, 256, (2, 210), dtype=np.uint8)  # two blocks of Q6_K
    like = write_like(
        tmp_path / "like.gguf", {"w": (3, 32)}, k=(kept, gguf.GGMLQuantizationType.Q6_K)
    )
    q = random_array(rng, "Q4_0", 3, 1)
    assert to_gguf(like, {"w": q}, like=like) == {"w": "Q4_0"}  # over itself
    reader = gguf.GGUFReader(like)
    assert bytes(reader.tensors[1].data) == kept.tobytes()
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["tokenizer.ggml.tokens"] == ["a", "ü", "<s>"]
    assert fields["tokenizer.ggml.scores"] == [0.5, -1.0, 2.0]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["general.quantization_version"] == 2
    tree, metadata = from_gguf(like)
    assert {key: metadata[key] for key in metadata} == {
        key: value for key, value in fields.items() if not key.startswith("GGUF.")
    }
    np.testing.assert_array_equal(tree["k"], gguf.dequantize(kept, gguf.GGMLQuantizationType.Q6_K))


@pytest.mark.parametrize(
    ("shape", "transpose", "product"),
    [
        ((64, 3, 5), (1, 2, 0), "i,iab->ab"),  # queries of Flax: [d, heads, size]
        ((2, 32, 6), (2, 0, 1), "ab,abi->i"),  # their way back: [heads, size, d]
        ((6, 64), False, "i,oi->o"),
        ((64, 64), True, "i,io->o"),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_axes_in_any_order_give_the_same_products(tmp_path, shape, transpose, product, stacked):
    operand, _ = product.split("->")
    operand, weight = operand.split(",")
    contracted = [weight.index(axis) for axis in operand]
    rng = np.random.default_rng(1)
    run = max(contracted)  # groups of 32 along the last contracted axis
    extents = [n if i not in contracted else 1 for i, n in enumerate(shape)]
    for axis in contracted:
        extents[axis] = shape[axis] // 32 if axis == run else shape[axis]
    layers = (2,) * stacked
    codes = rng.integers(-8, 8, (*layers, *shape), dtype=np.int8)
    scales = rng.integers(128, 256, (*layers, *extents)).astype(np.float32)
    grid = Grid(jnp.asarray(scales), bits=4, lower=-8, upper=7, group=(run - len(shape), 32))
    q = QArray(jnp.asarray(codes), grid)
    x = rng.integers(-8, 8, [shape[axis] for axis in contracted]).astype(np.float32)
    out = math.prod(shape) // x.size
    names = ["blk.0.x.weight", "blk.1.x.weight"][: 1 + stacked]
    like = write_like(tmp_path / "like.gguf", dict.fromkeys(names, (out, x.size)))
    name = "blk.{}.x.weight" if stacked else names[0]
    to_gguf(tmp_path / "out.gguf", {"w": q}, like=like, names={"w": (name, transpose)})
    found = read(tmp_path / "out.gguf")
    for layer, name in enumerate(names):
        w = np.asarray(q.dequantize())
        wanted = np.einsum(product, x, w[layer] if stacked else w)
        assert found[name][0] == "Q4_0"
        np.testing.assert_array_equal(found[name][1] @ x.ravel(), wanted.ravel())


def rotated(x, interleaved):
    """Rotary embedding of a head's outputs at position 3, which pairs neighbours, or halves."""
    angles = 3 * 10.0 ** -np.arange(x.size // 2)
    a, b = (x[::2], x[1::2]) if interleaved else np.split(x, 2)
    a, b = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
    return np.stack([a, b], 1).ravel() if interleaved else np.concatenate([a, b])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_hugging_face_names_give_the_same_attention(tmp_path, arch, stacked):
    # Each of 4 heads with a key of 2, head size 8; quantized kernels, float biases.
    layer = "layers" if stacked else "layers/0"
    shapes = {"q": (32, 32), "k": (32, 16)}
    params = {}
    for i, (name, shape) in enumerate(shapes.items()):
        head = f"model/{layer}/self_attn/{name}_proj"
        lead = (1,) * stacked
        params[f"{head}/kernel"] = jnp.asarray(weights((*lead, *shape), seed=i))
        params[f"{head}/bias"] = jnp.asarray(weights((*lead, shape[1]), seed=i + 5))
    q = quantize_params(params, {"kernel": Uniform(4, group_size=32, channel_axis=(0, -1) if stacked else -1)})  # fmt: skip
    like = write_like(
        tmp_path / "like.gguf",
        {f"blk.0.attn_{n}.{p}": s for n, (i, o) in shapes.items() for p, s in [("weight", (o, i)), ("bias", (o,))]},
        arch=arch,
    )  # fmt: skip
    kinds = to_gguf(tmp_path / "out.gguf", q, like=like)
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.attn_k.weight"] == "Q4_0"
    found = read(tmp_path / "out.gguf")
    x = weights((32,), seed=9)

    def score(project, interleaved):
        heads = {name: project(name).reshape(-1, 8) for name in shapes}
        return [
            rotated(q, interleaved) @ k
            for q, k in zip(heads["q"], np.repeat(heads["k"], 2, 0), strict=True)
        ]

    def theirs(name):
        return found[f"blk.0.attn_{name}.weight"][1] @ x + found[f"blk.0.attn_{name}.bias"][1]

    def ours(name):
        head = f"model/{layer}/self_attn/{name}_proj"
        w, b = (np.asarray(q[f"{head}/{part}"]) for part in ("kernel", "bias"))
        return x @ (w[0] if stacked else w) + (b[0] if stacked else b)

    # llama.cpp rotates neighbours in a llama, halves in a Qwen2.
    np.testing.assert_allclose(score(theirs, arch == "llama"), score(ours, False), rtol=1e-4)


def test_rows_of_one_block_need_no_groups(tmp_path):
    # A kernel and its transpose with 32 contracted weights, which share a scale without groups.
    w = jnp.asarray(weights((32, 6)))
    like = write_like(tmp_path / "like.gguf", {"a": (6, 32), "b": (6, 32)})
    tree = {
        "a": Uniform(4, group_size=32).quantize(w),
        "b": Uniform(8, channel_axis=0, group_size=32).quantize(w.T),
    }
    assert tree["a"].grid.group is tree["b"].grid.group is None
    kinds = to_gguf(tmp_path / "out.gguf", tree, like=like)
    assert kinds == {"a": "Q4_0", "b": "Q8_0"}
    found = read(tmp_path / "out.gguf")
    np.testing.assert_array_equal(found["a"][1], tree["a"].dequantize().T)
    np.testing.assert_array_equal(found["b"][1], tree["b"].dequantize())


def test_rows_of_queries_are_compared_with_those_of_like(tmp_path):
    w = weights((64, 32))  # 4 heads
    order = np.arange(64).reshape(4, 2, 8).swapaxes(1, 2).ravel()
    path, name = "model/layers/0/self_attn/q_proj/weight", "blk.0.attn_q.weight"
    tree = {path: Uniform(4, channel_axis=0, group_size=32).quantize(jnp.asarray(w))}
    values, other = np.asarray(tree[path].dequantize()), weights((64, 32), seed=1)
    for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0):
        for content, names, wanted in [
            (w[order], None, values[order]),
            (other, None, values[order]),
            (w, None, "like.gguf are in Hugging Face's order"),
            (w[order], {path: name}, "its rows are in Hugging Face's order"),
            (other, {path: name}, values),
            (w, {path: name}, values),
        ]:
            stored = content if kind.name == "F32" else gguf.quantize(content, kind)
            like = write_like(tmp_path / "like.gguf", {}, **{name: (stored, kind)})
            if isinstance(wanted, str):
                with pytest.raises(ValueError, match=wanted):
                    to_gguf(tmp_path / "out.gguf", tree, like=like, names=names)
            else:
                to_gguf(tmp_path / "out.gguf", tree, like=like, names=names)
                np.testing.assert_array_equal(read(tmp_path / "out.gguf")[name][1], wanted)


def test_experts_are_one_tensor(tmp_path):
    """Leaves ``[experts, in, out]``, for one layer and for all layers stacked."""
    for kernels, layer in (((3, 32, 16), "0/"), ((2, 3, 32, 16), "")):
        path = f"model/layers/{layer}mlp/experts/up_proj/kernel"
        channels = (0, -1) if layer else (0, 1, -1)
        q = Uniform(4, channel_axis=channels, group_size=32).quantize(jnp.asarray(weights(kernels)))
        names = [f"blk.{i}.ffn_up_exps.weight" for i in range(1 if layer else 2)]
        like = write_like(
            tmp_path / "like.gguf", dict.fromkeys(names, (3, 16, 32)), arch="qwen2moe"
        )
        kinds = to_gguf(tmp_path / "out.gguf", {path: q}, like=like)
        assert kinds == dict.fromkeys(names, "Q4_0")
        found = read(tmp_path / "out.gguf")
        values = np.asarray(q.dequantize()).reshape(-1, 3, 32, 16)
        for name, value in zip(names, values, strict=True):
            np.testing.assert_array_equal(found[name][1], value.swapaxes(1, 2))


@pytest.mark.parametrize(
    ("arch", "modules"),
    [
        ("llama", "self_attn.q_proj self_attn.o_proj mlp.gate_proj mlp.down_proj input_layernorm post_attention_layernorm block_sparse_moe.gate block_sparse_moe.experts.w1 block_sparse_moe.experts.w2 block_sparse_moe.experts.w3"),
        ("qwen3", "self_attn.q_norm self_attn.k_norm self_attn.k_proj self_attn.v_proj mlp.up_proj"),
        ("qwen2moe", "mlp.gate mlp.experts.gate_proj mlp.experts.up_proj mlp.experts.down_proj mlp.shared_expert_gate mlp.shared_expert.gate_proj mlp.shared_expert.down_proj mlp.shared_expert.up_proj"),
    ],
    ids=lambda x: x.split()[0],
)  # fmt: skip
def test_names_match_the_gguf_package(tmp_path, arch, modules):
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    theirs = gguf.get_tensor_name_map(number, 2)
    for module in ["model.embed_tokens", "model.norm", "lm_head"] + [f"model.layers.1.{m}" for m in modules.split()]:  # fmt: skip
        like = write_like(tmp_path / "like.gguf", {"other": (1, 32)}, arch=arch)
        with GGUFFile(like) as file:
            name, is_theirs = gguf_name(module + ".weight", file)
        assert (name, is_theirs) == (f"{theirs.get_name(module)}.weight", True)


def test_given_names_are_used_unchanged(tmp_path):
    q = random_array(np.random.default_rng(0), "Q4_0", 32, 1)
    like = write_like(tmp_path / "like.gguf", {"blk.0.attn_q.weight": (32, 32)})
    to_gguf(tmp_path / "out.gguf", {"blk": {"0": {"attn_q": {"weight": q}}}}, like=like)
    to_gguf(
        tmp_path / "called.gguf",
        {"model/layers/0/self_attn/q_proj/weight": q, "inv_freq": jnp.ones(4)},
        like=like,
        names=lambda path: "blk.0.attn_q.weight" if "q_proj" in path else None,
    )
    for name in ("out", "called"):
        found = read(tmp_path / f"{name}.gguf")["blk.0.attn_q.weight"][1]
        np.testing.assert_array_equal(found, q.dequantize())


def test_tied_embeddings_stay_tied(tmp_path):
    q = random_array(np.random.default_rng(0), "Q8_0", 7, 2)
    like = write_like(tmp_path / "like.gguf", {"token_embd.weight": (7, 64)})
    tree = {"model": {"embed_tokens": {"embedding": q}}}
    assert to_gguf(tmp_path / "out.gguf", tree, like=like) == {"token_embd.weight": "Q8_0"}
    with pytest.raises(ValueError, match=r"leaf 'lm_head/kernel': .* no tensor 'output.weight'"):
        to_gguf(tmp_path / "out.gguf", {**tree, "lm_head": {"kernel": q}}, like=like)


def scaled(q, factor):
    grid = q.grid
    return QArray(q.qvalue, Grid(grid.scale * factor, bits=4, lower=-8, upper=7, group=grid.group))


W = jnp.asarray(weights((64, 32)))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (lambda: Uniform(4, symmetric=False, group_size=32).quantize(W), r"zero points.*Uniform\(4, g"),
        (lambda: Uniform(8, symmetric=False, group_size=32).quantize(W), r"zero points.*Uniform\(8, g"),
        (lambda: ZScore(R=15).quantize(W), r"zero points.*Uniform\(5, g"),
        (lambda: NormalFloat(4).quantize(W), r"codebook.*Uniform\(4, group_size=32\)"),
        (lambda: Uniform(4, group_size=16).quantize(W), r"groups of 16 along axis -2 in rows of 64.*Uni"),
        (lambda: Uniform(4, group_size=48).quantize(W), "groups of 48 along axis -2 in rows of 64"),
        (lambda: Uniform(4, group_size=32).quantize(W[:48]), "in rows of 48.*fit no type"),
        (lambda: scaled(Uniform(4, group_size=32).quantize(W), 2.0**20), r"\(4 bits\) has a scale of .*float16"),
        (lambda: scaled(Uniform(4, group_size=32).quantize(W), 2.0**-17), "a scale of .*float16"),
        (lambda: scaled(Uniform(4, group_size=32).quantize(W), jnp.nan), "has a scale of nan, since its weights are not finite"),
        (lambda: W.astype(jnp.float8_e4m3fn), "dtype float8_e4m3fn"),
        (lambda: W.astype(jnp.int8), "dtype int8, which weights in GGUF cannot have"),
        (lambda: np.zeros(W.shape), "dtype float64, which weights in GGUF cannot have"),
        (lambda: jnp.ones((3, 32)), r"has shape \(3, 32\), but tensor 'a.w' in .*like.gguf has \(32, 64\); `like` must be the same model"),
        (lambda: jnp.asarray([1.0]), r"shape \(1,\), but"),
    ],
)  # fmt: skip
def test_unsupported_grids_are_named_and_nothing_is_written(tmp_path, leaf, message):
    q = leaf()
    rows = (32, q.shape[0]) if q.shape == (48, 32) else (32, 64)
    like = write_like(tmp_path / "like.gguf", {"a.w": rows})
    with pytest.raises(ValueError, match=f"leaf 'a/w' .*{message}"):
        to_gguf(tmp_path / "out.gguf", {"a": {"w": q}}, like=like)
    assert [path.name for path in tmp_path.iterdir()] == ["like.gguf"]


@pytest.mark.parametrize(
    ("quantizer", "shape", "target", "name"),
    [
        (Uniform(4), (48, 64), (48, 64), "blk.0.w"),
        (Uniform(4, group_size=16), (64, 48), (48, 64), "blk.0.w"),
        (Ternary(), (48, 256), (48, 256), "blk.0.w"),
        (Uniform(5), (2, 48, 64), (48, 64), "blk.{}.w"),
        (Uniform(5, group_size=8), (2, 64, 48), (48, 64), "blk.{}.w"),
    ],
)
def test_the_grid_that_an_error_names_fits(tmp_path, quantizer, shape, target, name):
    like = write_like(tmp_path / "like.gguf", {"blk.0.w": target, "blk.1.w": target})
    w = jnp.asarray(weights(shape))
    out, options = tmp_path / "out.gguf", {"like": like, "names": {"w": name}}
    with pytest.raises(ValueError, match="the nearest grid that fits") as error:
        to_gguf(out, {"w": quantizer.quantize(w)}, **options)
    named = re.search(r"that fits is (.*), or write", str(error.value))[1]
    fitting = eval(named, {"Uniform": Uniform, "Ternary": Ternary})
    assert set(to_gguf(out, {"w": fitting.quantize(w)}, **options).values()) <= {
        "Q4_0",
        "Q5_0",
        "TQ2_0",
    }


def test_other_bad_arguments_are_named(tmp_path):
    like = write_like(tmp_path / "like.gguf", {"w": (32, 32), "blk.0.w": (32, 32)})
    q = Uniform(4, channel_axis=None).quantize(W[:32])
    out = tmp_path / "out.gguf"
    cases = [
        ({"x": q}, {}, "leaf 'x': .* no tensor 'x'; the nearest"),
        ({"x": q, "y": q}, {"names": lambda path: ("w", True)}, "leaves 'x' and 'y' are both tensor 'w'"),
        ({"w": q}, {}, "leaf 'w' .*cannot tell whether"),
        ({"w": q}, {"names": {"w": ("w", (0, 0))}}, "names: leaf 'w' has transpose"),
        ({"w": q}, {"otherwise": "int8"}, "otherwise must be one of float16"),
        ({"w": jnp.ones(())}, {"names": {"w": "blk.{}.w"}}, "leaf 'w' has no leading axis"),
        ({"w": jnp.ones((0, 32, 32))}, {"names": {"w": "blk.{}.w"}}, "leaf 'w' is a stack of 0, but .*'blk.0.w'"),
        ({"w": QArray(q.qvalue - 8, q.grid)}, {"names": {"w": ("w", True)}}, "leaf 'w': codes from"),
    ]  # fmt: skip
    for tree, options, message in cases:
        with pytest.raises(ValueError, match=message):
            to_gguf(out, tree, like=like, **options)
    with pytest.raises(TypeError, match="names: leaf 'w' has 3"):
        to_gguf(out, {"w": q}, like=like, names=lambda path: 3)
    with pytest.raises(TypeError, match="leaf 'w' is traced"):
        jax.jit(lambda q: to_gguf(out, {"w": q}, like=like))(q)
    for leaf in (jax.ShapeDtypeStruct((32, 32), jnp.float32), jax.eval_shape(lambda: q)):
        with pytest.raises(TypeError, match="leaf 'w' is a ShapeDtypeStruct"):
            to_gguf(out, {"w": leaf}, like=like)
    with pytest.raises(TypeError, match=r"leaf 'rngs/key' is a key.*nnx\.Param"):
        to_gguf(out, {"rngs": {"key": jax.random.key(0)}}, like=like)
    with pytest.raises(FileNotFoundError):
        to_gguf(out, {"w": q}, like=tmp_path / "missing.gguf")
    assert not out.exists()


def test_otherwise_writes_unsupported_grids_as_floats(tmp_path):
    affine = Uniform(4, symmetric=False, group_size=32).quantize(W)
    tree = {"affine": affine, "w": Uniform(4, group_size=32).quantize(W)}
    like = write_like(tmp_path / "like.gguf", {"affine": (32, 64), "w": (32, 64)})
    kinds = to_gguf(tmp_path / "out.gguf", tree, like=like, otherwise="float16")
    assert kinds == {"affine": "F16", "w": "Q4_0"}
    found = read(tmp_path / "out.gguf")["affine"][1]
    np.testing.assert_array_equal(found, as_float32(affine.dequantize().T.astype(jnp.float16)))
    large = {"affine": QArray(affine.qvalue, Grid(affine.scale * 1e6, bits=4, lower=-8, upper=7, group=affine.grid.group))}  # fmt: skip
    before = (tmp_path / "out.gguf").read_bytes()
    with pytest.raises(ValueError, match=r"leaf 'affine' has a value of .* beyond float16's"):
        to_gguf(tmp_path / "out.gguf", large, like=like, otherwise="float16")
    assert (tmp_path / "out.gguf").read_bytes() == before
    assert to_gguf(tmp_path / "out.gguf", large, like=like, otherwise="float32")["affine"] == "F32"
    found = read(tmp_path / "out.gguf")["affine"][1]
    np.testing.assert_array_equal(found, large["affine"].dequantize().T)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "TQ2_0", "Q4_1"])
def test_a_file_that_llama_cpp_quantized_is_read_exactly(tmp_path, kind):
    number = gguf.GGMLQuantizationType[kind]
    content = gguf.quantize(weights((4, 512)), number)
    path = write_like(tmp_path / "a.gguf", {}, w=(content, number))
    leaf = from_gguf(path)[0]["w"]
    assert isinstance(leaf, QArray) == (kind != "Q4_1")
    np.testing.assert_array_equal(leaf, gguf.dequantize(content, number))
    if isinstance(leaf, QArray):
        np.testing.assert_array_equal(narrow([leaf])[0].dequantize(), leaf.dequantize())
        to_gguf(tmp_path / "b.gguf", {"w": leaf}, like=path)
        assert bytes(gguf.GGUFReader(tmp_path / "b.gguf").tensors[0].data) == content.tobytes()


def test_training_from_a_q4_0_file_starts_from_its_codes(tmp_path):
    content = gguf.quantize(weights((16, 64)), gguf.GGMLQuantizationType.Q4_0)
    path = write_like(tmp_path / "a.gguf", {}, w=(content, gguf.GGMLQuantizationType.Q4_0))
    tree, _ = from_gguf(path)
    params = dequantize_params(tree)
    tx = optax.chain(optax.sgd(0.0), quantize_weights(Uniform(4, channel_axis=0, group_size=32)))
    state = tx.init(params)
    for _ in range(2):
        grid = state[-1].grid["w"]
        np.testing.assert_array_equal(grid.encode(params["w"]), tree["w"].qvalue)
        updates, state = tx.update({"w": jnp.zeros_like(params["w"])}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], tree["w"].dequantize(), rtol=2.0**-8)


def test_the_fourth_code_of_tq2_0_is_kept(tmp_path):
    content = np.full((1, 66), 255, np.uint8)
    content[0, 64:] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    path = write_like(tmp_path / "a.gguf", {}, w=(content, gguf.GGMLQuantizationType.TQ2_0))
    leaf = from_gguf(path)[0]["w"]
    np.testing.assert_array_equal(leaf.dequantize(), np.ones((1, 256)))
    assert leaf.grid.upper == 2


@hypothesis.given(data=st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("gguf")
    q = random_array(np.random.default_rng(0), "Q4_0", 2, 1)
    like = write_like(folder / "like.gguf", {"w": q.shape, "n": (3,)})
    to_gguf(folder / "a.gguf", {"w": q}, like=like)
    content = bytearray((folder / "a.gguf").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    (folder / "b.gguf").write_bytes(content)
    with contextlib.suppress(ValueError):  # and nothing else
        from_gguf(folder / "b.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"GGUX" + c[4:], "does not begin with 'GGUF'"),
        (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], "version 50331648"),
        (lambda c: c[:24] + struct.pack("<Q", 2**60) + c[32:], "ends within the header"),
        (lambda c: c[:-1], "tensor 'w' has 4095 bytes, but needs 4096"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    path = write_like(tmp_path / "a.gguf", {"w": (32, 32)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"a\.gguf: .*{message}"):
        from_gguf(path)
    with pytest.raises(ValueError, match=r"a\.gguf"):
        to_gguf(tmp_path / "b.gguf", {}, like=path)


def test_without_the_gguf_package_only_other_types_fail(tmp_path, monkeypatch):
    number = gguf.GGMLQuantizationType.Q4_1
    content = gguf.quantize(weights((4, 32)), number)
    path = write_like(tmp_path / "a.gguf", {"w": (2, 3)}, k=(content, number))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    to_gguf(tmp_path / "b.gguf", {"w": jnp.ones((2, 3))}, like=path)
    with pytest.raises(ImportError, match=r"tensor 'k' is Q4_1.*'optax-clipquant\[gguf\]'"):
        from_gguf(tmp_path / "b.gguf")


@pytest.mark.slow
def test_llama_cpp_runs_a_quantized_llama(tmp_path):
    """Next tokens and probabilities of a two-layer llama agree with a forward pass in NumPy."""
    xllamacpp = pytest.importorskip("xllamacpp")
    heads, size, width, words = 4, 16, 64, 96
    shapes = {"token_embd.weight": (words, width), "output_norm.weight": (width,)}
    for layer in range(2):
        block = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width)}
        block |= {"attn_k": (32, width), "attn_v": (32, width), "attn_output": (width, width)}
        block |= {"ffn_gate": (96, width), "ffn_up": (96, width), "ffn_down": (width, 96)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    writer = gguf.GGUFWriter(tmp_path / "like.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(words - 3)]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * words)
    writer.add_token_types([2, 3, 3] + [6] * (words - 3))
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = {
        name: jnp.asarray(weights(shape, seed=i) / (1 if len(shape) == 1 else 8))
        for i, (name, shape) in enumerate(shapes.items())
    }
    q = quantize_params(params, Uniform(8, channel_axis=0, group_size=32))
    assert (
        to_gguf(tmp_path / "q.gguf", q, like=tmp_path / "like.gguf")["token_embd.weight"] == "Q8_0"
    )
    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "q.gguf")
    settings.n_ctx, settings.n_parallel, settings.warmup = 128, 1, False
    prompt = [1, 10, 20, 30, 40, 50]
    answer = xllamacpp.Server(settings).handle_completions(
        {"prompt": prompt, "max_tokens": 1, "temperature": 0, "n_probs": words, "logprobs": words}
    )
    (item,) = answer["choices"][0]["logprobs"]["content"]
    found = {top["id"]: top["logprob"] for top in item["top_logprobs"]}

    w = {name: np.asarray(leaf) for name, leaf in dequantize_params(q).items()}
    angles = np.arange(len(prompt))[:, None] * 1e4 ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * angles)[:, None]

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale

    def rotate(x):
        z = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = w["token_embd.weight"][prompt]
    for layer in range(2):
        b = {name.split(".")[2]: v for name, v in w.items() if name.startswith(f"blk.{layer}.")}
        y = norm(x, b["attn_norm"])
        query, key, value = ((y @ b[f"attn_{n}"].T).reshape(len(prompt), -1, size) for n in "qkv")
        key, value = (np.repeat(part, 2, 1) for part in (rotate(key), value))
        scores = np.einsum("ths,uhs->htu", rotate(query), key) / 4
        scores = np.where(np.tri(len(prompt), dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("htu,uhs->ths", p, value).reshape(len(prompt), -1) @ b["attn_output"].T
        y = norm(x, b["ffn_norm"])
        gate = y @ b["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ b["ffn_up"].T)) @ b["ffn_down"].T
    logits = (norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T)[-1]
    wanted = logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()
    off = [abs(found[token] - wanted[token]) for token in found]
    # llama.cpp rounds activations to 8 bits.
    assert max(off) < 0.1 * np.std(logits)
    assert item["id"] == np.argmax(wanted)
