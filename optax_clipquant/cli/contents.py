"""The tensors of any checkpoint as arrays, dequantized."""

from collections.abc import Iterator

import numpy as np

from optax_clipquant.cli.numpy_grid import Threads, decode
from optax_clipquant.formats.checkpoint import Checkpoint
from optax_clipquant.formats.dtypes import Opaque, nbytes
from optax_clipquant.formats.native.description import LeafSpec
from optax_clipquant.formats.native.names import path_of_name
from optax_clipquant.formats.safetensors import bytes_of
from optax_clipquant.report.rows import Row


def described(path: str, leaf: LeafSpec, bytes_before: int, bytes_after: int) -> Row:
    """The row of a tensor, without errors."""
    return Row(
        path,
        leaf.shape,
        leaf.bits,
        bytes_before,
        bytes_after,
        grid=leaf.grid,
        weights_per_scale=leaf.weights_per_scale,
    )


class Contents:
    """The tensors of a checkpoint by name; in files of ``save``, by path.

    Attributes:
      path: the path of the checkpoint.
      leaves: the description of each tensor.
      metadata: its metadata, without the entries of ``save``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path, self.metadata = checkpoint.path, checkpoint.metadata
        self._names: dict[str, str] = {}
        for name in checkpoint.leaves:
            path = path_of_name(name) if checkpoint.is_saved else name
            if path in self._names:
                raise ValueError(f"{self.path}: two tensors would have the name {path!r}")
            self._names[path] = name
        self.leaves: dict[str, LeafSpec] = {
            path: checkpoint.leaves[name] for path, name in self._names.items()
        }

    @property
    def rows(self) -> list[Row]:
        return [
            described(path, leaf, nbytes(*leaf.spec), leaf.nbytes)
            for path, leaf in self.leaves.items()
        ]

    def pieces(self, path: str, threads: Threads) -> Iterator[np.ndarray]:
        """A tensor, dequantized, in pieces."""
        name, leaf = self._names[path], self.leaves[path]
        if not self._checkpoint.is_saved:
            yield from self._checkpoint.pieces(name)
            return
        tensors = self._checkpoint.tensors(name)
        if leaf.levels is None:
            yield tensors[""]
            return
        with self._checkpoint.describing(name):
            yield from decode(leaf, tensors, threads)

    def read(self, path: str, threads: Threads) -> np.ndarray:
        """A tensor, dequantized; one of a dtype that NumPy lacks as bytes."""
        dtype, shape = self.leaves[path].spec
        whole = np.empty(nbytes(dtype, shape), np.uint8)
        done = 0
        for piece in self.pieces(path, threads):
            whole[done : done + piece.nbytes] = bytes_of(piece)
            done += piece.nbytes
        return whole if isinstance(dtype, Opaque) else whole.view(dtype).reshape(shape)
