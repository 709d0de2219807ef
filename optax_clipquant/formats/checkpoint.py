"""Checkpoints in Hugging Face's form: one safetensors file, or shards with an index, read as one model.

The index, ``*.safetensors.index.json``, has a ``weight_map`` from the name of each tensor (in files of
``save``, of each leaf) to the file beside it that holds it. No JAX here.
"""

import contextlib
import functools
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar

import numpy as np

from optax_clipquant._atomic import replacing
from optax_clipquant.formats.dtypes import Spec
from optax_clipquant.formats.native.description import Entry, LeafSpec, plain
from optax_clipquant.formats.native.file import SavedFile, Tensors, is_saved
from optax_clipquant.formats.native.names import assemble
from optax_clipquant.formats.opening import open_file
from optax_clipquant.formats.safetensors import Reader

W = TypeVar("W")

_INDEX = ".index.json"


class Checkpoint:
    """An open checkpoint: a safetensors file, an index, or a folder with one of these.

    Attributes:
      path: the path as given.
      is_saved: whether ``save`` or the command wrote it.
      leaves: the description of each leaf by name; in files of other programs, of each tensor.
      nodes: the kinds of the nodes by name.
      metadata: its metadata without the entries of ``save``; for shards, the entries that all agree on.

    Raises:
      OSError: a file cannot be opened.
      ValueError: a file is damaged or of another type, or the shards do not match the index. The
        message names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.leaves: dict[str, LeafSpec] = {}
        self.nodes: dict[str, str] = {}
        self._readers: dict[str, Reader] = {}
        self._saved: dict[str, tuple[SavedFile, Entry]] = {}
        weight_map, files = _files_of(self.path)
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(Reader(file)) for file in files]
            self.is_saved = bool(readers) and is_saved(readers[0])
            for reader in readers:
                if is_saved(reader) != self.is_saved:
                    raise ValueError(f"{reader.path}: one of optax_clipquant among others, or the reverse")  # fmt: skip
            texts = self._take_saved(readers) if self.is_saved else self._take(readers, weight_map)
            self._check_map(weight_map)
            self._stack = stack.pop_all()
        self.metadata = {
            key: text
            for key, text in (texts[0].items() if texts else ())
            if all(other.get(key) == text for other in texts)
        }

    def _take(self, readers: list[Reader], weight_map: Mapping[str, str] | None) -> list[dict[str, str]]:  # fmt: skip
        for reader in readers:
            for name, spec in reader.specs.items():
                # Tensors that the index assigns to another shard, or omits, are not part of the model.
                if weight_map is None or weight_map.get(name) == os.path.basename(reader.path):
                    self._readers[name] = reader
                    self.leaves[name] = plain(spec)
        return [reader.texts for reader in readers]

    def _take_saved(self, readers: list[Reader]) -> list[dict[str, str]]:
        files = [SavedFile(reader) for reader in readers]
        for file in files:
            for entry in file.entries:
                if entry.name in self._saved:
                    raise ValueError(f"{file.path}: leaf {entry.name!r} is in another shard too")
                self._saved[entry.name] = file, entry
                self.leaves[entry.name] = entry.leaf
            self.nodes |= file.nodes
        if len(files) > 1:
            try:
                assemble(dict.fromkeys(self.leaves), self.nodes)
            except ValueError as error:
                raise ValueError(f"{self.path}: the shards do not form a tree ({error})") from error
        return [file.metadata for file in files]

    def _check_map(self, weight_map: Mapping[str, str] | None) -> None:
        for name, file in (weight_map or {}).items():
            reader = self._saved[name][0] if name in self._saved else self._readers.get(name)
            if reader is None or os.path.basename(reader.path) != file:
                raise ValueError(f"{self.path}: tensor {name!r} is not in {file!r}, as the index has it")  # fmt: skip
        if weight_map is not None and self.leaves.keys() - weight_map.keys():
            name = min(self.leaves.keys() - weight_map.keys())
            raise ValueError(f"{self.path}: leaf {name!r} is not in the index")

    @functools.cached_property
    def specs(self) -> dict[str, Spec]:
        """The dtype and shape of each leaf, dequantized."""
        return {name: leaf.spec for name, leaf in self.leaves.items()}

    @property
    def size(self) -> int:
        """The total size of its files, in bytes."""
        return sum(os.path.getsize(file) for file in _files_of(self.path)[1])

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """Like ``Reader.read``, for a checkpoint that ``save`` did not write."""
        return self._readers[name].read(name, out)

    def read_at(self, name: str, first: int, out: np.ndarray) -> None:
        """Like ``Reader.read_at``."""
        self._readers[name].read_at(name, first, out)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Like ``Reader.pieces``."""
        return self._readers[name].pieces(name)

    def tensors(self, name: str) -> Tensors:
        """The tensors of a leaf; in files of ``save``, their checksum is verified."""
        if not self.is_saved:
            return {"": self.read(name)}
        file, entry = self._saved[name]
        return file.read(entry)

    def describing(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context for decoding tensors, which adds the file and leaf to errors."""
        if not self.is_saved:
            return contextlib.nullcontext()
        return self._saved[name][0].describing(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def files_of(path: str | os.PathLike[str]) -> list[str]:
    """The safetensors files of a checkpoint."""
    return _files_of(os.fspath(path))[1]


def _files_of(path: str) -> tuple[dict[str, str] | None, list[str]]:
    """The weight map of a checkpoint (None without an index), and its safetensors files."""
    if os.path.isdir(path):
        path = _main_file(path)
    if not path.endswith(".json"):
        return None, [path]
    file = open_file(path, "the index of a checkpoint")
    try:
        with file:
            content = json.load(file)
        if isinstance(content, dict) and "weight_map" not in content:
            raise ValueError("it has no 'weight_map'; name the folder or its *.index.json")
        weight_map = content["weight_map"]
        files = dict.fromkeys(weight_map.values())
        wrong = [f for f in files if not isinstance(f, str) or not f or os.path.basename(f) != f]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not the name of a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not the index of a checkpoint ({error})") from error
    folder = os.path.dirname(path)
    for name in files:
        if not os.path.exists(os.path.join(folder, name)):
            raise FileNotFoundError(f"{path}: the shard {name!r} is not there")
    return weight_map, [os.path.join(folder, name) for name in files]


def _main_file(folder: str) -> str:
    """The path of the index, or of the only safetensors file, in a folder."""
    names = sorted(os.listdir(folder))
    for ending in (f".safetensors{_INDEX}", ".safetensors"):
        found = [name for name in names if name.endswith(ending) and not name.startswith(".")]
        usual = f"model{ending}"
        if usual in found or len(found) == 1:
            return os.path.join(folder, usual if usual in found else found[0])
        if found:
            raise ValueError(f"{folder} is a folder with {len(found)} files *{ending}; name one: {found[:8]}")  # fmt: skip
    raise IsADirectoryError(f"{folder} is a folder without a checkpoint (no *.safetensors); name a file")  # fmt: skip


@contextlib.contextmanager
def writing_checkpoint(
    path: str | os.PathLike[str],
    sizes: Mapping[str, int],
    max_shard_size: int | None,
    writing: Callable[[str, list[str]], contextlib.AbstractContextManager[W]],
) -> Iterator[Callable[[str], W]]:
    """Writes a checkpoint, which replaces an old one when it is complete.

    Args:
      path: the file; with ``max_shard_size``, the folder or the index.
      sizes: the bytes of each leaf, in the order in which they will be written.
      max_shard_size: the largest content of a shard, which a single leaf may exceed; None for one file.
      writing: opens the file at a path for the leaves with the given names.

    Yields:
      A function from the name of a leaf to the open file for it.
    """
    path = os.fspath(path)
    with contextlib.ExitStack() as stack:
        if max_shard_size is None:
            file = stack.enter_context(writing(path, list(sizes)))
            yield lambda name: file
            return
        index, stem = index_of(path)
        folder = os.path.dirname(index)
        if not os.path.exists(folder):
            os.mkdir(folder)
            stack.push(_removing(folder))
        old = _old_shards(index)
        shards = _shards(sizes, max_shard_size)
        tag = ""
        # The shards of an old index are left alone until the new index replaces it.
        while any(
            os.path.lexists(os.path.join(folder, name)) for name in _names(stem, tag, shards)
        ):
            tag = f"-{secrets.token_hex(4)}"
        names = _names(stem, tag, shards)
        weight_map = {
            leaf: name for name, shard in zip(names, shards, strict=True) for leaf in shard
        }
        # Entered first, so that it is completed last.
        file = stack.enter_context(replacing(index))
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        file.write(json.dumps(content, indent=1, sort_keys=True).encode())
        opened = {
            name: stack.enter_context(writing(os.path.join(folder, name), shard))
            for name, shard in zip(names, shards, strict=True)
        }
        yield lambda leaf: opened[weight_map[leaf]]
        stack.close()
        for name in old - set(names):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def index_of(path: str) -> tuple[str, str]:
    """The index of a sharded checkpoint at ``path``, and the stem of its shards' names."""
    if path.endswith(_INDEX):
        name = os.path.basename(path)
        return os.path.abspath(path), name.removesuffix(_INDEX).removesuffix(".safetensors")
    return os.path.join(os.path.abspath(path), f"model.safetensors{_INDEX}"), "model"


def _old_shards(index: str) -> set[str]:
    try:
        return set((_files_of(index)[0] or {}).values())
    except (OSError, ValueError):
        return set()


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards or [[]]


def _names(stem: str, tag: str, shards: list[list[str]]) -> list[str]:
    count = len(shards)
    return [f"{stem}{tag}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _removing(folder: str) -> Callable[..., None]:
    """An exit callback that removes a newly made folder after a failure."""

    def exit(kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    return exit
