"""Names of leaves."""

import jax


def path_of(path: jax.tree_util.KeyPath) -> str:
    """A path as text, such as ``"Dense_0/kernel"``.

    Boxes around a param (Flax NNX's variables, linen's ``Partitioned``) add a last part ``value``
    in some places and not in others, so it is dropped.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
