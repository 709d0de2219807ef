"""The GGUF container: a header of typed metadata and tensor descriptions, then the tensors, aligned.

All numbers are little-endian. A file is ``GGUF``, the version (uint32), the number of tensors and of
metadata entries (uint64 each); the entries, each a string, a type (uint32) and a value; the
descriptions, each a string, the number of axes (uint32), their extents with the fastest first
(uint64 each), a type (uint32) and an offset (uint64); and, from the next multiple of the alignment
on, the tensors, whose offsets count from there. A string is its length (uint64) and UTF-8 bytes.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import itertools
import math
import os
import struct
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Self

import ml_dtypes
import numpy as np

from optax_clipquant.formats.opening import open_file
from optax_clipquant.formats.safetensors import bytes_of, replacing

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SCALARS: dict[int, str] = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)
_MAX_AXES = 4  # the limit of ggml

PLAIN = {
    kind: np.dtype(dtype)
    for kind, dtype in {
        **{"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64},
        **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
    }.items()
}
"""The dtypes of types without blocks."""
# Elements per block, and bytes per block.
SIZES = {
    **{kind: (1, dtype.itemsize) for kind, dtype in PLAIN.items()},
    **{"Q4_0": (32, 18), "Q5_0": (32, 22), "Q8_0": (32, 34), "TQ2_0": (256, 66)},
}
_IDS = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "I8": 24, "I16": 25, "I32": 26},
    **{"I64": 27, "F64": 28, "BF16": 30, "TQ2_0": 35},
    # For these, only the name and the offset in the file are used.
    **{"Q4_1": 3, "Q5_1": 7, "Q8_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14},
    **{"Q8_K": 15, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20},
    **{"IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "TQ1_0": 34, "MXFP4": 39, "NVFP4": 40},
}
_NAMES = {number: name for name, number in _IDS.items()}


class Tensor(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
      kind: the name of its type, or for an unknown type its number as text.
      shape: its shape in NumPy's order, with rows along the last axis.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes, for a known type."""
        block, size = SIZES[self.kind]
        return math.prod(self.shape) // block * size


