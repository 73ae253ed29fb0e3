"""Grams and sensitivities of models that are no text decoders, against hooks and autograd of our own."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

import rocket
from rocket.calib import collect_grams, measure_sensitivities
from rocket.config import RocketError
from rocket.config.schema import CalibConfig, ProfilingConfig
from rocket.models import target_layers

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}
TEXT = {**WIDTHS, "vocab_size": 61, "max_position_embeddings": 32, "initializer_range": 0.1}
VISION = {**WIDTHS, "image_size": 32, "patch_size": 8, "initializer_range": 0.1}
SIDES = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}


def bart():
    sizes = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "init_std": 0.2}
    return BartForConditionalGeneration(BartConfig(**sizes, **SIDES))


def t5():
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, initializer_factor=1.0))


def bert():
    return BertForMaskedLM(BertConfig(**TEXT))


def dinov2():
    return Dinov2Model(Dinov2Config(**VISION))


def clip():
    text = {**TEXT, "eos_token_id": 60, "bos_token_id": 59, "pad_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def wav2vec2():
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    norms = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=20, **WIDTHS, **convolutions, **positions, **norms))


def build(make, dtype=torch.float64):
    torch.manual_seed(0)
    return make().to(dtype).eval()


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 58, shape, generator=torch.Generator().manual_seed(seed))


def text_pair() -> dict[str, torch.Tensor]:
    """Both sides padded, each in its own place; lengths are equal, so shapes tell nothing."""
    mask, labels = torch.ones(3, 10, dtype=torch.int64), ids(3, 10, seed=1)
    mask[0, 6:], labels[1, 4:] = 0, -100
    return {"input_ids": ids(3, 10), "attention_mask": mask, "labels": labels}


def captioned() -> dict[str, torch.Tensor]:
    """As many tokens as patches: 16."""
    mask = torch.ones(3, 16, dtype=torch.int64)
    mask[0, 9:] = 0
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids(3, 16), "attention_mask": mask, "pixel_values": pixels}


def record(model, batch, layers) -> dict[str, torch.Tensor]:
    """What each layer reads, [batch, positions, in]."""
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def assert_grams_are_of(calibration, seen, keep) -> None:
    for name, inputs in seen.items():
        tokens = inputs[keep(name)]
        assert calibration.tokens[calibration.inputs[name]] == len(tokens)
        torch.testing.assert_close(
            calibration.gram(name).double(), tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("make", [bart, t5])
def test_each_side_of_an_encoder_decoder_follows_its_own_padding(make):
    model, batch = build(make), text_pair()
    layers = target_layers(model)
    calibration = collect_grams(model, layers, [batch])

    def keep(name: str) -> torch.Tensor:
        reads_encoder = "encoder_attn.k" in name or "encoder_attn.v" in name
        reads_encoder = reads_encoder or "EncDecAttention.k" in name or "EncDecAttention.v" in name
        in_decoder = "decoder." in name and not reads_encoder
        return batch["labels"] != -100 if in_decoder else batch["attention_mask"].bool()

    assert set(calibration.inputs) == set(layers)
    assert_grams_are_of(calibration, record(model, batch, layers), keep)


def test_the_text_mask_says_nothing_of_the_vision_tower():
    model, batch = build(clip, torch.float32), captioned()
    layers = target_layers(model)
    calibration = collect_grams(model, layers, [batch])
    text, vision = (next(name for name in layers if name.startswith(tower)) for tower in ("text", "vision"))
    assert calibration.tokens[calibration.inputs[text]] == 41
    assert calibration.tokens[calibration.inputs[vision]] == 3 * 17


def test_frames_of_padded_audio_are_left_out():
    model = build(wav2vec2)
    mask = torch.ones(2, 800, dtype=torch.int64)
    mask[1, 400:] = 0
    batch = {"input_values": torch.randn(2, 800, dtype=torch.float64), "attention_mask": mask}
    calibration = collect_grams(model, target_layers(model), [batch])
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(800)))
    half = int(model._get_feat_extract_output_lengths(torch.tensor(400)))
    assert all(abs(count - frames - half) <= 1 for count in calibration.tokens.values())


def squared_gradients(model, batch, name: str, objective) -> torch.Tensor:
    """Σ over positions of (∂ objective / ∂y)², by zeros added to one layer's output."""
    zeros = []

    def add(_, __, output):
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    handle = model.get_submodule(name).register_forward_hook(add)
    value = objective(model(**batch))
    handle.remove()
    return torch.autograd.grad(value, zeros[0])[0].square().flatten(0, -2).sum(dim=0)


