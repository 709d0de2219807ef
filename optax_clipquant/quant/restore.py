"""What tells a checkpoint of other levels apart when it is restored."""

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from optax_clipquant.quant.levels import Levels

T = TypeVar("T", bound=type)
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a tree keeps of a dataclass beside its arrays.

    Attributes:
      static: the static fields.
      given: the names of the arrays that are given. They are not compared: as for any dataclass, a prefix
        of a tree (of ``in_axes``, or of shardings) may hold None in place of an array.
    """

    static: tuple[Any, ...]
    given: tuple[str, ...] = dataclasses.field(default=(), compare=False)


def register_with_layout(cls: T, data_fields: tuple[str, ...], meta_fields: tuple[str, ...]) -> T:
    """Registers a dataclass as ``jax.tree_util.register_dataclass`` does, with its layout in a key.

    The key of the field ``scale`` is, for example, ``scale(block=(-2, 256), bits=8, dtype=float32, row=given)``.
    Orbax and other libraries keep arrays under the keys of a tree and nothing else of it. So they find no such
    array when they restore into a tree with another layout, and say which keys differ.
    """

    optional = tuple(name for name in data_fields if name != "scale")

    def flatten(x: Any) -> tuple[tuple[Any, ...], Layout]:
        data = tuple([getattr(x, name) for name in data_fields])
        static = tuple([getattr(x, name) for name in meta_fields])
        given = vars(x).get("_given")
        if given is None or isinstance(x.scale, _ARRAYS):
            given = tuple([name for name in optional if getattr(x, name) is not None])
        return data, Layout(static, given)

    def flatten_with_keys(x: Any) -> tuple[tuple[Any, ...], Layout]:
        data, layout = flatten(x)
        key = "scale" + _listed(_as_fields(meta_fields, layout))
        keys = (key if name == "scale" else name for name in data_fields)
        return tuple(zip(map(jax.tree_util.GetAttrKey, keys), data, strict=True)), layout

    def unflatten(layout: Layout, data: Iterable[Any]) -> Any:
        x = object.__new__(cls)
        vars(x).update(zip(meta_fields, layout.static, strict=True))
        # For trees of placeholders: orbax puts objects in place of None too, and others None in place of arrays.
        vars(x).update(zip(data_fields, data, strict=True), _given=layout.given)
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _as_fields(meta_fields: tuple[str, ...], layout: Layout) -> dict[str, Any]:
    fields = dict(zip(meta_fields, layout.static, strict=True))
    if fields.get("codebook"):  # its numbers are too long for the name of a file
        fields["codebook"] = f"{zlib.crc32(repr(fields['codebook']).encode()):08x}"
    given = dict.fromkeys(layout.given, "given")
    return {name: x for name, x in fields.items() if x is not None} | given


def as_text(static: Mapping[str, Any]) -> np.ndarray:
    """``static`` as JSON in a byte array, which every kind of checkpoint can hold."""
    return np.frombuffer(json.dumps(static, default=str).encode(), np.uint8)


def levels_of(fields: Mapping[str, Any]) -> Levels:
    """The levels whose fields ``as_text`` wrote."""
    found = dict(fields)
    for name in ("group", "codebook"):
        found[name] = None if found[name] is None else tuple(found[name])
    return Levels(**{**found, "dtype": np.dtype(found["dtype"])})


def check_restored(
    path: str,
    here: Mapping[str, Any],
    text: Any,
    arrays: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> None:
    """Raises if a checkpoint does not match the tree it is restored into.

    Args:
      path: the place in the tree.
      here: the static half in the tree.
      text: the static half in the checkpoint, from ``as_text``; None in checkpoints before version 0.2.
      arrays: the arrays in the tree.
      saved: the arrays in the checkpoint.

    Raises:
      ValueError: the static halves or the shapes of the arrays differ; the message shows both.
    """

    # The tree may hold placeholders without shapes, such as shardings.
    names = [name for name, x in arrays.items() if x is None or hasattr(x, "shape")]

    def with_shapes(static: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        shapes = {name: None if arrays[name] is None else [*arrays[name].shape] for name in names}
        return {**static, **{f"shape of {name}": shape for name, shape in shapes.items()}}

    own = with_shapes(json.loads(bytes(as_text(here))), arrays)
    found = with_shapes({} if text is None else json.loads(bytes(np.asarray(text))), saved)
    # Older checkpoints lack the fields that were added since.
    if own | found != own:
        raise ValueError(
            f"{path.removeprefix('./')}: the checkpoint holds {_listed(found)}, and the tree to restore "
            f"into has {_listed(own)}; build that tree with the quantizer that the checkpoint was saved with"
        )


def _listed(fields: Mapping[str, Any]) -> str:
    return "(" + ", ".join(f"{name}={value}" for name, value in fields.items()) + ")"