class GGUFFile:
    """An open GGUF file.

    Attributes:
      path: the file.
      metadata: the metadata by key: numbers, text, bools, and lists of these.
      raw: the type and value of each metadata entry as bytes, by key.
      tensors: the tensors by name, in the order of the header.
      alignment: the alignment of tensors, in bytes.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the file is truncated, or not a GGUF file of a supported version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.metadata: dict[str, Any] = {}
        self.raw: dict[str, bytes] = {}
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, tuple[int, int]] = {}
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open_file(self.path, "a GGUF file"))
            self._size = os.fstat(self._file.fileno()).st_size
            try:
                self._read_header()
            except (MemoryError, OSError):
                raise
            except Exception as error:
                raise ValueError(
                    f"{self.path}: truncated, altered, or not a GGUF file ({error})"
                ) from error
            stack.pop_all()

    def _read_header(self) -> None:
        if self._bytes(4) != _MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        version, count, entries = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, but this reads {_VERSIONS}, little-endian")
        for _ in range(entries):
            key = self._string()
            first = self._file.tell()
            (kind,) = self._unpack("I")
            if key in self.metadata:
                raise ValueError(f"the key {key!r} is there twice")
            self.metadata[key] = self._value(kind)
            length = self._file.tell() - first
            self._file.seek(first)
            self.raw[key] = self._bytes(length)
        offsets = [self._describe() for _ in range(count)]
        self.alignment = self.metadata.get("general.alignment", 32)
        if not (isinstance(self.alignment, int) and self.alignment.bit_count() == 1):
            raise ValueError(f"the alignment {self.alignment!r} is not a power of two")
        start = _padded(self._file.tell(), self.alignment)
        ends = sorted({*offsets, self._size - start})
        following = dict(itertools.pairwise(ends))
        for (name, tensor), offset in zip(self.tensors.items(), offsets, strict=True):
            room = following.get(offset, self._size - start) - offset
            size = tensor.nbytes if tensor.kind in SIZES else room
            if room < 0 or size > room:
                raise ValueError(f"tensor {name!r} has {room} bytes, but needs {size}")
            self._places[name] = start + offset, size

    def _describe(self) -> int:
        """Reads the description of a tensor, and returns the tensor's offset."""
        name = self._string()
        (ndim,) = self._unpack("I")
        if ndim > _MAX_AXES:
            raise ValueError(f"tensor {name!r} has {ndim} axes, and {_MAX_AXES} are the most")
        *extents, number, offset = self._unpack("Q" * ndim + "IQ")
        tensor = Tensor(_NAMES.get(number, str(number)), tuple(reversed(extents)))
        if name in self.tensors:
            raise ValueError(f"tensor {name!r} is there twice")
        if tensor.kind in SIZES and tensor.shape and tensor.shape[-1] % SIZES[tensor.kind][0]:
            raise ValueError(f"tensor {name!r} of {tensor.kind} has rows of {tensor.shape[-1]}")
        self.tensors[name] = tensor
        return offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_SCALARS[kind])[0]
        inner, length = self._unpack("IQ")
        if inner in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[inner])
            return list(struct.unpack(f"<{length}{_SCALARS[inner]}", self._bytes(length * size)))
        # Each element takes at least 8 bytes of the file, so a false length ends with the file.
        return [self._value(inner) for _ in range(length)]

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        return self._bytes(length).decode()

    def _unpack(self, fields: str) -> tuple[Any, ...]:
        return struct.unpack("<" + fields, self._bytes(struct.calcsize("<" + fields)))

    def _bytes(self, length: int) -> bytes:
        if length > self._size - self._file.tell():
            raise ValueError("it ends within the header")
        return self._file.read(length)

    def read(self, name: str) -> np.ndarray:
        """The bytes of a tensor; for an unknown type, with the padding after it."""
        place, size = self._places[name]
        content = np.empty(size, np.uint8)
        self._file.seek(place)
        if self._file.readinto(content.data) != size:
            raise ValueError(f"{self.path}: tensor {name!r} is truncated")
        return content

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor, piece by piece."""
        place, size = self._places[name]
        for first in range(0, size, 2**20):
            self._file.seek(place + first)
            piece = np.frombuffer(self._file.read(min(2**20, size - first)), np.uint8)
            if not piece.size:
                raise ValueError(f"{self.path}: tensor {name!r} is truncated")
            yield piece

    def nbytes(self, name: str) -> int:
        return self._places[name][1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._file.close()


def uint32(value: int) -> bytes:
    """The type and value of a metadata entry that holds a uint32, as bytes."""
    return struct.pack("<II", _UINT32, value)


class Writer:
    """A new GGUF file, into which tensors are put in any order; see ``writing``."""

    def __init__(
        self,
        file: BinaryIO,
        entries: Mapping[str, bytes],
        tensors: Mapping[str, tuple[Tensor, int]],
        alignment: int,
    ) -> None:
        self._file = file
        header = [_MAGIC, struct.pack("<IQQ", 3, len(tensors), len(entries))]
        header += [_text(key) + value for key, value in entries.items()]
        self._places: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, (tensor, nbytes) in tensors.items():
            number = _IDS.get(tensor.kind) or int(tensor.kind if tensor.kind.isdigit() else 0)
            header += [_text(name), struct.pack("<I", len(tensor.shape))]
            header += [struct.pack("<Q", extent) for extent in reversed(tensor.shape)]
            header.append(struct.pack("<IQ", number, offset))
            self._places[name] = offset, nbytes
            offset = _padded(offset + nbytes, alignment)
        content = b"".join(header)
        self._start = _padded(len(content), alignment)
        file.truncate(self._start + offset)
        file.write(content)

    def put(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """Writes a tensor from pieces of its bytes."""
        offset, nbytes = self._places.pop(name)
        self._file.seek(self._start + offset)
        written = 0
        for piece in pieces:
            written += self._file.write(bytes_of(piece).data)
        if written != nbytes:
            raise ValueError(f"tensor {name!r} has {written} bytes, but {nbytes} were announced")

    def finish(self) -> None:
        if self._places:
            raise ValueError(f"tensors {list(self._places)[:8]} were announced, but not put")


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str],
    entries: Mapping[str, bytes],
    tensors: Mapping[str, tuple[Tensor, int]],
    alignment: int,
) -> Iterator[Writer]:
    """Writes a GGUF file, which replaces ``path`` when complete; see ``replacing``.

    Args:
      path: the file.
      entries: the type and value of each metadata entry, in the form of ``GGUFFile.raw``.
      tensors: the description and the size in bytes of each tensor, by name.
      alignment: the alignment of tensors, in bytes.
    """
    with replacing(path) as file:
        writer = Writer(file, entries, tensors, alignment)
        yield writer
        writer.finish()


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
