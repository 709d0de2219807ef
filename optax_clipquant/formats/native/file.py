"""Reads and writes files of ``save`` one leaf at a time: safetensors with packed codes. No JAX here.

``FORMAT.md`` beside this folder specifies their layout; ``description.py`` writes and checks their headers.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from optax_clipquant.formats.dtypes import Spec
from optax_clipquant.formats.native.description import (
    VERSION,
    Description,
    Entry,
    LeafSpec,
    read_description,
)
from optax_clipquant.formats.native.names import assemble
from optax_clipquant.formats.safetensors import Reader, Writer, bytes_of, writing

_HEADER = "optax_clipquant"
_DIGEST = "optax_clipquant.sha256"

Tensors = dict[str, np.ndarray]
"""The tensors of a leaf, by kind (see ``LeafSpec``)."""
Parts = Iterable[tuple[str, Iterable[np.ndarray]]]
"""The tensors of a leaf with their kinds, in the order of kinds, each in pieces."""


class SavedWriter:
    """A new file of ``save``, into which leaves are put one at a time and in any order."""

    def __init__(self, file: Writer, description: Description, texts: Mapping[str, str]) -> None:
        self._file, self._description, self._texts = file, description, texts

    def put(self, name: str, parts: Parts) -> None:
        """Writes a leaf, consuming its tensors in turn."""
        checksum = 0
        for kind, pieces in parts:
            tensor = self._description.entries[name].tensors[kind]
            for piece in self._file.putting(tensor, pieces):
                checksum = zlib.crc32(piece, checksum)
        self._description.note(name, checksum)

    def finish(self) -> None:
        """Completes the header."""
        self._file.texts = _texts(self._description, self._texts)


@contextlib.contextmanager
def writing_saved(
    path: str | os.PathLike[str],
    leaves: Mapping[str, LeafSpec],
    *,
    nodes: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[SavedWriter]:
    """Writes a file of ``save`` for a tree that need not be in memory; it replaces ``path`` when complete.

    Args:
      path: as for ``save``.
      leaves: the descriptions of the leaves, by name.
      nodes: the kinds of the nodes by name.
      metadata: as for ``save``.
    """
    metadata = dict(metadata or {})
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must map text to text, got {key!r}: {value!r}")
        if key in (_HEADER, _DIGEST):
            raise ValueError(f"metadata key {key!r} is reserved; choose another")
    description = Description(leaves, nodes)
    with writing(path, description.specs, _texts(description, metadata)) as file:
        saved = SavedWriter(file, description, metadata)
        yield saved
        saved.finish()


class SavedFile:
    """An open file of ``save`` with a validated header.

    Attributes:
      path: the file.
      entries: its leaves, in the order of names.
      nodes: the kinds of the nodes by name.
      metadata: the metadata given to ``save``.

    Raises:
      ValueError: the file was altered or not written by ``save``, or its header does not describe a tree
        of its tensors.
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
            content = json.loads(reader.texts[_HEADER])
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: the header is damaged ({error}); write it again"
            ) from error
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int:
            raise ValueError(f"{self.path}: the header is damaged (no version); write it again")
        if version != VERSION:
            raise ValueError(f"{self.path}: format version {version}, but this reads {VERSION}")
        with self.describing():
            self.entries, self.nodes = read_description(reader.specs, content)
            assemble(dict.fromkeys(entry.name for entry in self.entries), self.nodes)
        self.metadata = {k: v for k, v in reader.texts.items() if k not in (_HEADER, _DIGEST)}

    def read(self, entry: Entry) -> Tensors:
        """Reads the tensors of a leaf and verifies their checksum."""
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
    def describing(self, name: str | None = None) -> Iterator[None]:
        """A context for decoding, which reports errors as a header that does not describe the tensors."""
        try:
            yield
        except ValueError as error:
            what = "" if name is None else f"tensor {name!r}: "
            raise ValueError(
                f"{self.path}: the header does not describe its tensors ({what}{error}); write it again"
            ) from error


def is_saved(reader: Reader) -> bool:
    """Whether the file's metadata says that ``save`` wrote it."""
    return _HEADER in reader.texts and _DIGEST in reader.texts


def _texts(description: Description, metadata: Mapping[str, str]) -> dict[str, str]:
    texts = {**metadata, _HEADER: json.dumps(description.content(), separators=(",", ":"))}
    return texts | {_DIGEST: _digest(texts, description.specs)}


def _digest(texts: Mapping[str, str], specs: Mapping[str, Spec]) -> str:
    content: list[Any] = [
        sorted((key, text) for key, text in texts.items() if key != _DIGEST),
        sorted((name, dtype.name, shape) for name, (dtype, shape) in specs.items()),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
