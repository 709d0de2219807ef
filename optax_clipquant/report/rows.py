"""The size and error of each leaf, as data and as a table."""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from optax_clipquant._print import Name, Printed, compact_table

if TYPE_CHECKING:
    import rich.table


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a ``Summary``.

    Attributes:
      path: the leaf's path in the tree.
      shape: its shape.
      bits: bits per code, or per element if the leaf is not quantized.
      bytes_before: its size in ``params``, in bytes.
      bytes_after: its size on disk in bytes, scales included.
      max_error: the largest absolute error; None without an original to compare with.
      snr_db: signal-to-noise ratio, ``10 log10(sum(w**2) / sum((w - w')**2))``; inf without error,
        None without an original to compare with.
      grid: the kind of its grid: uniform, affine, ternary, binary, codebook (``NormalFloat``) or z-score; None
        if the leaf is not quantized.
      weights_per_scale: the number of weights that share a scale; None if the leaf is not quantized.
    """

    path: str
    shape: tuple[int, ...]
    bits: float
    bytes_before: int
    bytes_after: int
    max_error: float | None = None
    snr_db: float | None = None
    grid: str | None = None
    weights_per_scale: int | None = None


@dataclasses.dataclass(frozen=True)
class Summary(Printed):
    """The result of ``summarize``: ``rows`` is plain data, and ``print`` shows a table.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_clipquant import Uniform, quantize_params, summarize
      >>> params = {"kernel": jnp.ones((64, 8))}
      >>> summary = summarize(params, quantize_params(params, Uniform(bits=4)))
      >>> summary.rows[0].bits, summary.bytes_before, summary.bytes_after
      (4, 2048, 272)
    """

    rows: tuple[Row, ...]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def ratio(self) -> float:
        """The compression ratio, ``bytes_before / bytes_after``."""
        return self.bytes_before / max(self.bytes_after, 1)

    def __rich__(self) -> "rich.table.Table":
        table = compact_table(show_footer=True)
        # Where there is no room, digits wrap rather than being cut off.
        table.add_column("leaf", "total", overflow="fold")
        compared = any(row.max_error is not None for row in self.rows)
        quantized = any(row.grid is not None for row in self.rows)
        for header, footer in (
            ("shape", ""),
            ("bits", ""),
            *((("per\nscale", ""),) if quantized else ()),
            ("bytes\nbefore", f"{self.bytes_before:,}"),
            ("bytes\nafter", f"{self.bytes_after:,}"),
            ("ratio", f"{self.ratio:.2f}"),
            *((("max\nerror", ""), ("SNR\n(dB)", "")) if compared else ()),
        ):
            table.add_column(header, footer, justify="right", overflow="fold")
        for row in self.rows:
            errors = (row.max_error, ".2g"), (row.snr_db, ".1f")
            each = row.weights_per_scale
            table.add_row(
                Name(row.path),
                "x".join(map(str, row.shape)),
                f"{row.bits:.3g}",
                *(("" if each is None else f"{each:,}",) if quantized else ()),
                f"{row.bytes_before:,}",
                f"{row.bytes_after:,}",
                f"{row.bytes_before / max(row.bytes_after, 1):.2f}",
                *("" if x is None else f"{x:{form}}" for x, form in errors[: 2 * compared]),
            )
        return table


def row_of(
    path: str,
    before: np.ndarray,
    after: np.ndarray,
    bits: float | None = None,
    size: int | None = None,
) -> Row:
    """Compares one leaf with its original.

    Args:
      path: the leaf's path.
      before: the original.
      after: the leaf, dequantized.
      bits: bits per code; by default, per element of ``after``.
      size: the bytes on disk; by default those of ``after``.

    Raises:
      ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"leaf {path!r} has shape {before.shape} in params and {after.shape} in qparams"
        )
    max_error, snr_db = errors(before, after)
    return Row(
        path,
        before.shape,
        8.0 * after.itemsize if bits is None else bits,
        before.nbytes,
        after.nbytes if size is None else size,
        max_error,
        snr_db,
    )


def errors(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The largest absolute error, and the signal-to-noise ratio in dB; NaN and -inf if a value is NaN.

    Computed in float64, exactly for integers, and in blocks that fit a cache.
    """
    largest = noise = signal = 0.0
    before, after = before.ravel(), after.ravel()
    blocks = [slice(i, i + _BLOCK) for i in range(0, before.size, _BLOCK)]
    with np.errstate(invalid="ignore", over="ignore"):
        reach = max(
            (float(_magnitude(x).max()) for x in map(before.__getitem__, blocks)), default=0.0
        )
        unit = reach if 0 < reach < math.inf else 1.0  # so that no square overflows
        for block in blocks:
            x = before[block]
            distance = _distance(x, after[block])
            largest = float(np.maximum(largest, distance.max()))
            noise += float(np.square(distance / unit).sum())
            signal += float(np.square(_magnitude(x) / unit).sum())
    if noise == 0:
        return largest, math.inf
    ratio = signal / noise
    return largest, 10 * math.log10(ratio) if ratio > 0 else -math.inf


_BLOCK = 2**16


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype == y.dtype and x.dtype.kind in "iu":
        # A signed difference wraps modulo 2**bits; as an unsigned integer it is right.
        distance = np.maximum(x, y) - np.minimum(x, y)
        return distance.view(f"u{x.itemsize}").astype(np.float64)
    # Equal infinities differ by 0, not by NaN.
    return np.where(x == y, 0, np.abs(_wide(x) - _wide(y)))


def _magnitude(x: np.ndarray) -> np.ndarray:
    return np.abs(_wide(x))


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
