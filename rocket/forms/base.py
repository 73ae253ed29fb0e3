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
from rocket.nn import LayerSpec, Precision


@dataclass(frozen=True)
class Option:
    """One way to store a layer, its size and its cost.

    ``parameters`` counts stored values as the paper does: dictionary entries and kept coefficients. ``mask_bits`` are
    the positions of the bit mask that comes with them (rows padded to 64 bits). ``cost`` is in the units of the
    profile's cost (`factorization.problem`). ``rank`` and ``nnz`` are as in `LayerSpec`. ``scales`` are the rows whose
    values are int8, each with a scale in the model's type; 0 where the values themselves are in it.
    """

    form: str
    parameters: Whole
    mask_bits: Whole
    cost: Cost
    rank: Whole = 0
    nnz: Whole = 0
    scales: Whole = 0

    @property
    def precision(self) -> Precision:
        return "int8" if self.scales else "float"

    @property
    def label(self) -> str:
        """The form and, where it is not the model's own, the type of its values.

        >>> Option("sparse", 12, 64, cost=0.0, nnz=12, scales=3).label, Option("dense", 12, 0, cost=0.0).label
        ('sparse int8', 'dense')
        """
        return f"{self.form} int8" if self.scales else self.form

    @property
    def is_original(self) -> bool:
        """Whether the layer stays what it is."""
        return self.form == "dense" and not self.scales

    def bytes(self, itemsize: int) -> int:
        """Bytes of the stored tensors when a value of the model's type takes ``itemsize`` bytes."""
        values = self.parameters + self.scales * itemsize if self.scales else self.parameters * itemsize
        return values + self.mask_bits // 8

    def spec(self, in_features: int, out_features: int, input_group: str) -> LayerSpec:
        """What config.json will say of a layer of these features stored so."""
        return LayerSpec(self.form, in_features, out_features, self.rank, self.nnz, input_group, self.precision)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Form(Protocol):
    """A layer form: what it offers for a layer, and the tensors of the layer it becomes."""

    name: str

    def options(self, problem: LayerProblem, settings: ProfilingConfig) -> Sequence[Option]:
        """The form's options for a layer, at most one a removed ratio, each with its size and cost."""
        ...

    def build(
        self, problem: LayerProblem, option: Option, settings: ProfilingConfig, draft: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of the replacing layer, under the names of its class in `rocket.nn`, in float64.

        A ``draft`` is fitted only as far as a price needs: good enough to see what rounding does to it.
        """
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
