"""Conversion of quantized trees to qwix's types."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_clipquant._tree import map_with_path, path_of, refuse_abstract
from optax_clipquant.quant.params import PyTree
from optax_clipquant.quant.qarray import QArray, is_qarray


def to_qwix(qparams: PyTree, *, like: PyTree = None) -> PyTree:
    """Replaces each ``QArray`` of ``qparams`` by a ``qwix.QArray``, for qwix's PTQ models.

    Values do not change: ``qwix.dequantize`` returns what ``dequantize`` does, except for the sign of 0
    where a scale is negative. Levels at half steps ``(k + 1/2) * s`` (1 and 2 bits) become ``(2 k + 1) *
    (s / 2)``. Codes are int4 where they fit, else int8.

    Args:
      qparams: a tree with ``QArray`` leaves; other leaves are left alone.
      like: the params of a PTQ model in Flax linen, which may be abstract, as in the example. Each
        leaf then comes in the box in which the model expects it, or as floats where the model expects
        these. Without ``like``, the leaves have no boxes.

    Raises:
      ImportError: qwix is not installed.
      ValueError: qwix does not support a grid: a codebook (``NormalFloat``), a fractional zero point
        (``ZScore``), a shorter last group, or a scale that the leaf's dtype does not hold exactly. Or
        ``like`` has other leaves or shapes. The message names the leaf.

    Examples:
      A PTQ model, and our params for it:

      >>> import flax.linen as nn
      >>> import qwix
      >>> from optax_clipquant import Uniform, quantize_params
      >>> model, x = nn.Dense(8), jnp.ones((2, 16))
      >>> qparams = quantize_params(model.init(jax.random.key(0), x)["params"], Uniform(bits=4))
      >>> rule = qwix.QuantizationRule(weight_qtype=jnp.int4)
      >>> ptq = qwix.quantize_model(model, qwix.PtqProvider([rule]))
      >>> like = jax.eval_shape(ptq.init, jax.random.key(0), x)["params"]
      >>> y = ptq.apply({"params": to_qwix(qparams, like=like)}, x)
      >>> bool(jnp.allclose(y, model.apply({"params": qparams}, x)))
      True
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "to_qwix needs qwix: pip install 'optax-clipquant[qwix]'", name="qwix"
        ) from error

    def convert(key: jax.tree_util.KeyPath, leaf: Any) -> Any:
        if not is_qarray(leaf):
            return leaf
        refuse_abstract(f"leaf {path_of(key)!r}", leaf, "give arrays, or call it in jax.eval_shape")
        codes, scale, zero_point = _parts_of(leaf, path_of(key))
        return qwix.QArray(codes, scale, zero_point, codes.dtype)

    def fill(key: jax.tree_util.KeyPath, box: Any, leaf: Any) -> Any:
        if np.shape(box) != np.shape(leaf):
            raise ValueError(
                f"leaf {path_of(key)!r} has shape {np.shape(leaf)}, but {np.shape(box)} in `like`"
            )
        if not _is_box(box):
            return leaf.dequantize() if is_qarray(leaf) else leaf
        if not is_qarray(leaf):
            raise ValueError(
                f"leaf {path_of(key)!r} is quantized in `like`, but not in qparams; quantize it, or "
                "give the model a rule that leaves it alone"
            )
        return box.replace(array=convert(key, leaf))

    if like is None:
        return map_with_path(convert, qparams, is_leaf=is_qarray)
    return map_with_path(fill, like, qparams, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    """Whether ``leaf`` is the box of a weight in a PTQ model, a class that qwix does not export."""
    return hasattr(leaf, "array") and hasattr(leaf, "how")


def _parts_of(q: QArray, path: str) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The codes, scale and zero point for qwix, which decodes ``(code - zero point) * scale``."""
    grid, codes, scale = q.grid, q.qvalue, q.grid.scale.astype(jnp.float32)
    lower, upper = grid.lower, grid.upper
    if grid.codebook is not None:
        raise ValueError(
            f"leaf {path!r} has a codebook, which qwix lacks; quantize with Uniform, or give the "
            "model floats with dequantize_params"
        )
    if grid.zero_point is not None and not jnp.issubdtype(grid.zero_point.dtype, jnp.integer):
        raise ValueError(
            f"leaf {path!r} has fractional zero points (ZScore), which qwix's integer products do not "
            "support; quantize with Uniform(symmetric=False)"
        )
    if grid.group is not None:
        axis, size = grid.group
        if q.shape[axis] % size:
            raise ValueError(
                f"leaf {path!r} has {q.shape[axis]} entries along axis {axis} in groups of {size}, and "
                "qwix has no shorter last group; choose a group_size that divides them"
            )
    if grid.offset:
        codes = 2 * codes.astype(jnp.int8) + jnp.int8(1)
        lower, upper, scale = 2 * lower + 1, 2 * upper + 1, scale / 2
    dtype = jnp.int4 if lower >= -8 and upper <= 7 else jnp.int8
    short = scale.astype(grid.dtype)
    same = (short.astype(jnp.float32) == scale) | jnp.isnan(scale)
    if not isinstance(same, Tracer) and not bool(jnp.all(same)):
        raise ValueError(
            f"leaf {path!r} has scales that {grid.dtype}, its dtype, does not hold exactly; quantize a "
            "float32 leaf"
        )
    zero_point = None if grid.zero_point is None else grid.zero_point.astype(dtype)
    return codes.astype(dtype), short, zero_point
