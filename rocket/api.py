"""The Python interface for a model that is in memory already: `plan`, then `rocket.compress`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocket.allocation import Planner, measure_size
from rocket.calib import SENSITIVITY_BATCH, calibrate, sensitivity_samples
from rocket.config.schema import CalibConfig, ProfilingConfig
from rocket.data import Sample, pack_tokens
from rocket.forms import select_forms
from rocket.models import (
    Batch,
    evaluation_mode,
    first_batches,
    refuse_offloaded,
    refuse_quantized,
    sample_batches,
    takes_text_alone,
    target_layers,
    token_batches,
    unstacked_experts,
)
from rocket.models.processor import tokenizer_of
from rocket.profiling import profile_layers

KINDS = (
    "give texts, token ids [samples, seq_len], samples of images or speech, or batches of tensors: keyword arguments "
    "of the model's forward"
)


def plan(
    model: PreTrainedModel,
    calibration: Sequence[str] | torch.Tensor | Sequence[Batch] | Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    processor: Any = None,
    calib: CalibConfig | None = None,
    profiling: ProfilingConfig | None = None,
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Planner:
    """Calibrate and profile a model once; the result plans any size in seconds.

    ``calibration`` holds texts (then ``tokenizer`` is needed), token ids [samples, seq_len], samples of images or
    speech (then ``processor`` is needed, which also serves for texts if it has a tokenizer), or batches: keyword
    arguments of the model's forward, with ``labels`` where it learns from them, taken as they are. ``calib`` and
    ``profiling`` are the sections of the same names of a config file. The model is left as it is. Raises RocketError
    when the text is too short, the model does not take what the samples hold, a part of it is not in memory, or no
    layer matches; ValueError for calibration of another kind, and when texts or samples come alone.
    """
    calib, profiling = calib or CalibConfig(), profiling or ProfilingConfig()
    if profiling.cost == "loss" and calib.sensitivity_samples == 0:
        raise ValueError("the cost 'loss' needs calib.sensitivity_samples > 0")
    refuse_quantized(type(model).__name__, model.config)
    refuse_offloaded(model)
    material = _material(model, calibration, tokenizer if processor is None else processor, calib)
    forms = select_forms(profiling.forms)
    with unstacked_experts(model), evaluation_mode(model):
        layers = target_layers(model, targets, ignore)
        wanted = sensitivity_samples(calib, profiling)
        batches = material(None, calib.batch_size)
        statistics = calibrate(model, layers, batches, material(wanted, SENSITIVITY_BATCH) if wanted else ())
        layers = statistics.known(layers)
        profiles = profile_layers(layers, statistics, forms, profiling)
        size = measure_size(model, layers)
    return Planner(profiles, size, profiling, calibration=statistics)


def _material(
    model: PreTrainedModel, calibration: Any, processor: Any, calib: CalibConfig
) -> Callable[[int | None, int], Sequence[Batch]]:
    """(how many samples, how many a batch) -> batches, of whatever kind calibration was given."""
    if isinstance(calibration, torch.Tensor):
        _check_ids(model, calibration)
        return lambda count, size: token_batches(model, calibration[:count], size)
    if isinstance(calibration, str | Mapping):
        calibration = [calibration]
    if not isinstance(calibration, Sequence):
        raise ValueError(f"calibration is a {type(calibration).__name__}; {KINDS}")
    if not calibration:
        raise ValueError("calibration is empty")
    kind = next((kind for kind in (str, Mapping, Sample) if all(isinstance(item, kind) for item in calibration)), None)
    if kind is Mapping and all(any(map(torch.is_tensor, batch.values())) for batch in calibration):
        return lambda count, _: first_batches(calibration, count)
    if kind not in (str, Sample):
        raise ValueError(f"calibration holds {type(calibration[0]).__name__} objects; {KINDS}")
    if processor is None:
        what = "samples need the processor" if kind is Sample else "texts need the tokenizer"
        raise ValueError(f"calibration {what}")
    if kind is Sample:
        samples = calibration[: calib.num_samples]
        return lambda count, size: sample_batches(model, processor, samples[:count], size)
    tokens = pack_tokens(calibration, tokenizer_of(processor), calib.seq_len, calib.num_samples, calib.seed)
    return lambda count, size: token_batches(model, tokens[:count], size)


def _check_ids(model: PreTrainedModel, ids: torch.Tensor) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError(f"calibration is {ids.dtype} {list(ids.shape)}; token ids are integers [samples, seq_len]")
    table = model.get_input_embeddings() if takes_text_alone(model) else None
    first, last = int(ids.min()), int(ids.max())
    if isinstance(table, torch.nn.Embedding) and not 0 <= first <= last < table.num_embeddings:
        raise ValueError(f"calibration has token ids from {first} to {last}, the model {table.num_embeddings} tokens")
