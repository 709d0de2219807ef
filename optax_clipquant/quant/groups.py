"""Groups of weights that share a scale: channels, runs, stacked layers. No JAX here."""

import math
from typing import Literal

from optax_clipquant.quant.uses import Use

ChannelAxis = int | tuple[int, ...] | Literal["auto"] | None
Group = tuple[int, int] | None  # (negative axis, size): runs of `size` neighbours share a scale


def contracted_axes(
    ndim: int, channel_axis: ChannelAxis = "auto", use: Use | None = None
) -> tuple[int, ...]:
    """The axes of an array along which weights may share a scale: all but the channel axes.

    ``channel_axis`` names these. For ``"auto"``, they are the axes that ``use`` does not contract, or
    without a use the last axis. For None there are none, except the axes of stacked layers if ``use``
    has any: each layer is a tensor by itself.

    Raises:
      ValueError: ``channel_axis`` or ``use`` names an axis that the array does not have.
    """
    if channel_axis == "auto" and use is not None:
        return use.reduced(ndim)
    if channel_axis is None:
        stacked = frozenset() if use is None else use.stacked
        return tuple(axis for axis in range(ndim) if axis not in stacked)
    if channel_axis == "auto":
        channel_axis = -1 if ndim else ()
    channels = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
    if ndim == 0:
        return ()
    for axis in channels:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"channel_axis {axis} is out of range for an array with {ndim} axes; name an axis in "
                f"[{-ndim}, {ndim - 1}], or None for one scale per tensor"
            )
    kept = {axis % ndim for axis in channels}
    return tuple(axis for axis in range(ndim) if axis not in kept)


def cut_groups(
    shape: tuple[int, ...], contracted: tuple[int, ...], size: int | None
) -> tuple[tuple[int, ...], Group]:
    """Groups of at most ``size`` weights: the axes to reduce whole, and the axis to cut into runs.

    From the last contracted axis outward, axes are reduced whole while the product of their extents
    stays within ``size``. The first that does not fit is cut into runs, and is not among the axes
    returned; those further out have a scale for each index.

    Examples:
      >>> cut_groups((3, 3, 64, 8), (0, 1, 2), 32)  # a convolution: [3, 3, 2, 8] scales
      ((), (-2, 32))
      >>> cut_groups((5, 5, 3, 16), (0, 1, 2), 32)  # [3, 1, 1, 16]
      ((1, 2), (-4, 2))
      >>> cut_groups((3, 3, 16, 8), (0, 1, 2), 64)  # [3, 1, 1, 8]
      ((1, 2), None)
    """
    if size is None:
        return contracted, None
    shared: list[int] = []
    product = 1
    for axis in reversed(contracted):
        if product * shape[axis] > size:
            run = size // product
            return tuple(reversed(shared)), (axis - len(shape), run) if run > 1 else None
        product *= shape[axis]
        shared.append(axis)
    return tuple(reversed(shared)), None


def groups_of(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], group: Group
) -> tuple[tuple[int, ...], Group]:
    """Recovers the result of ``cut_groups`` from the shapes of an array and its scales.

    Raises:
      ValueError: the scales do not fit an array of ``shape``.
    """
    cut = None if group is None else group[0] + len(shape)
    shared = []
    fits = len(shape) == len(scale_shape) and (cut is None or cut >= 0)
    for axis, (n, scales) in enumerate(zip(shape, scale_shape, strict=False)):
        if axis == cut:
            fits &= group is not None and scales == math.ceil(n / group[1])
        elif scales == 1:
            shared.append(axis)
        else:
            fits &= scales == n
    if not fits:
        raise ValueError(
            f"scales of shape {scale_shape} in groups {group} do not fit an array of shape {shape}. A "
            "checkpoint restored into a tree that was quantized by another rule has such, and so has a QArray "
            "with axes moved past its groups, as by jax.vmap along a later axis: move those of .dequantize()"
        )
    return tuple(shared), group


def scale_shape(shape: tuple[int, ...], shared: tuple[int, ...], group: Group) -> tuple[int, ...]:
    """The shape of the scales of an array of ``shape``; the inverse of ``groups_of``."""
    extents = [1 if axis in shared else n for axis, n in enumerate(shape)]
    if group is not None:
        axis, size = group
        extents[axis] = math.ceil(shape[axis] / size)
    return tuple(extents)


def weights_per_scale(shape: tuple[int, ...], scale_shape: tuple[int, ...], group: Group) -> int:
    """The number of weights that share a scale; of the whole groups, where the last one is shorter.

    Examples:
      >>> weights_per_scale((3, 3, 64, 8), (3, 3, 2, 8), (-2, 32))
      32
    """
    shared, group = groups_of(shape, scale_shape, group)
    run = 1 if group is None else min(group[1], shape[group[0]])
    return run * math.prod(shape[axis] for axis in shared)
