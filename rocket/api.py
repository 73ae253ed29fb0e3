"""The Python interface for a model that is in memory already: `plan`, then `rocket.compress`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocket.allocation import Planner, measure_size
from rocket.calib import calibrate
from rocket.config.schema import CalibConfig, ProfilingConfig
from rocket.data import pack_tokens
from rocket.forms import select_forms
from rocket.models import evaluation_mode, refuse_quantized, target_layers, unstacked_experts
from rocket.profiling import profile_layers


def plan(
    model: PreTrainedModel,
    calibration: Sequence[str] | torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    calib: CalibConfig | None = None,
    profiling: ProfilingConfig | None = None,
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Planner:
    """Calibrate and profile a model once; the result plans any size in seconds.

    ``calibration`` holds texts (then ``tokenizer`` is needed) or token ids [samples, seq_len]. ``calib`` and
    ``profiling`` are the sections of the same names of a config file. The model is left as it is. Raises RocketError
    when the text is too short or no layer matches, ValueError when texts come without a tokenizer.
    """
    calib, profiling = calib or CalibConfig(), profiling or ProfilingConfig()
    if profiling.cost == "loss" and calib.sensitivity_samples == 0:
        raise ValueError("the cost 'loss' needs calib.sensitivity_samples > 0")
    if isinstance(calibration, torch.Tensor):
        tokens = calibration
    elif tokenizer is None:
        raise ValueError("calibration texts need the tokenizer")
    else:
        tokens = pack_tokens(calibration, tokenizer, calib.seq_len, calib.num_samples, calib.seed)
    refuse_quantized(type(model).__name__, model.config)
    forms = select_forms(profiling.forms)
    with unstacked_experts(model), evaluation_mode(model):
        layers = target_layers(model, targets, ignore)
        wanted = calib.sensitivity_samples if profiling.cost == "loss" else 0
        statistics = calibrate(model, layers, tokens, calib.batch_size, wanted)
        layers = statistics.known(layers)
        profiles = profile_layers(layers, statistics, forms, profiling)
        size = measure_size(model, layers.values())
    return Planner(profiles, size, profiling, calibration=statistics)
