"""Feature agreement and class accuracy: cases solved by hand, and what is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from rocket.config.errors import RocketError
from rocket.evaluation import FeatureAgreement, agreement, class_accuracy, features_of_model

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}


def on_circle(*degrees: float) -> torch.Tensor:
    """Unit features [n, 2]."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_cosine_is_the_mean_over_images_whatever_the_lengths():
    original = on_circle(0, 0, 0)
    compressed = on_circle(0, 60, 90) * torch.tensor([[3.0], [0.5], [7.0]])
    result = agreement(original, compressed, neighbours=1)
    assert result.cosine == pytest.approx((1 + 0.5 + 0) / 3, abs=1e-6)
    assert result.items == 3


def test_interval_covers_the_mean_and_shrinks_with_images():
    rng = np.random.default_rng(1)
    few = agreement(on_circle(*[0.0] * 20), on_circle(*rng.uniform(0, 90, 20).tolist()))
    many = agreement(on_circle(*[0.0] * 2000), on_circle(*rng.uniform(0, 90, 2000).tolist()))
    for result in (few, many):
        assert result.cosine_low < result.cosine < result.cosine_high
    # The mean of n independent cosines has a standard error of (deviation / √n); the interval is ± 1.96 of them.
    deviation = math.sqrt(0.5 - (2 / math.pi) ** 2)
    assert many.cosine_high - many.cosine_low == pytest.approx(2 * 1.96 * deviation / math.sqrt(2000), rel=0.1)
    assert few.cosine_high - few.cosine_low > 5 * (many.cosine_high - many.cosine_low)


def test_neighbours_that_two_models_share():
    original = on_circle(0, 10, 30, 100)
    # Nearest two by hand: 0:{1,2} 1:{0,2} 2:{1,0} 3:{2,1}; then 0:{1,3} 1:{0,3} 2:{3,1} 3:{1,2}
    compressed = on_circle(0, 10, 95, 50)
    assert agreement(original, compressed, neighbours=2).knn_overlap == pytest.approx((1 + 1 + 1 + 2) / 8)
    assert agreement(original, original, neighbours=2).knn_overlap == 1.0


def test_equal_features_agree_in_every_figure():
    features = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = agreement(features, features.clone())
    assert result == FeatureAgreement(
        pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0), 1.0, neighbours=5, items=12
    )


def test_few_items_have_no_neighbours_to_share():
    result = agreement(on_circle(0, 90), on_circle(0, 30))
    assert result.cosine == pytest.approx(0.75)
    assert result.knn_overlap is None


@pytest.mark.parametrize(
    ("original", "compressed", "message"),
    [
        (torch.ones(6, 2), torch.ones(6, 3), r"shapes \(6, 2\) and \(6, 3\) cannot be compared"),
        (torch.ones(0, 2), torch.ones(0, 2), "5 nearest neighbours among 0 items: give more"),
        (torch.ones(6, 2), torch.full((6, 2), math.nan), r"the compressed model's features are not finite for 6 of 6"),
        (torch.ones(6, 2) / 0, torch.ones(6, 2), r"the original's features .* \(first: 0\); use model.dtype=float32"),
    ],
)
def test_what_cannot_be_compared(original, compressed, message):
    with pytest.raises(RocketError, match=message):
        agreement(original, compressed)


def test_class_accuracy():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0], [5.0, 4.0, 4.5]], dtype=torch.bfloat16)
    assert class_accuracy(logits, torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1], "one label for each"), ([0, 1, 3], "label 3: the model has classes 0 to 2"), ([0, -1, 2], "label -1")],
)
def test_labels_that_do_not_fit(labels, message):
    with pytest.raises(RocketError, match=message):
        class_accuracy(torch.zeros(3, 3), torch.tensor(labels))


def batches(*sizes: int, side: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(size, 3, side, side, generator=generator)} for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_is_the_class_token(dtype):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("dinov2", **SMALL), dtype=dtype).train()
    features = features_of_model(model, batches(3, 2))
    assert model.training
    assert features.dtype == torch.float32
    assert features.shape == (5, 16)
    model.eval()
    pixels = torch.cat([batch["pixel_values"] for batch in batches(3, 2)]).to(dtype)
    expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(features, expected.float(), atol=1e-5 if dtype == torch.float32 else 0.1)


def test_feature_of_a_classifier_is_its_logits():
    torch.manual_seed(0)
    config = AutoConfig.for_model("vit", **SMALL, num_labels=7)
    model = AutoModelForImageClassification.from_config(config).eval()
    expected = model(**batches(2)[0]).logits
    assert torch.allclose(features_of_model(model, batches(2)), expected, atol=1e-6)


class Encoder(nn.Linear):
    """Gives whatever it is told to."""

    def __init__(self, with_class_token: bool = False, **output: torch.Tensor) -> None:
        super().__init__(1, 1)
        self.output = output
        if with_class_token:
            self.cls_token = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: torch.Tensor) -> object:
        return SimpleNamespace(**self.output, keys=self.output.keys)


TOKENS = torch.arange(12.0).view(1, 3, 4)  # mean over tokens: 4, 5, 6, 7
OUTPUTS = {
    "mean of tokens": (Encoder(last_hidden_state=TOKENS), [4.0, 5.0, 6.0, 7.0]),
    "class token": (Encoder(with_class_token=True, last_hidden_state=TOKENS), [0.0, 1.0, 2.0, 3.0]),
    "mean of a map": (Encoder(last_hidden_state=TOKENS.view(1, 3, 2, 2)), [1.5, 5.5, 9.5]),
    "pooled": (Encoder(last_hidden_state=TOKENS, pooler_output=torch.ones(1, 2)), [1.0, 1.0]),
    "contrastive": (Encoder(pooler_output=torch.ones(1, 2), image_embeds=torch.zeros(1, 3)), [0.0, 0.0, 0.0]),
    "contrastive, both": (
        Encoder(image_embeds=torch.tensor([[0.0, 2.0]]), text_embeds=torch.tensor([[3.0, 4.0]])),
        [0.0, 1.0, pytest.approx(0.6), pytest.approx(0.8)],
    ),
    "contrastive, other texts": (
        Encoder(image_embeds=torch.ones(1, 2), text_embeds=torch.ones(3, 2)),
        [1.0, 1.0],
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_feature_by_what_the_output_has(kind):
    model, expected = OUTPUTS[kind]
    assert features_of_model(model, batches(1)).tolist() == [expected]


def test_output_without_a_feature():
    with pytest.raises(RocketError, match="Encoder gives loss: none of these is a feature"):
        features_of_model(Encoder(loss=torch.zeros(())), batches(1))
    with pytest.raises(RocketError, match="features of nothing"):
        features_of_model(Encoder(logits=torch.zeros(1, 1)), [])
