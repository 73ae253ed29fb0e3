"""From samples to what a model's forward takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Florence2ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from rocket.config.errors import RocketError
from rocket.data import Sample
from rocket.models import (
    labels_of,
    run_forward,
    sample_batches,
    takes_media,
    takes_text_alone,
    token_batches,
)
from rocket.models.processor import tokenizer_of

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
VISION = {**WIDTHS, "image_size": 16, "patch_size": 8}
TEXT = {**WIDTHS, "vocab_size": 260, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
SIDES = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


@pytest.fixture(scope="module")
def image_tokenizer(byte_tokenizer) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a placeholder for images, number 257."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(byte_tokenizer.backend_tokenizer).from_str(byte_tokenizer.backend_tokenizer.to_str()),
        eos_token="<eos>",
        pad_token="<eos>",
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.padding_side = "right"
    return tokenizer


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def sound(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=int(16_000 * seconds)).astype(np.float32)


def clip_images() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def tiny_whisper(of=WhisperForConditionalGeneration):
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 5}
    config = {**SIDES, **HEADS, "vocab_size": 260, "num_mel_bins": 8, **ids}
    return of(WhisperConfig(**config, max_source_positions=50, max_target_positions=32))


def tiny_llava():
    vision = {"model_type": "clip_vision_model", **VISION, "num_hidden_layers": 2}
    text = {"model_type": "llama", **TEXT}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=257))


def test_the_tokenizer_of_a_processor(byte_tokenizer):
    assert tokenizer_of(byte_tokenizer) is byte_tokenizer
    assert tokenizer_of(SimpleNamespace(tokenizer=byte_tokenizer)) is byte_tokenizer


def test_images(byte_tokenizer):
    model = ViTModel(ViTConfig(**VISION)).to(torch.bfloat16)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    batches = sample_batches(model, processor, [Sample(image=picture(seed)) for seed in range(5)], 2)
    assert [batch["pixel_values"].shape[0] for batch in batches] == [2, 2, 1]
    assert run_forward(model, batches[0]).last_hidden_state.dtype == torch.bfloat16
    assert takes_media(model)
    assert not takes_text_alone(model)
    with pytest.raises(RocketError, match="ViTModel reads no text alone; give it samples of what it takes"):
        token_batches(model, torch.zeros(2, 8, dtype=torch.int64), 1)
    with pytest.raises(RocketError, match="ViTModel takes images; the samples hold text"):
        sample_batches(model, processor, [Sample(text="words")], 1)


def test_speech_for_an_encoder_decoder(byte_tokenizer):
    model = tiny_whisper()
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    processor = SimpleNamespace(feature_extractor=extractor, tokenizer=byte_tokenizer)
    samples = [Sample(text="a river", audio=sound(0.5, 0)), Sample(text="rain", audio=sound(0.9, 1))]
    (batch,) = sample_batches(model, processor, samples, 2)
    assert batch["input_features"].shape == (2, 8, 100)
    labels = batch["labels"]
    assert labels.shape == (2, 7)
    assert byte_tokenizer.decode(labels[1, :4]) == "rain"
    assert (labels[1, 4:] == -100).all()
    assert run_forward(model, batch).logits.shape == (2, 7, 260)
    with pytest.raises(RocketError, match="writes text, and some of these samples have none"):
        sample_batches(model, processor, [Sample(audio=sound(0.5, 0))], 1)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(text="rain", audio=sound(1.5, 0)), "sample 1 has 1.5 s of audio; this model takes in 1 s, cut it"),
        (Sample(text="rain" * 10, audio=sound(1, 0)), "rainrain.*40 tokens; .* writes at most 32, cut the clip"),
    ],
)
def test_clips_that_the_model_cannot_take_whole(byte_tokenizer, sample, message):
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    processor = SimpleNamespace(feature_extractor=extractor, tokenizer=byte_tokenizer)
    with pytest.raises(RocketError, match=message):
        sample_batches(tiny_whisper(), processor, [Sample(text="rain", audio=sound(1, 0)), sample], 1)


def test_speech_for_parts_of_an_encoder_decoder(byte_tokenizer):
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    samples = [Sample(audio=sound(0.5, 0), text="rain", label=1)]
    model = tiny_whisper(WhisperForAudioClassification)
    (batch,) = sample_batches(model, extractor, samples, 1)
    assert batch.keys() == {"input_features"}
    assert run_forward(model, batch).logits.shape == (1, 2)
    with pytest.raises(RocketError, match="WhisperModel generates no text from what it takes; give rocket"):
        sample_batches(tiny_whisper(WhisperModel), extractor, samples, 1)


@pytest.mark.parametrize(
    ("of", "sample"),
    [
        (Qwen2AudioForConditionalGeneration, Sample(audio=sound(0.5, 0), text="rain")),
        (Florence2ForConditionalGeneration, Sample(image=picture(0), text="rain")),
    ],
)
def test_models_that_read_media_and_a_question(of, sample):
    model = of.__new__(of)
    object.__setattr__(model, "config", SimpleNamespace(is_encoder_decoder=of is Florence2ForConditionalGeneration))
    with pytest.raises(
        RocketError, match=f"{of.__name__} reads .* beside a text that asks about .*; give rocket.plan batches"
    ):
        sample_batches(model, None, [sample], 1)


def test_the_token_that_a_decoder_starts_with_is_no_label(byte_tokenizer):
    model = tiny_whisper()
    model.config.decoder_start_token_id = byte_tokenizer("r")["input_ids"][0]
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    processor = SimpleNamespace(feature_extractor=extractor, tokenizer=byte_tokenizer)
    (batch,) = sample_batches(model, processor, [Sample(text=text, audio=sound(1, 0)) for text in ("rain", "river")], 2)
    assert byte_tokenizer.decode(batch["labels"][1]) == "iver"


def test_speech_for_an_encoder():
    convolutions = {"conv_dim": (16,), "conv_kernel": (10,), "conv_stride": (5,), "num_feat_extract_layers": 1}
    model = Wav2Vec2Model(Wav2Vec2Config(**WIDTHS, **convolutions, num_conv_pos_embedding_groups=4))
    samples = [Sample(audio=sound(0.05, 0)), Sample(text="x", audio=sound(0.1, 1))]
    (batch,) = sample_batches(model, Wav2Vec2FeatureExtractor(), samples, 2)
    assert batch.keys() == {"input_values", "attention_mask"}
    assert batch["attention_mask"].sum(dim=1).tolist() == [800, 1600]
    # A model that normalises over time was trained without a mask: it tells calibration of padding, not the model.
    values = batch["input_values"]
    model.eval()
    assert model.config.feat_extract_norm == "group"
    assert torch.equal(run_forward(model, batch).last_hidden_state, model(values).last_hidden_state)
    model.config.feat_extract_norm = "layer"
    assert torch.equal(run_forward(model, batch).last_hidden_state, model(**batch).last_hidden_state)


def test_pairs_of_image_and_text(image_tokenizer):
    text = {**TEXT, "eos_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))

    def processor(images, text, **options):
        return {**clip_images()(images, return_tensors="pt"), **image_tokenizer(text, **options)}

    processor.tokenizer = image_tokenizer
    samples = [Sample(text=text, image=picture(0)) for text in ("a stone house", "rain")]
    (batch,) = sample_batches(model, processor, samples, 2)
    assert batch.keys() == {"pixel_values", "input_ids", "attention_mask"}
    assert run_forward(model, batch).image_embeds.shape == (2, 8)
    with pytest.raises(RocketError, match="CLIPModel reads images with text, and some of these samples have no text"):
        sample_batches(model, processor, [*samples, Sample(image=picture(1))], 2)


WORDS = ["<unk>", "▁", "Q", "<image>", "A:", "two", "herons", "rain"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


ROLES = (
    "{% for message in messages %}[{{ message.role }}] {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}.{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("template", "end"), [(None, ""), (TEMPLATE, ""), (f"you see: {TEMPLATE}", ""), (ROLES, ".")], ids=repr
)
def test_images_answered_by_text(image_tokenizer, template, end, side):
    image_tokenizer.padding_side = side
    model = tiny_llava()
    processor = LlavaProcessor(
        image_processor=clip_images(),
        tokenizer=image_tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    samples = [Sample(text=text, image=picture(seed)) for seed, text in enumerate(("two herons", "rain"))]
    (batch,) = sample_batches(model, processor, samples, 2)
    ids, labels = batch["input_ids"], batch["labels"]
    assert (ids == 257).sum(dim=1).tolist() == [4, 4]
    assert [image_tokenizer.decode(row[row != -100]) for row in labels] == [f"two herons{end}", f"rain{end}"]
    assert run_forward(model, batch).logits.shape[:2] == ids.shape
    without = {key: value for key, value in batch.items() if key != "labels"}
    everything = ids.masked_fill((ids == 257) | (batch["attention_mask"] == 0), -100)
    if side == "left":
        everything[1, (batch["attention_mask"][1] == 0).sum()] = -100  # nothing stands before it
    assert torch.equal(labels_of(model, without), everything)


def test_a_template_that_begins_a_text_leaves_no_second_beginning(image_tokenizer):
    class Tokenizer:
        bos_token = "<eos>"
        __call__ = staticmethod(image_tokenizer)

    class Processor:
        tokenizer = Tokenizer()
        chat_template = f"<eos>{TEMPLATE}"

        def apply_chat_template(self, messages, add_generation_prompt=False):
            return "<eos><image>" + "".join(part["text"] for part in messages[-1]["content"] if "text" in part)

        def __call__(self, images, text, add_special_tokens=True, **_):
            beginning = "<eos>" if add_special_tokens else ""
            return {"pixel_values": torch.zeros(1), **image_tokenizer([beginning + text[0]], return_tensors="pt")}

    (batch,) = sample_batches(tiny_llava(), Processor(), [Sample(text="rain", image=picture(0))], 1)
    assert image_tokenizer.decode(batch["input_ids"][0]) == "<eos><image>rain"


def test_an_answer_begins_where_its_prompt_ends():
    """By a tokenizer that writes a space before each text, as Llama's: the answer alone has other tokens than in it."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Prepend("▁ ")
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<unk>")

    class Processor:
        chat_template = "Q <image> A: "

        def apply_chat_template(self, messages, add_generation_prompt=False):
            answers = [part["text"] for message in messages[1:] for part in message["content"]]
            return self.chat_template + " ".join(answers)

        def __call__(self, images, text, padding, return_tensors):
            return {"pixel_values": torch.zeros(1), **tokenizer(text, padding=padding, return_tensors=return_tensors)}

    Processor.tokenizer = tokenizer
    samples = [Sample(text=text, image=picture(0)) for text in ("two herons", "rain")]
    (batch,) = sample_batches(tiny_llava(), Processor(), samples, 2)
    learned = [[WORDS[number] for number in row[row != -100]] for row in batch["labels"]]
    assert learned == [["two", "herons"], ["rain"]]
