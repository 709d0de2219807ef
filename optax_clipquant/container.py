"""The safetensors container, one tensor at a time: reading what a file holds, writing it whole or not at all.

A file is the length of its header (8 bytes, little-endian), the header (JSON, padded with spaces), and
the tensors' bytes. Nothing is mapped into memory: a tensor takes room from ``read`` on, and no sooner.
"""

import contextlib
import json
import math
import os
import secrets
import types
from collections.abc import Iterator, Mapping
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
      ValueError: it is truncated or no safetensors file, or has a dtype that NumPy lacks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.texts: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        self._offsets: dict[str, int] = {}
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
        self._file.seek(self._offsets[name])
        if self._file.readinto(out.data) != size:
            raise ValueError(f"{self.path}: tensor {name!r} is truncated")
        return out.view(dtype).reshape(shape)

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
    """A new file, whose tensors may be put in any order; see ``writing``.

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
        file.truncate(8 + self._room + end)

    def put(self, name: str, array: np.ndarray) -> None:
        if (array.dtype, array.shape) != self._specs[name]:
            raise ValueError(
                f"tensor {name!r} is {array.dtype} {array.shape}, but was announced as "
                "{} {}".format(*self._specs[name])
            )
        self._file.seek(8 + self._room + self._offsets[name])
        self._file.write(bytes_of(array).data)
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
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file; name another")
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: there is no folder {folder}")
    temporary = os.path.join(folder, f".{name[:32]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of ``array`` in C order, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
