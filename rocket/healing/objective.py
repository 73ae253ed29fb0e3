"""What healing minimises: the loss on labels, or the distance from what the original puts out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rocket.calib.objective import class_scores
from rocket.calib.positions import Positions
from rocket.config.errors import RocketError
from rocket.models import Batch, is_causal_lm, is_encoder_decoder, label_scores, labels_of
from rocket.models.inputs import IGNORED

CHUNK_VALUES = 1 << 22
"""Scores that are worked on at once in float32: few enough to stay near the processor."""


def language_modelling(model: nn.Module, output: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of the batch's labels, nats a label; 0 if none is predicted (texts of one token).

    Raises RocketError if model or batch have no labels.
    """
    logits, labels = _logits(model, output), labels_of(model, batch)
    if labels is None or labels.shape != logits.shape[:-1]:
        raise RocketError(f"{type(model).__name__} has no labels to learn from; use healing.objective=distillation")
    scores, targets = label_scores(model, logits, labels)
    return F.cross_entropy(scores, targets) if len(targets) else logits.sum() * 0.0


def distillation(model: nn.Module, output: Any, original: Any, batch: Batch, temperature: float) -> Tensor:
    """Mean divergence KL(original ‖ model) over the predictions for a batch, in nats, times temperature².

    ``output`` and ``original`` are the two models' outputs for the batch. Both scores are divided by ``temperature``
    first; the factor keeps gradients as large as at 1 (Hinton et al. 2015, arXiv 1503.02531). Predictions are those of
    the batch's labels; of all positions but padding where there are no labels (classifiers, masked language models,
    CTC); it is 0 where none counts. Raises RocketError if the model puts out no scores of classes.
    """
    scores, wanted = (_logits(model, each).flatten(0, -2) for each in (output, original))
    rows = _counted(model, _logits(model, output), batch).flatten().nonzero()[:, 0].to(scores.device)
    divergence: Tensor = _Divergence.apply(scores, wanted, rows, temperature)  # type: ignore[no-untyped-call]
    return divergence


class _Divergence(torch.autograd.Function):
    """Mean T² KL(softmax(target / T) ‖ softmax(scores / T)) over some ``rows`` of [n, classes], for the temperature T.

    Its gradient T (softmax(scores / T) - softmax(target / T)) / len(rows) is computed on the way, some rows at a time,
    so that only these are ever copied or float32: scores are the largest tensors of a training step.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor, rows: Tensor, temperature: float) -> Tensor:
        gradient, count = torch.zeros_like(scores), max(len(rows), 1)
        total = scores.new_zeros((), dtype=torch.float64)
        for some in rows.split(max(1, CHUNK_VALUES // scores.shape[-1])):
            predicted = scores[some].float().div_(temperature).log_softmax(-1)
            expected = target[some].float().div_(temperature).log_softmax(-1)
            probability = expected.exp()
            total += (probability * expected.sub_(predicted)).sum()
            slope = predicted.exp_().sub_(probability).mul_(temperature / count)
            gradient.index_copy_(0, some, slope.to(gradient.dtype))
        ctx.save_for_backward(gradient)
        return (total * temperature**2 / count).float()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * incoming, None, None, None


def _logits(model: nn.Module, output: Any) -> Tensor:
    logits = class_scores(output)
    if logits is None:
        raise RocketError(f"{type(model).__name__} predicts no classes, such as tokens; it cannot be healed")
    return logits


def _counted(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
    """True at the positions [...] of logits [..., classes] whose predictions count."""
    shape, labels = logits.shape[:-1], labels_of(model, batch)
    if labels is not None and labels.shape == shape:
        counted = labels != IGNORED
        return F.pad(counted[:, 1:], (0, 1)) if is_causal_lm(model) else counted  # a label is predicted one before it
    mask = Positions(model, batch).mask(shape, is_encoder_decoder(model))
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask
