import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys

import chex
import flax.core
import flax.struct
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers import DTYPED, NAMES, QUANTIZERS, cases, mlp_params, weights

from optax_clipquant import (
    Grid,
    QArray,
    Ternary,
    Uniform,
    ZScore,
    load,
    narrow,
    quantize_params,
    save,
)
from optax_clipquant.formats.packing import pack, unpack
from optax_clipquant.quant.levels import Levels
from optax_clipquant.quant.uses import Calibration, Use, Uses


def assert_same(loaded, tree):
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "model.safetensors"


def small_tree():
    params = mlp_params()
    return quantize_params(params, {"Dense_0": Uniform(bits=3, group_size=5), "Dense_1": Ternary()})


@pytest.mark.parametrize(("name", "dtype"), DTYPED)
def test_round_trip_of_every_quantizer(file, name, dtype):
    tree = {
        "w": QUANTIZERS[name].quantize(jnp.asarray(weights((33, 7))).astype(dtype)),
        "empty": QUANTIZERS[name].quantize(jnp.zeros((0, 7), dtype)),
        "b": jnp.ones(7, dtype),
    }
    save(file, tree)
    assert_same(load(file), tree)


@pytest.mark.parametrize("bits", cases(range(1, 9), [1, 3, 8]))
@pytest.mark.parametrize(
    "kwargs", [{}, {"group_size": 8}, {"channel_axis": None}, {"symmetric": False}], ids=str
)
def test_round_trip_of_every_width(file, bits, kwargs):
    quantizer = Uniform(bits=bits, scale_rule="absmax", **kwargs)  # compiles in a moment
    tree = [
        quantizer.quantize(jnp.asarray(weights(shape))) for shape in [(33, 7), (7,), (3, 3, 9, 2)]
    ]
    save(file, tree)
    assert_same(load(file), tree)


def test_scalars_traced_bounds_and_narrow_codes_round_trip(file):
    tree = {
        "scalar": Uniform(bits=4).quantize(jnp.array(2.5)),
        "traced": jax.jit(lambda w, R: ZScore(R=R).quantize(w))(jnp.asarray(weights((6, 5))), 5),
        "constant": ZScore().quantize(jnp.full((3, 2), 0.3)),
    }
    save(file, narrow(tree))
    assert_same(load(file), tree)
    assert_same(load(file, narrow=True), narrow(tree))


def brute_force(digits: list[int], bits: int) -> bytes:
    stream = sum(digit << (bits * i) for i, digit in enumerate(digits))
    return stream.to_bytes(math.ceil(len(digits) * bits / 8), "little")


@hypothesis.given(bits=st.integers(1, 8), data=st.data())
def test_packing_matches_one_big_integer(bits, data):
    lower = -(2 ** (bits - 1))
    grid = Grid(jnp.ones(()), bits=bits, lower=lower, upper=-lower - 1)
    digits = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    codes = np.array(digits, int) + lower
    packed = pack(codes.astype(np.int8), grid)
    assert packed.tobytes() == brute_force(digits, bits)
    np.testing.assert_array_equal(unpack(packed, len(digits), grid), codes)


@hypothesis.given(st.lists(st.integers(-1, 1), max_size=23))
def test_packing_puts_five_ternary_codes_in_a_byte(codes):
    grid = Grid(jnp.ones(()), bits=math.log2(3), lower=-1, upper=1)
    packed = pack(np.array(codes, np.int8), grid)
    digits = [code + 1 for code in codes] + [0] * (-len(codes) % 5)
    expected = [
        sum(d * 3**j for j, d in enumerate(digits[i : i + 5])) for i in range(0, len(digits), 5)
    ]
    assert packed.tolist() == expected
    np.testing.assert_array_equal(unpack(packed, len(codes), grid), codes)


