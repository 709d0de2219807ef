"""Safetensors files made small, and plain again, one tensor at a time.

A tensor is quantized or dequantized in a thread while the one before is packed and written, so that
memory holds two of them: about twice the largest.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_clipquant.allocation import allocate
from optax_clipquant.container import Reader, Spec, nbytes, writing
from optax_clipquant.files import SavedFile, is_saved, write
from optax_clipquant.names import name_of
from optax_clipquant.params import is_weight, naming
from optax_clipquant.qarray import is_qarray
from optax_clipquant.quantizers import Quantizer
from optax_clipquant.report import Row

WIDTHS = (2, 3, 4, 6, 8)  # that a budget is spent on
# Others are left alone: jax would cut 64 bits, and 8 bits are small.
_QUANTIZED = {jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32)}

T = TypeVar("T")
Progress = Callable[[int], None]
"""Is told of bytes done."""

_quantize = jax.jit(lambda rule, w: rule.quantize(w))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, quantized or not.

    Attributes:
      spec: dtype and shape of what it stands for.
      bits: bits of a code or an element.
      nbytes: its bytes in the file.
      quantized: whether it is a ``QArray``.
      read: gives it.
    """

    spec: Spec
    bits: float
    nbytes: int
    quantized: bool
    read: Callable[[], Any]


def tensors_of(reader: Reader) -> dict[str, Tensor]:
    """The tensors of any file, by name; of one of ``save``, by path."""
    if not is_saved(reader):
        return {
            name: _plain(spec, functools.partial(reader.read, name))
            for name, spec in reader.specs.items()
        }
    file = SavedFile(reader)
    found: dict[str, Tensor] = {}
    for entry in file.entries:
        if entry.path in found:
            raise ValueError(f"{reader.path}: two tensors would have the name {entry.path!r}")
        read = functools.partial(file.leaf, entry)
        if entry.static is None or entry.shape is None:
            found[entry.path] = _plain(reader.specs[entry.name], read)
            continue
        spec = jnp.dtype(entry.static[5]), tuple(entry.shape)
        size = sum(nbytes(*reader.specs[name]) for name in entry.tensors.values())
        found[entry.path] = Tensor(spec, entry.static[0] or math.log2(3), size, True, read)
    return found


def array_of(leaf: Any) -> Any:
    return leaf.dequantize() if is_qarray(leaf) else leaf


def widths_of(
    specs: Mapping[str, Spec], default: int | None, rules: Sequence[tuple[str, int | None]]
) -> dict[str, int | None]:
    """The bits of each tensor that is to be quantized: those with at least 2 axes, not bias or scale.

    Args:
      specs: dtypes and shapes by name.
      default: what tensors get where no rule is found.
      rules: an expression and bits, or None for a tensor to be kept; the first that is found decides.

    Raises:
      ValueError: an expression is found nowhere, or in no tensor that could be quantized; or no tensor
        is to be quantized.
    """
    chosen = {name: default for name, spec in specs.items() if _is_weight(name, spec)}
    kept: set[str] = set()
    decided: set[str] = set()
    for pattern, bits in rules:
        found = [name for name in specs if re.search(pattern, name)]
        if not found:
            raise ValueError(f"rule {pattern!r} is found in the name of no tensor: see `inspect`")
        if bits is not None and not chosen.keys() & set(found):
            raise ValueError(
                f"rule {pattern!r} is found only in tensors that are never quantized: {found[:5]}"
            )
        for name in (chosen.keys() & set(found)) - decided:
            decided.add(name)
            if bits is None:
                kept.add(name)
            else:
                chosen[name] = bits
    chosen = {name: bits for name, bits in chosen.items() if name not in kept}
    if not chosen:
        raise ValueError(
            "no tensor is left to quantize: these are float16, bfloat16 or float32 with at least 2 "
            "axes, not named bias or scale, and not kept by a rule"
        )
    return chosen


