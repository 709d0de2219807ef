"""What leaves are called in a file.

The name of a leaf is the keys that lead to it, each with ``~`` written ``~0`` and ``/`` written ``~1``
(JSON pointer, RFC 6901, without the leading slash), joined by ``/``. The tree itself is ``~``;
``__metadata__``, which safetensors keeps for itself, is ``~_metadata__``.
"""

from typing import Any

ROOT = "~"


def name_of(keys: tuple[Any, ...]) -> str:
    """The name of the leaf to which ``keys`` lead."""
    if not keys:
        return ROOT
    name = "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in keys)
    return "~_metadata__" if name == "__metadata__" else name


def keys_of(name: str) -> tuple[str, ...]:
    """The keys that ``name_of`` joined."""
    if name == ROOT:
        return ()
    if name == "~_metadata__":
        return ("__metadata__",)
    return tuple(key.replace("~1", "/").replace("~0", "~") for key in name.split("/"))


def path_of_name(name: str) -> str:
    """The keys that a name holds, joined by slashes."""
    return "/".join(keys_of(name))
