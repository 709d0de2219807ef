"""The size and error of each leaf of a quantized tree, and its bits per weight."""

import dataclasses
from typing import Any

import jax
import numpy as np

from optax_clipquant._tree import flatten_with_path, path_of, refuse_abstract
from optax_clipquant.quant.groups import weights_per_scale
from optax_clipquant.quant.params import PyTree
from optax_clipquant.quant.qarray import is_qarray
from optax_clipquant.report.rows import Row, Summary, row_of


def summarize(params: PyTree, qparams: PyTree) -> Summary:
    """Compares ``qparams`` with ``params``: size, error and signal-to-noise ratio of each leaf.

    Computed on the host, in float64.

    Args:
      params: a tree of arrays.
      qparams: the same tree, with ``QArray`` leaves.

    Raises:
      ValueError: the trees have different leaves, or leaves of different shapes.
      TypeError: a leaf of ``params`` is a ``QArray``, or a leaf has no values.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_clipquant import Uniform, quantize_params
      >>> params = {"kernel": jnp.linspace(-1, 1, 64).reshape(8, 8), "bias": jnp.zeros(8)}
      >>> summary = summarize(params, quantize_params(params, Uniform(bits=4)))
      >>> summary.bytes_before, summary.bytes_after
      (288, 80)
      >>> print(summary)  # doctest: +SKIP
    """
    before = {path_of(path): leaf for path, leaf in flatten_with_path(params, is_leaf=is_qarray)[0]}
    after = {path_of(path): leaf for path, leaf in flatten_with_path(qparams, is_leaf=is_qarray)[0]}
    for path, leaf in before.items():
        refuse_abstract(f"params leaf {path!r}", leaf)
        refuse_abstract(f"qparams leaf {path!r}", after.get(path))
        if is_qarray(leaf):
            raise TypeError(
                f"params leaf {path!r} is a QArray; give the float params first, or dequantize_params of it"
            )
    if before.keys() != after.keys():
        raise ValueError(
            f"params and qparams have different leaves: {sorted(before.keys() ^ after.keys())[:8]}"
        )

    def row(path: str) -> Row:
        array, leaf = np.asarray(before[path]), after[path]
        if not is_qarray(leaf):
            return row_of(path, array, np.asarray(leaf))
        found = row_of(path, array, np.asarray(leaf), leaf.bits, leaf.nbytes_packed)
        zero = leaf.zero_point
        return dataclasses.replace(
            found,
            grid=leaf.grid.kind(None if zero is None else zero.dtype),
            weights_per_scale=weights_per_scale(leaf.shape, leaf.scale.shape, leaf.grid.group),
        )

    return Summary(tuple(row(path) for path in before))


def bits_per_param(qparams: PyTree) -> float:
    """Mean bits per quantized weight on disk, scales included; over all weights if none is quantized.

    Args:
      qparams: a tree with ``QArray`` leaves, which may be abstract, as from ``jax.eval_shape``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_clipquant import Uniform, quantize_params
      >>> bits_per_param(quantize_params({"kernel": jnp.ones((64, 8))}, Uniform(bits=4, group_size=32)))
      4.5
    """
    leaves: list[Any] = [
        leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for leaf in jax.tree.leaves(qparams, is_leaf=is_qarray)
    ]
    sizes = [(leaf.nbytes_packed, leaf.size) for leaf in leaves if is_qarray(leaf)]
    sizes = sizes or [(leaf.size * leaf.dtype.itemsize, leaf.size) for leaf in leaves]
    return 8 * sum(size for size, _ in sizes) / max(sum(count for _, count in sizes), 1)
