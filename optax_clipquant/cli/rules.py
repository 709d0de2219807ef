"""The choice of tensors to quantize, their rules, and the reasons for keeping the others. No JAX here."""

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from optax_clipquant.formats.dtypes import Spec, bits_of, nbytes
from optax_clipquant.quant.groups import Group, contracted_axes, cut_groups, scale_shape
from optax_clipquant.quant.levels import Levels
from optax_clipquant.quant.uses import names_a_weight

WIDTHS = (2, 3, 4, 6, 8)  # the bits that a budget can choose
FLOAT8 = {np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}
# Without float64, which jax would truncate.
_QUANTIZED = {np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32)} | FLOAT8

Quantizer = Literal["uniform", "affine", "ternary", "normal-float"]


class Store(NamedTuple):
    """How the format of OUT stores quantized tensors, as far as a budget counts it.

    Attributes:
      widths: the bits that a budget can choose from.
      takes_others: whether codes of other widths are stored at their width, or at the next one of ``widths``.
      block: the number of weights that have a scale, whatever their groups; None if the groups have one.
      scale_bytes: the bytes of a scale; None for those of the tensor's dtype.
    """

    widths: tuple[int, ...] = WIDTHS
    takes_others: bool = True
    block: int | None = None
    scale_bytes: int | None = 2


SAFETENSORS = Store()


class Rule(NamedTuple):
    """The arguments of a quantizer. With ``bits`` None, a budget chooses them, or they are the default."""

    bits: int | None = None
    quantizer: Quantizer = "uniform"
    channel_axis: int | None = 0
    group_size: int | None = None
    scale_rule: Literal["absmax", "mse"] | None = None
    store: Store = SAFETENSORS

    @property
    def width(self) -> int:
        """The bits, if no budget chooses them."""
        return self.bits or (4 if self.quantizer == "normal-float" else 8)

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that a budget can choose from."""
        if self.bits or self.quantizer == "ternary":
            return (self.width,)
        widths = self.store.widths
        return tuple(n for n in widths if n <= 4) if self.quantizer == "normal-float" else widths

    @property
    def is_absmax(self) -> bool:
        """Whether ``numpy_grid.Absmax`` can quantize by this rule."""
        rule = self.scale_rule or ("absmax" if self.width > 3 else "mse")
        return self.quantizer == "uniform" and self.width >= 3 and rule == "absmax"

    def packed_bytes(self, spec: Spec, bits: int) -> int:
        """The bytes of a tensor's packed codes, scales and zero points."""
        dtype, shape = spec
        store = self.store
        levels = Levels(bits=math.log2(3) if self.quantizer == "ternary" else bits)
        if not store.takes_others:
            levels = Levels(bits=min(n for n in store.widths if n >= levels.bits))
        _, scales, _ = scale_layout(shape, self.channel_axis, store.block or self.group_size)
        each = store.scale_bytes or bits_of(dtype) // 8
        each += self.quantizer == "affine"
        return levels.packed_size(math.prod(shape)) + each * math.prod(scales)


def scale_layout(
    shape: tuple[int, ...], channel_axis: int | None, group_size: int | None
) -> tuple[tuple[int, ...], tuple[int, ...], Group]:
    """The axes that share a scale, the shape of the scales, and the axis and size of the groups."""
    axes, group = cut_groups(shape, contracted_axes(len(shape), channel_axis), group_size)
    return axes, scale_shape(shape, axes, group), group


def choose(
    specs: Mapping[str, Spec],
    default: Rule,
    rules: Sequence[tuple[str, dict[str, Any] | None]],
    keep: Mapping[str, str] | None = None,
) -> tuple[dict[str, Rule], dict[str, str]]:
    """The rule of each tensor to quantize, and the reason for keeping each of the others.

    Args:
      specs: dtypes and shapes by name.
      default: the rule for tensors that no expression matches.
      rules: pairs of an expression and its changes to the default, or None to keep the tensor; the
        first expression that matches a name decides.
      keep: tensors to keep whatever ``rules`` say, with the reasons.

    Raises:
      ValueError: an expression matches no tensor, or none that could be quantized; a tensor lacks the
        axis that its rule names; or no tensor is left to quantize.
    """
    never = {name: why for name, spec in specs.items() if (why := _never(name, spec))}
    kept = never | _already_quantized(specs)
    unsaid = {name: why for name in specs if name not in kept and (why := _by_name(name))}
    able = specs.keys() - kept.keys()
    found = _found(specs, able, [(pattern, change is not None) for pattern, change in rules])
    chosen: dict[str, Rule] = {}
    for name, spec in specs.items():
        if name not in able:
            continue
        change = rules[found[name]][1] if name in found else {}
        if keep and name in keep:
            kept[name] = keep[name]
        elif change is None:
            kept[name] = "kept by a rule"
        elif name in unsaid and name not in found:
            kept[name] = unsaid[name]
        else:
            chosen[name] = default._replace(**change)
            _check_axis(name, spec, chosen[name])
    if not chosen:
        reasons = ", ".join(sorted(set(kept.values()))) or "there are none"
        raise ValueError(
            "no tensor is left to quantize: these are float16, bfloat16, float32 or float8 with at least "
            f"2 axes, not named bias or scale, and not kept by a rule (here: {reasons})"
        )
    return chosen, kept


