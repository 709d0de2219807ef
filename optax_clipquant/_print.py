"""How results are shown: as a rich table, and by ``print`` as its text."""

import abc
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command need not wait for it where it shows none
    import rich.progress
    import rich.table


class Printed(abc.ABC):
    """A result whose ``__rich__`` gives a table, which ``print`` shows too."""

    @abc.abstractmethod
    def __rich__(self) -> "rich.table.Table": ...

    def __str__(self) -> str:
        import rich.console

        buffer = io.StringIO()
        # In a notebook, rich would show it there and leave no text, or text with colours.
        console = rich.console.Console(
            file=buffer, width=120, force_jupyter=False, force_terminal=False
        )
        console.print(self)
        return buffer.getvalue().rstrip("\n")


def compact_table(*, show_footer: bool = False) -> "rich.table.Table":
    """A table without columns that leaves the room to its content."""
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
      count_bytes: whether it counts bytes, and tells the time that remains, not that which has passed.
      transient: whether it vanishes at the end.
      shown: whether there is a bar at all; a task may be added and advanced all the same.
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
