"""Quantized trees on devices: shardings, and codes in few bits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optax_clipquant.lowering.sharding import sharding_of_scales
from optax_clipquant.quant.qarray import QArray, is_qarray


def shardings_for(qparams: Any, shardings: Any) -> Any:
    """The shardings of the arrays of ``qparams``, for ``jax.device_put`` and ``jax.jit(in_shardings=...)``.

    Codes are sharded like the weights. Scales are split like the codes, except that they are replicated
    along axes that codes share (a ``(1, n)`` scale has no rows to split) or that do not divide.

    Args:
      qparams: a tree with ``QArray`` leaves, of arrays or ``jax.ShapeDtypeStruct``.
      shardings: one sharding; or a tree of them for the float params, or a prefix of one.

    Returns:
      A tree like ``qparams`` with shardings in place of arrays.

    Examples:
      >>> from optax_clipquant import Grid
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> grid = Grid(scale=jnp.full((1, 2), 0.5), bits=4, lower=-8, upper=7)
      >>> qparams = {"w": QArray(jnp.ones((4, 2), jnp.int8), grid)}
      >>> rows = jax.NamedSharding(mesh, jax.P("model", None))
      >>> found = shardings_for(qparams, {"w": rows})
      >>> found["w"].qvalue.spec, found["w"].scale.spec
      (P('model', None), P(None, None))
      >>> qparams = jax.device_put(qparams, found)
    """

    def of_leaf(sharding: Any, leaf: Any) -> Any:
        if not is_qarray(leaf):
            return sharding
        return jax.tree.map(
            lambda x: (
                sharding if x is leaf.qvalue else sharding_of_scales(sharding, x.shape, leaf.shape)
            ),
            leaf,
        )

    def of_subtree(sharding: Any, subtree: Any) -> Any:
        if not isinstance(sharding, jax.sharding.Sharding):
            raise TypeError(
                f"shardings_for: shardings must hold jax.sharding.Sharding, got {sharding!r}; a "
                "jax.P needs its mesh: jax.NamedSharding(mesh, spec)"
            )
        return jax.tree.map(functools.partial(of_leaf, sharding), subtree, is_leaf=is_qarray)

    return jax.tree.map(of_subtree, shardings, qparams, is_leaf=lambda x: isinstance(x, jax.P))


def narrow(qparams: Any) -> Any:
    """Returns ``qparams`` with codes as int4 or int2, and scales as bfloat16, where they fit.

    This is for accelerators, whose compilers keep such codes packed in memory, so that a 4-bit weight is
    read as half a byte. XLA's CPU backend uses a byte for each anyway and is slow at writing them, so int8
    is the default. No value changes: scales that bfloat16 cannot hold exactly, such as those of a file that
    llama.cpp wrote, stay float32. Inside ``jax.jit``, where values cannot be compared, they become bfloat16
    regardless.

    Args:
      qparams: a tree with ``QArray`` leaves; other leaves are left alone.

    Examples:
      >>> from optax_clipquant import Grid
      >>> grid = Grid(scale=jnp.full((1, 1), 0.5), bits=4, lower=-8, upper=7)
      >>> narrow(QArray(jnp.array([[1, -8]], jnp.int8), grid)).qvalue.dtype
      dtype(int4)
    """

    def narrow_leaf(leaf: Any) -> Any:
        if not is_qarray(leaf):
            return leaf
        grid = leaf.grid
        dtype = next(
            (t for t in (jnp.int2, jnp.int4) if jnp.iinfo(t).min <= grid.lower and grid.upper <= jnp.iinfo(t).max),
            leaf.qvalue.dtype,
        )  # fmt: skip
        # Fractional zero points mark a z-score grid, whose scale may use all of float32's bits.
        if grid.zero_point is None or jnp.issubdtype(grid.zero_point.dtype, jnp.integer):
            short = grid.scale.astype(jnp.bfloat16)
            same = jnp.array_equal(
                short.astype(jnp.float32), grid.scale.astype(jnp.float32), equal_nan=True
            )
            if isinstance(same, Tracer) or same:
                grid = dataclasses.replace(grid, scale=short)
        return QArray(leaf.qvalue.astype(dtype), grid)

    return jax.tree.map(narrow_leaf, qparams, is_leaf=is_qarray)
