"""Everything that calibration measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from rocket.calib.collect import Calibration, collect_grams
from rocket.calib.sensitivity import measure_sensitivities
from rocket.config.schema import CalibConfig, ProfilingConfig
from rocket.models import Batch, LinearLayer

SENSITIVITY_BATCH = 2


def sensitivity_samples(calib: CalibConfig, profiling: ProfilingConfig) -> int:
    """How many samples go through the backward pass; 0 where the cost needs no sensitivities."""
    return calib.sensitivity_samples if profiling.cost == "loss" else 0


def calibrate(
    model: nn.Module,
    layers: Mapping[str, LinearLayer],
    batches: Sequence[Batch],
    sensitivity_batches: Sequence[Batch] = (),
) -> Calibration:
    """Gram matrices over ``batches`` (keyword arguments of the model's forward); sensitivities over the second ones."""
    calibration = collect_grams(model, layers, batches)
    if not sensitivity_batches:
        return calibration
    return calibration.with_sensitivities(
        measure_sensitivities(model, calibration.known(layers), sensitivity_batches, seen=calibration.seen())
    )
