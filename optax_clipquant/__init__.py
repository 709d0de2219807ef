"""Clamp gradients, train on a quantization grid, ship a small model.

The public names are in ``__init__.pyi``. Each is imported on first access, so that the command
``optax-clipquant`` starts in a fifth of the time it takes to import JAX. ``plots``, which needs
matplotlib, is the module ``optax_clipquant.report.plots``.

.. include:: ../examples/how_it_works.md
"""

import importlib
from typing import Any

import lazy_loader

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "plots":
        return importlib.import_module("optax_clipquant.report.plots")
    return _public(name)
