"""The common style of the plots: axes, colours, lines and markers."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import matplotlib.figure
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
)
GREY = "#666666"
STYLES = (
    *((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PINK, ":", "D")),
    *((YELLOW, (0, (5, 1)), "v"), (SKY, (0, (3, 1, 1, 1)), "P"), (GREY, (0, (1, 1)), "X")),
)
"""Colour, line and marker of the first series, the second, ..."""

Style = tuple[Any, Any, Any]
Mode = Literal["max", "min"]


def subplots(
    columns: int = 1, rows: int = 1, *, width: float = 5.2, height: float = 4.0
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """Makes a figure with axes in the common style.

    Args:
      columns: the number of columns of axes.
      rows: the number of rows of axes.
      width: the width of each axes, in inches.
      height: the height of each axes, in inches.

    Returns:
      The figure, which ``figure.savefig(path)`` writes without a window or backend, and its axes.
    """
    size = (width * columns, height * rows)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained", dpi=120)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for each in axes:
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    return figure, axes


def styled(series: Mapping[str, Any]) -> Iterable[tuple[tuple[str, Any], Style]]:
    """Pairs each name and its values with a style; those of up to 14 series differ."""
    for i, item in enumerate(series.items()):
        turn, place = divmod(i, len(STYLES))
        color, line, marker = STYLES[place]
        if turn % 2:  # the colours again, with other lines and markers
            line, marker = STYLES[(place + 3) % len(STYLES)][1], "*d<>hp8"[place]
        yield item, (color, line, marker)


def sign_of(mode: str) -> int:
    """1 for "max", -1 for "min"."""
    if mode not in ("max", "min"):
        raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
    return 1 if mode == "max" else -1
