"""What a model says of images and texts: how far its features moved, how many it puts into the right class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rocket.config.errors import RocketError
from rocket.evaluation.perplexity import evaluating
from rocket.models import run_forward

_RESAMPLES = 1000


@dataclass(frozen=True)
class FeatureAgreement:
    """How alike two models' features of the same items are, images or texts; 1 is alike in every figure.

    cosine: mean over the items of the cosine between the two features of an item. cosine_low, cosine_high: its 95 %
    bootstrap interval over the items (too narrow where several are of one photograph or document). knn_overlap: mean
    share of an item's ``neighbours`` nearest other items, by cosine, that the two models agree on; None where there are
    no more items than that.
    """

    cosine: float
    cosine_low: float
    cosine_high: float
    knn_overlap: float | None
    neighbours: int
    items: int


def features_of_model(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """One feature for each item, float32 [n, d] on the CPU, from batches of keyword arguments of the model's forward.

    The feature is what the output has, in this order: the embeddings of a contrastive model (``image_embeds``, and
    ``text_embeds`` beside it where each image has a text, both at unit length), the pooled output, the last hidden
    state, the logits of a classifier. Hidden states [n, tokens, d] count by their class token where the model has one,
    else by their mean, and maps [n, d, height, width] by their mean.

    Cost: a forward pass. The model stays on its device and its training mode is restored. Raises RocketError if there
    is no batch or the output has none of these.
    """
    features = []
    with evaluating(model):
        for batch in batches:
            features.append(_feature(model, run_forward(model, batch)).float().cpu())
    if not features:
        raise RocketError("features of nothing; give at least one batch")
    return torch.cat(features)


def agreement(original: Tensor, compressed: Tensor, neighbours: int = 5) -> FeatureAgreement:
    """Compare two models' features [n, d] of the same n items, in the same order.

    Raises RocketError if the shapes differ, there is no item, or a feature is not finite.

    Source of the interval: Efron and Tibshirani 1993, An introduction to the bootstrap (percentiles, 1000 resamples).

    >>> features = torch.eye(3)
    >>> result = agreement(features, 2 * features, neighbours=1)
    >>> result.cosine, result.knn_overlap
    (1.0, 1.0)
    """
    if original.ndim != 2 or original.shape != compressed.shape:
        shapes = f"{tuple(original.shape)} and {tuple(compressed.shape)}"
        raise RocketError(f"features of shapes {shapes} cannot be compared; give both models the same items")
    if neighbours < 1 or not len(original):
        raise RocketError(f"{neighbours} nearest neighbours among {len(original)} items: give more")
    _check_finite(original, "the original's features")
    _check_finite(compressed, "the compressed model's features")
    before, after = (F.normalize(features.double(), dim=1) for features in (original, compressed))
    cosines = (before * after).sum(dim=1).clamp(-1, 1).cpu().numpy()
    low, high = _bootstrap_interval(cosines)
    overlap = _shared_neighbours(before, after, neighbours) if neighbours < len(original) else None
    return FeatureAgreement(float(cosines.mean()), low, high, overlap, neighbours, len(cosines))


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit [n, classes] is that of their label, int64 [n].

    Raises RocketError if there is not one label for each image, one names no class, or a logit is not finite.

    >>> class_accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        shapes = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        raise RocketError(f"{shapes}: accuracy needs logits [n, classes] and one label for each of n images")
    beyond = labels[(labels < 0) | (labels >= logits.shape[1])]
    if len(beyond):
        raise RocketError(
            f"label {int(beyond[0])}: the model has classes 0 to {logits.shape[1] - 1}; correct the labels"
        )
    _check_finite(logits, "the logits")
    return float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())


def _feature(model: Any, output: Any) -> Tensor:
    """[n, d] of an output, in the model's own type."""
    image, text = (getattr(output, name, None) for name in ("image_embeds", "text_embeds"))
    if image is not None and text is not None and len(image) == len(text):
        return torch.cat([F.normalize(image, dim=1), F.normalize(text, dim=1)], dim=1)
    for name in ("image_embeds", "pooler_output", "last_hidden_state", "logits"):
        value = getattr(output, name, None)
        if value is None:
            continue
        if value.ndim == 4:
            value = value.flatten(2).mean(dim=2)
        elif value.ndim == 3:
            value = value[:, 0] if _has_class_token(model) else value.mean(dim=1)
        feature: Tensor = value
        return feature
    raise RocketError(f"{type(model).__name__} gives {', '.join(output.keys())}: none of these is a feature")


def _has_class_token(model: Any) -> bool:
    return any(name.endswith(("cls_token", "class_embedding")) for name, _ in model.named_parameters())


def _check_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise RocketError(
            f"{what} are not finite for {len(bad)} of {len(values)} items (first: {bad[0]}); use model.dtype=float32"
        )


def _bootstrap_interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    draws = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _shared_neighbours(before: Tensor, after: Tensor, count: int) -> float:
    shared = (_is_neighbour(before, count) & _is_neighbour(after, count)).sum(dim=1)
    return float(shared.double().mean()) / count


def _is_neighbour(unit: Tensor, count: int) -> Tensor:
    """Bool [n, n]: whether column j is among the nearest of row i, itself left out, for unit vectors [n, d]."""
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, similarity.topk(count, dim=1).indices, True)
