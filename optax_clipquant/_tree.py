"""Leaves of trees and their paths, whatever boxes hold them."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

PyTree = Any


def path_of(path: jax.tree_util.KeyPath) -> str:
    """A path of ``flatten_with_path`` as text, such as ``"Dense_0/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def listed(paths: Iterable[str]) -> str:
    """Paths for a message: the first five, and how many more there are; "none" if there are none."""
    shown = [repr(path) for path in paths]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return (", ".join(shown[:5]) or "none") + more


def flatten_with_path(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[jax.tree_util.KeyPath, Any]], Any]:
    """Like ``jax.tree_util.tree_flatten_with_path``, but boxes around params add nothing to paths.

    Boxes (Flax NNX's variables, linen's ``Partitioned``) appear in some places and not in others, such as in
    ``init`` but not in ``update`` of ``nnx.Optimizer``. A field named ``value`` of a user's class stays.
    """
    return list(_walk((), tree, is_leaf or (lambda x: False))), jax.tree.structure(tree, is_leaf)


def map_with_path(
    fn: Callable[..., Any],
    tree: PyTree,
    *rest: PyTree,
    is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
    """Like ``jax.tree_util.tree_map_with_path``, with the paths of ``flatten_with_path``."""
    found, treedef = flatten_with_path(tree, is_leaf)
    others = [treedef.flatten_up_to(other) for other in rest]
    return treedef.unflatten(fn(*leaf, *x) for leaf, *x in zip(found, *others, strict=True))


def _walk(
    path: jax.tree_util.KeyPath, tree: PyTree, is_leaf: Callable[[Any], bool]
) -> Iterator[tuple[jax.tree_util.KeyPath, Any]]:
    for below, x in jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_leaf(x) or _is_box(x)
    )[0]:
        if is_leaf(x) or not _is_box(x):
            yield path + below, x
            continue
        inside, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y, box=x: y is not box)
        for key, content in inside:
            name = () if path_of(key) == "value" else key
            yield from _walk(path + below + name, content, is_leaf)


def _is_box(x: Any) -> bool:
    # A caller who has boxes has imported their modules; for others, importing them would only cost time.
    nnx, meta = sys.modules.get("flax.nnx"), sys.modules.get("flax.core.meta")
    return (nnx is not None and isinstance(x, nnx.Variable)) or (
        meta is not None and isinstance(x, meta.AxisMetadata)
    )


def is_float0(x: Any) -> bool:
    """Whether ``x`` is a ``float0`` array: the gradient of an integer param, which holds no data."""
    return getattr(x, "dtype", None) == jax.dtypes.float0


def unboxed(tree: Any) -> Any:
    """``tree`` with arrays in place of NNX's variables.

    ``nnx.Optimizer`` passes variables to ``init`` but arrays to ``update``, and a variable cannot hold a
    ``Grid``.
    """
    nnx = sys.modules.get("flax.nnx")
    return tree if nnx is None else nnx.as_pure(tree)


def is_placeholder(params: Any) -> bool:
    """Whether ``params`` are the placeholder, of a private class, that ``optax.tree_map_params`` passes to ``init``."""
    return type(params).__name__ == "_ParamsPlaceholder"


