"""A tree as named leaves (``names.py``), and back."""

from collections.abc import Mapping
from typing import Any

import jax

from optax_clipquant.formats.names import keys_of, name_of
from optax_clipquant.quant.params import PyTree
from optax_clipquant.quant.qarray import is_qarray


def flatten(tree: PyTree) -> tuple[dict[str, Any], dict[str, str]]:
    """The leaves of ``tree`` and the kinds of its nodes, by name."""
    leaves: dict[str, Any] = {}
    nodes: dict[str, str] = {}
    _collect(tree, (), leaves, nodes)
    return leaves, nodes


def assemble(leaves: Mapping[str, Any], nodes: Mapping[str, str]) -> PyTree:
    """The tree that ``flatten`` flattened."""
    return _assemble(
        {keys_of(name): leaf for name, leaf in leaves.items()},
        {keys_of(name): kind for name, kind in nodes.items()},
    )


def _collect(
    tree: PyTree, keys: tuple[Any, ...], leaves: dict[str, Any], nodes: dict[str, str]
) -> None:
    """Puts the leaves under ``tree`` in ``leaves``, and the kinds of nodes in ``nodes``."""
    name = name_of(keys)
    if tree is None:
        nodes[name] = "none"
        return
    children = None if is_qarray(tree) else _children(tree)
    if children is None:
        leaves[name] = tree
        return
    for key, _ in children:
        if type(key) not in (str, int):
            path = "/".join(map(str, keys))
            raise TypeError(f"{path or 'the tree'}: keys must be text or integers, got {key!r}")
    if type(tree) in (list, tuple):
        nodes[name] = type(tree).__name__
    elif not children:
        nodes[name] = "dict"
    elif all(type(key) is int for key, _ in children):
        nodes[name] = "int"
    for key, child in children:
        _collect(child, (*keys, key), leaves, nodes)


def _children(tree: PyTree) -> list[tuple[Any, PyTree]] | None:
    """Key and value of each child of a node, None for a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(flat) == 1 and not flat[0][0]:
        return None
    # A node without children has no key to show; None among children is one.
    names = ("key", "idx", "name")
    return [
        (next((getattr(path[0], n) for n in names if hasattr(path[0], n)), str(path[0])), child)
        for path, child in flat
    ]


def _assemble(leaves: dict[tuple[str, ...], Any], nodes: dict[tuple[str, ...], str]) -> PyTree:
    """The tree with ``leaves`` at their keys."""
    # Dicts as sets that keep their order.
    children: dict[tuple[str, ...], dict[str, None]] = {}
    for keys in (*leaves, *nodes):
        for depth, key in enumerate(keys):
            children.setdefault(keys[:depth], {})[key] = None

    def build(keys: tuple[str, ...]) -> PyTree:
        if keys in leaves:
            return leaves[keys]
        kind = nodes.get(keys)
        if kind == "none":
            return None
        inner = {key: build((*keys, key)) for key in children.get(keys, {})}
        if kind in ("list", "tuple"):
            items = [inner[str(index)] for index in range(len(inner))]
            return items if kind == "list" else tuple(items)
        if kind == "int":
            return {int(key): child for key, child in inner.items()}
        return inner

    return build(())
