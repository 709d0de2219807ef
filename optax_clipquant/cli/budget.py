"""``--budget``: chooses the bits of each tensor from its errors at all widths.

It needs JAX, and is imported only where needed.
"""

import collections
import concurrent.futures
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.cli.numpy_grid import Threads, in_turn
from optax_clipquant.cli.rules import FLOAT8, WIDTHS, Rule, scale_layout
from optax_clipquant.cli.search import buffer_for, check_platform, quantizer_of
from optax_clipquant.cli.terminal import Progress
from optax_clipquant.formats.checkpoint import Checkpoint
from optax_clipquant.formats.dtypes import nbytes
from optax_clipquant.quant.quantizers.base import Quantizer
from optax_clipquant.tuning.allocate import Table, budget_of

_BLOCK = 2**17  # weights that fit a cache
# Weights that can be measured in the time it takes to compile the programs for one length.
_COMPILATION = 10**8
_SAMPLE = 2**20  # weights; the error of a larger tensor is estimated from a sample of its rows
_LONGEST = 2**20  # weights; the error of a longer row is estimated from a sample of its weights
_EMBEDDING = re.compile(
    r"(^|[./])(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|token_embd|lm_head)([./]|$)"
)

Key = tuple[tuple[Quantizer, ...], np.dtype, int]
"""The key of a compiled program: the quantizers of rows, the dtype of the weights, and the length of a row."""
Program = Callable[[tuple[Quantizer, ...], np.ndarray], tuple[jax.Array, jax.Array]]
Programs = Mapping[Key, concurrent.futures.Future[Program]]


def allocate_rules(
    source: Checkpoint, rules: Mapping[str, Rule], budget: float, progress: Progress
) -> dict[str, Rule]:
    """``rules`` with open bits filled in, for the least squared error within a budget.

    Every weight counts alike, which says little about a language model: there, allocations by squared error
    are worse than uniform widths of the same size (SmolLM2 at 4.5 bits per weight: KL .308 against .268). So
    its tensors stay within one bit of the largest width that all can have.

    Raises:
      ValueError: the budget is below the smallest size, which is noticed before anything is read; or as
        ``measure`` does.
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
        uniform = max((n for n in WIDTHS if _size(source, rules, n) <= limit), default=WIDTHS[0])
        near = np.array([_near(rule.widths, uniform) for rule in rules.values()])
    else:
        near = np.tile(np.arange(len(WIDTHS)), (len(rules), 1))
    table = Table(
        np.take_along_axis(sizes, near, 1), np.take_along_axis(errors, near, 1), counts, limit
    )
    with _quiet():
        chosen = near[np.arange(len(rules)), table.solve()]
    return {
        name: rule if len(rule.widths) == 1 else rule._replace(bits=rule.widths[index])
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

    Weights that share a scale are laid out as a row, so that tensors share programs, whose compilation
    would take most of the time with many shapes. Rows are then lengthened to one of a few lengths by
    repeating some of their weights. Rows and tensors of more than a million weights are sampled. A program
    measures all widths, whose searches have much in common.

    Raises:
      ValueError: a tensor has weights that are not finite.
    """
    lengths = {name: _length(source.specs[name][1], rule) for name, rule in rules.items()}
    weights: dict[int, int] = collections.Counter()
    for name, length in lengths.items():
        weights[length] += min(math.prod(source.specs[name][1]), _SAMPLE)
    common = _common_lengths(weights)
    keys = {
        name: (_row_quantizers(rule), _dtype(source, name), common[lengths[name]])
        for name, rule in rules.items()
    }
    buffer, found = buffer_for(source, rules), {}
    with Threads(2) as compiler, Threads(2) as runner:
        programs = {
            key: compiler.submit(_lower(key).compile) for key in dict.fromkeys(keys.values())
        }
        for name, rule in rules.items():
            w = source.read(name, buffer).astype(_dtype(source, name), copy=False)
            found[name] = _errors(w, rule, keys[name], programs, runner)
            if not np.isfinite(found[name]).all():
                raise ValueError(
                    f"tensor {name!r} has weights that are infinite or NaN; fix them, or keep it with --rule"
                )
            progress(nbytes(*source.specs[name]))
    return found


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


def _dtype(source: Checkpoint, name: str) -> np.dtype:
    dtype, _ = source.specs[name]
    assert isinstance(dtype, np.dtype)
    return np.dtype(np.float32) if dtype in FLOAT8 else dtype


def _row_quantizers(rule: Rule) -> tuple[Quantizer, ...]:
    """The quantizer of each width, for rows."""
    as_rows = rule._replace(channel_axis=0, group_size=None)
    return tuple(quantizer_of(as_rows, bits) for bits in rule.widths)


def _length(shape: tuple[int, ...], rule: Rule) -> int:
    """The number of weights that share a scale."""
    axes, _, group = scale_layout(shape, rule.channel_axis, rule.group_size)
    length = math.prod(shape[axis] for axis in axes) * (1 if group is None else group[1])
    return min(max(length, 1), _LONGEST)


def _common_lengths(weights: Mapping[int, int]) -> dict[int, int]:
    """The length to extend rows of each length to, for the least time of compilation and measurement.

    ``weights`` counts the weights in rows of each length.
    """
    lengths = sorted(weights)
    # For each number of shortest lengths: the least cost, and how many come before the last common length.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for last, common in enumerate(lengths, 1):
        costs = []
        cost = float(_COMPILATION)
        for first in range(last - 1, -1, -1):
            cost += weights[lengths[first]] * common / lengths[first]
            costs.append((best[first][0] + cost, first))
        best.append(min(costs))
    found, last = {}, len(lengths)
    while last:
        first = best[last][1]
        found |= dict.fromkeys(lengths[first:last], lengths[last - 1])
        last = first
    return found


def _lower(key: Key) -> jax.stages.Lowered:
    quantizers, dtype, width = key
    block = jax.ShapeDtypeStruct((max(_BLOCK // width, 1), width), dtype)
    return _squared_errors.lower(quantizers, block)


@jax.jit
def _squared_errors(
    quantizers: tuple[Quantizer, ...], rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums of squared errors, in units of the square of the largest weight, and that weight."""
    w = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w))
    unit = jnp.where(largest == 0, 1, largest)
    errors = (q.quantize(rows).dequantize().astype(jnp.float32) - w for q in quantizers)
    return jnp.stack([jnp.sum(jnp.square(error / unit)) for error in errors]), unit


def _errors(
    w: np.ndarray, rule: Rule, key: Key, programs: Programs, threads: Threads
) -> np.ndarray:
    """The sum of squared errors of a tensor at each width."""
    program, (quantizers, _, width) = programs[key].result(), key

    def of_block(block: np.ndarray) -> np.ndarray:
        errors, unit = program(quantizers, block)
        return np.asarray(errors, np.float64) * float(unit) ** 2

    total = np.zeros(len(quantizers))
    for rows in _rows(w, rule):
        count, length = rows.shape
        step = max(_BLOCK // width, 1)
        most = max(_SAMPLE // (step * length), 1) * step
        rng = np.random.default_rng(0)
        factor = length / width
        if count > most:
            # Errors of rows scale with the squares of their largest weights, which are known for all rows.
            squares = np.square(_largest(rows).astype(np.float64))
            sample = np.sort(rng.choice(count, most, replace=False))
            rows, part = rows[sample], squares[sample].sum()
            factor *= squares.sum() / part if part else count / most
        if length > width:
            # The sample includes the extremes, which scales depend on.
            sample = rows[:, rng.choice(length, width, replace=False)]
            sample[:, 0], sample[:, 1] = rows.max(1), rows.min(1)
            rows = sample
        total += factor * sum(in_turn(threads, of_block, _blocks(rows, step, width)))
    return total


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


def _blocks(rows: np.ndarray, step: int, width: int) -> Iterator[np.ndarray]:
    """Blocks of ``step`` rows, repeated along their length to ``width``, and padded with rows of zeros."""
    length = rows.shape[1]
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        block = np.zeros((step, width), rows.dtype)
        block[: len(part)] = part if length == width else part[:, np.arange(width) % length]
        yield block


def _rows(w: np.ndarray, rule: Rule) -> Iterator[np.ndarray]:
    """``w`` as ``[scales, weights per scale]``, with the last groups separately if they are shorter."""
    axes, _, group = scale_layout(w.shape, rule.channel_axis, rule.group_size)
    if group is None:
        yield _as_rows(w, axes)
        return
    axis, size = group[0] + w.ndim, group[1]
    whole = w.shape[axis] // size * size
    before = (slice(None),) * axis
    for part in (w[(*before, slice(whole))], w[(*before, slice(whole, None))]):
        run = min(size, part.shape[axis])
        if part.size:
            split = part.reshape(*w.shape[:axis], -1, run, *w.shape[axis + 1 :])
            yield _as_rows(split, (axis + 1, *(a + (a > axis) for a in axes)))


def _as_rows(w: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    kept = [axis for axis in range(w.ndim) if axis not in axes]
    length = math.prod(w.shape[axis] for axis in axes)
    return w.transpose(*kept, *axes).reshape(-1, max(length, 1)) if w.size else np.zeros((0, 1), w.dtype)  # fmt: skip