def on_shapes(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``init`` to accept ``jax.ShapeDtypeStruct`` leaves, for which it returns an abstract state.

    The wrapped function raises a ``TypeError`` under ``optax.tree_map_params``, which cannot tell which
    parts of such a state correspond to the params.
    """

    @functools.wraps(init)
    def wrapped(params: Any) -> Any:
        if is_placeholder(params):
            raise TypeError(
                f"{init.__qualname__.split('.')[0]}: optax.tree_map_params cannot map this state, which "
                "holds more for a leaf of params than an array of its shape. To shard it, put the params "
                "on the mesh: state = tx.init(params) is then sharded like them, and "
                "jax.tree.map(lambda x: x.sharding, state) gives its shardings, as in the example of "
                "quantize_weights"
            )
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(unboxed(params))):
            return jax.eval_shape(init, params)
        return init(params)

    return wrapped


def check_unchanged(
    transform: str, what: str, path: str, leaf: Any, shape: tuple[int, ...], dtype: Any = None
) -> None:
    """Raises if a leaf's shape, or its dtype if one is given, is not the one it had in ``init``.

    Args:
      transform: the name of the public function, for the message.
      what: ``"params"`` or ``"updates"``.
      path: the leaf's path.
      leaf: an array.
      shape: the shape in ``init``. A shape that merely broadcasts would otherwise go unnoticed.
      dtype: the dtype in ``init``.

    Raises:
      ValueError: the shape differs.
      TypeError: the dtype differs, as after ``p + u`` of half-precision params and float32 updates.
    """
    if np.shape(leaf) != tuple(shape):
        raise ValueError(
            f"{transform}: {what} leaf {path!r} has shape {np.shape(leaf)}, but had {tuple(shape)} in "
            "init; call tx.init again for params of other shapes"
        )
    if dtype is not None and leaf.dtype != dtype:
        raise TypeError(
            f"{transform}: {what} leaf {path!r} is {leaf.dtype}, but was {np.dtype(dtype)} in init. "
            "Apply updates with optax.apply_updates(params, updates), which keeps the dtype of params; "
            "p + u, or eqx.apply_updates, does not. Params cast on purpose need a new tx.init"
        )


NUMBERS = (int, float, np.generic, np.ndarray, jax.Array)  # and arrays of them


def check_scalar(transform: str, name: str, value: Any, what: str, help: str = "") -> None:
    """Raises if an argument is not a number or a 0-d array; ``what`` it must be, and ``help``, are for the message."""
    if not isinstance(value, NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{transform}: {name} must be {what}, got {value!r}{help}")
    if np.ndim(value) != 0:
        raise ValueError(
            f"{transform}: {name} must be a scalar, got an array of shape {np.shape(value)}{help}"
        )


def check_state(transform: str, state: Any, kind: Any) -> None:
    """Raises if ``state`` is not of the named tuple ``kind``, but another transform's, or another argument.

    Only fields are compared, since a notebook may have loaded the class again.
    """
    if getattr(state, "_fields", None) != kind._fields:
        raise TypeError(
            f"{transform}: the state is a {type(state).__name__}, not a {kind.__name__}; call "
            "update(updates, state, params) with the state of this chain. If it was restored from a checkpoint of "
            "another chain, give that chain, or make the state anew with tx.init(params)"
        )


def check_option(transform: str, name: str, value: bool, before: bool) -> None:
    """Raises if the state was made with another ``value`` of the option ``name``."""
    if bool(value) is not before:
        raise ValueError(
            f"{transform}: the state was made with {name}={before}, and not {name}={value}; give the {name} that "
            "the state was made with, or make it anew with tx.init(params)"
        )


def check_known(transform: str, paths: Iterable[str], known: Iterable[str]) -> None:
    """Raises if params have a leaf that they did not have in ``init``.

    Args:
      transform: the name of the public function, for the message.
      paths: the paths of the params.
      known: the paths in ``init``.

    Raises:
      ValueError: one of ``paths`` is not ``known``.
    """
    if new := sorted(set(paths) - set(known)):
        raise ValueError(
            f"{transform}: params have a leaf {new[0]!r} that they did not have in init"
            + (f", and {len(new) - 1} more" if len(new) > 1 else "")
            + "; call tx.init again, or leave it out with optax.masked in both"
        )


def refuse_abstract(what: str, x: Any, way_out: str = "give arrays") -> None:
    """Raises ``TypeError`` if ``x``, an array or a ``QArray``, has no values."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x)):
        raise TypeError(f"{what} is a ShapeDtypeStruct, which has no values; {way_out}")