@pytest.mark.parametrize("bits", [3, 5, 8, math.log2(3)])
def test_packing_across_blocks_matches_one_block(bits):
    upper = 1 if bits == math.log2(3) else 2 ** (bits - 1) - 1
    grid = Grid(jnp.ones(()), bits=bits, lower=-1 if upper == 1 else -upper - 1, upper=upper)
    codes = np.random.default_rng(0).integers(grid.lower, upper + 1, 3_000_001).astype(np.int8)
    np.testing.assert_array_equal(unpack(pack(codes, grid), codes.size, grid), codes)


def test_structure_and_dtypes_are_kept(file):
    tree = {
        "list": [jnp.ones(2), [None, (jnp.zeros((0, 3)),)]],
        "tuple": (jnp.arange(3), ()),
        "empty": {},
        5: {"int": jnp.array(True)},
        "half": [
            jnp.ones(3, jnp.bfloat16),
            jnp.ones(3, jnp.float16),
            jnp.ones(3, jnp.float8_e4m3fn),
        ],
        # jax would make these float32 and int32.
        "wide": [np.array([1 + 2.0**-40]), np.array(2**40)],
        "complex": jnp.ones(2, jnp.complex64),
        "unsigned": jnp.arange(3, dtype=jnp.uint8),
    }
    tree = {k: v for k, v in tree.items() if k != 5} | {"ints": {5: tree[5]}}
    save(file, tree)
    loaded = load(file)
    assert_same(loaded, tree)
    assert isinstance(loaded["wide"][0], np.ndarray)
    assert isinstance(loaded["half"][0], jax.Array)
    save(file, jnp.ones(3))
    assert_same(load(file), jnp.ones(3))
    save(file, None)
    assert load(file) is None


def test_numbers_and_memory_layouts_are_normalised(file):
    fortran = np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3))
    save(
        file,
        {
            "number": 2,
            "fortran": fortran,
            "strided": fortran[:, ::2],
            "big endian": np.arange(3, dtype=">i4"),
        },
    )
    loaded = load(file)
    assert loaded["number"].item() == 2
    np.testing.assert_array_equal(loaded["fortran"], fortran)
    np.testing.assert_array_equal(loaded["strided"], fortran[:, ::2])
    np.testing.assert_array_equal(loaded["big endian"], [0, 1, 2])


def test_tensors_are_aligned(file):
    tree = {"a": jnp.ones(3, jnp.uint8), "b": jnp.ones(5), "c": jnp.ones(1, jnp.bfloat16)}
    save(file, tree | {"q": Uniform(bits=3).quantize(jnp.asarray(weights((5, 3))))})
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    sizes = {"U8": 1, "BF16": 2, "F32": 4}
    header = json.loads(content[8:start])
    assert len(header) == 6
    for name, entry in header.items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0


def test_colliding_names_are_kept_apart(file):
    q = Uniform(bits=4).quantize(jnp.asarray(weights((4, 3))))
    tree = {
        "a/b": jnp.ones(1),
        "a": {"b": jnp.zeros(2)},
        "q": q,
        "~s0": jnp.ones(3),
        "a~1b": jnp.ones(4),
        "": {"": jnp.ones(5)},
        "/": jnp.ones(7),
        "~": jnp.ones(8),
        "~0": [jnp.ones(9), {"0": jnp.ones(10)}],
        "__metadata__": jnp.ones(6),  # safetensors' own
        "_metadata__": jnp.ones(6),
    }
    save(file, tree)
    assert_same(load(file), tree)
    assert_same(load(file, like=tree), tree)


