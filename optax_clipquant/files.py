"""Small files: safetensors with the codes packed at exactly their bits.

``layout.py`` says which tensors hold a tree, ``container.py`` how tensors lie in a file. Beside them, the file's metadata hold the layout's JSON,
with the ``version`` of the format, under ``optax_clipquant``; and under ``optax_clipquant.sha256`` the
digest of all of the header that matters.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from optax_clipquant.container import Reader, Spec, writing
from optax_clipquant.layout import (
    Altered,
    Entry,
    Plan,
    entries_of,
    leaf_of,
)
from optax_clipquant.names import assemble, flatten
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

    The write is atomic: the file is written beside ``path``, synced and renamed, so that a
    crash leaves the old file as it was. A checksum covers every byte that matters.

    Args:
      path: the file, by custom with the ending ``.safetensors``.
      tree: nested dicts, lists, tuples and None; other nodes (an ``nnx.State``, a dataclass) are
        stored as dicts of their children, and restored with ``load(path, like=...)``. Numbers are
        stored as 0-d arrays.
      metadata: text to store beside it, for ``safetensors.safe_open(path, "numpy").metadata()``.

    Raises:
      TypeError: a leaf cannot be stored, or ``metadata`` is not text.
      ValueError: ``metadata`` has a key that this library reserves, or the codes of a leaf do not fit
        their grid.

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
    leaves, nodes = flatten(tree)
    write(path, leaves, leaves.items(), nodes=nodes, metadata=metadata)


def write(
    path: str | os.PathLike[str],
    leaves: Mapping[str, Any],
    contents: Iterable[tuple[str, Any]],
    *,
    nodes: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file leaf by leaf: ``save`` for a tree that need not be in memory.

    Args:
      path: as for ``save``.
      leaves: the leaves by name, or what they will be: see ``Plan``.
      contents: name and value of each leaf, in any order; each is asked for when the one before is
        written.
      nodes: the kinds of the nodes by name.
      metadata: as for ``save``.
    """
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must map text to text, got {key!r}: {value!r}")
        if key in (_HEADER, _DIGEST):
            raise ValueError(f"metadata key {key!r} is reserved; choose another")
    plan = Plan(leaves, nodes)

    def texts() -> dict[str, str]:
        header = {"version": _VERSION, **plan.content()}
        texts = {**(metadata or {}), _HEADER: json.dumps(header, separators=(",", ":"))}
        return texts | {_DIGEST: _digest(texts, plan.specs)}

    with writing(path, plan.specs, texts()) as file:
        for name, leaf in contents:
            for tensor, array in plan.tensors_of(name, leaf).items():
                file.put(tensor, array)
        file.texts = texts()


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
    with Reader(path) as reader:
        file = SavedFile(reader)
        tree = file.rebuild({entry.name: file.leaf(entry) for entry in file.entries})
    if like is not None:
        tree = _fill(like, tree, os.fspath(path))
    return narrow_codes(tree) if narrow else tree


class SavedFile:
    """An open file of ``save``, whose header is checked.

    Attributes:
      entries: its leaves, in the order of names.
      metadata: the text that was given to ``save``.

    Raises:
      ValueError: it was altered, or is not one of ``save``.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader, path = reader, reader.path
        if not is_saved(reader):
            raise ValueError(
                f"{path}: not written by optax_clipquant.save; read it with safetensors.numpy.load_file"
            )
        if _digest(reader.texts, reader.specs) != reader.texts[_DIGEST]:
            raise ValueError(
                f"{path}: the header was altered (its checksum differs); write it again"
            )
        try:
            self._header = json.loads(reader.texts[_HEADER])
            version = self._header["version"]
        except Exception as error:
            raise ValueError(f"{path}: the header is damaged ({error}); write it again") from error
        if version != _VERSION:
            raise ValueError(f"{path}: format version {version}, but this reads {_VERSION}")
        self.entries = self._trying(lambda: entries_of(reader.specs, self._header))
        self.metadata = {k: v for k, v in reader.texts.items() if k not in (_HEADER, _DIGEST)}

    def leaf(self, entry: Entry) -> Any:
        """A leaf, whose checksum is checked."""
        return self._trying(lambda: leaf_of(entry, self._reader.read))

    def rebuild(self, leaves: Mapping[str, Any]) -> PyTree:
        """The tree of all leaves, given by name."""
        return self._trying(lambda: assemble(leaves, self._header["nodes"]))

    def _trying(self, fn: Callable[[], Any]) -> Any:
        path = self._reader.path
        try:
            return fn()
        except OSError:
            raise
        except Altered as error:
            raise ValueError(
                f"{path}: tensor {str(error)!r} was altered (its checksum differs)"
            ) from None
        except Exception as error:
            raise ValueError(
                f"{path}: the header does not describe its tensors ({error}); write it again"
            ) from error


def is_saved(reader: Reader) -> bool:
    """Whether the file says that ``save`` wrote it."""
    return _HEADER in reader.texts and _DIGEST in reader.texts


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


def _digest(texts: Mapping[str, str], specs: Mapping[str, Spec]) -> str:
    content = [
        sorted((key, text) for key, text in texts.items() if key != _DIGEST),
        sorted((name, dtype.name, shape) for name, (dtype, shape) in specs.items()),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
