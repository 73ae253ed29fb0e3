"""Everything that calibration measures, from one set of token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from rocket.calib.collect import Calibration, collect_grams
from rocket.calib.sensitivity import measure_sensitivities
from rocket.models import LinearLayer
from rocket.run import track

SENSITIVITY_BATCH = 2


def calibrate(
    model: nn.Module, layers: Mapping[str, LinearLayer], tokens: Tensor, batch_size: int, sensitivity_samples: int
) -> Calibration:
    """Gram matrices over ``tokens`` [samples, seq_len], and sensitivities over the first ``sensitivity_samples``."""
    calibration = collect_grams(model, layers, batches_of(tokens, batch_size, "calibrate"))
    if not sensitivity_samples:
        return calibration
    batches = batches_of(tokens[:sensitivity_samples], SENSITIVITY_BATCH, "sensitivities")
    return replace(calibration, sensitivities=measure_sensitivities(model, calibration.known(layers), batches))


def batches_of(tokens: Tensor, batch_size: int, label: str) -> Iterable[Mapping[str, Tensor]]:
    """Keyword arguments of the model's forward for each batch, with a progress bar."""
    return track([{"input_ids": ids} for ids in tokens.split(batch_size)], label)
