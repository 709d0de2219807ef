"""``--budget``: chooses the bits of each tensor from its errors at all widths.

It needs JAX, and is imported only where needed.
"""

import concurrent.futures
import contextlib
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.cli.numpy_grid import Threads, in_turn, threads
from optax_clipquant.cli.rules import WIDTHS, Rule
from optax_clipquant.cli.search.rows import (
    Key,
    Part,
    Quantizers,
    dtype_of,
    keys_of,
    parts_of,
    quantizer_of,
    valid_of,
)
from optax_clipquant.cli.search.scales import buffer_for, check_platform
from optax_clipquant.cli.terminal import Progress
from optax_clipquant.formats.checkpoint import Checkpoint
from optax_clipquant.formats.dtypes import nbytes
from optax_clipquant.quant.quantizers.base import ChannelwiseQuantizer, quantize_rows
from optax_clipquant.tuning.allocate import Table, budget_of

_BLOCK = 2**17  # weights that fit a cache
_SAMPLE = 2**20  # weights; the error of a larger tensor is estimated from a sample of its rows
_LONGEST = 2**20  # weights; the error of a longer row is estimated from a sample of its weights
_EMBEDDING = re.compile(
    r"(^|[./])(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|token_embd|lm_head)([./]|$)"
)

Programs = Mapping[Key, concurrent.futures.Future[jax.stages.Compiled]]


def allocate_rules(
    source: Checkpoint, rules: Mapping[str, Rule], budget: float, progress: Progress
) -> dict[str, Rule]:
    """``rules`` with open bits filled in, for the least squared error within a budget.

    Every weight counts alike, which says little about a language model: there, allocations by squared error
    are worse than uniform widths of the same size (SmolLM2 at 4.5 bits per weight: KL .308 against .268). So
    its tensors stay within one bit of the largest width that all can have.

    Raises:
      ValueError: the budget is below the smallest size, which is noticed before anything is read.
    """
    check_platform()
    sizes = [
        _padded([rule.packed_bytes(source.specs[name], bits) for bits in rule.widths])
        for name, rule in rules.items()
    ]
    sizes = np.array(sizes)
    counts = np.array([math.prod(source.specs[name][1]) for name in rules], np.float64)
    limit = budget_of(sizes, counts.sum(), budget)
    errors = np.array([_padded(e) for e in measure(source, rules, progress).values()])
    if is_language_model(source.specs):
        open_widths = {n for rule in rules.values() if len(rule.widths) > 1 for n in rule.widths}
        fitting = (n for n in open_widths if _size(source, rules, n) <= limit)
        uniform = max(fitting, default=min(open_widths, default=WIDTHS[0]))
        near = np.array([_near(rule.widths, uniform) for rule in rules.values()])
    else:
        near = np.tile(np.arange(len(WIDTHS)), (len(rules), 1))
    table = Table(
        np.take_along_axis(sizes, near, 1), np.take_along_axis(errors, near, 1), counts, limit
    )
    with _quiet():
        chosen = near[np.arange(len(rules)), table.solve()]
    return {
        name: rule if len(rule.widths) == 1 else rule._replace(bits=_padded(rule.widths)[index])
        for (name, rule), index in zip(rules.items(), chosen, strict=True)
    }


def is_language_model(names: Iterable[str]) -> bool:
    """Whether a tensor has a name that language models give their token embedding."""
    return any(_EMBEDDING.search(name) for name in names)


def _size(source: Checkpoint, rules: Mapping[str, Rule], width: int) -> int:
    """The bytes of all tensors at a width, or at the nearest width that their rules allow."""
    return sum(
        rule.packed_bytes(source.specs[name], min(rule.widths, key=lambda n: abs(n - width)))
        for name, rule in rules.items()
    )


def _near(widths: Sequence[int], uniform: int) -> list[int]:
    """For each width, the position of the nearest one within a bit of ``uniform``, or of the one nearest to that."""
    least = min(abs(n - uniform) for n in widths)
    allowed = [i for i, n in enumerate(widths) if abs(n - uniform) <= max(1, least)]
    nearest = [min(allowed, key=lambda i: abs(widths[i] - n)) for n in widths]
    return _padded(nearest)