@pytest.mark.parametrize("bits", [1, 3, 4, math.log2(3)])
def test_codes_outside_their_bits_are_refused(file, bits):
    save(file, {"old": jnp.ones(1)})
    for code in (-128, -3, 8, 127):
        grid = Grid(jnp.ones((1,)), bits=bits, lower=-1, upper=1 if bits != 1 else 0)
        with pytest.raises(
            ValueError, match=f"leaf 'a/q': codes from .* do not fit .* -1 to {grid.upper}"
        ):
            save(file, {"a": {"q": QArray(jnp.array([code, 0], jnp.int8), grid)}})
    # The bounds are wider than the bits.
    with pytest.raises(ValueError, match="leaf 'q': codes from 0 to 0 do not fit"):
        save(file, {"q": QArray(jnp.zeros(1, jnp.int8), Grid(jnp.ones((1,)), bits=bits))})
    for wrong in (0, 9, 2.5):
        with pytest.raises(ValueError, match=f"leaf 'q': bits must be .* got {wrong}"):
            save(file, {"q": QArray(jnp.zeros(1, jnp.int8), Grid(jnp.ones((1,)), bits=wrong))})
    with pytest.raises(TypeError, match="leaf 'q' has codes of dtype int32"):
        save(file, {"q": QArray(jnp.array([300]), Grid(jnp.ones((1,))))})
    assert_same(load(file), {"old": jnp.ones(1)})


@pytest.mark.parametrize("scale", [np.nan, np.inf, 3.4e38, 1e-42, -0.0, 0.3])
def test_extreme_scales_round_trip(file, scale):
    grid = Grid(jnp.full((1,), scale, jnp.float32), bits=4, lower=-8, upper=7)
    tree = {"q": QArray(jnp.array([3], jnp.int8), grid)}
    save(file, tree)
    assert_same(load(file), tree)


@flax.struct.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array | None


Pair = collections.namedtuple("Pair", ["first", "second"])


def test_custom_nodes_are_restored_by_like(file):
    q = Uniform(bits=4).quantize(jnp.asarray(weights((4, 3))))
    tree = {"layer": Layer(q, None), "pair": Pair(jnp.ones(2), jnp.zeros(1))}
    save(file, tree)
    assert load(file)["layer"].keys() == {"kernel", "bias"}
    like = {
        "layer": Layer(jax.ShapeDtypeStruct((4, 3), jnp.float32), None),
        "pair": Pair(jnp.zeros(2), jnp.zeros(1)),
    }
    assert_same(load(file, like=like), tree)
    assert_same(load(file, like=tree), tree)
    frozen = flax.core.freeze(small_tree())
    save(file, frozen)
    assert_same(load(file, like=flax.core.freeze(mlp_params())), frozen)


@jax.tree_util.register_pytree_with_keys_class
class OddKeys:
    def __init__(self, x):
        self.x = x

    def tree_flatten_with_keys(self):
        return (("odd", self.x),), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_nodes_with_custom_keys_are_restored(file):
    tree = {"node": OddKeys(jnp.ones(2))}
    save(file, tree)
    assert_same(load(file), {"node": {"odd": jnp.ones(2)}})
    assert_same(load(file, like=tree), tree)


def test_boxes_are_matched_with_and_without_value(file):
    bare, boxed = jnp.ones((2, 3)), nnx.Param(jnp.zeros((2, 3)))
    for tree, like in [(bare, boxed), ({"w": bare}, {"w": boxed})]:
        save(file, tree)
        assert_same(load(file, like=like), jax.tree.map(jnp.ones_like, like))
        save(file, like)
        assert_same(load(file, like=tree), jax.tree.map(jnp.zeros_like, tree))


def test_nnx_state_round_trips(file):
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    qstate = quantize_params(state, Uniform(bits=4))
    save(file, qstate)
    loaded = load(file, like=state)
    assert isinstance(loaded, nnx.State)
    x = jnp.asarray(weights((2, 6)))
    with jax.numpy_rank_promotion("allow"):
        chex.assert_trees_all_equal(nnx.merge(graphdef, loaded)(x), nnx.merge(graphdef, qstate)(x))


def test_mismatched_like_is_refused(file):
    save(file, small_tree())
    like = mlp_params()
    like["Dense_0"]["kernel"] = jnp.ones((12, 11))
    with pytest.raises(
        ValueError,
        match=r"model.safetensors: leaf 'Dense_0/kernel' has shape \(12, 10\), but \(12, 11\)",
    ):
        load(file, like=like)
    with pytest.raises(ValueError, match=r"model.safetensors: no leaf 'Dense_2'"):
        load(file, like=mlp_params() | {"Dense_2": jnp.ones(1)})
    with pytest.raises(ValueError, match="leaves that `like` lacks"):
        load(file, like={"Dense_0": mlp_params()["Dense_0"]})


