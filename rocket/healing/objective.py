"""What healing minimises: the loss on labels, or the distance from what the original puts out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rocket.calib.objective import class_scores
from rocket.calib.positions import Positions
from rocket.config.errors import RocketError
from rocket.models import Batch, is_encoder_decoder, label_scores, labels_of

CHUNK_VALUES = 1 << 22
"""Scores that are worked on at once in float32: few enough to stay near the processor."""


def language_modelling(model: nn.Module, output: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of the batch's labels, nats a label. Raises RocketError if model or batch have none."""
    logits, labels = _logits(model, output), labels_of(model, batch)
    if labels is None or labels.shape != logits.shape[:-1]:
        raise RocketError(f"{type(model).__name__} has no labels to learn from; use healing.objective=distillation")
    return F.cross_entropy(*label_scores(model, logits, labels))


def distillation(model: nn.Module, output: Any, original: Any, batch: Batch, temperature: float) -> Tensor:
    """Mean divergence KL(original ‖ model) over the predictions for a batch, in nats, times temperature².

    ``output`` and ``original`` are the two models' outputs for the batch. Both scores are divided by ``temperature``
    first; the factor keeps gradients as large as at 1 (Hinton et al. 2015, arXiv 1503.02531). Predictions are those of
    the batch's labels; of all positions but padding where there are no labels (classifiers, masked language models,
    CTC). Raises RocketError if the model puts out no scores of classes.
    """
    scores, wanted = (_predictions(model, _logits(model, each), batch) for each in (output, original))
    divergence: Tensor = _Divergence.apply(scores, wanted, temperature)  # type: ignore[no-untyped-call]
    return divergence


class _Divergence(torch.autograd.Function):
    """Mean T² KL(softmax(target / T) ‖ softmax(scores / T)) over rows [n, classes], for the temperature T.

    Its gradient T (softmax(scores / T) - softmax(target / T)) / n is computed on the way, some rows at a time, so that
    neither distribution is ever there as a whole: they are the largest tensors of a training step.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(scores)
        total = scores.new_zeros((), dtype=torch.float64)
        rows = max(1, CHUNK_VALUES // scores.shape[-1])
        parts = zip(scores.split(rows), target.split(rows), gradient.split(rows), strict=True)
        for part, wanted, slope in parts:
            predicted = (part.float() / temperature).log_softmax(-1)
            expected = (wanted.float() / temperature).log_softmax(-1)
            probability = expected.exp()
            total += (probability * expected.sub_(predicted)).sum()
            slope.copy_(predicted.exp_().sub_(probability).mul_(temperature / len(scores)))
        ctx.save_for_backward(gradient)
        return (total * temperature**2 / len(scores)).float()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * incoming, None, None


def _logits(model: nn.Module, output: Any) -> Tensor:
    logits = class_scores(output)
    if logits is None:
        raise RocketError(f"{type(model).__name__} predicts no classes, such as tokens; it cannot be healed")
    return logits


def _predictions(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
    """Scores [n, classes], float32, of the positions that count."""
    labels = labels_of(model, batch)
    if labels is not None and labels.shape == logits.shape[:-1]:
        return label_scores(model, logits, labels)[0]
    return Positions(model, batch).select(logits, is_encoder_decoder(model)).float()
