"""Small files: safetensors with the codes packed at exactly their bits.

A leaf at path ``P`` (keys joined by ``/``) is stored as

* an array: the tensor ``P``, as it is;
* a ``QArray``: ``P:q``, its packed codes (``packing.py``), as bytes; ``P:s``, its scales, as bfloat16 where that loses
  nothing and else as float32; and where there is one, ``P:z``, its zero point, and ``P:m``, its bound
  on codes.

The metadata hold, as JSON under ``optax_clipquant``, the tree and the CRC-32 of each tensor, and under
``optax_clipquant.sha256`` the digest of all of the header that matters.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jax.core import Tracer

from optax_clipquant.grids import Grid
from optax_clipquant.packing import pack, unpack
from optax_clipquant.params import PyTree, path_of
from optax_clipquant.qarray import QArray, is_qarray
from optax_clipquant.qarray import narrow as narrow_codes

_HEADER = "optax_clipquant"
_DIGEST = "optax_clipquant.sha256"
_VERSION = 1
_STORED = {
    np.dtype(t)
    for t in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64"),
        ml_dtypes.bfloat16,
    )
}
_CODES = {np.dtype(t) for t in (np.int8, ml_dtypes.int4, ml_dtypes.int2)}


def save(
    path: str | os.PathLike[str], tree: PyTree, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a tree of arrays and ``QArray`` leaves to a safetensors file.

    The file is complete or not there: it is written beside ``path``, synced and renamed, so that a
    crash leaves the old file as it was. A checksum covers every byte that matters.

    Args:
      path: the file, by custom with the ending ``.safetensors``.
      tree: nested dicts, lists, tuples and None; other nodes (an ``nnx.State``, a dataclass) are
        stored as dicts of their children, and restored with ``load(path, like=...)``. Numbers are
        stored as 0-d arrays.
      metadata: text to store beside it, for ``safetensors.safe_open(path, "numpy").metadata()``.

    Raises:
      TypeError: a leaf cannot be stored, or ``metadata`` is not text.
      ValueError: ``metadata`` has a key of ours, or the codes of a leaf do not fit their grid.

    Examples:
      >>> import tempfile
      >>> from optax_clipquant import Uniform, quantize_params
      >>> qparams = quantize_params({"kernel": jnp.ones((64, 64))}, Uniform(bits=3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/model.safetensors", qparams)
      ...     os.path.getsize(folder + "/model.safetensors")
      2072
    """
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must map text to text, got {key!r}: {value!r}")
        if key in (_HEADER, _DIGEST):
            raise ValueError(f"metadata key {key!r} is reserved; choose another")
    tensors: dict[str, np.ndarray] = {}
    spec = _describe(tree, "", tensors)
    checksums = {name: _crc32(tensor) for name, tensor in tensors.items()}
    header = {"version": _VERSION, "tree": spec, "crc32": [checksums[n] for n in sorted(checksums)]}
    texts = {**(metadata or {}), _HEADER: json.dumps(header, separators=(",", ":"))}
    texts[_DIGEST] = _digest(texts, {name: (t.dtype, t.shape) for name, t in tensors.items()})
    with _replacing(os.fspath(path)) as temporary:
        safetensors.numpy.save_file(tensors, temporary, texts)


def load(path: str | os.PathLike[str], *, like: PyTree = None, narrow: bool = False) -> PyTree:
    """Reads a tree that ``save`` wrote, exactly.

    Args:
      path: the file.
      like: a tree of the structure to restore (an ``nnx.State``, a ``FrozenDict``, a dataclass), whose
        leaves have the shapes expected: arrays, ``jax.ShapeDtypeStruct`` or ``QArray``. Leaves are
        matched by their paths. Without it, what ``save`` stored as dicts stays dicts.
      narrow: whether codes come as int4 or int2 where they fit: see ``narrow``.

    Returns:
      The tree. Arrays are ``jax.Array``, but those of a dtype that jax would cut (float64 without
      x64) stay NumPy arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, altered, or not one of ``save``; or it does not fit ``like``.
        The message names the file, and the tensor or leaf.

    Examples:
      >>> import tempfile
      >>> from optax_clipquant import Uniform, quantize_params
      >>> qparams = quantize_params({"kernel": jnp.ones((8, 2))}, Uniform(bits=4))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/model.safetensors", qparams)
      ...     load(folder + "/model.safetensors")["kernel"].dequantize().sum()
      Array(16., dtype=float32)
    """
    path = os.fspath(path)
    tensors, header = _read(path)
    try:
        tree = _rebuild(header["tree"], "", tensors)
    except Exception as error:
        raise ValueError(
            f"{path}: the header does not describe its tensors ({error}); write it again"
        ) from error
    if like is not None:
        tree = _fill(like, tree, path)
    return narrow_codes(tree) if narrow else tree


