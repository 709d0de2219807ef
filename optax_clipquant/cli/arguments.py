"""Arguments that the commands share, and their help."""

import argparse
import math
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Run = Callable[[argparse.Namespace], None]
Commands = Callable[[str, Run, str, str], argparse.ArgumentParser]
"""Adds a command, given its name, the function that runs it, its description and its examples."""


def parser_of(*adds: Callable[[Commands], None]) -> argparse.ArgumentParser:
    """The parser of the command line, with the commands that ``adds`` add."""
    command_line = argparse.ArgumentParser(
        prog="optax-clipquant",
        description="Inspect safetensors files, compress their weights to 1 to 8 bits and back, and convert them for other runtimes.",
        epilog="Exit codes: 0; 1 after an error; 2 for wrong arguments; 130 after Ctrl-C, 143 after SIGTERM.",
    )
    command_line.add_argument(
        "--version", action=_Version, nargs=0, help="show the version and exit"
    )
    subparsers = command_line.add_subparsers(required=True, title="commands")

    def command(name: str, run: Run, text: str, examples: str) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            epilog=f"examples:\n{examples}",
            formatter_class=_Formatter,
        )
        parser.set_defaults(run=run)
        return parser

    for add in adds:
        add(command)
    return command_line


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fits paragraphs to the terminal, but leaves the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return "\n\n".join(
            textwrap.fill(part, width, initial_indent=indent, subsequent_indent=indent)
            for part in text.split("\n\n")
        )


class _Version(argparse.Action):
    """Looks up the version only when asked, since that takes as long as reading the arguments."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        import importlib.metadata

        print(f"optax-clipquant {importlib.metadata.version('optax-clipquant')}")
        parser.exit()


def add_files(parser: argparse.ArgumentParser, source: str) -> None:
    """Adds IN and OUT."""
    parser.add_argument(
        "input", metavar="IN", help=f"{source}, the *.index.json of its shards, or their folder"
    )
    parser.add_argument(
        "output", metavar="OUT", help="the file to write, such as small.safetensors"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument(
        "--max-shard-size",
        type=size,
        metavar="SIZE",
        help="write shards of at most this size, such as 5GB, and their index; OUT is a folder or an index",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def bits(text: str) -> int:
    if text not in {str(bits) for bits in range(1, 9)}:
        raise argparse.ArgumentTypeError(f"must be 1 to 8, got {text!r}")
    return int(text)


def positive(kind: Callable[[str], T], limit: float) -> Callable[[str], T]:
    """A converter to a number above 0 and at most ``limit``."""

    def parse(text: str) -> T:
        try:
            value: Any = kind(text)
        except ValueError:
            value = 0
        if not 0 < value <= limit:
            raise argparse.ArgumentTypeError(
                f"must be a positive number, at most {limit:.15g}, got {text!r}"
            )
        return value

    return parse


def axis(text: str) -> int | None:
    if text == "none":
        return None
    if not re.fullmatch(r"-?\d{1,2}", text):
        raise argparse.ArgumentTypeError(f"must be the number of an axis, or none, got {text!r}")
    return int(text)


def size(text: str) -> int:
    """Parses a size such as ``5GB`` to bytes."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?i?B?)", text, re.I)
    unit = found[2].upper() if found else ""
    base = 1024 if "I" in unit else 1000
    value = int(float(found[1]) * base ** "BKMGT".index(unit[:1] or "B")) if found else 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB or 200MiB, got {text!r}")
    return value


group_size = positive(int, 2**31 - 1)
budget = positive(float, 64)
_CHANGES = {
    "axis": ("channel_axis", axis),
    "group": ("group_size", lambda text: None if text == "none" else group_size(text)),
    "scale": ("scale_rule", None),
    "quantizer": ("quantizer", None),
}
_ITEM = r"(?:axis|group|scale|quantizer)=[^,=]*"
_RULE = re.compile(rf"(.*?)=(keep|ternary|[1-8])((?:,{_ITEM})*)", re.S)
CHOICES = {
    "scale": ("mse", "absmax"),
    "quantizer": ("uniform", "affine", "ternary", "normal-float"),
}


def rule(text: str) -> tuple[str, dict[str, Any] | None]:
    """Parses ``REGEX=4,axis=1,group=32`` to the expression and its changes; None means to keep the tensor."""
    found = _RULE.fullmatch(text)
    if not found or (found[2] == "keep" and found[3]):
        raise argparse.ArgumentTypeError(
            f"must be REGEX=BITS, REGEX=ternary or REGEX=keep, with BITS from 1 to 8, and except for keep "
            f"with options such as ,axis=1,group=32,scale=mse,quantizer=affine, got {text!r}"
        )
    pattern, value, items = found.groups()
    try:
        re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{pattern!r} is not a regular expression: {error}"
        ) from error
    if value == "keep":
        return pattern, None
    changes: dict[str, Any] = {"quantizer": "ternary"} if value == "ternary" else {"bits": int(value)}  # fmt: skip
    for item in items.split(",")[1:]:
        key, _, content = item.partition("=")
        field, parse = _CHANGES[key]
        if parse is None and content not in CHOICES[key]:
            raise argparse.ArgumentTypeError(
                f"{key} must be one of {', '.join(CHOICES[key])}, got {content!r} in {text!r}"
            )
        if field in changes:
            raise argparse.ArgumentTypeError(f"{text!r} sets {field} twice")
        changes[field] = content if parse is None else parse(content)
    return pattern, changes