def assert_size_is_near_the_ideal(file, tree):
    save(file, tree)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QArray))
    ideal = 0
    for leaf in leaves:
        if isinstance(leaf, QArray):
            codes = (
                math.ceil(leaf.size / 5)
                if leaf.bits == math.log2(3)
                else math.ceil(leaf.size * leaf.bits / 8)
            )
            ideal += codes + 2 * leaf.scale.size
        else:
            ideal += leaf.nbytes
    assert file.stat().st_size <= 1.01 * ideal + 8192 + 300 * len(leaves)


@pytest.mark.parametrize("name", NAMES)
def test_size_is_near_the_ideal(file, name):
    tree = {
        f"layer_{i}": {"kernel": jnp.asarray(weights((256, 96), seed=i)), "bias": jnp.ones(96)}
        for i in range(8)
    }
    assert_size_is_near_the_ideal(file, quantize_params(tree, QUANTIZERS[name]))


@pytest.mark.parametrize("length", [20, 80, 160])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("split", [True, False], ids=["nested", "flat"])
def test_header_of_many_small_leaves_is_small(file, length, symmetric, split):
    """With 500 leaves the allowance of 8 KB is 16 bytes each, so that this measures the header."""
    w = jnp.asarray(weights((64, 32)))
    q = jax.jit(Uniform(bits=4, symmetric=symmetric).quantize)(w)
    # A path is written once; the allowance covers 100 characters of it.
    tree = {}
    for i in range(500):
        path = f"model/layers_{i}/attention/".ljust(length - 6, "x").replace("xxxxx", "x/xxx")
        *parents, last = path.split("/") if split else [path]
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = {"kernel": q}
    if symmetric and length <= 100:
        assert_size_is_near_the_ideal(file, tree)
    else:
        save(file, tree)
    size = file.stat().st_size
    content = 500 * (q.nbytes_packed)
    assert size - content <= 8192 + 500 * (178 + length + 85 * (not symmetric))


def test_stored_dtypes_and_metadata(file):
    save(
        file,
        small_tree() | {"z": ZScore().quantize(jnp.full((3, 2), 0.3))},
        metadata={"author": "me"},
    )
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata()["author"] == "me"
        assert json.loads(opened.metadata()["optax_clipquant"])["version"] == 1
    tensors = safetensors.numpy.load_file(file)
    assert tensors["Dense_0/kernel"].dtype == np.uint8
    assert tensors["Dense_0/kernel"].shape == (12 * 10 * 3 // 8,)
    assert tensors["~s0"].dtype == ml_dtypes.bfloat16
    assert tensors["~s0"].shape == (3, 10)
    assert tensors["Dense_1/kernel"].shape == (10 * 4 // 5,)
    assert tensors["~s2"].dtype == np.float32  # 0.3 is no bfloat16
    with pytest.raises(TypeError, match="metadata must map text to text"):
        save(file, {}, metadata={"a": 1})
    with pytest.raises(ValueError, match="reserved"):
        save(file, {}, metadata={"optax_clipquant": ""})


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("text", "leaf 'a/b' is a str"),
        (object(), "leaf 'a/b' is a object"),
        (jax.random.key(0), "leaf 'a/b' is a PRNG key; store jax.random.key_data"),
        (jnp.ones(2, jnp.int4), "leaf 'a/b' has dtype int4"),
        (jnp.ones(2, jnp.float8_e4m3b11fnuz), "leaf 'a/b' has dtype float8_e4m3b11fnuz"),
        (np.array(["x"]), "leaf 'a/b' has dtype"),
    ],
)
def test_leaves_that_cannot_be_stored(file, leaf, message):
    save(file, {"old": jnp.ones(1)})
    with pytest.raises(TypeError, match=re.escape(message)):
        save(file, {"a": {"b": leaf}})
    assert_same(load(file), {"old": jnp.ones(1)})
    assert os.listdir(file.parent) == [file.name]


