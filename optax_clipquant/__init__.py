"""Clamp gradients, train on a quantization grid, ship a small model.

The public names are in ``__init__.pyi``. Each is imported when it is first asked for: the command
``optax-clipquant`` then starts in a fifth of the time that JAX takes. Modules, such as
``optax_clipquant.plots``, are there once they are imported by their names.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
