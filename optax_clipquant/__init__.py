"""Clamp gradients, train on a quantization grid, ship a small model.

The public names are in ``__init__.pyi``. Each is imported on first access, so that the command
``optax-clipquant`` starts in a fifth of the time it takes to import JAX. ``plots``, which needs
matplotlib, is the module ``optax_clipquant.report.plots``.

.. include:: ../examples/how_it_works.md
"""

# Nothing is imported here before it is needed: until the command has taken over Ctrl-C, Python answers
# it with a traceback.

_attached: list = []


def _attach() -> list:
    """What lazy_loader returns: functions for ``__getattr__`` and ``__dir__``, and ``__all__``."""
    if not _attached:
        import lazy_loader

        _attached.extend(lazy_loader.attach_stub(__name__, __file__))
    return _attached


def __getattr__(name: str) -> object:
    if name == "plots":
        import importlib

        return importlib.import_module("optax_clipquant.report.plots")
    if name == "__all__":
        return _attach()[2]
    return _attach()[0](name)


def __dir__() -> list[str]:
    return _attach()[1]()
