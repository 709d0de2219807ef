"""The sensitivity of a loss to each weight."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from optax_clipquant._tree import (
    PyTree,
    flatten_with_path,
    is_float0,
    path_of,
    refuse_abstract,
)
from optax_clipquant.analysis.arguments import check_batches


def squared_gradients(
    loss: Callable[[PyTree, Any], jax.Array], params: PyTree, batches: Iterable[Any]
) -> PyTree:
    """The mean over batches of the squared gradient of each weight.

    To second order, moving a weight by ``d`` at a minimum of a negative log-likelihood costs ``E[g**2] *
    d**2 / 2`` (the diagonal of the empirical Fisher information), so this is a sensitivity for
    ``allocate_bits``. Small batches work best, since gradients cancel in the mean over a large one.

    A reconstruction loss ``sum((f(w) - f(w0))**2)`` has gradient 0 at ``w0``. Use the loss ``sum(v *
    f(w))`` with normal ``v`` drawn for each batch instead: its mean squared gradient is the diagonal of
    the second derivative (Gauss-Newton), up to a factor of 2.

    Args:
      loss: a function of params and a batch that returns a scalar. It is compiled once.
      params: the params to evaluate it at.
      batches: the batches.

    Returns:
      A tree of float32 arrays, zeros where params are integers.

    Raises:
      ValueError: there are no batches.
      TypeError: ``params`` have no values, or ``batches`` are no iterable of batches.

    Examples:
      >>> loss = lambda params, x: jnp.sum(params["w"] * x)
      >>> batches = [jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0])]
      >>> squared_gradients(loss, {"w": jnp.ones(2)}, batches)["w"]
      Array([5., 2.], dtype=float32)
    """

    check_batches("squared_gradients", batches)
    for path, leaf in flatten_with_path(params)[0]:
        refuse_abstract(f"squared_gradients: params leaf {path_of(path)!r}", leaf)

    @jax.jit
    def add(total: PyTree, batch: Any) -> PyTree:
        grads = jax.grad(loss, allow_int=True)(params, batch)
        return jax.tree.map(
            lambda t, g: t if is_float0(g) else t + jnp.square(g.astype(jnp.float32)), total, grads
        )

    total = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    count = 0
    for batch in batches:
        total = add(total, batch)
        count += 1
    if not count:
        raise ValueError("squared_gradients: batches is empty; give at least one")
    return jax.tree.map(lambda t: t / count, total)
