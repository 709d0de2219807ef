"""Small files: safetensors with the codes packed at exactly their bits.

``layout.py`` says which tensors hold a tree. Beside them, the file's metadata hold the layout's JSON,
with the ``version`` of the format, under ``optax_clipquant``; and under ``optax_clipquant.sha256`` the
digest of all of the header that matters.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from optax_clipquant.layout import Altered, Tensors, describe, rebuild
from optax_clipquant.params import PyTree
from optax_clipquant.paths import path_of
from optax_clipquant.qarray import is_qarray
from optax_clipquant.qarray import narrow as narrow_codes

_HEADER = "optax_clipquant"
_DIGEST = "optax_clipquant.sha256"
_VERSION = 1


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
      >>> import jax.numpy as jnp
      >>> from optax_clipquant import Uniform, quantize_params
      >>> qparams = quantize_params({"kernel": jnp.ones((64, 64))}, Uniform(bits=3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/model.safetensors", qparams)
      ...     os.path.getsize(folder + "/model.safetensors")
      2040
    """
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must map text to text, got {key!r}: {value!r}")
        if key in (_HEADER, _DIGEST):
            raise ValueError(f"metadata key {key!r} is reserved; choose another")
    tensors, content = describe(tree)
    header = {"version": _VERSION, **content}
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
      >>> import jax.numpy as jnp
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
        tree = rebuild(tensors, header)
    except Altered as error:
        raise ValueError(
            f"{path}: tensor {str(error)!r} was altered (its checksum differs)"
        ) from None
    except Exception as error:
        raise ValueError(
            f"{path}: the header does not describe its tensors ({error}); write it again"
        ) from error
    if like is not None:
        tree = _fill(like, tree, path)
    return narrow_codes(tree) if narrow else tree


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


def _read(path: str) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file and our header, which is checked."""
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
    except Exception as error:
        raise ValueError(f"{path}: the header is damaged ({error}); write it again") from error
    if version != _VERSION:
        raise ValueError(f"{path}: format version {version}, but this reads {_VERSION}")
    return tensors, header


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
