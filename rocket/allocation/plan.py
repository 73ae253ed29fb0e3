"""From profiles and a budget to a plan: one option for every layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from rocket.allocation import knapsack, uniform
from rocket.allocation.budget import Budget, ModelSize
from rocket.allocation.cap import cap_errors
from rocket.allocation.prediction import MeasuredPoint, Prediction
from rocket.calib import Calibration
from rocket.config.errors import RocketError
from rocket.config.records import read_record
from rocket.config.schema import AllocationConfig, ProfilingConfig
from rocket.forms import Option
from rocket.forms.base import keep_share
from rocket.profiling import LayerProfile

Allocator = Callable[[Sequence[LayerProfile], Sequence[np.ndarray], int], list[int]]
ALLOCATORS: dict[str, Allocator] = {"knapsack": knapsack.allocate, "uniform": uniform.allocate}

logger = logging.getLogger(__name__)


def select_allocator(name: str) -> Allocator:
    """The allocator of this name. Raises RocketError if there is none."""
    if name not in ALLOCATORS:
        raise RocketError(f"allocation.method={name!r}: there are {', '.join(ALLOCATORS)}")
    return ALLOCATORS[name]


@dataclass(frozen=True)
class Plan:
    """One option a layer, and what the compressed model will be.

    ``cost`` is the sum of the chosen options' costs: with the cost ``loss``, the predicted increase of the loss in
    nats per token. ``profiling`` are the settings that the options were profiled with and are built with.
    """

    budget: Budget
    choices: Mapping[str, Option]
    input_groups: Mapping[str, str]
    size: ModelSize
    profiling: ProfilingConfig
    calibration: Calibration | None = field(default=None, compare=False, repr=False)

    @property
    def cost(self) -> float:
        return sum(option.cost for option in self.choices.values())

    @property
    def kept_target_parameters(self) -> int:
        """Stored values of the target layers."""
        return sum(option.parameters for option in self.choices.values())

    @property
    def parameters(self) -> int:
        """Parameters of the whole compressed model."""
        return self.kept_target_parameters + self.size.other_parameters

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the compressed checkpoint, masks included."""
        kept = sum(option.bytes(self.size.itemsize_of(layer)) for layer, option in self.choices.items())
        return kept + self.size.other_bytes

    @property
    def removed_ratio(self) -> float:
        """Removed share of the target layers' parameters, as the paper counts."""
        return 1.0 - self.kept_target_parameters / self.size.target_parameters

    def __str__(self) -> str:
        """What becomes of the target layers, in words."""
        quantized = sum(option.scales > 0 for option in self.choices.values())
        in_int8 = f", the values of {quantized} of {len(self.choices)} layers in int8" if quantized else ""
        return f"{100 * self.removed_ratio:.1f} % of the target layers' parameters removed{in_int8}"

    @property
    def bytes_removed_ratio(self) -> float:
        """Removed share of the whole checkpoint's bytes."""
        return 1.0 - self.bytes / self.size.bytes

    def forms(self) -> dict[str, int]:
        """How many layers take each form, those in int8 told apart."""
        counts: dict[str, int] = {}
        for option in self.choices.values():
            counts[option.label] = counts.get(option.label, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": vars(self.budget),
            "cost": self.cost,
            "removed_ratio": self.removed_ratio,
            "bytes_removed_ratio": self.bytes_removed_ratio,
            "size": vars(self.size),
            "profiling": self.profiling.model_dump(mode="json"),
            "choices": {
                layer: {**option.to_dict(), "input_group": self.input_groups[layer]}
                for layer, option in self.choices.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], calibration: Calibration | None = None) -> Plan:
        """Read a plan back from what `to_dict` gave. Raises RocketError if it is malformed."""
        stored = read_record(_StoredPlan, values, "the plan")
        return cls(
            stored.budget,
            {layer: choice.option() for layer, choice in stored.choices.items()},
            {layer: choice.input_group for layer, choice in stored.choices.items()},
            stored.size,
            stored.profiling,
            calibration,
        )


@dataclass(frozen=True, kw_only=True)
class _StoredChoice(Option):
    input_group: str

    def option(self) -> Option:
        return Option(**{name.name: getattr(self, name.name) for name in fields(Option)})


@dataclass(frozen=True)
class _StoredPlan:
    """The parts of a plan's file that are not derived from others."""

    budget: Budget
    size: ModelSize
    profiling: ProfilingConfig
    choices: dict[str, _StoredChoice]