def test_save_under_jit_is_refused(file):
    with pytest.raises(TypeError, match="leaf 'x' is traced; call save outside"):
        jax.jit(lambda x: save(file, {"x": x}))(jnp.ones(2))


def test_leaves_without_values_are_refused(file):
    w = jnp.ones((4, 4))
    for leaf in (w, Uniform(4).quantize(w)):
        with pytest.raises(TypeError, match="leaf 'x' is a ShapeDtypeStruct"):
            save(file, {"x": jax.eval_shape(lambda leaf=leaf: leaf)})
    assert not file.exists()


def test_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save(tmp_path / "none" / "model.safetensors", {})


def test_every_truncation_is_found(file):
    save(file, small_tree())
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model.safetensors: "):
            load(file)
    file.write_bytes(content + b"x")
    with pytest.raises(ValueError, match=r"model.safetensors: "):
        load(file)


def test_every_altered_byte_is_found_or_harmless(file):
    tree = small_tree()
    save(file, tree)
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    found = 0
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= int(rng.integers(1, 256))
        file.write_bytes(altered)
        try:
            loaded = load(file)
        except ValueError as error:
            assert "model.safetensors: " in str(error)  # noqa: PT017
            found += 1
        else:
            assert_same(loaded, tree)
    # Only the padding of the header is harmless.
    assert found > len(content) - 16


def test_altered_tensor_is_named(file):
    save(file, {"kernel": jnp.ones((64, 64))})
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="tensor 'kernel' was altered"):
        load(file)


