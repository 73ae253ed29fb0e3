"""Per-layer error curves: every option of every form, with size and cost. They do not depend on the budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rocket.calib import Calibration
from rocket.config.errors import RocketError
from rocket.config.records import Positive, read_record
from rocket.config.schema import ProfilingConfig
from rocket.factorization.problem import Cost, LayerProblem
from rocket.forms import Form, Option, options_of
from rocket.models import LinearLayer, weight_of
from rocket.usage import track

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerProfile:
    """What a layer may become. ``options`` start with dense and are otherwise in the order of the forms.

    ``damping`` is what its Gram matrix needed to be positive definite (`factorization.whitening`).
    """

    layer: str
    input_group: str
    in_features: Positive
    out_features: Positive
    cost: Cost
    damping: float
    options: tuple[Option, ...]

    @property
    def parameters(self) -> int:
        return self.in_features * self.out_features

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "options": [option.to_dict() for option in self.options]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], layer: str) -> LayerProfile:
        """Read a profile back. Raises RocketError if it is malformed, or not of ``layer``."""
        profile = read_record(cls, values, f"the profile of {layer}")
        if profile.layer != layer:
            raise RocketError(
                f"the profile of {layer} is that of {profile.layer[:200]!r}; delete profiles/ and run again"
            )
        if not profile.options:
            raise RocketError(f"the profile of {layer} has no options; delete profiles/ and run again")
        return profile


def profile_layer(
    layer: str, input_group: str, problem: LayerProblem, forms: Sequence[Form], settings: ProfilingConfig
) -> LayerProfile:
    """All options of a layer, costs by ``problem.cost``.

    Time is that of the dictionary search (`forms`), and with int8 of building two options a form.
    """
    options = options_of(problem, forms, settings)
    damping = problem.damping
    if damping > 0:
        logger.info("%s: Gram matrix damped by %.0e of its mean diagonal", layer, damping)
    return LayerProfile(layer, input_group, problem.in_features, problem.out_features, problem.cost, damping, options)


def profile_layers(
    layers: Mapping[str, LinearLayer], calibration: Calibration, forms: Sequence[Form], settings: ProfilingConfig
) -> list[LayerProfile]:
    """`profile_layer` of each, with a progress bar."""
    return [
        profile_layer(
            name, calibration.inputs[name], calibration.problem(name, weight_of(layer), settings), forms, settings
        )
        for name, layer in track(list(layers.items()), "profile layers")
    ]
