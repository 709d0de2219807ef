"""How a function uses its weights, as plain data. No JAX here."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from optax_clipquant._print import Name, Printed, compact_table

if TYPE_CHECKING:
    import rich.table

Kind = Literal["dot", "conv", "lookup", "elementwise", "unknown"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class Use:
    """How a function uses one leaf, and the role of each of its axes.

    Axes are counted from 0, those of stacked layers included. An axis that is in none of the sets is
    an output: it stays in the result of the dot or convolution.

    Attributes:
      kinds: ``"dot"`` and ``"conv"``: the leaf is multiplied with data and summed over; ``"lookup"``:
        rows are picked by data; ``"elementwise"``: it is added, multiplied or the like, as a bias or
        the scale of a norm is; ``"unknown"``: it reaches an operation whose effect on its axes is
        not known. Empty where the function does not use the leaf.
      contracted: the axes that are summed over.
      batch: the axes that run beside an axis of the data: experts, the channels of a depthwise
        convolution.
      stacked: the axes along which the function takes one index at a time: scanned or indexed layers.
      lookup: the axes along which data picks indices.
      others: the contracted axes of later uses, where they differ from ``contracted``, which is those of
        the first use in program order.
      adapter: whether the leaf is a factor of a product that is added to another weight or to its
        result (LoRA). Such leaves stay float unless ``where`` selects them.

    Raises:
      ValueError: a kind is unknown, or an axis is not an integer of at least 0.

    Examples:
      >>> Use({"dot"}, contracted={0}).reduced(2)
      (0,)
      >>> Use({"lookup"}, lookup={0}).reduced(2)  # an embedding: a scale for each row
      (1,)
    """

    kinds: frozenset[Kind] = frozenset()
    contracted: frozenset[int] = frozenset()
    batch: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()
    lookup: frozenset[int] = frozenset()
    others: tuple[frozenset[int], ...] = ()
    adapter: bool = False

    def __init__(
        self,
        kinds: Iterable[Kind] | Kind = (),
        contracted: Iterable[int] = (),
        batch: Iterable[int] = (),
        stacked: Iterable[int] = (),
        lookup: Iterable[int] = (),
        others: Iterable[Iterable[int]] = (),
        adapter: bool = False,
    ) -> None:
        found: set[Any] = {kinds} if isinstance(kinds, str) else set(kinds)
        if not found <= set(KINDS):
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {sorted(found)}")
        sets = {"contracted": contracted, "batch": batch, "stacked": stacked, "lookup": lookup}
        for name, axes in sets.items():
            object.__setattr__(self, name, _axes(name, axes))
        object.__setattr__(self, "kinds", frozenset(found))
        object.__setattr__(self, "others", tuple(_axes("others", axes) for axes in others))
        object.__setattr__(self, "adapter", adapter)

    @property
    def is_weight(self) -> bool:
        """Whether the leaf is quantized by default.

        It is if it is in a dot, a convolution or a lookup, has no unknown use, and is not an adapter.
        """
        known = bool(self.kinds & {"dot", "conv", "lookup"}) and "unknown" not in self.kinds
        return known and not self.adapter

    def reduced(self, ndim: int) -> tuple[int, ...]:
        """The axes along which the weights of a leaf with ``ndim`` axes may share a scale.

        They are the contracted ones. Where nothing is contracted, they are all axes but lookup,
        stacked and batch axes, so that each row of an embedding has a scale.

        Raises:
          ValueError: the use names an axis that the leaf does not have.
        """
        kept = self.lookup | self.stacked | self.batch
        beyond = {axis for axis in self.contracted | kept if axis >= ndim}
        if beyond:
            raise ValueError(
                f"it was traced with the axes {sorted(self.contracted | kept)}, but has only {ndim}; "
                "trace the function with params of the same shapes"
            )
        return tuple(sorted(self.contracted or set(range(ndim)) - kept))


def _axes(name: str, axes: Iterable[int]) -> frozenset[int]:
    found = frozenset(axes)
    if not all(isinstance(axis, int) and axis >= 0 for axis in found):
        raise ValueError(f"{name} must be axes counted from 0, got {sorted(found)}")
    return found


class Uses(Mapping[str, Use], Printed):
    """A mapping from the path of each leaf to its ``Use``, as ``trace_weights`` returns; prints as a table.

    Args:
      uses: the uses by path, the "/"-joined string that rules match.
      shapes: the shapes of the traced leaves by path.

    Examples:
      >>> print(Uses({"kernel": Use({"dot"}, contracted={0}), "old": Use()}, {"kernel": (8, 4)}))
      leaf    shape  use     contracted  batch  stacked  lookup
      ─────────────────────────────────────────────────────────
      kernel  8x4    dot     0
      old            unused
    """

    def __init__(
        self,
        uses: Mapping[str, Use],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._uses = dict(uses)
        self.shapes: Mapping[str, tuple[int, ...]] = dict(shapes or {})

    def __getitem__(self, path: str) -> Use:
        return self._uses[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._uses)

    def __len__(self) -> int:
        return len(self._uses)

    def __repr__(self) -> str:
        return f"Uses({self._uses!r})"

    def __rich__(self) -> "rich.table.Table":
        table = compact_table()
        sets = ("contracted", "batch", "stacked", "lookup")
        for header in ("leaf", "shape", "use", *sets):
            table.add_column(header, overflow="fold")
        for path, use in self.items():
            # The first of uses that contract different axes decides; the others are shown beside it.
            contracted = " | ".join(map(_text, (use.contracted, *use.others)))
            table.add_row(
                Name(path),
                "x".join(map(str, self.shapes.get(path, ()))),
                ", ".join(kind for kind in KINDS if kind in use.kinds) + " (adapter)" * use.adapter
                or "unused",
                contracted,
                *(_text(getattr(use, name)) for name in sets[1:]),
            )
        return table


def _text(axes: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(axes)))


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of the activations that the weights of a function are multiplied by, on data.

    Attributes:
      uses: how the function uses its weights.
      moments: by path, the mean square of the activations that meet each contracted index of the leaf: a
        float32 array that broadcasts to the leaf.

    Raises:
      ValueError: a leaf has a moment but no use.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_clipquant import calibrate
      >>> calibration = calibrate(lambda w, x: x @ w, jnp.ones((2, 3)), [jnp.array([[1.0, 2.0]])])
      >>> calibration.moments[""].ravel()
      Array([1., 4.], dtype=float32)
    """

    uses: Uses
    moments: Mapping[str, Any]

    def __post_init__(self) -> None:
        unknown = self.moments.keys() - self.uses.keys()
        if unknown:
            raise ValueError(f"moments of leaves that have no use: {sorted(unknown)[:8]}")


def names_a_weight(path: str) -> bool:
    """Whether a leaf with this path may be quantized by default: it is not named ``bias`` or ``scale``."""
    return path.rpartition("/")[2] not in ("bias", "scale")
