"""Terminal helpers of the commands: progress, reports, and checks of output paths."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optax_clipquant._atomic import check_replaceable
from optax_clipquant._print import progress_bar
from optax_clipquant.formats.checkpoint import files_of, index_of
from optax_clipquant.report.rows import Row

Progress = Callable[[int], None]
"""Called with the number of bytes done."""


def printable(text: str) -> str:
    """``text`` with control characters escaped, which names in files may hold."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # fmt: skip


def message_of(error: BaseException) -> str:
    """A one-line message for an error."""
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{error.filename}: {error.strerror or error}")
    return printable(" ".join(str(error).split())) or type(error).__name__


@contextlib.contextmanager
def progress(text: str, total: int) -> Iterator[Progress]:
    """A progress bar on stderr that counts bytes; not shown if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    with progress_bar(count_bytes=True, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)


def print_table(table: Any) -> None:
    """Prints what rich can display, as wide as the terminal; elsewhere as the variable COLUMNS says, or 120."""
    import rich.console

    given = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    rich.console.Console(width=None if given else 120).print(table)


def print_json(content: dict[str, Any]) -> None:
    """Prints strict JSON, which has no numbers that are not finite."""
    print(json.dumps(_strict(content), indent=2, allow_nan=False))


def _strict(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _strict(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_strict(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def plain_rows(rows: Sequence[Row], dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """The rows as plain dicts, for JSON."""
    return [
        {**dataclasses.asdict(row), "bits": _whole(row.bits), "dtype": dtype}
        for row, dtype in zip(rows, dtypes, strict=True)
    ]


def _whole(x: float) -> float:
    """The same number, as an integer if it is one."""
    return int(x) if float(x).is_integer() else x


def total_size(path: str) -> int:
    """The bytes of a checkpoint."""
    return sum(os.path.getsize(file) for file in files_of(path))


def check_output(args: argparse.Namespace) -> None:
    """Checks before the work that OUT can be written, and is not IN."""
    sources, output = [args.input], args.output
    with contextlib.suppress(OSError, ValueError):  # raised again when IN is opened
        sources += files_of(args.input)
    if args.max_shard_size is not None:
        output, _ = index_of(output)
        if os.path.isdir(args.input) and os.path.realpath(args.input) == os.path.dirname(os.path.realpath(output)):  # fmt: skip
            sources.append(output)
        _check_folder(args.output, os.path.dirname(output))
        if os.path.lexists(output) and not args.force:
            raise FileExistsError(f"OUT {output} exists; overwrite it with --force")
    for source in sources:
        same = os.path.exists(source) and os.path.exists(output) and os.path.samefile(source, output)  # fmt: skip
        if same or os.path.realpath(source) == os.path.realpath(output):
            if source != args.input:
                raise ValueError(
                    f"OUT {args.output} is a file of the checkpoint IN, {args.input}; name another OUT"
                )
            raise ValueError(f"IN and OUT are the same file, {args.input}; name another OUT")
    if args.max_shard_size is None:
        if os.path.isdir(output) or output.endswith(("/", os.sep)):
            raise IsADirectoryError(f"OUT {output} is a folder; name a file, or write shards into it with --max-shard-size")  # fmt: skip
        check_free(f"OUT {output}", output, args.force)


def check_free(what: str, path: str, force: bool) -> None:
    """Checks before the work that the file ``path`` can be written."""
    check_replaceable(path)
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{what} exists; overwrite it with --force")


def _check_folder(path: str, folder: str) -> None:
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ValueError(f"OUT {path}: with --max-shard-size it is a folder or *.index.json; {folder} is a file")  # fmt: skip
    parent = os.path.dirname(folder)
    if not os.path.isdir(parent):
        raise FileNotFoundError(f"OUT {path}: there is no folder {parent}")


def report(
    args: argparse.Namespace,
    rows: Sequence[Row],
    dtypes: Sequence[str],
    kept: dict[str, str] | None = None,
    done: str = "quantized",
    **figures: float,
) -> None:
    """Prints the result of a command and the reasons for kept tensors, in a few lines or in full as JSON.

    Args:
      args: the arguments of the command.
      rows: the rows of all tensors.
      dtypes: the dtypes of all tensors.
      kept: the reasons by name.
      done: the word for what was done to tensors.
      figures: ``quantized`` and further figures.
    """
    index = index_of(args.output)[0] if args.max_shard_size is not None else args.output
    before, after = total_size(args.input), total_size(index)
    if args.json:
        files = {"input": args.input, "output": args.output, "file_bytes": [before, after]}
        tensors = plain_rows(rows, dtypes)
        if kept is not None:
            tensors = [{**row, "kept": kept.get(row["path"])} for row in tensors]
        print_json({**files, **figures, "tensors": tensors})
        return
    bits = figures.get("bits_per_param")
    print(
        f"{printable(args.input)}: {before:,} bytes -> {printable(args.output)}: {after:,} bytes "
        f"({before / after:.2f} to 1); {figures['quantized']} of {len(rows)} tensors {done}"
        + ("" if bits is None else f", {bits:.3f} bits per weight")
    )
    if kept:
        counts: dict[str, int] = {}
        for reason in kept.values():
            counts[reason] = counts.get(reason, 0) + 1
        told = ", ".join(f"{n} {reason}" for reason, n in counts.items())
        print(printable(f"kept unchanged: {told}"))
