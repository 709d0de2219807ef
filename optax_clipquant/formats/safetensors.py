"""Reads and writes safetensors files one tensor at a time; writing is atomic.

A file is the length of its header (8 bytes, little-endian), the header (JSON, padded with spaces), and
the tensors' bytes. Nothing is mapped into memory: a tensor takes no room before ``read``.
"""

import contextlib
import json
import os
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Self

import numpy as np

from optax_clipquant._atomic import replacing
from optax_clipquant.formats.dtypes import (
    TAGS,
    Opaque,
    Spec,
    bits_of,
    nbytes,
    spec_of,
)
from optax_clipquant.formats.opening import open_file

_HEADER_LIMIT = 100_000_000  # bytes, set by the safetensors format

# Other file types that hold models, by their first bytes. All but gzip's would be too long a header.
_GZIP = b"\x1f\x8b\x08"
_FOREIGN = {
    b"GGUF": "a GGUF file: use `optax-clipquant convert`, or optax_clipquant.from_gguf",
    b"\x93NUMPY": "an array of NumPy, .npy: load it with numpy.load",
    b"\x89HDF": "an HDF5 file, such as Keras' .h5: load it with the library that wrote it",
    _GZIP: "compressed by gzip: decompress it first",
    b"version https://git-lfs": "the pointer of Git LFS to a file: run `git lfs pull`",
    b"<": "a page of HTML or XML, as of a failed download",
    **{
        b"\x80%c" % n: "a pickle, such as PyTorch's .pt and .bin: torch.load it"
        for n in range(2, 6)
    },
}


class Reader:
    """An open safetensors file.

    Attributes:
      path: the file.
      texts: its metadata.
      specs: the dtype and shape of each tensor, in file order.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the file is truncated, not a safetensors file, or not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.texts: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        self._offsets: dict[str, int] = {}
        self._lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open_file(self.path, "a safetensors file"))
            self._read_header()
            stack.pop_all()

    def _read_header(self) -> None:
        first = self._file.read(8)
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(first, "little")
        try:
            if len(first) < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"its header would take {length:,} of {size:,} bytes")
            header = json.loads(
                self._file.read(length), object_pairs_hook=_unique, parse_constant=_refuse
            )
            self._parse(header, 8 + length, size)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            if (length > _HEADER_LIMIT or first.startswith(_GZIP)) and (
                kind := self._foreign_kind()
            ):
                raise ValueError(f"{self.path} is not a safetensors file, but {kind}") from None
            raise ValueError(
                f"{self.path}: truncated, altered, or not a safetensors file ({error})"
            ) from error

    def _foreign_kind(self) -> str | None:
        self._file.seek(0)
        head = self._file.read(256)
        if head.startswith(b"PK\x03\x04"):
            name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
            if name.endswith(b".npy"):
                return "arrays of NumPy, .npz: load them with numpy.load"
            if name.endswith((b".pkl", b".format_version", b".storage_alignment")):
                return "a PyTorch file, .pt or .bin: torch.load it"
            return "a zip archive: unpack it first"
        return next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), None)

    def _parse(self, header: dict[str, Any], start: int, size: int) -> None:
        """Reads the parsed header, whose tensors must fill the file without gap or overlap."""
        texts = header.pop("__metadata__", None) or {}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise ValueError(f"the metadata {key!r} is not text")
            (key + text).encode()  # raises for half a surrogate pair
        self.texts = texts
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            name.encode()
            first, last = entry["data_offsets"]
            try:
                self.specs[name] = spec_of(entry["dtype"], entry["shape"], last - first)
            except ValueError as error:
                raise ValueError(f"tensor {name!r}: {error}") from None
            if not (type(first) is type(last) is int and first == end):
                raise ValueError(f"tensor {name!r} begins at {first!r}, but should at {end}")
            self._offsets[name] = start + first
            end = last
        if start + end != size:
            raise ValueError(f"its tensors end at byte {start + end:,} of {size:,}")

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """Reads a tensor, into the start of ``out`` if that is given; one of an ``Opaque`` dtype as its bytes."""
        dtype, shape = self.specs[name]
        size = nbytes(dtype, shape)
        out = np.empty(size, np.uint8) if out is None else out[:size]
        self.read_at(name, 0, out)
        return out if isinstance(dtype, Opaque) else out.view(dtype).reshape(shape)

    def read_at(self, name: str, first: int, out: np.ndarray) -> None:
        """Fills ``out`` with the bytes of a tensor from byte ``first`` on. Threads may call it."""
        try:
            with self._lock:
                self._file.seek(self._offsets[name] + first)
                count = self._file.readinto(out.data)
        except OSError as error:
            error.filename = self.path if error.errno else None
            raise
        if count != out.nbytes:
            raise ValueError(f"{self.path}: tensor {name!r} is truncated")

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor, piece by piece; each piece overwrites the one before."""
        size = nbytes(*self.specs[name])
        room = np.empty(min(size, 2**20), np.uint8)
        for first in range(0, size, max(room.size, 1)):
            piece = room[: size - first]
            self.read_at(name, first, piece)
            yield piece

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._file.close()


