"""Tables and progress bars. Rich is imported only when something is shown."""

import abc
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console
    import rich.measure
    import rich.progress
    import rich.table


class Printed(abc.ABC):
    """A result whose ``__rich__`` gives a table, which ``print`` shows as text."""

    @abc.abstractmethod
    def __rich__(self) -> "rich.table.Table": ...

    def __str__(self) -> str:
        import rich.console

        buffer = io.StringIO()
        # In a notebook, rich would display the table and leave the buffer empty, or write colour codes.
        console = rich.console.Console(
            file=buffer, width=120, force_jupyter=False, force_terminal=False
        )
        console.print(self)
        return buffer.getvalue().rstrip("\n")


class Name:
    """The name of a leaf in a table: not parsed as markup, and broken after ``.``, ``/`` or ``_`` if too long."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __rich_measure__(
        self, console: "rich.console.Console", options: "rich.console.ConsoleOptions"
    ) -> "rich.measure.Measurement":
        import rich.cells
        import rich.measure

        return rich.measure.Measurement(1, rich.cells.cell_len(self._name))

    def __rich_console__(
        self, console: "rich.console.Console", options: "rich.console.ConsoleOptions"
    ) -> "rich.console.RenderResult":
        import rich.cells
        import rich.text

        lines = [""]
        for part in re.findall(r"[^./_]*[./_]?", self._name):
            if lines[-1] and rich.cells.cell_len(lines[-1] + part) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield rich.text.Text("\n".join(lines), overflow="fold")


def compact_table(*, show_footer: bool = False) -> "rich.table.Table":
    """An empty table with little padding, which leaves the width to its contents."""
    import rich.box
    import rich.table

    return rich.table.Table(
        show_footer=show_footer, box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )


def progress_bar(
    *, count_bytes: bool = False, transient: bool = False, shown: bool = True
) -> "rich.progress.Progress":
    """A progress bar on stderr, since stdout is for results.

    Args:
      count_bytes: whether to count bytes, and show the remaining time rather than the elapsed time.
      transient: whether the bar disappears at the end.
      shown: whether the bar is displayed; if not, tasks can still be added and advanced.
    """
    import rich.console
    import rich.progress

    figures = (
        (rich.progress.DownloadColumn(), rich.progress.TimeRemainingColumn())
        if count_bytes
        else (rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn())
    )
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        *figures,
        console=rich.console.Console(stderr=True),
        transient=transient,
        disable=not shown,
    )