def test_foreign_files_are_refused(file):
    safetensors.numpy.save_file({"w": np.ones(3)}, file)
    with pytest.raises(ValueError, match=r"model.safetensors: not written by optax_clipquant"):
        load(file)
    for content in (b"", b"{}", b"not a file" * 100, b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file"):
            load(file)


def test_oversized_metadata_is_refused(file):
    with pytest.raises(ValueError, match="shorten the metadata"):
        save(file, {"w": jnp.ones(2)}, metadata={"text": "x" * 100_000_001})
    assert not file.exists()


def test_folder_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        load(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        *("[]", "{", "null", "[" * 100_000 + "]" * 100_000),
        *('{"version":1}', '{"version":1,"leaves":[]}', '{"version":2,"leaves":[]}'),
    ],
    ids=lambda header: header[:24],
)
def test_invalid_headers_with_a_valid_digest_are_refused(file, header):
    save(file, {"w": jnp.ones(2)})
    with safetensors.safe_open(file, "numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    texts = {"optax_clipquant": header}
    layout = sorted((name, t.dtype.name, t.shape) for name, t in tensors.items())
    content = json.dumps([sorted(texts.items()), layout])
    texts["optax_clipquant.sha256"] = hashlib.sha256(content.encode()).hexdigest()
    safetensors.numpy.save_file(tensors, file, texts)
    with pytest.raises(
        ValueError,
        match=r"model.safetensors: (the header is|the header does not describe|format version)",
    ):
        load(file)


@pytest.mark.parametrize(
    "edit",
    [
        *({"leaves": []}, {"leaves": [1, 2]}, {"leaves": ["x"]}, {"leaves": [[1]]}, {"leaves": 5}),
        *(
            {"leaves": [[1, 0, [2]]]},
            {"nodes": []},
            {"nodes": {"~": "list"}},
            {"nodes": {"~": "int"}},
        ),
    ],
    ids=str,
)
def test_trees_that_do_not_describe_the_tensors_are_refused(file, edit):
    save(file, {"w": jnp.ones(2)})
    with safetensors.safe_open(file, "numpy") as opened:
        texts = opened.metadata()
    texts["optax_clipquant"] = json.dumps(json.loads(texts["optax_clipquant"]) | edit)
    content = json.dumps([[["optax_clipquant", texts["optax_clipquant"]]], [["w", "float32", [2]]]])
    texts["optax_clipquant.sha256"] = hashlib.sha256(content.encode()).hexdigest()
    safetensors.numpy.save_file({"w": np.ones(2, np.float32)}, file, texts)
    with pytest.raises(ValueError, match=r"model.safetensors: the header does not describe"):
        load(file)


def test_failed_write_keeps_the_old_file(file, monkeypatch):
    save(file, {"old": jnp.ones(1)})

    def fail(*args):
        raise OSError("disk full")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                save(file, small_tree())
        assert os.listdir(file.parent) == [file.name]
        assert_same(load(file), {"old": jnp.ones(1)})


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from optax_clipquant import save
from optax_clipquant.formats import safetensors as container
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "write":
    container.Writer.finish = die
else:
    setattr(os, sys.argv[2], die)
save(sys.argv[1], {"new": jnp.ones(1000)})
"""


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_killed_write_keeps_the_old_file(file, moment):
    save(file, {"old": jnp.ones(1)})
    process = subprocess.run([sys.executable, "-c", KILLED, file, moment], check=False)
    assert process.returncode == -signal.SIGKILL
    assert_same(load(file), {"old": jnp.ones(1)})


def test_new_file_has_default_permissions(file):
    save(file, {})
    other = file.with_suffix(".other")
    other.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


@pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 host devices")
def test_sharded_leaves_are_saved(file):
    mesh = jax.make_mesh((8,), ("x",), devices=jax.devices("cpu")[:8])
    w = jax.device_put(weights((16, 8)), jax.NamedSharding(mesh, jax.P("x", None)))
    with jax.set_mesh(mesh):
        q = Uniform(bits=4).quantize(w)
        save(file, {"q": q, "w": w})
    loaded = load(file)
    np.testing.assert_array_equal(loaded["w"], np.asarray(w))
    np.testing.assert_array_equal(loaded["q"].qvalue, np.asarray(q.qvalue))


def test_static_fields_are_restored(file):
    # Binary has an offset.
    tree = small_tree() | {"binary": QUANTIZERS["binary"].quantize(jnp.asarray(weights((33, 7))))}
    save(file, tree)
    for loaded, q in zip(
        *(jax.tree.leaves(t, is_leaf=lambda x: isinstance(x, QArray)) for t in (load(file), tree)),
        strict=True,
    ):
        if isinstance(q, QArray):
            for field in dataclasses.fields(Levels):
                assert getattr(loaded.grid, field.name) == getattr(q.grid, field.name)


def test_pipes_and_folders_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        save(tmp_path / "pipe", {"w": jnp.ones(2)})
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        save(tmp_path, {"w": jnp.ones(2)})
    assert os.listdir(tmp_path) == ["pipe"]


def test_calibration_is_restored(file):
    uses = {"a/b": Use({"dot"}, {0}, others=[{1}]), "c": Use({"lookup"}, lookup={0}, adapter=True)}
    moments = {"a/b": jnp.asarray(weights((4, 1)))}
    save(file, Calibration(Uses(uses, {"a/b": (4, 3)}), moments), metadata={"note": "x"})
    loaded = load(file)
    assert isinstance(loaded, Calibration)
    assert dict(loaded.uses) == uses
    assert loaded.uses.shapes == {"a/b": (4, 3)}
    assert_same(dict(loaded.moments), moments)


def test_functions_of_a_module_name_the_way_out(file):
    """They are leaves of an Equinox module, which is neither saved nor restored whole."""
    save(file, {"w": jnp.ones(3), "activation": None})
    whole = {"w": jnp.ones(3), "activation": jax.nn.relu}
    with pytest.raises(TypeError, match=r"'activation'.*eqx.filter"):
        save(file, whole)
    with pytest.raises(ValueError, match=r"'activation' of `like` is a function.*eqx.filter"):
        load(file, like=whole)
