"""What a model is good for, as one number whose gradient tells how much each of its layers matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rocket.calib.positions import Positions
from rocket.config.errors import RocketError
from rocket.models.inputs import Batch, is_encoder_decoder, label_scores, labels_of, run_forward


def objective(model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
    """(value, terms) of a batch, chosen by what the model puts out.

    With g = ∂value/∂y_j at a position, φ_j = Σ g² / terms makes ½ Σ_j φ_j E[(δ_j x)²] the predicted

    - increase of the loss per label, where there are logits and labels: the value is the summed cross-entropy
    - divergence per prediction, where there are logits alone (masked language models, CTC, classifiers): the same, for
      labels drawn from the model's own predictions
    - squared error of the features, relative to their mean square, where there are no logits: the value is the sum of
      the features with random signs, whose expected squared gradient is that of all features together

    Raises RocketError if the output holds none of these.
    """
    output = run_forward(model, batch)
    positions = Positions(model, batch)
    logits = class_scores(output)
    if logits is not None:
        labels = labels_of(model, batch)
        if labels is None or labels.shape != logits.shape[:-1]:
            return _own_predictions(logits, positions.mask(logits.shape[:-1], is_encoder_decoder(model)), generator)
        scores, targets = label_scores(model, logits, labels)
        return F.cross_entropy(scores, targets, reduction="sum"), len(targets)
    features = [positions.select(part, is_encoder_decoder(model)).float() for part in _features(output)]
    if not features:
        raise RocketError(
            f"{type(model).__name__} gives neither logits nor features, so no loss can be told; use profiling.cost="
            "activation"
        )
    value = torch.stack([(part * _signs(part, generator)).sum() for part in features]).sum()
    return value, 0.5 * sum(float(part.detach().double().square().sum()) for part in features)


def class_scores(output: Any) -> Tensor | None:
    """The scores [..., classes] that a model's output gives each of its predictions; None if it predicts no classes."""
    logits = _get(output, "logits")
    return logits if logits is not None and 2 <= logits.dim() <= 3 and logits.shape[-1] > 1 else None


def _own_predictions(logits: Tensor, counted: Tensor | None, generator: torch.Generator) -> tuple[Tensor, float]:
    scores = logits.flatten(0, -2).float()
    if counted is not None:
        scores = scores[counted.flatten().to(scores.device)]
    drawn = torch.multinomial(scores.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return F.cross_entropy(scores, drawn.to(scores.device), reduction="sum"), len(scores)


def _features(output: Any) -> list[Tensor]:
    """What a model without logits is used for: its embeddings of images and texts, or its final hidden states."""
    embeddings = [part for name in ("image_embeds", "text_embeds") if (part := _get(output, name)) is not None]
    if embeddings:
        return embeddings
    final = _get(output, "last_hidden_state")
    values = [final] if final is not None else list(output.values() if hasattr(output, "values") else output)
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.dim()][:1]


def _get(output: Any, name: str) -> Tensor | None:
    value = getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(0, 2, like.shape, generator=generator, device="cpu") - 1).to(like)