def drop_what_grows(
    specs: Mapping[str, Spec],
    chosen: dict[str, Rule],
    kept: dict[str, str],
    *,
    is_open: bool = False,
) -> None:
    """Moves tensors that quantization would not make smaller from ``chosen`` to ``kept``.

    With ``is_open``, a budget has still to choose bits, and only those that no width makes smaller are moved.
    """
    for name, rule in list(chosen.items()):
        spec, bits = specs[name], min(rule.widths) if is_open else rule.width
        if math.prod(spec[1]) and rule.packed_bytes(spec, bits) >= nbytes(*spec):
            del chosen[name]
            kept[name] = "not smaller when quantized"


def _found(
    specs: Mapping[str, Spec], able: set[str], rules: Sequence[tuple[str, bool]]
) -> dict[str, int]:
    """The index of the first rule that matches each name."""
    decided: dict[str, int] = {}
    for index, (pattern, quantizes) in enumerate(rules):
        found = [name for name in specs if re.search(pattern, name)]
        if not found:
            raise ValueError(f"rule {pattern!r} matches the name of no tensor: see `inspect`")
        if quantizes and not able & set(found):
            raise ValueError(
                f"rule {pattern!r} matches only tensors that are never quantized: {found[:5]}"
            )
        for name in found:
            decided.setdefault(name, index)
    return decided


def _check_axis(name: str, spec: Spec, rule: Rule) -> None:
    axis, ndim = rule.channel_axis, len(spec[1])
    if axis is not None and not -ndim <= axis < ndim:
        raise ValueError(
            f"tensor {name!r}: channel_axis {axis} is out of range for an array with {ndim} axes; name "
            f"an axis in [{-ndim}, {ndim - 1}], or keep the tensor by a rule"
        )


def _never(name: str, spec: Spec) -> str | None:
    """The reason why a tensor can never be quantized, or None."""
    dtype, shape = spec
    if len(shape) < 2:
        return "with fewer than 2 axes"
    if dtype not in _QUANTIZED:
        return f"of {dtype.name}"
    if not names_a_weight(name.replace(".", "/")):
        return "named bias or scale"
    return None


# These and the search below take a time that is linear in the length of names, which may be anything.
_STATISTIC = re.compile(r"(^|[._/])running_(mean|var)$", re.I)
_NORM = re.compile(r"norm\d*$|(^|_)ln(_|$)|(^|_)bn\d*$", re.I)
_ROTARY = re.compile(r"rotary|inv_freq|freqs_cis|(cos|sin)_cached", re.I)


def _by_name(name: str) -> str | None:
    """The reason to keep a tensor that no rule mentions, or None."""
    if _STATISTIC.search(name):
        return "a running statistic"
    module = name.replace("/", ".").rsplit(".", 2)[:-1]
    if module and _NORM.search(module[-1]):
        return "of a norm"
    return "a rotary table" if _ROTARY.search(name) else None


# Pairs of tensor names that mark a module as quantized, and the dtypes that the first must have.
_INTEGERS = "int8 uint8 int32 uint32"
_MARKS = [
    ("GPTQ or AWQ", "qweight", "scales", _INTEGERS),
    ("compressed-tensors", "weight_packed", "weight_scale", _INTEGERS),
    ("compressed-tensors or float8", "weight", "weight_scale", _INTEGERS + " float8_e4m3fn float8_e5m2"),
    ("float8 in blocks", "weight", "weight_scale_inv", "float8_e4m3fn float8_e5m2"),
    ("MLX", "weight", "scales", _INTEGERS),
    ("bitsandbytes", "weight", "weight.absmax", "uint8"),
    ("bitsandbytes", "weight", "SCB", "int8"),
    ("HQQ", "W_q", "scale", _INTEGERS),
    ("quanto", "weight._data", "weight._scale", _INTEGERS + " float8_e4m3fn float8_e5m2"),
]  # fmt: skip


def _already_quantized(specs: Mapping[str, Spec]) -> dict[str, str]:
    """The tensors of modules that another program has quantized, each with that program's name."""
    modules: dict[str, str] = {}
    for name, (dtype, _) in specs.items():
        for program, first, second, dtypes in _MARKS:
            module = name.removesuffix(first)
            if name.endswith(first) and module[-1:] in ("", ".", "/") and module + second in specs and dtype.name in dtypes.split():  # fmt: skip
                modules[module] = f"already quantized ({program})"
        # Microscaling formats: blocks of codes, and their exponents.
        if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in specs:
            modules[name.removesuffix("blocks")] = "already quantized (MXFP4)"
    found: dict[str, str] = {}
    names = sorted(specs)
    for module in sorted(modules, key=len):
        index = bisect.bisect_left(names, module)
        while index < len(names) and names[index].startswith(module):
            # Tensors of the module, such as `scales`, and of its weight, such as `weight.absmax`.
            if re.fullmatch(r"[^./]+|weight\.[^/]+", names[index][len(module) :]):
                found[names[index]] = modules[module]
            index += 1
    return found
