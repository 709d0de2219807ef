"""The command ``optax-clipquant``: look into safetensors files, make them small, and plain again."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optax_clipquant._print import progress_bar
from optax_clipquant.cli.arguments import parser
from optax_clipquant.cli.compress import (
    Coder,
    Contents,
    Progress,
    Rule,
    check_axes,
    compress,
    decompress,
    threads,
    widths_of,
)
from optax_clipquant.cli.host import Absmax
from optax_clipquant.formats.native import is_saved
from optax_clipquant.formats.safetensors import Reader, check_replaceable, nbytes, replacing
from optax_clipquant.report.rows import Row, Summary, errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 after an error, 128 + n after signal n.

    As a command, without ``argv``, it keeps off accelerators unless ``JAX_PLATFORMS`` names them.
    """
    args = parser(_inspect, _compress, _decompress).parse_args(argv)
    if argv is None:
        # All is done while a byte is read and written; and a TPU belongs to who trains on it.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # As Ctrl-C does: so that a half-written file is removed. Only the main thread is told of signals.
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has enough. Python flushes what is left of it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + _SIGPIPE
    except (KeyboardInterrupt, _Terminated) as stop:
        print("optax-clipquant: interrupted; nothing is left half-written", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        print(f"optax-clipquant: error: {_message(error)}", file=sys.stderr)
        return 1
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)
    return 0


_SIGPIPE = 13  # which Windows lacks


class _Terminated(BaseException):
    """SIGTERM."""


def _terminate(number: int, frame: types.FrameType | None) -> None:
    raise _Terminated


def _inspect(args: argparse.Namespace) -> None:
    if args.plot is not None:
        _check_plot(args)
    with Reader(args.file) as reader:
        tensors = Contents(reader)
        dtypes = [leaf.spec[0].name for leaf in tensors.leaves.values()]
        rows = tensors.rows
        if args.against is not None:
            with Reader(args.against) as floats:
                rows = _compared(tensors, Contents(floats), args)
    summary = Summary(tuple(rows))
    if args.plot is not None:
        _plot(args.plot, summary)
    if args.json:
        totals = {"bytes_before": summary.bytes_before, "bytes_after": summary.bytes_after}
        _print_json({"file": args.file, **totals, "tensors": _plain(rows, dtypes)})
    else:
        import rich.console

        rich.console.Console(width=None if sys.stdout.isatty() else 120).print(summary)


