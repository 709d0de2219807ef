"""The mean square of the inputs of each contracted index of a weight."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from optax_clipquant.analysis.compensation.meetings import squares
from optax_clipquant.analysis.compensation.moves import View
from optax_clipquant.analysis.compensation.plan import Follower, Leaves, Part
from optax_clipquant.analysis.compensation.streams import Stream
from optax_clipquant.quant.uses import Use


class InputSquares(Follower):
    """Sums the squares of the inputs of each contracted index of each leaf.

    Args:
      leaves: the leaves that are followed.
      uses: the use of each leaf. Along axes that are not contracted, batch or stacked, inputs are the same.
    """

    def __init__(self, leaves: Leaves, uses: list[Use]) -> None:
        super().__init__(leaves)
        kept = [use.contracted | use.batch | use.stacked for use in uses]
        self.shapes = [
            tuple(n if axis in axes else 1 for axis, n in enumerate(value.shape))
            for value, axes in zip(leaves.values, kept, strict=True)
        ]
        self.sums = [np.zeros(shape) for shape in self.shapes]
        self.rows = [np.zeros(shape) for shape in self.shapes]
        self._met: list[list[tuple]] = []

    def begin(self, met: list[list[tuple]]) -> None:
        """Starts a batch.

        Finding the weights of a meeting costs more than summing the squares, so ``met`` keeps the weights
        of each meeting for later batches of the same program.
        """
        self._met, self._position = met, 0

    def meet(self, eqn: JaxprEqn, side: int, view: View, x: Stream) -> None:
        if self._position == len(self._met):
            inputs, parts = self.leaves.parts(eqn, side, view)
            self._met.append(
                [(inputs, part.leaf, each) for part in parts for each in self._places(part)]
            )
        for inputs, leaf, each in self._met[self._position]:
            for value in x.float if x.batched else (x.float,):
                square, rows = squares(inputs, value)
                np.add.at(self.sums[leaf], each, np.asarray(square))
                np.add.at(self.rows[leaf], each, rows)
        self._position += 1
        self._count()

    def _places(self, part: Part) -> list[tuple[np.ndarray, ...]]:
        """The places of a part's sums; none for a later use that contracts other axes than the first."""
        places = np.unravel_index(part.index, self.leaves.values[part.leaf].shape)
        kept = zip(places, self.shapes[part.leaf], strict=True)
        places = [p if n > 1 else np.zeros_like(p) for p, n in kept]
        if any((p != p[:, :, :1]).any() for p in places):
            return []
        return [tuple(p[:, :, 0].copy() for p in places)]

    def means(self) -> dict[str, jax.Array]:
        """The mean squares by path, of the leaves that have met data."""
        return {
            path: jnp.asarray(total / np.maximum(rows, 1), jnp.float32)
            for path, total, rows in zip(self.leaves.paths, self.sums, self.rows, strict=True)
            if rows.any()
        }