def measure(
    source: Checkpoint, rules: Mapping[str, Rule], progress: Progress
) -> dict[str, np.ndarray]:
    """The sum of squared errors of each tensor at each of its rule's widths.

    Rows and tensors of more than a million weights are sampled. A program measures all widths, whose searches
    have much in common. Rows with weights that are not finite do not count.
    """
    parts = {name: parts_of(source.specs[name][1], rule) for name, rule in rules.items()}
    keys = keys_of(
        {
            (name, i): _needed(part, rule, dtype_of(source.specs[name]))
            for name, rule in rules.items()
            for i, part in enumerate(parts[name])
        },
        _BLOCK,
    )
    buffer, found = buffer_for(source, rules), {}
    with threads(2) as compiler, threads(2) as runner:
        programs = {
            key: compiler.submit(key.lower(_squared_errors).compile)
            for key in dict.fromkeys(keys.values())
        }
        for name, rule in rules.items():
            w = source.read(name, buffer)
            found[name] = np.zeros(len(rule.widths))
            for i, part in enumerate(parts[name]):
                key = keys[name, i]
                found[name] += _errors(part, w, key, programs[key].result(), runner)
            progress(nbytes(*source.specs[name]))
    return found


def _needed(part: Part, rule: Rule, dtype: np.dtype) -> tuple[Quantizers, np.dtype, int, int]:
    """What ``keys_of`` takes: the quantizer of each width, and the rows to measure."""
    quantizers = tuple(quantizer_of(rule, bits) for bits in rule.widths)
    length = min(part.length, _LONGEST)
    return quantizers, dtype, min(part.rows, -(-_SAMPLE // length)), length


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the output of the solver's C++ code out of stdout, which may be for JSON."""
    sys.stdout.flush()
    stdout = os.dup(1)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _padded(choices: Any) -> list[Any]:
    """Repeats the last choice, to the same number for every tensor."""
    return [*choices, *[choices[-1]] * (len(WIDTHS) - len(choices))]


@jax.jit
def _squared_errors(
    quantizers: Quantizers, rows: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums of squared errors, in units of the square of the largest weight, and that weight.

    Rows with weights that are not finite do not count: they are lost at any width.
    """
    w, valid = rows.astype(jnp.float32), valid_of(rows, count)
    reach = jnp.max(jnp.abs(w), axis=1)
    largest = jnp.max(jnp.where(jnp.isfinite(reach), reach, 0))
    unit = jnp.where(largest == 0, 1, largest)

    def error(quantizer: ChannelwiseQuantizer) -> jax.Array:
        q = quantize_rows(quantizer, rows, valid)
        squares = valid * jnp.square((q.dequantize().astype(jnp.float32) - w) / unit)
        return jnp.sum(jnp.where(jnp.isfinite(q.scale), squares, 0))

    return jnp.stack([error(quantizer) for quantizer in quantizers]), unit


def _errors(
    part: Part, w: np.ndarray, key: Key, program: jax.stages.Compiled, threads: Threads
) -> np.ndarray:
    """The sum of squared errors of a part of a tensor at each width."""
    rows = part.matrix(part.view(w)) if w.size else np.zeros((0, 1), w.dtype)
    count, length = len(rows), min(part.length, _LONGEST)

    def of_block(block: np.ndarray) -> np.ndarray:
        errors, unit = program(key.quantizers, key.block(block), np.int32(length))
        return np.asarray(errors, np.float64) * float(unit) ** 2

    most = max(_SAMPLE // (key.rows * part.length), 1) * key.rows
    rng = np.random.default_rng(0)
    factor = part.length / length
    if count > most:
        # Errors of rows scale with the squares of their largest weights, which are known for all rows.
        squares = np.square(_largest(rows).astype(np.float64))
        squares[~np.isfinite(squares)] = 0
        sample = np.sort(rng.choice(count, most, replace=False))
        rows, found = rows[sample], squares[sample].sum()
        factor *= squares.sum() / found if found else count / most
    if part.length > length:
        # The sample includes the extremes, which scales depend on.
        sample = rows[:, rng.choice(part.length, length, replace=False)]
        sample[:, 0], sample[:, 1] = rows.max(1), rows.min(1)
        rows = sample
    blocks = (rows[first : first + key.rows] for first in range(0, len(rows), key.rows))
    return factor * sum(in_turn(threads, of_block, blocks), np.zeros(len(key.quantizers)))


def _largest(rows: np.ndarray) -> np.ndarray:
    """The largest magnitude of each row; NaN if there is one."""
    # As integers, magnitudes have the same order, and NumPy takes a tenth of the time for bfloat16.
    unsigned = np.dtype(f"u{rows.itemsize}")
    magnitude = unsigned.type(2 ** (8 * rows.itemsize - 1) - 1)
    step = max(2**20 // rows.shape[1], 1)
    found = [
        (rows[first : first + step].view(unsigned) & magnitude).max(1)
        for first in range(0, len(rows), step)
    ]
    return np.concatenate(found).view(rows.dtype)
