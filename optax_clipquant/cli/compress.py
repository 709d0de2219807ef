"""``optax-clipquant compress`` quantizes the weights of a checkpoint, one tensor at a time."""

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Mapping

import numpy as np

from optax_clipquant.cli import arguments
from optax_clipquant.cli.arguments import Commands, add_files, add_json
from optax_clipquant.cli.contents import described
from optax_clipquant.cli.numpy_grid import Absmax, Coder, threads
from optax_clipquant.cli.rules import SAFETENSORS, WIDTHS, Rule, Store, choose, drop_what_grows
from optax_clipquant.cli.terminal import Progress, check_output, printable, progress, report
from optax_clipquant.formats.checkpoint import Checkpoint, writing_checkpoint
from optax_clipquant.formats.dtypes import nbytes
from optax_clipquant.formats.native.description import plain
from optax_clipquant.formats.native.file import Parts, SavedWriter, writing_saved
from optax_clipquant.formats.native.names import name_of
from optax_clipquant.report.rows import Row

_TEXT = """Quantize the weights of a safetensors file, or of a sharded checkpoint.

Tensors of float16, bfloat16, float32 or float8 with at least 2 axes are quantized, unless the last part of
the name (after a '.' or '/') is 'bias' or 'scale', or the tensor belongs to a norm, a rotary table, a running
statistic, or a module that another program has quantized; all others are kept. Read OUT with `decompress`, or
with optax_clipquant.load, which returns a flat dict with the names of IN."""
_EXAMPLES = """  optax-clipquant compress model.safetensors small.safetensors
  optax-clipquant compress model.safetensors small.safetensors --bits 4 --group-size 32
  optax-clipquant compress model.safetensors small.safetensors --bits 4 --rule 'embed=8' --rule 'head=keep'
  optax-clipquant compress model.safetensors small.safetensors --rule 'experts=3,axis=1,group=32,scale=mse'
  optax-clipquant compress model.safetensors small.safetensors --budget 4.5 --group-size 64
  optax-clipquant compress flax.safetensors small.safetensors --channel-axis -1
  optax-clipquant compress checkpoint/ small/ --quantizer normal-float --group-size 64 --max-shard-size 2GB"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands("compress", run, _TEXT, _EXAMPLES)
    add_files(parser, "any safetensors file")
    add_widths(parser)
    add_json(parser)


def add_widths(
    parser: argparse.ArgumentParser,
    group_size: int | None = None,
    widths: str = f"{', '.join(map(str, WIDTHS))} bits",
) -> None:
    """Adds the arguments that say how to quantize.

    Args:
      parser: the parser.
      group_size: the default of ``--group-size``.
      widths: what ``--budget`` chooses from, for its help.
    """
    width = parser.add_mutually_exclusive_group()
    width.add_argument(
        "--bits",
        type=arguments.bits,
        metavar="N",
        help="bits per code, 1 to 8 (default: 8; normal-float: 2 to 4, default 4)",
    )
    width.add_argument(
        "--budget",
        type=arguments.budget,
        metavar="BITS_PER_PARAM",
        help="upper limit of the mean bits per quantized weight, scales included: each tensor gets one of "
        f"{', '.join(map(str, WIDTHS))} bits, so that the sum of squared errors over all weights is least; "
        "every weight counts alike, for want of data, so tensors of a language model stay within one bit of "
        "uniform; of a tensor with more than a million weights, the error is estimated from some of them",
    )
    parser.add_argument(
        "--quantizer",
        choices=arguments.CHOICES["quantizer"],
        default="uniform",
        metavar="QUANTIZER",
        help="uniform: evenly spaced levels around 0 (default); affine: the same with zero points; ternary: "
        "three levels; normal-float: levels that are denser near 0",
    )
    parser.add_argument(
        "--group-size",
        type=arguments.group_size,
        default=group_size,
        metavar="N",
        help=f"runs of N weights share a scale (default: {group_size or 'all of a channel'})",
    )
    parser.add_argument(
        "--channel-axis",
        type=arguments.axis,
        default=0,
        metavar="AXIS",
        help="the axis with a scale for each index, or none. Default: 0, the outputs of PyTorch's weights "
        "and the tokens of an embedding; -1 for JAX's kernels, which have the outputs last",
    )
    parser.add_argument(
        "--scale",
        choices=arguments.CHOICES["scale"],
        help="how to choose scales: mse minimises the squared error, absmax spans the weights (default: mse up to 3 bits)",
    )
    parser.add_argument(
        "--rule",
        type=arguments.rule,
        action="append",
        default=[],
        metavar="REGEX=HOW",
        help="how to quantize tensors whose name matches REGEX: HOW is the number of bits, or ternary, "
        "optionally followed by ,axis=AXIS ,group=N ,scale=SCALE and ,quantizer=QUANTIZER; or it is keep, for "
        "tensors to leave unchanged. May be repeated; the first match decides",
    )
    parser.add_argument(
        "--allow-non-finite",
        action="store_true",
        help="write OUT even if weights are infinite or NaN, though all weights that share their scales are lost",
    )


def run(args: argparse.Namespace) -> None:
    check_output(args)
    with Checkpoint(args.input) as source:
        if source.is_saved:
            raise ValueError(f"{args.input} is compressed already; decompress it first")
        rows, kept = quantize(args, source, args.output)
        dtypes = [dtype.name for dtype, _ in source.specs.values()]
    quantized = [row for row in rows if row.path not in kept]
    weights = sum(math.prod(row.shape) for row in quantized)
    mean = 8 * sum(row.bytes_after for row in quantized) / max(weights, 1)
    report(args, rows, dtypes, kept, quantized=len(quantized), bits_per_param=mean)


def quantize(
    args: argparse.Namespace,
    source: Checkpoint,
    output: str,
    keep: Mapping[str, str] | None = None,
    store: Store = SAFETENSORS,
) -> tuple[list[Row], dict[str, str]]:
    """Writes ``source`` quantized as the arguments say; returns the rows, and the reasons for kept tensors.

    Those of ``keep`` are kept for the reasons there, whatever the arguments say. A budget counts the bytes
    of ``store``.
    """
    try:
        rules, kept = _choose(args, source, keep, store)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error
    total = sum(nbytes(*spec) for spec in source.specs.values())
    with _coders(source, rules) as coders, progress("compressing", total) as advance:
        rows = compress(
            source,
            output,
            coders,
            advance,
            max_shard_size=args.max_shard_size,
            allow_non_finite=args.allow_non_finite,
        )
    return rows, kept


def _choose(
    args: argparse.Namespace, source: Checkpoint, keep: Mapping[str, str] | None, store: Store
) -> tuple[dict[str, Rule], dict[str, str]]:
    """The rule of each tensor to quantize, and the reason for keeping each of the others."""
    default = Rule(args.bits, args.quantizer, args.channel_axis, args.group_size, args.scale, store)
    _check_bits("--bits", default)
    for pattern, change in args.rule:
        if change is not None:
            _check_bits(f"rule {pattern!r}", default._replace(**change))
    rules, kept = choose(source.specs, default, args.rule, keep)
    drop_what_grows(source.specs, rules, kept, is_open=args.budget is not None)
    if not rules:
        raise ValueError(
            "no tensor would be smaller when quantized; let more weights share a scale"
        )
    if args.budget is not None:
        from optax_clipquant.cli.search.budget import allocate_rules, is_language_model

        total = sum(nbytes(*source.specs[name]) for name in rules)
        with progress("choosing bits", total) as advance:
            rules = allocate_rules(source, rules, args.budget, advance)
        # At the chosen bits, more of them may be as small in float.
        drop_what_grows(source.specs, rules, kept)
        print(
            "optax-clipquant: the budget counted every weight alike, for want of data"
            + (
                ", so the bits of this language model stayed within one of uniform"
                if is_language_model(source.specs)
                else ""
            )
            + "; allocate_bits in Python measures what each tensor is worth",
            file=sys.stderr,
        )
    return rules, kept


def _check_bits(what: str, rule: Rule) -> None:
    if rule.quantizer == "normal-float" and not 2 <= rule.width <= 4:
        raise ValueError(f"{what}: normal-float takes 2 to 4 bits, got {rule.width}")
    if rule.quantizer == "ternary" and rule.bits is not None:
        raise ValueError(f"{what}: ternary has three levels and takes no bits, got {rule.bits}")


@contextlib.contextmanager
def _coders(source: Checkpoint, rules: Mapping[str, Rule]) -> Iterator[dict[str, Coder]]:
    """The coder of each tensor in ``rules``."""
    coders: dict[str, Coder] = {
        name: Absmax.of(source.specs[name], rule) for name, rule in rules.items() if rule.is_absmax
    }
    searched = {name: rule for name, rule in rules.items() if name not in coders}
    if not searched:
        yield coders
        return
    from optax_clipquant.cli.search.scales import searching

    with searching(source, searched) as found:
        yield coders | found


def compress(
    source: Checkpoint,
    output: str,
    coders: Mapping[str, Coder],
    advance: Progress,
    *,
    max_shard_size: int | None = None,
    allow_non_finite: bool = False,
) -> list[Row]:
    """Writes the file that ``save`` would write for all tensors, with those in ``coders`` quantized."""
    specs = source.specs
    leaves = {name: plain(spec) for name, spec in specs.items()}
    leaves |= {name: coder.leaf for name, coder in coders.items()}
    sizes = {name: leaf.nbytes for name, leaf in leaves.items()}

    @contextlib.contextmanager
    def open_file(path: str, names: list[str]) -> Iterator[SavedWriter]:
        named = {name_of((name,)): leaves[name] for name in names}
        with writing_saved(path, named, nodes={}, metadata=source.metadata) as file:
            yield file

    spoiled: list[str] = []
    with threads() as pool, writing_checkpoint(output, sizes, max_shard_size, open_file) as file_of:
        for name, spec in specs.items():
            if name in coders:
                parts = coders[name].encode(functools.partial(source.read_at, name), pool)
                parts = _noting_spoiled(parts, name, spoiled)
            else:
                parts = [("", source.pieces(name))]
            file_of(name).put(name_of((name,)), parts)
            advance(nbytes(*spec))
        if spoiled:
            _tell_non_finite(source, spoiled, allow_non_finite)
    return [
        described(name, leaf, nbytes(*specs[name]), leaf.nbytes) for name, leaf in leaves.items()
    ]


def _noting_spoiled(parts: Parts, name: str, spoiled: list[str]) -> Parts:
    """Passes on ``parts``, and adds ``name`` to ``spoiled`` if a scale is not finite, as with such weights."""
    for kind, pieces in parts:
        if kind == "s":
            pieces = list(pieces)
            if not all(np.isfinite(piece.astype(np.float32)).all() for piece in pieces):
                spoiled.append(name)
        yield kind, pieces


def _tell_non_finite(source: Checkpoint, names: list[str], allow: bool) -> None:
    counts = {}
    for name in names:
        dtype, _ = source.specs[name]
        assert isinstance(dtype, np.dtype)
        counts[name] = sum(
            int(np.count_nonzero(~np.isfinite(piece.view(dtype).astype(np.float32))))
            for piece in source.pieces(name)
        )
    told = ", ".join(f"{count} in {name!r}" for name, count in list(counts.items())[:8])
    more = "" if len(counts) <= 8 else f", and more in {len(counts) - 8} other tensors"
    text = f"{source.path}: {sum(counts.values())} weights are infinite or NaN: {told}{more}"
    if not allow:
        raise ValueError(
            f"{text}; fix them, keep the tensors with --rule, or pass --allow-non-finite"
        )
    print(printable(f"optax-clipquant: {text}"), file=sys.stderr)
