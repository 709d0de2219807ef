"""Dots and convolutions of data and weights as matrix products: ``x [batch, tokens, K] @ w [batch, K, N]``."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from optax_clipquant.lowering.sharding import gathered


@dataclasses.dataclass(frozen=True)
class DotInputs:
    """How the data of a ``dot_general`` is laid out.

    Attributes:
      batch: the batch axes of the data.
      contracted: its contracted axes.
      merged: whether all batches meet the same weights, and so count as tokens.
    """

    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    merged: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        batch = () if self.merged else self.batch
        free = [a for a in range(x.ndim) if a not in (*batch, *self.contracted)]
        shape = [math.prod(x.shape[a] for a in axes) for axes in (batch, free, self.contracted)]
        return gathered(x).transpose(*batch, *free, *self.contracted).reshape(shape)


@dataclasses.dataclass(frozen=True)
class ConvInputs:
    """How the patches of a ``conv_general_dilated`` are laid out.

    Attributes:
      layout: the axes of the images: batch, channels, space.
      window: the spatial extents of the kernel.
      groups: the number of feature groups.
      options: the options of the convolution.
    """

    layout: tuple[int, ...]
    window: tuple[int, ...]
    groups: int
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = gathered(x).transpose(self.layout)
        patches = jax.lax.conv_general_dilated_patches(
            x, self.window, **dict(self.options), precision=jax.lax.Precision.HIGHEST
        )
        patches = jnp.moveaxis(patches, 1, -1)
        patches = patches.reshape(-1, self.groups, patches.shape[-1] // self.groups)
        return patches.transpose(1, 0, 2)


Inputs = DotInputs | ConvInputs


def inputs_of(eqn: JaxprEqn, side: int) -> Inputs | None:
    """The layout of the data that the weight ``eqn.invars[side]`` meets; None if it has no known form."""
    params = eqn.params
    if eqn.primitive.name == "dot_general":
        contracted, batch = params["dimension_numbers"]
        return DotInputs(tuple(batch[1 - side]), tuple(contracted[1 - side]))
    if side == 0 or params["batch_group_count"] > 1:
        return None
    lhs, rhs, _ = params["dimension_numbers"]
    kernel: Any = eqn.invars[1].aval
    shape = kernel.shape
    options = {
        "window_strides": params["window_strides"],
        "padding": params["padding"],
        "lhs_dilation": params["lhs_dilation"],
        "rhs_dilation": params["rhs_dilation"],
    }
    window = tuple(shape[a] for a in rhs[2:])
    return ConvInputs(tuple(lhs), window, params["feature_group_count"], tuple(options.items()))


def matrix(eqn: JaxprEqn, side: int, w: Any) -> Any:
    """Rearranges ``w``, an array laid out like the weight, to ``[batch, K, N]``. Takes NumPy and JAX arrays."""
    if eqn.primitive.name == "dot_general":
        contracted, batch = (axes[side] for axes in eqn.params["dimension_numbers"])
        free = [a for a in range(w.ndim) if a not in (*batch, *contracted)]
        shape = [math.prod(w.shape[a] for a in axes) for axes in (batch, contracted, free)]
        return w.transpose(*batch, *contracted, *free).reshape(shape)
    groups = eqn.params["feature_group_count"]
    w = w.transpose(eqn.params["dimension_numbers"][1])
    return w.reshape(groups, w.shape[0] // groups, -1).transpose(0, 2, 1)


@partial(jax.jit, static_argnames="inputs")
def second_moments(
    inputs: Inputs, x: jax.Array, quantized: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """The sums over tokens ``xq xq.T`` and ``xq (x - xq).T [batch, K, K]``, and the number of non-zero tokens.

    In float32, whatever the dtype of the inputs.
    """
    product = partial(jnp.einsum, "btk,btl->bkl", precision=jax.lax.Precision.HIGHEST)
    x = inputs(x).astype(jnp.float32)
    if quantized is None:
        return product(x, x), None, _tokens(x)
    used = inputs(quantized).astype(jnp.float32)
    return product(used, used), product(used, x - used), _tokens(used)


def squares(inputs: Inputs, x: jax.Array) -> tuple[jax.Array, int]:
    """The sum over tokens of ``x**2 [batch, K]``, and the number of tokens."""
    return _squares(inputs, x), jax.eval_shape(inputs, x).shape[1]


@partial(jax.jit, static_argnames="inputs")
def _squares(inputs: Inputs, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(inputs(x).astype(jnp.float32)), axis=1)


def _tokens(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.any(x != 0, axis=2), axis=1)


def merged(inputs: Inputs, index: np.ndarray) -> tuple[Inputs, np.ndarray]:
    """Turns batches into tokens if all meet the same weights."""
    if isinstance(inputs, DotInputs) and len(index) > 1 and (index == index[:1]).all():
        return dataclasses.replace(inputs, merged=True), index[:1]
    return inputs, index
