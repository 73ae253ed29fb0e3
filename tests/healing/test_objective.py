"""The objectives against torch's own losses and against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from rocket.config.errors import RocketError
from rocket.healing import distillation, language_modelling, objective


def output_of(logits: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_distillation_is_the_divergence_that_torch_computes(make_model, token_ids, monkeypatch, temperature, chunk):
    monkeypatch.setattr(objective, "CHUNK_VALUES", chunk)
    model, batch = make_model(), {"input_ids": token_ids[:3, :8]}
    logits, wanted = torch.randn(2, 3, 8, 20, generator=torch.Generator().manual_seed(0))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    value = distillation(model, output_of(ours), output_of(wanted), batch, temperature)
    rows = [scores[:, :-1].flatten(0, 1) / temperature for scores in (theirs, wanted)]
    expected = temperature**2 * F.kl_div(*(row.log_softmax(-1) for row in rows), reduction="batchmean", log_target=True)
    torch.testing.assert_close(value, expected)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_distillation_by_hand(make_model):
    """From (1/2, 1/2) to (3/4, 1/4): ½ ln(½ / ¾) + ½ ln(½ / ¼) = ½ ln(4/3)."""
    logits, wanted = torch.tensor([3.0, 1.0]).log().expand(1, 2, 2), torch.zeros(1, 2, 2)
    batch = {"input_ids": torch.tensor([[1, 0]])}
    value = distillation(make_model(), output_of(logits), output_of(wanted), batch, 1.0)
    assert float(value) == pytest.approx(0.5 * math.log(4 / 3))


def test_language_modelling_is_the_models_own_loss(make_model, token_ids):
    model, ids = make_model(), token_ids[:3]
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(language_modelling(model, output, {"input_ids": ids}), output.loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_one_token_have_nothing_to_predict(make_model, side):
    model, mask = make_model(), torch.tensor([[0, 1] if side == "left" else [1, 0]])
    batch = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": mask}
    logits = torch.randn(1, 2, 20, requires_grad=True)
    for loss in (
        language_modelling(model, output_of(logits), batch),
        distillation(model, output_of(logits), output_of(torch.randn(1, 2, 20)), batch, 2.0),
    ):
        loss.backward()
        assert loss.item() == 0.0
    assert not logits.grad.any()


def test_models_without_scores_are_refused(make_model, token_ids):
    features = SimpleNamespace(last_hidden_state=torch.zeros(3, 32, 8))
    with pytest.raises(RocketError, match="LlamaForCausalLM predicts no classes, such as tokens; it cannot be healed"):
        language_modelling(make_model(), features, {"input_ids": token_ids[:3]})


def test_padding_does_not_count(token_ids):
    """A masked language model has no labels of its own: all positions but padding count."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=20))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": token_ids[:2, :4], "attention_mask": mask}
    logits, wanted = torch.randn(2, 2, 4, 20, generator=torch.Generator().manual_seed(0))
    rows = [scores[mask.bool()].log_softmax(-1) for scores in (logits, wanted)]
    expected = F.kl_div(*rows, reduction="batchmean", log_target=True)
    torch.testing.assert_close(distillation(model, output_of(logits), output_of(wanted), batch, 1.0), expected)
    with pytest.raises(RocketError, match=r"BertForMaskedLM has no labels .* use healing.objective=distillation"):
        language_modelling(model, output_of(logits), batch)
