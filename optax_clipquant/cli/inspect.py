"""``optax-clipquant inspect`` shows the sizes and errors of a checkpoint's tensors."""

import argparse
import dataclasses
import os

from optax_clipquant._atomic import replacing
from optax_clipquant.cli.arguments import Commands, add_json
from optax_clipquant.cli.contents import Contents
from optax_clipquant.cli.numpy_grid import threads
from optax_clipquant.cli.terminal import (
    check_free,
    plain_rows,
    print_json,
    print_table,
    printable,
    progress,
)
from optax_clipquant.formats.checkpoint import Checkpoint
from optax_clipquant.formats.dtypes import Opaque
from optax_clipquant.report.rows import Row, Summary, errors

_TEXT = """Show each tensor of a safetensors file: shape, bits, the number of weights per scale, bytes.

With --against, also the largest error and the signal-to-noise ratio in dB beside a float file."""
_EXAMPLES = """  optax-clipquant inspect model.safetensors
  optax-clipquant inspect small.safetensors --against model.safetensors --plot small.png
  optax-clipquant inspect small.safetensors --json"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands("inspect", run, _TEXT, _EXAMPLES)
    parser.add_argument(
        "file", metavar="FILE", help="any safetensors file, index, or folder of a checkpoint"
    )
    parser.add_argument(
        "--against",
        metavar="FLOATFILE",
        help="show errors relative to the same tensors of this file",
    )
    parser.add_argument(
        "--plot",
        metavar="OUT.png",
        help="plot the sizes of the tensors, and with --against their signal-to-noise ratios",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the plot")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.plot is not None:
        _check_plot(args)
    with Checkpoint(args.file) as checkpoint:
        tensors = Contents(checkpoint)
        dtypes = [leaf.dtype.name for leaf in tensors.leaves.values()]
        rows = tensors.rows
        if args.against is not None:
            with Checkpoint(args.against) as floats:
                rows = _compared(tensors, Contents(floats), args)
    shown = [dataclasses.replace(row, path=printable(row.path)) for row in rows]
    summary = Summary(tuple(shown))
    if args.plot is not None:
        _plot(args.plot, summary)
    if args.json:
        totals = {"bytes_before": summary.bytes_before, "bytes_after": summary.bytes_after}
        print_json({"file": args.file, **totals, "tensors": plain_rows(rows, dtypes)})
    else:
        print_table(summary)


def _check_plot(args: argparse.Namespace) -> None:
    """Checks before the work that the plot can be written."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'optax-clipquant[plot]'") from error
    formats = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if _format_of(args.plot) not in formats:
        raise ValueError(f"--plot {args.plot} must end in one of .{', .'.join(sorted(formats))}")
    check_free(f"--plot {args.plot}", args.plot, args.force)


def _plot(path: str, summary: Summary) -> None:
    from optax_clipquant.report import plots

    max_leaves = 40
    shown = min(len(summary.rows), max_leaves + 1)
    figure, axes = plots.subplots(2, width=6, height=1.2 + 0.3 * max(shown, 5))
    plots.leaf_bars(axes, summary, max_leaves=max_leaves)
    with replacing(path) as file:
        figure.savefig(file, format=_format_of(path))


def _format_of(path: str) -> str:
    return os.path.splitext(path)[1].lstrip(".").lower()


def _compared(after: Contents, before: Contents, args: argparse.Namespace) -> list[Row]:
    """The rows with errors relative to a float file."""
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
    with threads() as pool, progress("comparing", total) as advance:
        for row in after.rows:
            # For dtypes that NumPy lacks, no error can be computed.
            if not isinstance(after.leaves[row.path].dtype, Opaque):
                max_error, snr_db = errors(before.read(row.path, pool), after.read(row.path, pool))
                row = dataclasses.replace(row, max_error=max_error, snr_db=snr_db)
            compared.append(row)
            advance(row.bytes_before)
    return compared