class Writer:
    """A new file, into which tensors are put one at a time and in any order; see ``writing``.

    Attributes:
      texts: the metadata. It may change until the end, but must not grow.
    """

    def __init__(self, file: BinaryIO, specs: Mapping[str, Spec], texts: Mapping[str, str]) -> None:
        self.texts = dict(texts)
        self._file = file
        self._specs = specs
        self._missing = set(specs)
        self._offsets: dict[str, int] = {}
        end = 0
        # Larger elements first, as in safetensors, so that each tensor is aligned.
        for name in sorted(specs, key=lambda name: (-bits_of(specs[name][0]), name)):
            self._offsets[name] = end
            end += nbytes(*specs[name])
        self._room = -(-len(self._header()) // 8) * 8
        if self._room > _HEADER_LIMIT:
            raise ValueError(
                f"the header would take {self._room:,} bytes, of which no safetensors reader takes more "
                f"than {_HEADER_LIMIT:,}; shorten the metadata"
            )
        file.truncate(8 + self._room + end)

    def put(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor."""
        if (array.dtype, array.shape) != self._specs[name]:
            raise ValueError(
                f"tensor {name!r} is {array.dtype} {array.shape}, but was announced as "
                "{} {}".format(*self._specs[name])
            )
        for _ in self.putting(name, [array]):
            pass

    def putting(self, name: str, pieces: Iterable[np.ndarray]) -> Iterator[memoryview]:
        """Writes a tensor from pieces in C order, and yields the bytes of each once it is written."""
        self._file.seek(8 + self._room + self._offsets[name])
        written = 0
        for piece in pieces:
            content = bytes_of(piece).data
            self._file.write(content)
            written += len(content)
            yield content
        size = nbytes(*self._specs[name])
        if written != size:
            raise ValueError(f"tensor {name!r} has {written} bytes, but {size} were announced")
        self._missing.discard(name)

    def finish(self) -> None:
        """Writes the header."""
        header = self._header()
        if self._missing:
            raise ValueError(f"tensors {sorted(self._missing)[:8]} were announced, but not put")
        if len(header) > self._room:
            raise ValueError(f"the metadata grew beyond its room of {self._room} bytes")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))

    def _header(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": self.texts} if self.texts else {}
        for name, offset in self._offsets.items():
            dtype, shape = self._specs[name]
            header[name] = {
                "dtype": dtype.name if isinstance(dtype, Opaque) else TAGS[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + nbytes(dtype, shape)],
            }
        return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], specs: Mapping[str, Spec], texts: Mapping[str, str]
) -> Iterator[Writer]:
    """Writes a safetensors file with tensors of these ``specs``, which replaces ``path`` when complete.

    See ``replacing``. ``texts`` is the metadata, or a placeholder that takes as much room.

    Raises:
      FileNotFoundError: the folder of ``path`` does not exist.
      ValueError: a tensor has another dtype or shape than announced, or was not put.
    """
    with replacing(path) as file:
        writer = Writer(file, specs, texts)
        yield writer
        writer.finish()


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of ``array`` in C order, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a name appears twice")
    return found


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
