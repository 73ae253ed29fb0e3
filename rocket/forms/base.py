"""What a layer may become: the interface that every form implements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rocket.config.records import Cost, Whole
from rocket.config.schema import ProfilingConfig
from rocket.factorization.problem import LayerProblem
from rocket.kernels import bitmap
from rocket.nn import LayerSpec


@dataclass(frozen=True)
class Option:
    """One way to store a layer, its size and its cost.

    ``parameters`` counts stored values as the paper does: dictionary entries and kept coefficients. ``mask_bits`` are
    the positions of the bit mask that comes with them (rows padded to 64 bits). ``cost`` is in the units of the
    profile's cost (`factorization.problem`). ``rank`` and ``nnz`` are as in `LayerSpec`.
    """

    form: str
    parameters: Whole
    mask_bits: Whole
    cost: Cost
    rank: Whole = 0
    nnz: Whole = 0

    def bytes(self, itemsize: int) -> int:
        """Bytes of the stored tensors when values take ``itemsize`` bytes each."""
        return self.parameters * itemsize + self.mask_bits // 8

    def spec(self, in_features: int, out_features: int, input_group: str) -> LayerSpec:
        """What config.json will say of a layer of these features stored so."""
        return LayerSpec(self.form, in_features, out_features, self.rank, self.nnz, input_group)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Form(Protocol):
    """A layer form: what it offers for a layer, and the tensors of the layer it becomes."""

    name: str

    def options(self, problem: LayerProblem, settings: ProfilingConfig) -> Sequence[Option]:
        """The form's options for a layer, at most one a removed ratio, each with its size and cost."""
        ...

    def build(self, problem: LayerProblem, option: Option, settings: ProfilingConfig) -> dict[str, Tensor]:
        """The tensors of the replacing layer, under the names of its class in `rocket.nn`, in float64."""
        ...


def padded_bits(rows: int, columns: int) -> int:
    """Bits of a mask whose rows are padded to 64-bit words.

    >>> padded_bits(3, 65)
    384
    """
    return rows * 8 * bitmap.mask_bytes(columns)


def keep_share(removed_ratio: float, values: int) -> float:
    """(1 - r) · values, nudged so that a decimal ratio does not lose a unit to binary rounding.

    >>> int((1 - 0.55) * 100), int(keep_share(0.55, 100))
    (44, 45)
    """
    return (1.0 - removed_ratio) * values * (1.0 + 1e-12)


def keep_ratio_budget(problem: LayerProblem, removed_ratio: float) -> float:
    """Stored values that a removed ratio leaves to a layer."""
    return keep_share(removed_ratio, problem.weight.numel())


def as_state(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().to(torch.float64).contiguous() for name, tensor in tensors.items()}
