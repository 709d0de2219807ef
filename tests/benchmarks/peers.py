"""What others quantize a language model's matrices with: the peers of ``language_model.py``.

qwix's int4, int3 and int2, nf4, GPTQ and AWQ are its functions on single matrices with the inputs of the float
model, which is what its hooks gather. HQQ and AWQ are formulas with the settings of their packages, which need
PyTorch.

HQQ is of Badri and Shaji (Half-Quadratic Quantization of Large Machine Learning Models, 2023). It has zero
points, so its groups are of 64, for equal bits per weight. (In groups of 32, a grid of 4 bits with zero points
is that of the file, Q4_1, and finds the float model's weights again.)

AWQ is of Lin et al. (Activation-aware Weight Quantization, arXiv:2306.00978), as llm-awq and AutoAWQ run it for
a Llama, except that

- its grid is that of the other rows, symmetric in groups of 32, with the sign of the scale for which the largest
  magnitude gets the last level. On it the KL is .089 at 4 bits and .42 at 3; with zero points in groups of 64, as
  the packages have it, .112 and .60; with the largest magnitude on level 7, .120 at 4 bits;
- the inputs of ``attn_output`` have multipliers too, which the packages leave out where heads share values, and
  queries and keys are clipped too, which is slightly better (.112 for .114 with zero points);
- what chooses the exponent is the error of the matrices' own outputs, for q, k and v as for gate and up, where
  the packages take the output of the attention and of the MLP.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import smollm2

if TYPE_CHECKING:
    from language_model import Work

PyTree = Any
SHARING = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))


def how(qtype: Any) -> Any:
    """Of a matrix ``[out, in]``."""
    import qwix._src.core.qarray

    return qwix._src.core.qarray.HowToQuantize(
        qtype=qtype, channelwise_axes=(0,), tiled_axes={1: smollm2.GROUP}
    )


def by_qwix(qtype: Any, fit: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    """``fit`` for each layer, of the matrix ``[out, in]``; in and out are ``[layers, in, out]``."""
    return jax.lax.map(lambda xs: fit(xs[0].T, *xs[1:], how(qtype)).T, arguments)


def qwix_plain(work: "Work", bits: int, qtype: Any = None) -> PyTree:
    from qwix._src.core import qarray

    def fit(w: jax.Array, how: Any) -> jax.Array:
        return qarray.dequantize(qarray.quantize(w, how))

    return work.by_matrix(lambda _, w: by_qwix(qtype or f"int{bits}", fit, w))


def gptq_matrix(w: jax.Array, hessian: jax.Array, how: Any) -> jax.Array:
    """``gptq_core.quantize_weight`` with a block for each group, as loops: unrolled, it compiles for long."""
    from qwix.contrib import gptq_core

    size, columns = smollm2.GROUP, w.shape[1]
    damping = 0.01 * jnp.trace(hessian) / columns
    lower = jnp.linalg.cholesky(hessian + damping * jnp.eye(columns))
    u = jnp.linalg.cholesky(gptq_core.cholesky_inverse(lower), upper=True)

    def group(w: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        inside = jax.lax.dynamic_slice_in_dim(w, first, size, 1)
        rows = jax.lax.dynamic_slice_in_dim(u, first, size, 0)
        local = jax.lax.dynamic_slice_in_dim(rows, first, size, 1)
        scale, zero_point = gptq_core.find_params(inside, how)

        def column(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            inside, found, errors = carry
            _, level = gptq_core.quantize(inside[:, j][:, None], how.qtype, scale, zero_point)
            error = (inside[:, j] - level[:, 0]) / local[j, j]
            inside = inside - jnp.where(jnp.arange(size) >= j, local[j], 0)[None] * error[:, None]
            return inside, found.at[:, j].set(level[:, 0]), errors.at[:, j].set(error)

        zeros = jnp.zeros_like(inside)
        _, found, errors = jax.lax.fori_loop(0, size, column, (inside, zeros, zeros))
        later = jnp.where(jnp.arange(columns)[None] >= first + size, errors @ rows, 0)
        return w - later, found

    _, found = jax.lax.scan(group, w, jnp.arange(0, columns, size))
    return jnp.moveaxis(found, 0, 1).reshape(w.shape)


def qwix_gptq(work: "Work", bits: int) -> PyTree:
    from qwix.contrib import gptq_core

    hessians = work.statistics(lambda x: gptq_core.compute_hessian(x.T))
    return work.by_matrix(lambda name, w: by_qwix(f"int{bits}", gptq_matrix, w, hessians[name]))


def qwix_awq(work: "Work", bits: int) -> PyTree:
    from qwix._src.core import qarray
    from qwix.contrib import awq_core

    def fit(w: jax.Array, inputs: jax.Array, how: Any) -> jax.Array:
        codes, scales = awq_core.quantize_weight(w, inputs, how)
        return qarray.dequantize(codes) / scales

    inputs = work.statistics(awq_core.compute_act_scale)
    return work.by_matrix(lambda name, w: by_qwix(f"int{bits}", fit, w, inputs[name]))


@functools.partial(jax.jit, static_argnums=1)
def hqq_matrix(w: jax.Array, bits: int) -> jax.Array:
    """Zero points that minimise the error in the l_p quasi-norm, p = .7, by half-quadratic splitting.

    ``W_e`` is the proximal step on the error, the zero point then fits ``W - W_e`` in closed form;
    beta starts at 10 and grows by 1.01, 20 rounds.
    """
    shape, top, p = w.shape, 2**bits - 1, 0.7
    w = w.reshape(shape[0], -1, 2 * smollm2.GROUP, shape[2])
    low, high = jnp.min(w, 2, keepdims=True), jnp.max(w, 2, keepdims=True)
    scale = top / jnp.maximum(high - low, 1e-8)

    def codes(zero: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(w * scale + zero), 0, top)

    def round_(i: jax.Array, zero: jax.Array) -> jax.Array:
        q = codes(zero)
        error = w - (q - zero) / scale
        size = jnp.maximum(jnp.abs(error), 1e-12)
        shrunk = jnp.sign(error) * jnp.maximum(size - size ** (p - 1) / (10 * 1.01**i), 0)
        return jnp.mean(q - (w - shrunk) * scale, 2, keepdims=True)

    zero = jax.lax.fori_loop(0, 20, round_, -low * scale)
    return ((codes(zero) - zero) / scale).reshape(shape)


def hqq(work: "Work", bits: int) -> PyTree:
    return work.by_matrix(lambda _, w: hqq_matrix(w, bits))


def nearest(w: jax.Array, bits: int, ratio: jax.Array | float = 1) -> jax.Array:
    """Levels of groups ``[groups, size, out]``; the largest magnitude times ``ratio`` is the last level."""
    top = 2 ** (bits - 1)
    low, high = jnp.min(w, 1, keepdims=True), jnp.max(w, 1, keepdims=True)
    scale = ratio * jnp.where(high > -low, high, low) / -top
    scale = jnp.where(scale == 0, 1, scale)
    return scale * jnp.clip(jnp.round(w / scale), -top, top - 1)


@functools.partial(jax.jit, static_argnums=2)
def awq_matrix(w: jax.Array, inputs: jax.Array, bits: int) -> jax.Array:
    """Multipliers ``m = E|x|^a`` of the inputs, then clipping: ``Q(w m) / m``, of ``w [in, out]``.

    Of 20 exponents ``a`` the one with the least error of the output, and for each group of each output channel the
    largest level, of 1 to .55 times the largest magnitude, with the least error of what the group adds to it.
    ``inputs`` has E[x x^T], and E|x| as its last row; with them the error of all tokens is ``e^T E[x x^T] e``.
    """
    h, size = inputs[:-1], smollm2.GROUP

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(-1, size, x.shape[-1])

    def multipliers(exponent: jax.Array) -> jax.Array:
        m = jnp.maximum(inputs[-1] ** exponent, 1e-4)[:, None]
        return m / jnp.sqrt(jnp.max(m) * jnp.min(m))

    def loss(exponent: jax.Array) -> jax.Array:
        m = multipliers(exponent)
        error = nearest(grouped(w * m), bits).reshape(w.shape) / m - w
        return jnp.vdot(error, h @ error)

    exponents = jnp.arange(20) / 20
    m = multipliers(exponents[jnp.argmin(jax.lax.map(loss, exponents))])
    groups = jnp.arange(len(w) // size)
    inside = h.reshape(len(groups), size, len(groups), size)[groups, :, groups]

    def group_loss(ratio: jax.Array) -> jax.Array:
        error = nearest(grouped(w * m), bits, ratio) / grouped(m) - grouped(w)
        return jnp.sum(error * (inside @ error), 1, keepdims=True)

    ratios = 1 - jnp.arange(10) / 20
    ratio = ratios[jnp.argmin(jax.lax.map(group_loss, ratios), 0)]
    return nearest(grouped(w * m), bits, ratio).reshape(w.shape) / m


def awq(work: "Work", bits: int) -> PyTree:
    def of(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x.T @ x / len(x), jnp.mean(jnp.abs(x), 0)[None]])

    inputs, blocks = work.statistics(of), work.params["blocks"]
    found: dict[str, jax.Array] = {}
    for names in SHARING:
        together = jnp.concatenate([blocks[name] for name in names], 2)
        fitted = jax.lax.map(lambda xs: awq_matrix(*xs, bits), (together, inputs[names[0]]))
        ends = np.cumsum([blocks[name].shape[2] for name in names])[:-1]
        found |= dict(zip(names, jnp.split(fitted, ends, 2), strict=True))
    return work.by_matrix(lambda name, _: found[name])
