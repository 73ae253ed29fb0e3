"""The layer as it is."""

from __future__ import annotations

from torch import Tensor

from rocket.config.schema import ProfilingConfig
from rocket.factorization.problem import LayerProblem
from rocket.forms.base import Option, as_state

name = "dense"


def options(problem: LayerProblem, settings: ProfilingConfig) -> list[Option]:
    return [Option(name, problem.weight.numel(), mask_bits=0, cost=0.0)]


def build(problem: LayerProblem, option: Option, settings: ProfilingConfig, draft: bool = False) -> dict[str, Tensor]:
    return as_state(weight=problem.weight)
