"""Files of ``save``, a leaf at a time and without JAX: safetensors with the codes packed at exactly their bits.

``layout.py`` says which tensors hold a tree, ``container.py`` how tensors lie in a file. Beside them, the
file's metadata hold the layout's JSON, with the ``version`` of the format, under ``optax_clipquant``; and
under ``optax_clipquant.sha256`` the digest of all of the header that matters.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from optax_clipquant.formats.layout import Entry, Leaf, Plan, entries_of
from optax_clipquant.formats.safetensors import Reader, Spec, bytes_of, writing

_HEADER = "optax_clipquant"
_DIGEST = "optax_clipquant.sha256"
_VERSION = 1

Tensors = dict[str, np.ndarray]
"""The tensors of a leaf, by kind: see ``Leaf``."""
Parts = Iterable[tuple[str, Iterable[np.ndarray]]]
"""The tensors of a leaf, by kind and in the order of kinds, each in pieces."""


def write(
    path: str | os.PathLike[str],
    leaves: Mapping[str, Leaf],
    contents: Iterable[tuple[str, Parts]],
    *,
    nodes: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file leaf by leaf: ``save`` for a tree that need not be in memory.

    Args:
      path: as for ``save``.
      leaves: what the file will hold, by name.
      contents: name and tensors of each leaf, in any order; each is asked for when the one before is
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
        for name, parts in contents:
            checksum = 0
            for kind, pieces in parts:
                for piece in file.putting(plan.entries[name].tensors[kind], pieces):
                    checksum = zlib.crc32(piece, checksum)
            plan.note(name, checksum)
        file.texts = texts()


class SavedFile:
    """An open file of ``save``, whose header is checked.

    Attributes:
      path: the file.
      entries: its leaves, in the order of names.
      nodes: the kinds of the nodes by name.
      metadata: the text that was given to ``save``.

    Raises:
      ValueError: it was altered, or is not one of ``save``.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader, self.path = reader, reader.path
        if not is_saved(reader):
            raise ValueError(
                f"{self.path}: not written by optax_clipquant.save; read it with safetensors.numpy.load_file"
            )
        if _digest(reader.texts, reader.specs) != reader.texts[_DIGEST]:
            raise ValueError(
                f"{self.path}: the header was altered (its checksum differs); write it again"
            )
        try:
            header = json.loads(reader.texts[_HEADER])
            version = header["version"]
        except Exception as error:
            raise ValueError(
                f"{self.path}: the header is damaged ({error}); write it again"
            ) from error
        if version != _VERSION:
            raise ValueError(f"{self.path}: format version {version}, but this reads {_VERSION}")
        with self.describing():
            self.entries = entries_of(reader.specs, header)
            self.nodes: dict[str, str] = header["nodes"]
        self.metadata = {k: v for k, v in reader.texts.items() if k not in (_HEADER, _DIGEST)}

    def read(self, entry: Entry) -> Tensors:
        """The tensors of a leaf, whose checksum is checked."""
        tensors = {kind: self._reader.read(name) for kind, name in entry.tensors.items()}
        checksum = 0
        for tensor in tensors.values():
            checksum = zlib.crc32(bytes_of(tensor).data, checksum)
        if checksum != entry.checksum:
            raise ValueError(
                f"{self.path}: tensor {entry.name!r} was altered (its checksum differs)"
            )
        return tensors

    @contextlib.contextmanager
    def describing(self) -> Iterator[None]:
        """Where the header is relied on: says so where it does not fit the tensors."""
        try:
            yield
        except (MemoryError, OSError):
            raise
        except Exception as error:
            raise ValueError(
                f"{self.path}: the header does not describe its tensors ({error}); write it again"
            ) from error


def is_saved(reader: Reader) -> bool:
    """Whether the file says that ``save`` wrote it."""
    return _HEADER in reader.texts and _DIGEST in reader.texts


def _digest(texts: Mapping[str, str], specs: Mapping[str, Spec]) -> str:
    content: list[Any] = [
        sorted((key, text) for key, text in texts.items() if key != _DIGEST),
        sorted((name, dtype.name, shape) for name, (dtype, shape) in specs.items()),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
