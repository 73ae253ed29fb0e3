"""From a plan's predicted loss to the loss that one should expect: at most two measured plans correct the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_POINTS = 2
EXPONENTS = (0.5, 2.0)


class MeasuredPoint(NamedTuple):
    """A plan that was built and measured: its size, its predicted ``cost``, and what the loss really rose by (nats)."""

    removed_ratio: float
    cost: float
    loss_increase: float


@dataclass(frozen=True)
class Prediction:
    """Increase of the loss = ``scale`` · cost^``exponent``, in nats a token, for a plan's predicted ``cost`` likewise.

    The predicted cost is a second-order sum over layers taken as independent. What it leaves out grows smoothly with
    the size of the change, so its error is close to a power law.

    >>> points = [MeasuredPoint(0.2, 0.1, 0.2), MeasuredPoint(0.5, 0.4, 1.6)]
    >>> round(Prediction.fit(points)(0.2), 4)
    0.5657
    """

    scale: float = 1.0
    exponent: float = 1.0

    def __call__(self, cost: float) -> float:
        return self.scale * cost**self.exponent if cost > 0 else 0.0

    @classmethod
    def fit(cls, points: Sequence[MeasuredPoint]) -> Prediction:
        """Through measured points: one sets the scale, two the exponent as well.

        Points whose cost or increase is not positive say nothing (noise exceeds what was lost) and are passed over. An
        exponent outside `EXPONENTS` is noise too (two points close together) and is brought to the nearer end; the line
        then goes through the larger point. Raises ValueError for more than two points.
        """
        if len(points) > MAX_POINTS:
            raise ValueError(f"at most {MAX_POINTS} measured points, got {len(points)}")
        usable = sorted(
            (point.cost, point.loss_increase) for point in points if min(point.cost, point.loss_increase) > 0
        )
        if not usable:
            return cls()
        (first_cost, first_increase), (cost, increase) = usable[0], usable[-1]
        exponent = 1.0
        if first_cost < cost:
            exponent = math.log(increase / first_increase) / math.log(cost / first_cost)
        exponent = min(max(exponent, EXPONENTS[0]), EXPONENTS[1])
        return cls(increase / cost**exponent, exponent)
