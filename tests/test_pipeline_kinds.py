"""The whole pipeline on models that are no text decoders: what they are calibrated on and measured by follows."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from rocket.compression import stored_values
from rocket.config import RocketError, load_config
from rocket.evaluation import Score, metrics
from rocket.pipeline import export_dense, measure_prices, run_pipeline
from rocket.reporting.measured import measured_rows
from rocket.session import Session

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}
VISION = {**WIDTHS, "image_size": 16, "patch_size": 8}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A .jsonl of forty images with texts and labels."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(40):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": f"picture {number}", "label": number % 3})
    path = tmp_path / "pictures.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def write_config(tmp_path, text_file):
    """Writes the config of a run of a model that is saved with its processor."""

    def write(model, processor, source: Path, texts: list[str], samples: list[str]) -> Path:
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        sections = {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"},
            "calib": {"source": str(source), "num_samples": 12, "seq_len": 32, "sensitivity_samples": 4},
            "profiling": {"removed_ratios": [0.1, 0.3, 0.5, 0.7], "rank_support_ratios": [1.0, 2.0]},
            "compression": {"removed_ratio": 0.3},
            "evaluation": {"texts": texts, "samples": samples, "seq_len": 32, "max_tokens": 256},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
        return tmp_path / "config.yaml"

    return write


def run(path: Path, *overrides: str, stage=run_pipeline):
    with Session(load_config(path, overrides)) as session:
        return stage(session)


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**VISION, num_labels=3, initializer_range=0.2))


def vit_processor():
    return ViTImageProcessor(size={"height": 16, "width": 16})


def test_image_classifier(write_config, pictures, monkeypatch):
    path = write_config(vit(), vit_processor(), pictures, [], [str(pictures)])
    summary = run(path)
    assert stored_values(summary.path, summary.plan.choices) == summary.plan.kept_target_parameters
    (score,) = summary.original.scores[str(pictures)]
    assert score.name.startswith("accuracy (")
    assert 0 <= score.low <= score.value <= score.high <= 100
    ((name, before, after),) = measured_rows(summary.original, summary.compressed)
    assert (name, before) == (f"{score.name}, {pictures}", str(score))
    assert "(" in after
    again = run(path)
    assert (again.original, again.compressed) == (summary.original, summary.compressed)
    dense = run(path, stage=export_dense)
    assert type(AutoModelForImageClassification.from_pretrained(dense)) is ViTForImageClassification
    with pytest.raises(RocketError, match="only text decoders calibrated on text can be measured"):
        run(path, stage=lambda session: measure_prices(session, [0.3]))


def test_image_encoder(write_config, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "views"
    folder.mkdir()
    for number in range(120):
        Image.effect_noise((16, 16), 10.0 + number).convert("RGB").save(folder / f"{number}.png")
    model = Dinov2Model(Dinov2Config(**VISION))
    summary = run(write_config(model, vit_processor(), folder, [], [str(folder)]))
    original, compressed = (evaluation.scores[str(folder)] for evaluation in (summary.original, summary.compressed))
    assert [score.value for score in original] == pytest.approx([1.0, 1.0])
    assert 0.5 < compressed[0].value < 1.0
    assert compressed[0].low <= compressed[0].value <= compressed[0].high
    assert 0 <= compressed[1].value <= 1
    with pytest.raises(RocketError, match="Dinov2Model predicts no classes, such as tokens; it cannot be healed"):
        run(tmp_path / "config.yaml", f"healing.source={folder}", "healing.minutes=1")
    # what the original was like is lost: it is measured again, not taken for equal
    (summary.path.parents[1] / "evaluation/original.safetensors").unlink()
    (summary.path.parents[1] / "evaluation/removed-0.30.json").unlink()
    again = run(tmp_path / "config.yaml")
    assert (again.original, again.compressed) == (summary.original, summary.compressed)


def test_what_metrics_keep_of_the_original_reaches_the_compressed_model(write_config, pictures, monkeypatch):
    def measure(subject: metrics.Subject) -> metrics.Measurement:
        with torch.no_grad():
            features = torch.cat([subject.model(**batch).logits for batch in subject.batches])
        if subject.reference is None:
            return metrics.Measurement([], {"features": features})
        return metrics.Measurement([Score("distance", float((features - subject.reference["features"]).norm()))])

    monkeypatch.setattr(metrics, "METRICS", (metrics.Metric("features", lambda _: True, measure),))
    path = write_config(vit(), vit_processor(), pictures, [], [str(pictures)])
    summary = run(path)
    assert summary.original.scores == {str(pictures): []}
    ((name, before, after),) = measured_rows(summary.original, summary.compressed)
    assert (name, before) == (f"distance, {pictures}", "")
    assert float(after) > 0


def test_text_to_text(write_config, byte_tokenizer, text_file):
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    summary = run(write_config(model, byte_tokenizer, text_file, [str(text_file)], []))
    (score,) = summary.compressed.scores[str(text_file)]
    assert score.name == "perplexity"
    assert 1 < score.value < 1e9
    check_healing(summary, f"healing.source={text_file}", "healing.tokens=512", "healing.seq_len=32")


def check_healing(summary, *limits: str) -> None:
    """Heal in the run of ``summary``; values change, their number and what is measured of them do not."""
    path = summary.path.parents[1] / "config.yaml"
    healed = run(path, "healing.learning_rate=3e-3", *limits)
    before, after = (load_file(folder / "model.safetensors") for folder in (summary.path, healed.path))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert stored_values(healed.path, summary.plan.choices) == summary.plan.kept_target_parameters
    (compressed,), (better,) = healed.compressed.scores.values(), healed.healed.scores.values()
    assert [score.name for score in compressed] == [score.name for score in better]
    assert all(before.value != after.value for before, after in zip(compressed, better, strict=True))


def test_text_encoder(write_config, byte_tokenizer, text_file, caplog):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**WIDTHS, vocab_size=260, max_position_embeddings=32))
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    path = write_config(model, tokenizer, text_file, [str(text_file)], [])
    summary = run(path)
    assert summary.plan.removed_ratio >= 0.3
    (before,), (after,) = (found.scores[str(text_file)] for found in (summary.original, summary.compressed))
    assert before.name == after.name
    assert before.name.endswith(" masked tokens")
    assert before.value != after.value
    check_healing(summary, f"healing.source={text_file}", "healing.tokens=512", "healing.seq_len=32")
    with pytest.raises(RocketError, match=r"evaluation\.seq_len=64 exceeds the model's 32 positions"):
        run(path, f"evaluation.texts=[{text_file}]", "evaluation.seq_len=64")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (BertForSequenceClassification, ["same of 8 predictions, %"]),
        (BertForTokenClassification, ["same of 256 predictions, %"]),
        (BertModel, ["feature cosine (8 windows)", "shared 5 nearest neighbours"]),
        (BertForPreTraining, []),  # two heads
    ],
)
def test_other_text_encoders(write_config, byte_tokenizer, text_file, kind, names):
    torch.manual_seed(0)
    model = kind(BertConfig(**WIDTHS, vocab_size=260, max_position_embeddings=32, initializer_range=0.2))
    path = write_config(model, byte_tokenizer, text_file, [str(text_file)], [])
    summary = run(path, "evaluation.seq_len=32", "evaluation.max_tokens=256")
    before, after = (found.scores[str(text_file)] for found in (summary.original, summary.compressed))
    assert [score.name for score in before] == [score.name for score in after] == names
    if names:
        assert before[0].value in (1.0, 100.0)
        assert 0 < after[0].value <= before[0].value


def test_images_answered_by_text(write_config, byte_tokenizer, pictures):
    torch.manual_seed(0)
    backend = byte_tokenizer.backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(backend).from_str(backend.to_str()), eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    text = {"model_type": "llama", **WIDTHS, "vocab_size": 260, "max_position_embeddings": 64}
    vision = {"model_type": "clip_vision_model", **VISION}
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=257))
    summary = run(write_config(model, processor, pictures, [], [str(pictures)]))
    assert any("vision" in layer for layer in summary.plan.choices)
    assert any("language" in layer for layer in summary.plan.choices)
    ((name, before, after),) = measured_rows(summary.original, summary.compressed)
    assert name == f"perplexity, {pictures}"
    assert float(before) > 1
    assert float(after) > 1
    check_healing(summary, f"healing.source={pictures}", "healing.minutes=0.05")


def test_sources_that_a_model_does_not_take(write_config, pictures, text_file):
    path = write_config(vit(), vit_processor(), pictures, [], [str(pictures)])
    with pytest.raises(
        RocketError, match=r"ViTForImageClassification reads no text alone; write \[\] and name samples"
    ):
        run(path, f"evaluation.texts=[{text_file}]")
    with pytest.raises(
        RocketError, match=r"calib\.source=.*: ViTForImageClassification reads no text alone; name images or speech"
    ):
        run(path, f"calib.source={text_file}", f"output_dir={path.parent / 'other'}")
    with pytest.raises(RocketError, match="'nowhere': no such source"):
        run(path, "evaluation.samples=[nowhere]")
