"""Clamp gradients, train on a quantization grid, ship a small model.

The public names are in ``__init__.pyi``. Each is imported when it is first asked for: the command
``optax-clipquant`` then starts in a fifth of the time that JAX takes. ``plots``, which
needs matplotlib, is the module ``optax_clipquant.report.plots``.
"""

import importlib
from typing import Any

import lazy_loader

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "plots":
        return importlib.import_module("optax_clipquant.report.plots")
    return _public(name)