@dataclass(frozen=True)
class CurvePoint:
    """A size and its predicted price: ``cost`` as in `Plan`.

    ``loss_increase`` is that cost corrected by the planner's measured points, in nats a token; None without any.
    """

    removed_ratio: float
    parameters: int
    bytes: int
    cost: float
    loss_increase: float | None = None


@dataclass(frozen=True)
class Planner:
    """Profiles of a model, ready to be asked for a plan of any size.

    ``measured`` holds at most two plans whose real price is known; it corrects the predictions of `curve`.

    >>> planner.curve()                                # doctest: +SKIP
    >>> planner.at(removed_ratio=0.3)                  # doctest: +SKIP
    >>> planner.at(bytes=6e9)                          # doctest: +SKIP
    """

    profiles: Sequence[LayerProfile]
    size: ModelSize
    profiling: ProfilingConfig
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    calibration: Calibration | None = field(default=None, repr=False)
    measured: Sequence[MeasuredPoint] = ()

    @property
    def by_bytes(self) -> bool:
        """Whether sizes are told in bytes: values say little of them where some may be int8."""
        return "int8" in self.profiling.precisions

    def at(
        self,
        removed_ratio: float | None = None,
        kept_parameters: float | str | None = None,
        bytes: float | str | None = None,
    ) -> Plan:
        """The best plan within one of the three budgets, 0.3, 8e9 or "8B", 6e9 or "6GB".

        Raises RocketError if no combination of options fits.
        """
        return self.within(Budget.of(removed_ratio, kept_parameters, bytes))

    def within(self, budget: Budget) -> Plan:
        """The best plan within a budget."""
        allocate = select_allocator(self.allocation.method)
        capacity = self._capacity(budget)
        profiles = list(self.profiles)
        sizes = [self._sizes(profile, budget) for profile in profiles]
        smallest = int(sum(size.min() for size in sizes))
        if smallest > capacity:
            raise RocketError(f"the budget {budget.name} cannot be reached: {self._reachable(budget, smallest)}")
        if self.allocation.error_cap:
            profiles = cap_errors(profiles, sizes, capacity)
            sizes = [self._sizes(profile, budget) for profile in profiles]
        picks = allocate(profiles, sizes, capacity)
        return Plan(
            budget,
            {profile.layer: profile.options[pick] for profile, pick in zip(profiles, picks, strict=True)},
            {profile.layer: profile.input_group for profile in profiles},
            self.size,
            self.profiling,
            self.calibration,
        )

    def curve(self, removed_ratios: Sequence[float] | None = None) -> list[CurvePoint]:
        """Plans over a range of sizes, as far as options reach, without building any.

        By default from 5 % to 65 % removed: of the target layers' values, or (`by_bytes`) of the whole checkpoint.
        """
        shares = [round(0.05 * step, 2) for step in range(1, 14)]
        if removed_ratios is None and self.by_bytes:
            budgets = [Budget.of(bytes=int((1 - share) * self.size.bytes)) for share in shares]
        else:
            budgets = [Budget.of(removed_ratio=ratio) for ratio in removed_ratios or shares]
        prediction = Prediction.fit(self.measured) if self.measured else None
        points = []
        for budget in budgets:
            try:
                plan = self.within(budget)
            except RocketError:
                logger.info("%s is beyond what the profiled options reach", budget.name)
                continue
            increase = prediction(plan.cost) if prediction else None
            points.append(CurvePoint(plan.removed_ratio, plan.parameters, plan.bytes, plan.cost, increase))
        return points

    def _capacity(self, budget: Budget) -> int:
        """What the target layers may take, in parameters or in bytes."""
        if budget.kind == "removed_ratio":
            return int(keep_share(budget.value, self.size.target_parameters))
        if budget.kind == "kept_parameters":
            return int(budget.value) - self.size.other_parameters
        return int(budget.value) - self.size.other_bytes

    def _sizes(self, profile: LayerProfile, budget: Budget) -> np.ndarray:
        if budget.kind == "bytes":
            itemsize = self.size.itemsize_of(profile.layer)
            return np.array([option.bytes(itemsize) for option in profile.options], dtype=np.int64)
        return np.array([option.parameters for option in profile.options], dtype=np.int64)

    def _reachable(self, budget: Budget, smallest: int) -> str:
        if budget.kind == "removed_ratio":
            return (
                f"the profiled options remove at most {1.0 - smallest / self.size.target_parameters:.4f}; add larger "
                "profiling.removed_ratios, or remove less"
            )
        if budget.kind == "kept_parameters":
            return f"the profiled options keep at least {smallest + self.size.other_parameters} parameters"
        return f"the profiled options take at least {smallest + self.size.other_bytes} bytes"
