"""The safetensors container, one tensor at a time: reading what a file holds, writing it whole or not at all.

A file is the length of its header (8 bytes, little-endian), the header (JSON, padded with spaces), and
the tensors' bytes. Nothing is mapped into memory: a tensor takes room from ``read`` on, and no sooner.
"""

import contextlib
import json
import math
import os
import secrets
import stat
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Self

import ml_dtypes
import numpy as np
import safetensors

DTYPES: dict[str, np.dtype] = {
    tag: np.dtype(dtype)
    for tag, dtype in {
        **{"BOOL": np.bool_, "F16": np.float16, "F32": np.float32, "F64": np.float64},
        **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
        **{"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64},
        **{"BF16": ml_dtypes.bfloat16, "C64": np.complex64},
        **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
    }.items()
}
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}

_HEADER_LIMIT = 100_000_000  # of the safetensors format

Spec = tuple[np.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


class Reader:
    """An open safetensors file.

    Attributes:
      path: the file.
      texts: its metadata.
      specs: dtype and shape of each tensor, in the order in which they lie in the file.

    Raises:
      OSError: the file cannot be opened.
      ValueError: it is truncated or no safetensors file, or has a dtype that NumPy lacks; or it is no
        regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.texts: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        self._offsets: dict[str, int] = {}
        self._lock = threading.Lock()
        # To open a pipe waits for who writes to it.
        mode = os.stat(self.path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{self.path} is a folder; name a safetensors file")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{self.path} is not a regular file; name a safetensors file")
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open(self.path, "rb"))
            self._read_header()
            stack.pop_all()

    def _read_header(self) -> None:
        try:
            # It checks that the tensors fill the file without gap or overlap.
            with safetensors.safe_open(self.path, "numpy"):
                pass
            length = int.from_bytes(self._file.read(8), "little")
            header: dict[str, Any] = json.loads(self._file.read(length))
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{self.path}: truncated, altered, or not a safetensors file ({error})"
            ) from error
        self.texts = header.pop("__metadata__", None) or {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"{self.path}: tensor {name!r} has dtype {entry['dtype']}, which is not one of "
                    f"{', '.join(DTYPES)}; convert it first"
                )
            self.specs[name] = DTYPES[entry["dtype"]], tuple(entry["shape"])
            self._offsets[name] = 8 + length + entry["data_offsets"][0]

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor ``name``, in the first bytes of ``out`` where that is given."""
        dtype, shape = self.specs[name]
        size = nbytes(dtype, shape)
        out = np.empty(size, np.uint8) if out is None else out[:size]
        self.read_at(name, 0, out)
        return out.view(dtype).reshape(shape)

    def read_at(self, name: str, first: int, out: np.ndarray) -> None:
        """Fills ``out`` with the bytes of a tensor, from its ``first`` on. Threads may call it."""
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
        """The bytes of the tensor ``name`` in turn; each takes the place of the one before."""
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
    """A new file, in which tensors may be put in any order, one at a time; see ``writing``.

    Attributes:
      texts: the metadata. It may change until the end, but take no more room.
    """

    def __init__(self, file: BinaryIO, specs: Mapping[str, Spec], texts: Mapping[str, str]) -> None:
        self.texts = dict(texts)
        self._file = file
        self._specs = specs
        self._missing = set(specs)
        self._offsets: dict[str, int] = {}
        end = 0
        # Larger elements first, as safetensors has it: then each tensor is aligned.
        for name in sorted(specs, key=lambda name: (-specs[name][0].itemsize, name)):
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
        """Writes a tensor from pieces of it, in C order; gives the bytes of each when it is written."""
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
                "dtype": _TAGS[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + nbytes(dtype, shape)],
            }
        return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], specs: Mapping[str, Spec], texts: Mapping[str, str]
) -> Iterator[Writer]:
    """A safetensors file of tensors of these ``specs``, which takes the place of ``path`` once whole.

    See ``replacing``. ``texts`` is the metadata, or text that takes as much room.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a tensor has another dtype or shape than announced, or was not put.
    """
    with replacing(path) as file:
        writer = Writer(file, specs, texts)
        yield writer
        writer.finish()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file, which takes the place of ``path`` once whole.

    It is written beside ``path``, synced and renamed: an exception or a crash leaves ``path`` as it
    was.

    Raises:
      FileNotFoundError: there is no such folder.
      IsADirectoryError: ``path`` is a folder.
      ValueError: it is a device, a pipe or a socket, which a file would take the place of.
    """
    path = os.fspath(path)
    check_replaceable(path)
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name[:32]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(folder)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = path  # as of a full disk
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def check_replaceable(path: str) -> None:
    """Raises as ``replacing`` does at once."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file; name another")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: there is no folder {folder}")


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of ``array`` in C order, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _sync(folder: str) -> None:
    if os.name != "posix":
        return  # only there a folder can be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
