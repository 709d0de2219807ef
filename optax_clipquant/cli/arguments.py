"""The arguments of the command ``optax-clipquant``, and its help."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

from optax_clipquant.cli.compress import WIDTHS

T = TypeVar("T")
Run = Callable[[argparse.Namespace], None]


def parser(inspect: Run, compress: Run, decompress: Run) -> argparse.ArgumentParser:
    """The parser of the command, whose ``run`` is what runs it."""
    command_line = argparse.ArgumentParser(
        prog="optax-clipquant",
        description="Look into safetensors files, compress their weights to 1 to 8 bits, and back.",
        epilog="Exit codes: 0; 1 after an error; 2 for wrong arguments; 130 after Ctrl-C, 143 after SIGTERM.",
    )
    commands = command_line.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Run, text: str, examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    look = command("inspect", inspect, _INSPECT, _INSPECT_EXAMPLES)
    look.add_argument("file", metavar="FILE", help="any safetensors file")
    look.add_argument(
        "--against", metavar="FLOATFILE", help="show the error beside the same tensors of this file"
    )
    look.add_argument(
        "--plot", metavar="OUT.png", help="draw sizes, and with --against the ratios, of the leaves"
    )
    look.add_argument("--force", action="store_true", help="overwrite the picture")
    small = command("compress", compress, _COMPRESS, _COMPRESS_EXAMPLES)
    plain = command("decompress", decompress, _DECOMPRESS, _DECOMPRESS_EXAMPLES)
    for sub, text in ((small, "any safetensors file"), (plain, "a compressed file")):
        sub.add_argument("input", metavar="IN", help=text)
        sub.add_argument("output", metavar="OUT", help="the file to write")
        sub.add_argument("--force", action="store_true", help="overwrite OUT")
    width = small.add_mutually_exclusive_group()
    width.add_argument(
        "--bits", type=_bits, default=8, metavar="N", help="bits of a code, 1 to 8 (default: 8)"
    )
    width.add_argument(
        "--budget",
        type=_positive(float),
        metavar="BITS_PER_PARAM",
        help="mean bits of a quantized weight, scales included, never exceeded: each tensor gets "
        f"one of {', '.join(map(str, WIDTHS))} bits, so that the sum of squared errors over all "
        "weights, each counted alike, is least",
    )
    small.add_argument(
        "--group-size",
        type=_positive(int),
        metavar="N",
        help="runs of N weights share a scale (default: all of a channel)",
    )
    small.add_argument(
        "--channel-axis",
        type=int,
        default=0,
        metavar="AXIS",
        help="the axis with a scale for each index. Default: 0, the outputs of PyTorch's weights and "
        "the tokens of an embedding; -1 for JAX's kernels, which have the outputs last",
    )
    small.add_argument(
        "--scale",
        choices=("mse", "absmax"),
        help="least squared error, or up to the largest weight (default: mse up to 3 bits)",
    )
    small.add_argument(
        "--rule",
        type=_rule,
        action="append",
        default=[],
        metavar="REGEX=BITS|keep",
        help="bits for the tensors in whose name REGEX is found, or keep them as they are; may be "
        "repeated, the first that is found decides",
    )
    for sub in (look, small, plain):
        sub.add_argument("--json", action="store_true", help="print JSON for programs")
    return command_line


_INSPECT = """Show each tensor of a safetensors file: shape, bits, bytes.

With --against, also the largest error and the signal-to-noise ratio in dB beside a float file."""
_INSPECT_EXAMPLES = """  optax-clipquant inspect model.safetensors
  optax-clipquant inspect small.safetensors --against model.safetensors --plot small.png
  optax-clipquant inspect small.safetensors --json"""
_COMPRESS = """Quantize the weights of a safetensors file.

Tensors of float16, bfloat16 or float32 with at least 2 axes are quantized, unless the last part of
the name (after a '.' or '/') is 'bias' or 'scale'; all others are kept. OUT is for `decompress`, or for
optax_clipquant.load, which gives a flat dict with the names of IN."""
_COMPRESS_EXAMPLES = """  optax-clipquant compress model.safetensors small.safetensors
  optax-clipquant compress model.safetensors small.safetensors --bits 4 --group-size 32
  optax-clipquant compress model.safetensors small.safetensors --bits 4 --rule 'embed=8' --rule 'head=keep'
  optax-clipquant compress model.safetensors small.safetensors --budget 4.5 --group-size 64
  optax-clipquant compress flax.safetensors small.safetensors --channel-axis -1"""
_DECOMPRESS = """Write a compressed file as a plain safetensors file, which any program reads.

Names, shapes, dtypes and metadata are those of the file that was compressed."""
_DECOMPRESS_EXAMPLES = """  optax-clipquant decompress small.safetensors model.safetensors
  optax-clipquant decompress small.safetensors model.safetensors --force --json"""


def _bits(text: str) -> int:
    if text not in {str(bits) for bits in range(1, 9)}:
        raise argparse.ArgumentTypeError(f"must be 1 to 8, got {text!r}")
    return int(text)


def _positive(kind: Callable[[str], T]) -> Callable[[str], T]:
    def parse(text: str) -> T:
        try:
            value: Any = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
        return value

    return parse


def _rule(text: str) -> tuple[str, int | None]:
    pattern, equals, bits = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be REGEX=BITS or REGEX=keep, got {text!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{pattern!r} is not a regular expression: {error}"
        ) from error
    return pattern, None if bits == "keep" else _bits(bits)
