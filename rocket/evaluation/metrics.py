"""What is measured of a model on a source: the metrics that fit the model's kind and what the samples hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rocket.config.errors import RocketError
from rocket.data import Sample
from rocket.evaluation.features import agreement, class_accuracy, features_of_model
from rocket.evaluation.perplexity import evaluating
from rocket.evaluation.wer import difference, word_error_rate
from rocket.models import (
    Batch,
    forward_arguments,
    is_causal_lm,
    is_encoder_decoder,
    label_scores,
    labels_of,
    run_forward,
)
from rocket.models.processor import tokenizer_of

NEIGHBOURS = 5
MASK_EVERY = 7  # about the 15 % that BERT learns from


@dataclass(frozen=True)
class Subject:
    """A model, and the inputs that it is measured on.

    ``samples`` are in the order of the rows of ``batches``; empty where those are windows of text. ``reference`` holds
    what the metric kept of the original model on the same inputs; it is None for the original itself.
    """

    model: Any
    processor: Any
    samples: Sequence[Sample]
    batches: Sequence[Batch]
    batch_size: int
    reference: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Score:
    """A number for the final table, by the name that it has there, with its 95 % interval where one is known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.value:.4g}{interval}"


@dataclass(frozen=True)
class Measurement:
    """What a metric found. ``kept``: of the original, what the compressed model is compared with."""

    scores: Sequence[Score]
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A way to measure. ``fits`` tells of a subject whether it can be measured so, without running the model."""

    name: str
    fits: Callable[[Subject], bool]
    measure: Callable[[Subject], Measurement]


def _writes(subject: Subject) -> bool:
    learns = is_causal_lm(subject.model) or is_encoder_decoder(subject.model)
    return learns and labels_of(subject.model, subject.batches[0]) is not None


def _perplexity(subject: Subject) -> Measurement:
    """exp of the mean loss of the labels: of an answer given its image, of a text's second half given its first."""

    def predicted(batch: Batch) -> tuple[Tensor, Tensor]:
        labels = labels_of(subject.model, batch)
        assert labels is not None
        return label_scores(subject.model, run_forward(subject.model, batch).logits, labels)

    return Measurement([Score("perplexity", _exp_of_loss(subject, predicted)[0])])


