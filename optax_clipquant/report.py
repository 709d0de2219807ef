"""Size and error of each quantized leaf, as data and as a table."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
import rich.text

from optax_clipquant.params import PyTree
from optax_clipquant.paths import path_of
from optax_clipquant.qarray import is_qarray
from optax_clipquant.reductions import extremes
from optax_clipquant.tables import Printed, compact_table


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a ``Summary``.

    Attributes:
      path: its path in the tree.
      shape: its shape.
      bits: bits of a code, or of an element where it is not quantized.
      bytes_before: its bytes in ``params``.
      bytes_after: its bytes on disk, scales included.
      max_error: the largest absolute error; None where there is nothing to compare with.
      snr_db: signal-to-noise ratio, ``10 log10(sum(w**2) / sum((w - w')**2))``; inf without error,
        None where there is nothing to compare with.
    """

    path: str
    shape: tuple[int, ...]
    bits: float
    bytes_before: int
    bytes_after: int
    max_error: float | None = None
    snr_db: float | None = None


@dataclasses.dataclass(frozen=True)
class Summary(Printed):
    """What ``summarize`` found: ``rows`` is plain data, ``print`` gives a table."""

    rows: tuple[Row, ...]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def ratio(self) -> float:
        """How many times smaller the tree has become."""
        return self.bytes_before / max(self.bytes_after, 1)

    def __rich__(self) -> rich.table.Table:
        table = compact_table(show_footer=True)
        # Digits are folded where there is no room, never left out.
        table.add_column("leaf", "total", overflow="fold")
        compared = any(row.max_error is not None for row in self.rows)
        for header, footer in (
            ("shape", ""),
            ("bits", ""),
            ("bytes\nbefore", f"{self.bytes_before:,}"),
            ("bytes\nafter", f"{self.bytes_after:,}"),
            ("ratio", f"{self.ratio:.2f}"),
            *((("max\nerror", ""), ("SNR\n(dB)", "")) if compared else ()),
        ):
            table.add_column(header, footer, justify="right", overflow="fold")
        for row in self.rows:
            errors = (row.max_error, ".2g"), (row.snr_db, ".1f")
            table.add_row(
                rich.text.Text(row.path),  # and no markup
                "x".join(map(str, row.shape)),
                f"{row.bits:.3g}",
                f"{row.bytes_before:,}",
                f"{row.bytes_after:,}",
                f"{row.bytes_before / max(row.bytes_after, 1):.2f}",
                *("" if x is None else f"{x:{form}}" for x, form in errors[: 2 * compared]),
            )
        return table


def summarize(params: PyTree, qparams: PyTree) -> Summary:
    """Bytes, error and signal-to-noise ratio of each leaf of ``qparams`` against ``params``.

    Args:
      params: a tree of arrays.
      qparams: the same tree, with ``QArray`` leaves.

    Raises:
      ValueError: the trees have other leaves, or leaves of other shapes.

    Examples:
      >>> from optax_clipquant import Uniform, quantize_params
      >>> params = {"kernel": jnp.linspace(-1, 1, 64).reshape(8, 8), "bias": jnp.zeros(8)}
      >>> summary = summarize(params, quantize_params(params, Uniform(bits=4)))
      >>> summary.bytes_before, summary.bytes_after
      (288, 80)
      >>> print(summary)  # doctest: +SKIP
    """
    before = {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    after = {
        path_of(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(qparams, is_leaf=is_qarray)[0]
    }
    if before.keys() != after.keys():
        raise ValueError(
            f"params and qparams have different leaves: {sorted(before.keys() ^ after.keys())[:8]}"
        )
    return Summary(tuple(row_of(path, before[path], after[path]) for path in before))


def bits_per_param(qparams: PyTree) -> float:
    """The mean bits of a quantized weight on disk, scales included; of any weight where none is.

    Args:
      qparams: a tree with ``QArray`` leaves, which may be abstract, as of ``jax.eval_shape``.

    Examples:
      >>> from optax_clipquant import Uniform, quantize_params
      >>> bits_per_param(quantize_params({"kernel": jnp.ones((64, 8))}, Uniform(bits=4, group_size=32)))
      4.5
    """
    leaves = jax.tree.leaves(qparams, is_leaf=is_qarray)
    sizes = [(leaf.nbytes_packed, leaf.size) for leaf in leaves if is_qarray(leaf)]
    sizes = sizes or [(leaf.size * leaf.dtype.itemsize, leaf.size) for leaf in leaves]
    return 8 * sum(size for size, _ in sizes) / max(sum(count for _, count in sizes), 1)


def row_of(path: str, before: Any, after: Any) -> Row:
    """The row of one leaf, of an array and what became of it."""
    itemsize = np.dtype(getattr(before, "dtype", np.asarray(before).dtype)).itemsize
    before = jnp.asarray(before)
    if before.shape != after.shape:
        raise ValueError(
            f"leaf {path!r} has shape {before.shape} in params and {after.shape} in qparams"
        )
    if is_qarray(after):
        max_error, noise, signal = map(float, _errors(before, after.dequantize()))
        bits, bytes_after = after.bits, after.nbytes_packed
    else:
        max_error, noise, signal = map(float, _errors(before, jnp.asarray(after)))
        bits, bytes_after = 8 * np.dtype(after.dtype).itemsize, after.nbytes
    snr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    return Row(path, before.shape, bits, before.size * itemsize, bytes_after, max_error, snr)


@jax.jit
def _errors(before: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest error, and energies of noise and signal in units of the largest element."""
    if not jnp.issubdtype(before.dtype, jnp.inexact):
        before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    error = jnp.abs(before - after.astype(before.dtype)).astype(jnp.float32)
    magnitude = jnp.abs(before).astype(jnp.float32)
    unit = jnp.max(magnitude, initial=0)
    unit = jnp.where(unit == 0, 1, unit)
    largest, _ = extremes(error)
    return (
        jnp.squeeze(largest),
        jnp.sum((error / unit) ** 2),
        jnp.sum((magnitude / unit) ** 2),
    )
