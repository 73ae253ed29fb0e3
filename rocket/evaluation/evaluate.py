"""Everything that a config asks to measure of one model, by what fits the model and each source."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from rocket.config.errors import RocketError
from rocket.config.schema import EvaluationConfig
from rocket.data import load_documents, load_samples, pack_tokens
from rocket.evaluation.metrics import Score, Subject, fitting_metrics
from rocket.evaluation.perplexity import perplexity, spread_windows
from rocket.evaluation.scores import TaskResult
from rocket.evaluation.tasks import zero_shot
from rocket.models import is_causal_lm, sample_batches, token_batches
from rocket.models.processor import tokenizer_of

TASK_BATCH = 4
"""Requests of zero-shot tasks, short beside windows of text, that are answered at once for each window of a batch."""
FEWEST_DOCUMENTS, FEWEST_TOKENS = 512, 16  # of a stream: so many documents at least, or one for so many tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    ``perplexities`` by text source, ``accuracies`` by task, ``scores`` by source: of what is no text that a decoder
    reads, or of other models than decoders. ``kept`` names the tensors of the original that scores of the compressed
    model are relative to.
    """

    perplexities: dict[str, float]
    accuracies: dict[str, TaskResult]
    scores: dict[str, list[Score]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def evaluate(
    settings: EvaluationConfig, model: Any, processor: Any, reference: Mapping[str, Tensor] | None = None
) -> tuple[Evaluation, dict[str, Tensor]]:
    """What is measured, and what is to be kept. ``reference``: what was kept of the original, None if this is it."""
    size = settings.batch_size
    perplexities: dict[str, float] = {}
    subjects: dict[str, Subject] = {}
    for source in settings.texts:
        limit = None if settings.max_tokens is None else max(FEWEST_DOCUMENTS, settings.max_tokens // FEWEST_TOKENS)
        documents = load_documents(source, "held_out", text_field=settings.text_field, stream_limit=limit)
        if is_causal_lm(model):
            result = perplexity(
                model,
                tokenizer_of(processor),
                documents,
                seq_len=settings.seq_len,
                batch_size=size,
                max_tokens=settings.max_tokens,
            )
            perplexities[source] = result.value
            continue
        windows = pack_tokens(documents, tokenizer_of(processor), settings.seq_len, None, 0)
        count = min(len(windows), max(1, (settings.max_tokens or windows.numel()) // settings.seq_len))
        batches = token_batches(model, spread_windows(windows, count), size)
        subjects[source] = Subject(model, processor, (), batches, size)
    for source in settings.samples:
        samples = load_samples(source, "held_out", settings.max_samples)
        subjects[source] = Subject(model, processor, samples, sample_batches(model, processor, samples, size), size)
    scores, kept = _measure(subjects, reference)
    tasks = {}
    if settings.tasks:
        tasks = zero_shot(
            model, tokenizer_of(processor), settings.tasks, limit=settings.limit, batch_size=TASK_BATCH * size
        )
    return Evaluation(perplexities, tasks, scores, sorted(kept)), kept


def _measure(
    subjects: Mapping[str, Subject], reference: Mapping[str, Tensor] | None
) -> tuple[dict[str, list[Score]], dict[str, Tensor]]:
    """Scores by source, and tensors to keep, named SOURCE/METRIC/NAME."""
    scores: dict[str, list[Score]] = {}
    kept: dict[str, Tensor] = {}
    for source, subject in subjects.items():
        metrics = fitting_metrics(subject)
        if not metrics:
            logger.warning("%s: no metric fits %s on it", source, type(subject.model).__name__)
        scores[source] = []
        for metric in metrics:
            prefix = f"{source}/{metric.name}/"
            known = None if reference is None else _beginning(reference, prefix)
            try:
                found = metric.measure(replace(subject, reference=known))
            except RocketError as error:
                raise RocketError(f"{source}: {error}") from None
            scores[source] += found.scores
            kept |= {prefix + name: value for name, value in found.kept.items()}
    return scores, kept


def _beginning(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