@pytest.mark.parametrize("make", [bart, t5])
def test_the_loss_of_an_encoder_decoder_is_counted_by_its_labels(make):
    model, batch = build(make), text_pair()
    layers = target_layers(model)
    measured = measure_sensitivities(model, layers, [batch])
    assert list(measured) == list(layers)

    def loss(output):
        return F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    for name in [list(layers)[index] for index in (0, 5, -4, -1)]:
        expected = squared_gradients(model, batch, name, loss) / 24
        torch.testing.assert_close(measured[name].double(), expected, rtol=1e-4, atol=1e-12)


def test_features_are_summed_with_random_signs():
    """On average over the signs: twice the squared Jacobian of all features, by their squares."""
    model = build(dinov2)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    name = "encoder.layer.1.mlp.fc2"
    name = name if name in target_layers(model) else next(x for x in target_layers(model) if x.endswith("1.mlp.fc2"))
    layers = {name: model.get_submodule(name)}
    measured = sum(measure_sensitivities(model, layers, [batch], seed)[name] for seed in range(40)) / 40
    with torch.no_grad():
        features = model(**batch).last_hidden_state
    jacobian = torch.zeros(32, dtype=torch.float64)
    for index in range(0, features[0].numel(), 7):
        row = squared_gradients(model, batch, name, lambda out, index=index: out.last_hidden_state[0].flatten()[index])
        jacobian += 7 * 2 * row  # a seventh of the features of one of two images
    expected = 2 * jacobian.sum() / features.square().sum()
    assert 0.8 * expected < measured.double().sum() < 1.25 * expected


def kl(before, after) -> torch.Tensor:
    before, after = before.log_softmax(-1), after.log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1)


def relative_error(before, after) -> torch.Tensor:
    return (after - before).square().sum() / before.square().sum()


def divergence_of_labels(batch, before, after) -> torch.Tensor:
    return kl(before.logits, after.logits)[batch["labels"] != -100].mean()


def divergence_of_tokens(batch, before, after) -> torch.Tensor:
    return kl(before.logits, after.logits)[batch["attention_mask"] == 1].mean()


def error_of_features(_, before, after) -> torch.Tensor:
    return relative_error(before.last_hidden_state, after.last_hidden_state)


def error_of_embeddings(_, before, after) -> torch.Tensor:
    both = [torch.cat([output.image_embeds, output.text_embeds]) for output in (before, after)]
    return relative_error(*both)


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": captioned()["pixel_values"].double()}


def padded_text() -> dict[str, torch.Tensor]:
    return {key: value for key, value in text_pair().items() if key != "labels"}


@pytest.mark.parametrize(
    ("make", "batch", "measure"),
    [
        (bart, text_pair, divergence_of_labels),
        (t5, text_pair, divergence_of_labels),
        (bert, padded_text, divergence_of_tokens),
        (dinov2, pixels, error_of_features),
        (clip, captioned, error_of_embeddings),
    ],
)
def test_the_predicted_cost_is_about_the_measured_one(make, batch, measure):
    # transformers 4.57 cannot mask CLIP in float64
    model, batch = build(make, torch.float32 if make is clip else torch.float64), batch()
    profiling = ProfilingConfig(forms=["sparse"], removed_ratios=[0.02, 0.05, 0.1])
    planner = rocket.plan(model, [batch], calib=CalibConfig(sensitivity_samples=3, num_samples=3), profiling=profiling)
    plan = planner.at(removed_ratio=0.05)
    small = rocket.compress(model, plan)
    with torch.no_grad():
        found = float(measure(batch, model(**batch), small(**batch)))
    assert 0.2 * plan.cost < found < 5 * plan.cost


def test_layers_that_no_gradient_reaches_are_left_out(caplog):
    model = build(dinov2)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    layers = target_layers(model)
    first = [name for name in layers if ".0." in name]
    blocks = model.get_submodule(first[0].partition(".0.")[0])
    detached = blocks[1].register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    measured = measure_sensitivities(model, layers, [batch])
    assert list(measured) == [name for name in layers if name not in first]
    assert f"no gradient reached {first[0]} and {len(first) - 1} other layers" in caplog.text
    blocks[1].register_forward_hook(lambda *args: args[-1].detach())
    with pytest.raises(RocketError, match="no gradient reached this layer, nor any other"):
        measure_sensitivities(model, layers, [batch])
    detached.remove()