def _check_plot(args: argparse.Namespace) -> None:
    """Before the work: whether there can be a picture."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'optax-clipquant[plot]'") from error
    formats = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if _format_of(args.plot) not in formats:
        raise ValueError(f"--plot {args.plot} must end in one of .{', .'.join(sorted(formats))}")
    _check_free(f"--plot {args.plot}", args.plot, args.force)


def _plot(path: str, summary: Summary) -> None:
    from optax_clipquant.report import plots

    most = 40
    shown = min(len(summary.rows), most + 1)
    figure, axes = plots.subplots(2, width=6, height=1.2 + 0.3 * max(shown, 5))
    plots.leaf_bars(axes, summary, most=most)
    with replacing(path) as file:
        figure.savefig(file, format=_format_of(path))


def _format_of(path: str) -> str:
    return os.path.splitext(path)[1].lstrip(".").lower()


def _compared(after: Contents, before: Contents, args: argparse.Namespace) -> list[Row]:
    """The rows with the errors beside a float file."""
    if before.leaves.keys() != after.leaves.keys():
        raise ValueError(
            f"--against {args.against}: {args.file} has other tensors: "
            f"{sorted(before.leaves.keys() ^ after.leaves.keys())[:8]}"
        )
    for path, leaf in after.leaves.items():
        shape = before.leaves[path].shape
        if shape != leaf.shape:
            raise ValueError(
                f"--against {args.against}: tensor {path!r} has shape {shape} there, and {leaf.shape} "
                f"in {args.file}"
            )
    compared = []
    total = sum(row.bytes_before for row in after.rows)
    with threads() as pool, _progress("comparing", total) as progress:
        for row in after.rows:
            max_error, snr_db = errors(before.read(row.path, pool), after.read(row.path, pool))
            compared.append(dataclasses.replace(row, max_error=max_error, snr_db=snr_db))
            progress(row.bytes_before)
    return compared


def _compress(args: argparse.Namespace) -> None:
    _check_output(args)
    with Reader(args.input) as source:
        if is_saved(source):
            raise ValueError(f"{args.input} is compressed already; decompress it first")
        rules = _choose(args, source)
        total = sum(nbytes(*spec) for spec in source.specs.values())
        with _coders(source, rules) as coders, _progress("compressing", total) as progress:
            rows = compress(source, args.output, coders, progress)
        dtypes = [dtype.name for dtype, _ in source.specs.values()]
    weights = sum(math.prod(row.shape) for row in rows if row.path in rules)
    packed = sum(row.bytes_after for row in rows if row.path in rules)
    _report(args, rows, dtypes, quantized=len(rules), bits_per_param=8 * packed / max(weights, 1))


def _choose(args: argparse.Namespace, source: Reader) -> dict[str, Rule]:
    """The rule of each tensor that is to be quantized."""
    try:
        rules = {
            name: Rule(bits, args.channel_axis, args.group_size, args.scale)
            for name, bits in widths_of(source.specs, args.rule).items()
        }
        check_axes(source.specs, rules)
        if args.budget is None:
            return {
                name: rule if rule.bits else rule._replace(bits=args.bits)
                for name, rule in rules.items()
            }
        from optax_clipquant.cli.search import allocate_rules

        total = sum(nbytes(*source.specs[name]) for name in rules)
        with _progress("choosing bits", total) as progress:
            return allocate_rules(source, rules, args.budget, progress)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


@contextlib.contextmanager
def _coders(source: Reader, rules: Mapping[str, Rule]) -> Iterator[dict[str, Coder]]:
    """What quantizes each tensor in ``rules``."""
    coders: dict[str, Coder] = {}
    for name, rule in rules.items():
        if rule.is_absmax:
            coders[name] = Absmax.of(
                source.specs[name], rule.bits or 8, rule.channel_axis, rule.group_size
            )
    searched = {name: rule for name, rule in rules.items() if name not in coders}
    if not searched:
        yield coders
        return
    from optax_clipquant.cli.search import searching

    with searching(source, searched) as found:
        yield coders | found


def _decompress(args: argparse.Namespace) -> None:
    _check_output(args)
    with Reader(args.input) as source:
        if not is_saved(source):
            raise ValueError(f"{args.input} is not compressed: optax_clipquant did not write it")
        contents = Contents(source)
        leaves = contents.leaves.values()
        total = sum(nbytes(*leaf.spec) for leaf in leaves)
        with _progress("decompressing", total) as progress:
            rows = decompress(contents, args.output, progress)
    dtypes = [leaf.spec[0].name for leaf in leaves]
    _report(args, rows, dtypes, quantized=sum(leaf.levels is not None for leaf in leaves))


def _check_output(args: argparse.Namespace) -> None:
    if os.path.realpath(args.input) == os.path.realpath(args.output) or (
        os.path.exists(args.input)
        and os.path.exists(args.output)
        and os.path.samefile(args.input, args.output)
    ):
        raise ValueError(f"IN and OUT are the same file, {args.input}; name another OUT")
    _check_free(f"OUT {args.output}", args.output, args.force)


def _check_free(what: str, path: str, force: bool) -> None:
    """Before the work: whether ``path`` may be written."""
    check_replaceable(path)
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{what} exists; overwrite it with --force")


@contextlib.contextmanager
def _progress(text: str, total: int) -> Iterator[Progress]:
    """A bar on stderr, to be told of bytes; none where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    with progress_bar(count_bytes=True, transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda count: progress.advance(task, count)


def _report(args: argparse.Namespace, rows: list[Row], dtypes: list[str], **figures: float) -> None:
    """What became of IN: a line, or all of it as JSON."""
    before, after = os.path.getsize(args.input), os.path.getsize(args.output)
    if args.json:
        files = {"input": args.input, "output": args.output, "file_bytes": [before, after]}
        _print_json({**files, **figures, "tensors": _plain(rows, dtypes)})
        return
    bits = figures.get("bits_per_param")
    print(
        f"{args.input}: {before:,} bytes -> {args.output}: {after:,} bytes "
        f"({before / after:.2f} to 1); {figures['quantized']} of {len(rows)} tensors quantized"
        + ("" if bits is None else f", {bits:.3f} bits a weight")
    )


def _plain(rows: list[Row], dtypes: list[str]) -> list[dict[str, Any]]:
    """For JSON, which has no infinity: no number there."""
    return [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in {**dataclasses.asdict(row), "dtype": dtype}.items()
        }
        for row, dtype in zip(rows, dtypes, strict=True)
    ]


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2))


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