def _exp_of_loss(subject: Subject, predicted: Callable[[Batch], tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """exp of the mean loss, and over how many predictions; ``predicted``: a batch's scores [n, classes] and targets."""
    loss, count = 0.0, 0
    with evaluating(subject.model):
        for batch in subject.batches:
            scores, targets = predicted(batch)
            loss += float(F.cross_entropy(scores, targets, reduction="none").double().sum())
            count += len(targets)
    if not count:
        raise RocketError("there is nothing in it that the model could predict; name a source with text")
    mean = loss / count
    return math.inf if mean > 700 else math.exp(mean), count


def _classifies(subject: Subject) -> bool:
    sequences = is_causal_lm(subject.model) or is_encoder_decoder(subject.model)
    labelled = bool(subject.samples) and all(sample.label is not None for sample in subject.samples)
    return labelled and not sequences and "labels" in forward_arguments(subject.model)


def _accuracy(subject: Subject) -> Measurement:
    """Share of the samples whose class has the highest score, in per cent, with its interval (Wilson 1927)."""
    with evaluating(subject.model):
        scores = torch.cat([run_forward(subject.model, batch).logits.cpu() for batch in subject.batches])
    labels = torch.tensor([sample.label for sample in subject.samples])
    right = class_accuracy(scores, labels)
    spread = 1.96**2 / len(labels)
    margin = math.sqrt(spread * right * (1 - right) + spread**2 / 4)
    bounds = [100 * (right + spread / 2 + side * margin) / (1 + spread) for side in (-1, 1)]
    return Measurement([Score(f"accuracy ({len(labels)} samples), %", 100 * right, *bounds)])


def _transcribes(subject: Subject) -> bool:
    spoken = all(sample.audio is not None and sample.text is not None for sample in subject.samples)
    writes = is_encoder_decoder(subject.model) or type(subject.model).__name__.endswith("ForCTC")
    return bool(subject.samples) and spoken and writes


def _word_error_rate(subject: Subject) -> Measurement:
    """In per cent, and by how much it is higher than the original's on the same clips, in points."""
    found = word_error_rate(subject.model, subject.processor, subject.samples, subject.batch_size)
    name = f"word error rate ({found.words} words), %"
    scores = [Score(name, 100 * found.value, 100 * found.low, 100 * found.high)]
    counts = torch.tensor([found.clip_errors, found.clip_words])
    if subject.reference is None:
        return Measurement(scores, {"counts": counts})
    errors, words = subject.reference["counts"].tolist()
    more = difference(errors, found.clip_errors, words)
    return Measurement([*scores, Score("more than the original's", 100 * more.value, 100 * more.low, 100 * more.high)])


def _fills_gaps(subject: Subject) -> bool:
    if not _encodes_text(subject) or not type(subject.model).__name__.endswith("ForMaskedLM"):
        return False
    return getattr(tokenizer_of(subject.processor), "mask_token_id", None) is not None


def _masked_perplexity(subject: Subject) -> Measurement:
    """exp of the mean loss at every seventh token of a window, all of which are hidden by the mask token at once."""
    mask = tokenizer_of(subject.processor).mask_token_id

    def predicted(batch: Batch) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        hidden = ids.clone()
        hidden[:, MASK_EVERY // 2 :: MASK_EVERY] = mask
        scores = run_forward(subject.model, {**batch, "input_ids": hidden}).logits[hidden != ids].float()
        return scores, ids[hidden != ids].to(scores.device)

    value, count = _exp_of_loss(subject, predicted)
    return Measurement([Score(f"perplexity of {count} masked tokens", value)])


def _predicts_of_text(subject: Subject) -> bool:
    predicts = "labels" in forward_arguments(subject.model) and getattr(subject.model.config, "num_labels", 2) > 1
    return _encodes_text(subject) and predicts and not _fills_gaps(subject)


def _same_predictions(subject: Subject) -> Measurement:
    """Share of the predictions, a class of a text or of each of its tokens, that are the original's, in per cent."""
    found = []
    with evaluating(subject.model):
        for batch in subject.batches:
            logits = getattr(run_forward(subject.model, batch), "logits", None)
            if logits is None:  # several heads, each with scores by another name
                return Measurement([])
            found.append(logits.argmax(dim=-1).flatten().cpu())
    classes = torch.cat(found)
    original = classes if subject.reference is None else subject.reference["classes"]
    share = 100 * float((classes == original).double().mean())
    score = Score(f"same of {len(classes)} predictions, %", share)
    return Measurement([score], {"classes": classes} if subject.reference is None else {})


def _encodes_text(subject: Subject) -> bool:
    return not subject.samples and not is_causal_lm(subject.model) and not is_encoder_decoder(subject.model)


def _gives_features(subject: Subject) -> bool:
    if _encodes_text(subject):
        return "labels" not in forward_arguments(subject.model)
    pictures = bool(subject.samples) and all(sample.image is not None for sample in subject.samples)
    writes = is_causal_lm(subject.model) or is_encoder_decoder(subject.model)
    return pictures and not writes and not _classifies(subject)


def _feature_agreement(subject: Subject) -> Measurement:
    """How alike the features are to the original's; 1 for the original itself."""
    features = features_of_model(subject.model, subject.batches)
    is_original = subject.reference is None
    found = agreement(features if subject.reference is None else subject.reference["features"], features, NEIGHBOURS)
    what = "images" if subject.samples else "windows"
    scores = [Score(f"feature cosine ({found.items} {what})", found.cosine, found.cosine_low, found.cosine_high)]
    if found.knn_overlap is not None:
        scores.append(Score(f"shared {found.neighbours} nearest neighbours", found.knn_overlap))
    return Measurement(scores, {"features": features} if is_original else {})


METRICS = (
    Metric("perplexity", _writes, _perplexity),
    Metric("accuracy", _classifies, _accuracy),
    Metric("word error rate", _transcribes, _word_error_rate),
    Metric("masked tokens", _fills_gaps, _masked_perplexity),
    Metric("predictions", _predicts_of_text, _same_predictions),
    Metric("features", _gives_features, _feature_agreement),
)


def fitting_metrics(subject: Subject) -> list[Metric]:
    """Every metric that a subject can be measured by."""
    return [metric for metric in METRICS if metric.fits(subject)]
