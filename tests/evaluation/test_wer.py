"""Word error rates: counted by hand, from transcripts of models that are told what to say, and of a real one."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from rocket.config.errors import RocketError
from rocket.config.schema import ModelConfig
from rocket.data.samples import Sample
from rocket.evaluation.wer import (
    WordErrorRate,
    _is_english,
    difference,
    plain_words,
    score,
    transcribe,
    word_error_rate,
)

SECOND = np.zeros(16_000, np.float32)


def plain(text: str) -> str:
    return text


def test_counted_by_hand():
    """One word substituted (sat -> sits) and one left out (the); one put in (very); none."""
    references = ["the cat sat on the mat", "it was cold", "yes"]
    hypotheses = ["the cat sits on mat", "it was very cold", "yes"]
    result = score(references, hypotheses, plain)
    assert result.clip_errors == (2, 1, 0)
    assert result.clip_words == (6, 3, 1)
    assert (result.errors, result.words, result.value) == (3, 10, 0.3)
    assert result.low <= 0.3 <= result.high
    assert result.hypotheses == tuple(hypotheses)


def test_more_errors_than_words():
    assert score(["yes"], ["no no no"], plain).value == 3.0
    assert score(["yes yes"], [""], plain).value == 1.0


def test_interval_is_that_of_the_binomial():
    """Clips of one word, a tenth of them wrong: the interval of a mean of 400 draws."""
    result = score(["yes"] * 400, ["no"] * 40 + ["yes"] * 360, plain)
    expected = 1.96 * np.sqrt(0.1 * 0.9 / 400)
    assert result.low == pytest.approx(0.1 - expected, abs=0.004)
    assert result.high == pytest.approx(0.1 + expected, abs=0.004)
    assert score(["yes"] * 400, ["no"] * 40 + ["yes"] * 360, plain) == result


def test_difference_is_paired():
    """Both models err on the same clips and one on one more: the difference is known far better than either rate."""
    references = ["yes"] * 100
    original = score(references, ["no"] * 30 + ["yes"] * 70, plain)
    compressed = score(references, ["no"] * 31 + ["yes"] * 69, plain)
    result = difference(original.clip_errors, compressed.clip_errors, original.clip_words)
    assert result.value == pytest.approx(0.01)
    assert result.low == 0.0
    assert 0.01 <= result.high <= 0.04
    assert original.high - original.low > 0.15
    same = difference(original.clip_errors, original.clip_errors, original.clip_words)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_difference_of_other_clips():
    with pytest.raises(RocketError, match="different clips cannot be compared"):
        difference([0], [0, 1], [3])


LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]


@pytest.fixture
def processor(tmp_path):
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({letter: number for number, letter in enumerate(LETTERS)}))
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(str(vocabulary)))


def tiny(**changes: object) -> Wav2Vec2Config:
    return Wav2Vec2Config(
        vocab_size=len(LETTERS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_kernel=(10, 10),
        conv_stride=(40, 40),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        **changes,
    )


@pytest.fixture
def ctc_model():
    """Says YES, whatever it hears: the frame number decides."""
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(tiny())

    def say_yes(_module, _args, output):
        frames = torch.full(output.shape[:2], LETTERS.index("<pad>"))
        frames[:, :5] = torch.tensor([LETTERS.index(letter) for letter in ("Y", "Y", "E", "<pad>", "S")])
        return torch.nn.functional.one_hot(frames, len(LETTERS)).to(output.dtype)

    model.lm_head.register_forward_hook(say_yes)
    return model.train()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_ctc_model(ctc_model, processor, batch_size):
    samples = [
        Sample(audio=SECOND, text="Yes."),
        Sample(audio=SECOND[:12_000], text="Oh, yes!"),
        Sample(audio=SECOND, text="no"),
    ]
    result = word_error_rate(ctc_model, processor, samples, batch_size)
    assert result.hypotheses == ("YES", "YES", "YES")
    assert (result.clip_errors, result.clip_words) == ((0, 1, 1), (1, 2, 1))
    assert ctc_model.training


def test_a_transcript_does_not_depend_on_what_else_is_in_the_batch(processor):
    """Neither where the extractor tells padding from silence nor where it does not."""
    generator = np.random.default_rng(0)
    clips = [generator.standard_normal(size).astype(np.float32) for size in (16_000, 9_000)]
    for norm in ("layer", "group"):
        torch.manual_seed(1)
        model = Wav2Vec2ForCTC(tiny(feat_extract_norm=norm, initializer_range=1.0)).eval()
        processor.feature_extractor.return_attention_mask = norm == "layer"
        together = transcribe(model, processor, clips)
        assert together == [text for clip in clips for text in transcribe(model, processor, [clip])]
        assert all(together)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Um acht Uhr - schön!", "um acht uhr schön"),
        ("がぎ", "が ぎ"),
        ("नमस्ते", "नमस्ते"),
        ("[laughter] don't", "don t"),
    ],
)
def test_words_of_any_language(text, words):
    assert plain_words(text) == words


@pytest.mark.parametrize(
    ("generation", "english"),
    [
        ({"is_multilingual": False}, True),
        ({"is_multilingual": True}, False),
        ({"is_multilingual": True, "language": "<|en|>"}, True),
        ({"is_multilingual": True, "language": "german"}, False),
        ({}, False),
    ],
)
def test_only_models_that_say_so_are_english(ctc_model, generation, english):
    ctc_model.generation_config = SimpleNamespace(**generation)
    assert _is_english(ctc_model) is english


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no clip to measure the word error rate on"),
        ([Sample(audio=SECOND, text="yes"), Sample(text="yes")], "sample 1 has no audio"),
        ([Sample(audio=SECOND)], "sample 0 has no transcript"),
        (
            [Sample(audio=SECOND, text="yes"), Sample(audio=SECOND, text="[laughter]")],
            r"sample 1: '\[laughter\]' has no",
        ),
        ([Sample(audio=SECOND, text="...")], r"sample 0: '\.\.\.' has no word"),
        ([Sample(audio=SECOND[:100], text="yes")], "sample 0 has 100 values of audio, fewer than the 400 of a frame"),
    ],
)
def test_samples_that_cannot_be_measured(ctc_model, processor, samples, message):
    ctc_model.forward = None  # it is not run before
    with pytest.raises(RocketError, match=message):
        word_error_rate(ctc_model, processor, samples)


def test_batch_size(ctc_model, processor):
    with pytest.raises(RocketError, match="batch_size 0: must be at least 1"):
        word_error_rate(ctc_model, processor, [Sample(audio=SECOND, text="yes")], 0)


def test_package_is_missing(monkeypatch, ctc_model, processor):
    ctc_model.forward = None
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    with pytest.raises(RocketError, match=r"pip install jiwer"):
        word_error_rate(ctc_model, processor, [Sample(audio=SECOND, text="yes")])


@pytest.fixture(scope="module")
def whisper_and_clips():
    from rocket.data.sources import speech
    from rocket.models import load_model

    try:
        clips = list(speech.read_pocketsphinx(speech.SHARE))
        return *load_model(ModelConfig(path="embedded:whisper-tiny.en", dtype="float32", device="cpu")), clips
    except RocketError as missing:
        pytest.skip(str(missing))


def test_real_model_on_real_speech(whisper_and_clips):
    """One of 22 + 19 words is wrong: the reference says "a more a amiable"; "Mr." and "mister" are the same."""
    model, processor, clips = whisper_and_clips
    result = word_error_rate(
        model, processor, [Sample(audio=clip.audio, text=clip.text) for clip in (clips[0], clips[3])]
    )
    assert (result.clip_errors, result.clip_words) == ((0, 1), (22, 19))
    assert isinstance(result, WordErrorRate)


def test_clip_longer_than_the_model_takes_in(whisper_and_clips):
    model, processor, _ = whisper_and_clips
    with pytest.raises(RocketError, match=r"sample 0 has 31.0 s of audio; this model takes in 30 s, cut it into"):
        word_error_rate(model, processor, [Sample(audio=np.zeros(31 * 16_000, np.float32), text="yes")])
