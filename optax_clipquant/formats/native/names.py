"""The names of leaves in a file, and the tree that named leaves form. No JAX here.

The name of a leaf is the keys that lead to it, each with ``~`` written ``~0`` and ``/`` written ``~1``
(JSON pointer, RFC 6901, without the leading slash), joined by ``/``. The tree itself is ``~``;
``__metadata__``, which safetensors keeps for itself, is ``~_metadata__``.
"""

import re
from collections.abc import Mapping
from typing import Any

ROOT = "~"
KINDS = ("list", "tuple", "int", "none", "dict")
"""The kinds of nodes that are not dicts with string keys."""

_DEPTH = 1000  # Python's recursion limit allows no deeper tree
_INTEGER = re.compile(r"0|-?[1-9]\d{0,4000}")
_NO_ESCAPE = re.compile("~(?![01])")


def name_of(keys: tuple[Any, ...]) -> str:
    """The name of the leaf under ``keys``."""
    if not keys:
        return ROOT
    name = "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in keys)
    return "~_metadata__" if name == "__metadata__" else name


def keys_of(name: str) -> tuple[str, ...]:
    """The keys that ``name_of`` joined to ``name``.

    Raises:
      ValueError: ``name_of`` does not return this name for any keys.
    """
    if name == ROOT:
        return ()
    if name == "~_metadata__":
        return ("__metadata__",)
    if name == "__metadata__" or _NO_ESCAPE.search(name):
        raise ValueError(f"the name {name!r} has a '~' that no key has")
    if name.count("/") >= _DEPTH:
        raise ValueError(f"the name {name[:64]!r}... has more than {_DEPTH} keys")
    return tuple(key.replace("~1", "/").replace("~0", "~") for key in name.split("/"))


def path_of_name(name: str) -> str:
    """The keys in ``name``, joined by slashes."""
    return "/".join(keys_of(name))


class _Node:
    """A node of the tree; a leaf has the kind ``"leaf"`` and itself as value."""

    __slots__ = ("children", "kind", "name", "value")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.kind = self.name = ""
        self.value: Any = None

    def settle(self, name: str, kind: str, value: Any = None) -> None:
        if self.kind:
            raise ValueError(f"the name {name!r} is that of a {self.kind} and of a {kind}")
        self.name, self.kind, self.value = name, kind, value


def assemble(leaves: Mapping[str, Any], nodes: Mapping[str, str]) -> Any:
    """Builds the tree from its leaves by name and the kinds of its nodes.

    Raises:
      ValueError: the names and kinds contradict each other.
    """
    root = _Node()
    for name, leaf in leaves.items():
        _reach(root, name).settle(name, "leaf", leaf)
    for name, kind in nodes.items():
        if kind not in KINDS:
            raise ValueError(f"the node {name!r} is a {kind!r}, which is none of {', '.join(KINDS)}")  # fmt: skip
        _reach(root, name).settle(name, kind)
    order = [root]
    for node in order:  # grows meanwhile, with each node before its children
        order.extend(node.children.values())
    for node in reversed(order):
        node.value = _value(node)
    return root.value


def _reach(root: _Node, name: str) -> _Node:
    node = root
    for key in keys_of(name):
        node = node.children.setdefault(key, _Node())
    return node


def _value(node: _Node) -> Any:
    children = {key: child.value for key, child in node.children.items()}
    if children and node.kind in ("leaf", "none", "dict"):
        below = next(iter(children))
        raise ValueError(f"the {node.kind} {node.name!r} has {below!r} below it, but can have nothing")  # fmt: skip
    if node.kind in ("list", "tuple"):
        wrong = children.keys() ^ {str(index) for index in range(len(children))}
        if wrong:
            raise ValueError(f"the {node.kind} {node.name!r} lacks or cannot have {min(wrong)!r}")
        items = [children[str(index)] for index in range(len(children))]
        return items if node.kind == "list" else tuple(items)
    if node.kind == "int":
        wrong = [key for key in children if not _INTEGER.fullmatch(key)]
        if wrong:
            raise ValueError(
                f"the node {node.name!r} has the key {wrong[0]!r}, which is not an integer"
            )
        return {int(key): child for key, child in children.items()}
    return node.value if node.kind in ("leaf", "none") else children
