"""Storage of a ``Calibration``: its moments as the tree of a file, its uses as metadata. No JAX here."""

import json
from collections.abc import Mapping
from typing import Any

from optax_clipquant.quant.uses import Calibration, Use, Uses

KEY = "optax_clipquant.calibration"
"""The metadata entry: JSON with the fields of each ``Use``, and the shape of its leaf, by path."""

_SETS = ("contracted", "batch", "stacked", "lookup")


def text_of(calibration: Calibration) -> str:
    """The uses of a calibration as text."""
    shapes = calibration.uses.shapes
    content = {
        path: {
            "kinds": sorted(use.kinds),
            **{name: sorted(getattr(use, name)) for name in _SETS},
            "others": [sorted(axes) for axes in use.others],
            "adapter": use.adapter,
            "shape": list(shapes[path]) if path in shapes else None,
        }
        for path, use in calibration.uses.items()
    }
    return json.dumps(content)


def calibration_of(text: str, moments: Mapping[str, Any]) -> Calibration:
    """The calibration with these moments, and with the uses that ``text_of`` wrote.

    Raises:
      ValueError: ``text`` is not what ``text_of`` writes.
    """
    uses, shapes = {}, {}
    try:
        for path, fields in json.loads(text).items():
            shape = fields.pop("shape")
            uses[path] = Use(**fields)
            if shape is not None:
                shapes[path] = tuple(map(int, shape))
        return Calibration(Uses(uses, shapes), moments)
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its calibration is damaged ({error!r})") from error
