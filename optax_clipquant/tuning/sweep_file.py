"""The JSON file of a sweep: its grid, and the rows so far.

    {"grid": {"c": [0.1, 1.0]}, "rows": [{"c": 0.1, "loss": "nan", "failed": true}]}

JSON has no numbers that are not finite; they are stored as the strings "nan", "inf" and "-inf".
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from optax_clipquant._atomic import replacing

FAILED = "failed"
_TEXTS = ("nan", "inf", "-inf")

Row = dict[str, Any]
"""The values of a point, its metrics, and ``failed``, as Python numbers."""


def read(
    path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]], points: Sequence[Row]
) -> list[Row]:
    """The rows in a file; an empty list if it does not exist.

    Args:
      path: the file.
      columns: the grid.
      points: all points of the grid, of which the file must hold the first ones.

    Raises:
      ValueError: the file belongs to another grid, is damaged, or was not written by ``sweep``.
    """
    way_out = "give another path, or delete the file"
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: not a regular file; give another path")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, parse_constant=_refuse)
        # Compared as text, which distinguishes 1 from 1.0, and the order of columns.
        grid, expected = json.dumps(content["grid"]), json.dumps(_plain(columns))
        if grid == expected:
            rows = [{name: _number(x) for name, x in row.items()} for row in content["rows"]]
            if [{name: row[name] for name in columns} for row in rows] != points[: len(rows)]:
                raise ValueError("the rows are not those of its grid")
            for row in rows:
                metrics = [x for name, x in row.items() if name not in (*columns, FAILED)]
                if row[FAILED] is all(map(math.isfinite, metrics)):
                    raise ValueError(f"a row is marked {row[FAILED]}, with the metrics {metrics}")
            return rows
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: damaged, or not written by sweep ({error!r}); {way_out}"
        ) from error
    raise ValueError(f"{path}: its grid is {grid}, but this sweep's is {expected}; {way_out}")


def write(
    path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]], rows: Sequence[Row]
) -> None:
    """Replaces the file atomically."""
    content = {"grid": _plain(columns), "rows": _plain(rows)}
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode())


def _number(x: Any) -> Any:
    if x in _TEXTS:
        return float(x)
    if isinstance(x, (bool, int, float)):
        return x
    raise TypeError(f"{x!r} is not a number")


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _plain(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, Sequence):
        return [_plain(value) for value in x]
    return x if math.isfinite(x) else str(x)