def _describe(tree: PyTree, path: str, tensors: dict[str, np.ndarray]) -> Any:
    """The structure of ``tree`` as JSON, whose leaves name what they add to ``tensors``."""
    if tree is None:
        return None
    if is_qarray(tree):
        return {"q": _add_qarray(tree, path, tensors)}
    if type(tree) in (list, tuple):
        kind = "l" if type(tree) is list else "t"
        return {kind: [_describe(x, _join(path, i), tensors) for i, x in enumerate(tree)]}
    children = _children(tree)
    if children is None:
        return {"a": _add_array(_host(tree, path), path, tensors)}
    for key, _ in children:
        if type(key) not in (str, int):
            raise TypeError(f"{path or 'the tree'}: keys must be text or integers, got {key!r}")
    return {"d": [[key, _describe(child, _join(path, key), tensors)] for key, child in children]}


def _children(tree: PyTree) -> list[tuple[Any, PyTree]] | None:
    """Key and value of each child of a node, None for a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(flat) == 1 and not flat[0][0]:
        return None
    # A node without children has no key to show; None among children is one.
    names = ("key", "idx", "name")
    return [
        (next((getattr(path[0], n) for n in names if hasattr(path[0], n)), str(path[0])), child)
        for path, child in flat
    ]


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


_PARTS = (":q", ":s", ":z", ":m")


def _free_name(path: str, tensors: dict[str, np.ndarray]) -> str:
    """``path``, or where keys that hold a slash or a colon have taken it, a name like it."""
    name = path
    # safetensors would write a tensor of that name without complaint, and then not read the file.
    while name == "__metadata__" or any(name + part in tensors for part in ("", *_PARTS)):
        name += "'"
    return name


def _add_array(array: np.ndarray, path: str, tensors: dict[str, np.ndarray]) -> Any:
    name = _free_name(path, tensors)
    tensors[name] = np.ascontiguousarray(array).reshape(array.shape)
    return 0 if name == path else name


def _add_qarray(q: QArray, path: str, tensors: dict[str, np.ndarray]) -> list[Any]:
    grid, name = q.grid, _free_name(path, tensors)
    codes = _host(q.qvalue, path, codes=True)
    _check_codes(codes, grid, path)
    tensors[f"{name}:q"] = pack(codes, grid)
    scale = _host(grid.scale, path).astype(np.float32)
    short = scale.astype(ml_dtypes.bfloat16)
    exact = np.array_equal(short.astype(np.float32), scale, equal_nan=True)
    tensors[f"{name}:s"] = short if exact else scale
    if grid.zero_point is not None:
        tensors[f"{name}:z"] = _host(grid.zero_point, path)
    if grid.max_code is not None:
        tensors[f"{name}:m"] = _host(grid.max_code, path)
    kinds = "z" * (grid.zero_point is not None) + "m" * (grid.max_code is not None)
    bits = 0 if grid.bits == math.log2(3) else grid.bits
    group = 0 if grid.group is None else list(grid.group)
    static = [bits, grid.lower, grid.upper, grid.offset, group, grid.dtype.name, list(q.shape)]
    return [*static, kinds, 0 if name == path else name]


def _check_codes(codes: np.ndarray, grid: Grid, path: str) -> None:
    """Raises where packing would cut codes: only a ``QArray`` made by hand can hold such."""
    if grid.bits != math.log2(3) and grid.bits not in range(1, 9):
        raise ValueError(f"leaf {path!r}: bits must be 1 to 8 or log2(3), got {grid.bits}")
    levels = 3 if grid.bits == math.log2(3) else 2 ** int(grid.bits)
    upper = min(grid.upper, grid.lower + levels - 1)
    if codes.size and not (grid.lower <= codes.min() and codes.max() <= upper):
        raise ValueError(
            f"leaf {path!r}: codes from {codes.min()} to {codes.max()} do not fit its grid, which has "
            f"room for {grid.lower} to {upper}; correct the grid's bits, lower and upper"
        )


def _host(leaf: Any, path: str, *, codes: bool = False) -> np.ndarray:
    """``leaf`` as an array that safetensors can hold."""
    where = f"leaf {path!r}" if path else "the tree"
    if isinstance(leaf, Tracer):
        raise TypeError(f"{where} is traced; call save outside jax.jit")
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where} is a PRNG key; store jax.random.key_data of it")
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
        raise TypeError(
            f"{where} is a {type(leaf).__name__}; only arrays and numbers can be stored"
        )
    array = np.asarray(leaf)
    if codes:
        if array.dtype not in _CODES:
            raise TypeError(f"{where} has codes of dtype {array.dtype}; cast them to int8")
        return array.astype(np.int8)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in _STORED:
        raise TypeError(f"{where} has dtype {array.dtype}, which a file cannot hold; cast it first")
    return array


def _rebuild(spec: Any, path: str, tensors: dict[str, np.ndarray]) -> PyTree:
    """The tree that ``_describe`` described."""
    if spec is None:
        return None
    ((kind, content),) = spec.items()
    if kind == "a":
        return _device(tensors[content or path])
    if kind == "q":
        return _rebuild_qarray(content, path, tensors)
    if kind == "d":
        return {key: _rebuild(child, _join(path, key), tensors) for key, child in content}
    children = [_rebuild(child, _join(path, i), tensors) for i, child in enumerate(content)]
    return {"l": list, "t": tuple}[kind](children)


def _rebuild_qarray(content: list[Any], path: str, tensors: dict[str, np.ndarray]) -> QArray:
    bits, lower, upper, offset, group, dtype, shape, kinds, name = content
    name = name or path
    grid = Grid(
        scale=_device(tensors[f"{name}:s"].astype(np.float32)),
        zero_point=_device(tensors[f"{name}:z"]) if "z" in kinds else None,
        max_code=_device(tensors[f"{name}:m"]) if "m" in kinds else None,
        offset=offset,
        bits=bits or math.log2(3),
        lower=lower,
        upper=upper,
        group=tuple(group) if group else None,
        dtype=jnp.dtype(dtype),
    )
    codes = unpack(tensors[f"{name}:q"], math.prod(shape), grid)
    return QArray(jnp.asarray(codes.reshape(shape)), grid)


def _device(array: np.ndarray) -> Any:
    """As a jax array, but where jax would cut it."""
    return (
        array if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype else jnp.asarray(array)
    )


def _fill(like: PyTree, tree: PyTree, file: str) -> PyTree:
    """``like`` with the leaves of ``tree``, matched by path."""
    expected, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_qarray)
    found = {
        _parts(key): leaf
        for key, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qarray)[0]
    }
    leaves = []
    for key, leaf in expected:
        path, parts = path_of(key), _parts(key)
        if parts not in found:
            raise ValueError(
                f"{file}: no leaf {path!r}, which `like` has; left to match are {_some(found)}"
            )
        shape = np.shape(found[parts])
        if shape != np.shape(leaf):
            raise ValueError(
                f"{file}: leaf {path!r} has shape {shape}, but {np.shape(leaf)} in `like`"
            )
        leaves.append(found.pop(parts))
    if found:
        raise ValueError(f"{file}: has leaves that `like` lacks: {_some(found)}")
    return treedef.unflatten(leaves)


def _parts(key: jax.tree_util.KeyPath) -> tuple[str, ...]:
    """A path as the text of its keys, without a box's ``value``, as ``path_of`` has it.

    Not joined: Haiku's keys hold slashes, and ``{"a/b": x}`` is not ``{"a": {"b": x}}``.
    """
    parts = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in key)
    return parts[:-1] if parts[-1:] == ("value",) else parts


def _some(found: Mapping[tuple[str, ...], Any]) -> list[str]:
    return ["/".join(parts) for parts in list(found)[:8]]


def _read(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file and our header, both checked."""
    with open(path, "rb"):  # the errors of the file system, which safetensors would hide
        pass
    try:
        with safetensors.safe_open(path, "numpy") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(
            f"{path}: truncated, altered, or not a safetensors file ({error})"
        ) from error
    if _HEADER not in texts or _DIGEST not in texts:
        raise ValueError(
            f"{path}: not written by optax_clipquant.save; read it with safetensors.numpy.load_file"
        )
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if _digest(texts, layout) != texts[_DIGEST]:
        raise ValueError(f"{path}: the header was altered (its checksum differs); write it again")
    try:
        header = json.loads(texts[_HEADER])
        version = header["version"]
        checksums = dict(zip(sorted(tensors), header["crc32"], strict=version == _VERSION))
    except Exception as error:
        raise ValueError(f"{path}: the header is damaged ({error}); write it again") from error
    if version != _VERSION:
        raise ValueError(f"{path}: format version {version}, but this reads {_VERSION}")
    for name, checksum in checksums.items():
        if _crc32(tensors[name]) != checksum:
            raise ValueError(f"{path}: tensor {name!r} was altered (its checksum differs)")
    return tensors, header


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _digest(
    texts: Mapping[str, str], layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
) -> str:
    content = [
        sorted((key, text) for key, text in texts.items() if key != _DIGEST),
        sorted((name, dtype.name, shape) for name, (dtype, shape) in layout.items()),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """A file to write in the folder of ``path``, which takes its place once it is whole and synced."""
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: there is no folder {folder}")
    temporary = os.path.join(folder, f".{name[:32]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb"):  # safetensors gives its files to their owner alone
            mode = os.stat(temporary).st_mode
        yield temporary
        os.chmod(temporary, mode)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
