"""What healing minimises: the loss on labels, or the distance from what the original puts out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rocket.config.errors import RocketError
from rocket.models.inputs import Batch, label_scores, labels_of

CHUNK_VALUES = 1 << 22
"""Scores that are worked on at once in float32: few enough to stay near the processor."""


def language_modelling(model: nn.Module, output: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of the batch's labels, nats a label. Raises RocketError if model or batch have none."""
    return F.cross_entropy(*_labelled(model, output, batch))


def distillation(model: nn.Module, output: Any, original: Any, batch: Batch, temperature: float) -> Tensor:
    """Mean divergence KL(original ‖ model) over the predictions of the batch's labels, in nats, times temperature².

    ``output`` and ``original`` are the two models' outputs for the batch. Both scores are divided by ``temperature``
    first; the factor keeps gradients as large as at 1 (Hinton et al. 2015, arXiv 1503.02531). Raises RocketError if
    model or batch have no labels.
    """
    scores, wanted = _labelled(model, output, batch)[0], _labelled(model, original, batch)[0]
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


def _labelled(model: nn.Module, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores [n, classes] and labels [n] of all positions that have a label."""
    logits, labels = getattr(output, "logits", None), labels_of(model, batch)
    if logits is None or labels is None or labels.shape != logits.shape[:-1]:
        raise RocketError(
            f"{type(model).__name__} puts out no scores of labels that these data have, so there is nothing to heal it "
            "by; models that write can be healed"
        )
    return label_scores(model, logits, labels)