def allocate_widths(
    source: Reader,
    widths: Mapping[str, int | None],
    budget: float,
    make: Callable[..., Quantizer],
    progress: Progress,
) -> dict[str, Quantizer]:
    """The quantizers of the least squared error within a budget, where ``widths`` leaves it open."""
    buffer = _buffer(source, widths)
    specs = {name: jax.ShapeDtypeStruct(*reversed(source.specs[name])) for name in widths}
    rules = {
        name: [make(bits=b) for b in (WIDTHS if bits is None else [bits] * len(WIDTHS))]
        for name, bits in widths.items()
    }

    def read(name: str) -> tuple[jax.Array, jax.Array]:
        w = _on_device(source.read(name, buffer))
        progress(nbytes(*source.specs[name]))
        return w, jnp.ones((1,) * w.ndim)

    return allocate(specs, rules, read, budget)


def compress(
    source: Reader,
    output: str | os.PathLike[str],
    rules: Mapping[str, Quantizer],
    progress: Progress,
) -> list[Row]:
    """Writes what ``save`` would write for the dict of all tensors, those in ``rules`` quantized."""
    programs: dict[Any, jax.stages.Lowered] = {}
    keys, leaves, rows = {}, {}, []
    for name, (dtype, shape) in source.specs.items():
        leaf = jax.ShapeDtypeStruct(shape, dtype)
        bits, size = 8.0 * dtype.itemsize, nbytes(dtype, shape)
        if name in rules:
            keys[name] = key = rules[name], dtype, shape
            if key not in programs:
                with naming(name):
                    programs[key] = _quantize.lower(rules[name], leaf)
            leaf = programs[key].out_info
            bits, size = leaf.bits, leaf.nbytes_packed
        leaves[name_of((name,))] = leaf
        rows.append(Row(name, shape, bits, nbytes(dtype, shape), size))

    with _compiling(programs) as compiled:

        def contents() -> Iterator[tuple[str, Any]]:
            buffer = _buffer(source, rules)
            for name, spec in source.specs.items():
                if name in rules:
                    quantize = compiled[keys[name]].result()
                    leaf: Any = quantize(rules[name], _on_device(source.read(name, buffer)))
                    jax.block_until_ready(leaf)  # the next takes the buffer
                else:
                    leaf = source.read(name)
                yield name_of((name,)), leaf
                progress(nbytes(*spec))

        with _ahead(contents()) as items:
            write(output, leaves, items, nodes={}, metadata=source.texts)
    return rows


def decompress(source: Reader, output: str | os.PathLike[str], progress: Progress) -> list[Row]:
    """Writes the tensors of a file of ``save`` as a plain file, with the metadata given to ``save``."""
    tensors = tensors_of(source)
    if "__metadata__" in tensors:
        raise ValueError(f"{source.path}: a plain file cannot have a tensor named '__metadata__'")
    specs = {path: tensor.spec for path, tensor in tensors.items()}

    def contents() -> Iterator[tuple[str, np.ndarray]]:
        for path, tensor in tensors.items():
            yield path, np.asarray(array_of(tensor.read()))
            progress(nbytes(*tensor.spec))

    with writing(output, specs, SavedFile(source).metadata) as file, _ahead(contents()) as items:
        for path, array in items:
            file.put(path, array)
    return [Row(p, t.spec[1], t.bits, t.nbytes, nbytes(*t.spec)) for p, t in tensors.items()]


def _plain(spec: Spec, read: Callable[[], Any]) -> Tensor:
    return Tensor(spec, 8 * spec[0].itemsize, nbytes(*spec), False, read)


def _is_weight(name: str, spec: Spec) -> bool:
    dtype, shape = spec
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    return dtype in _QUANTIZED and is_weight(name.replace(".", "/"), leaf)


def _buffer(source: Reader, names: Iterable[str]) -> np.ndarray:
    """Room for the largest of these tensors, at an address from which jax need not copy."""
    size = max(nbytes(*source.specs[name]) for name in names)
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size]


def _on_device(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, may_alias=True)


@contextlib.contextmanager
def _compiling(
    programs: Mapping[Any, jax.stages.Lowered],
) -> Iterator[dict[Any, concurrent.futures.Future[Any]]]:
    """The programs, which threads compile while the first of them run."""
    threads = concurrent.futures.ThreadPoolExecutor(2)
    try:
        yield {key: threads.submit(program.compile) for key, program in programs.items()}
    finally:
        threads.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """``items``, each made in a thread while the one before is in use."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:

        def take() -> Iterator[T]:
            future = thread.submit(next, items, None)
            while (item := future.result()) is not None:
                future = thread.submit(next, items, None)
                yield item

        yield take()
