"""Word error rate of a speech model, with error bars, and of one model against another."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from rocket.config.errors import RocketError
from rocket.data.samples import SAMPLING_RATE, Sample
from rocket.evaluation.perplexity import evaluating
from rocket.models.inputs import run_forward
from rocket.models.processor import check_clips, longest_clip
from rocket.usage import track

RESAMPLES = 10_000
REMARKS = re.compile(r"\[[^\]]*\]|<[^>]*>")
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese characters."""


@dataclass(frozen=True)
class WordErrorRate:
    """What `word_error_rate` measured.

    value: errors / words, a fraction. errors: words substituted, left out or put in. words: words of the references.
    low, high: 95 % interval of the value over the choice of clips. hypotheses: what the model wrote, a clip each;
    clip_errors, clip_words: the counts of each clip, so that two models can be compared pairwise.
    """

    value: float
    errors: int
    words: int
    low: float
    high: float
    hypotheses: tuple[str, ...]
    clip_errors: tuple[int, ...]
    clip_words: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """Word error rate of one model less another's, a fraction, with its 95 % interval."""

    value: float
    low: float
    high: float


def word_error_rate(model: Any, processor: Any, samples: Sequence[Sample], batch_size: int = 4) -> WordErrorRate:
    """Errors a word of the model's transcripts of samples with `audio` (16 kHz) and `text`, over all clips together.

    Decoding is greedy: token by token for models that generate (Whisper), the best symbol of each frame for CTC models
    (wav2vec2). References and transcripts are normalised before words are compared: for models of English alone by
    Whisper's normaliser (letter case, punctuation, numbers, contractions, fillers; not spelling), for others by
    `plain_words`.

    Cost: one transcription of each clip; models like Whisper, whose input is 30 s long, pay for 30 s whatever the clip.

    Raises RocketError when a sample lacks audio or text, has no word, or is longer than the model takes in; or when
    the package `jiwer` is missing.
    """
    normalize = EnglishTextNormalizer({}) if _is_english(model) else plain_words
    _check(samples, processor, batch_size, normalize)
    hypotheses: list[str] = []
    with evaluating(model):
        for start in track(range(0, len(samples), batch_size), "transcribe"):
            hypotheses += transcribe(model, processor, [sample.audio for sample in samples[start : start + batch_size]])
    return score([str(sample.text) for sample in samples], hypotheses, normalize)


def plain_words(text: str) -> str:
    """A text of any language without letter case, punctuation and remarks in brackets, its words apart by spaces.

    Characters of scripts that write no spaces count as words.

    >>> plain_words("Um acht, schön!"), plain_words("東京へ")
    ('um acht schön', '東 京 へ')
    """
    letters = unicodedata.normalize("NFKC", REMARKS.sub(" ", text)).lower()
    apart = SPACELESS.sub(r" \g<0> ", "".join(" " if unicodedata.category(x)[0] in "PS" else x for x in letters))
    return " ".join(apart.split())


def _is_english(model: Any) -> bool:
    """Whether a model of speech says that it writes English: Whisper's do."""
    generation = getattr(model, "generation_config", None)
    language = str(getattr(generation, "language", None)).strip("<|>").lower()
    return getattr(generation, "is_multilingual", None) is False or language in ("en", "english")


def transcribe(model: Any, processor: Any, clips: Sequence[Any]) -> list[str]:
    """What a model in evaluation mode hears in a batch of clips, each float32 [n] at 16 kHz."""
    # Whisper's input has one length; others are padded to the longest clip.
    padding = "max_length" if longest_clip(processor) else "longest"
    inputs = processor(audio=list(clips), sampling_rate=SAMPLING_RATE, padding=padding, return_tensors="pt")
    if model.can_generate():
        tokens = model.generate(**inputs.to(model.device, model.dtype), do_sample=False, num_beams=1)
        return [str(text) for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    mask = inputs.get("attention_mask")
    if mask is None and len(clips) > 1:  # the model cannot tell padding from silence
        return [text for clip in clips for text in transcribe(model, processor, [clip])]
    frames = run_forward(model, inputs).logits.argmax(dim=-1)
    lengths = [frames.shape[1]] * len(clips)
    if mask is not None and hasattr(model, "_get_feat_extract_output_lengths"):
        lengths = model._get_feat_extract_output_lengths(mask.sum(dim=-1)).tolist()
    heard = [row[:length] for row, length in zip(frames, lengths, strict=True)]
    return [str(text) for text in processor.batch_decode(heard, skip_special_tokens=True)]


def score(references: Sequence[str], hypotheses: Sequence[str], normalize: Any) -> WordErrorRate:
    """Word errors of transcripts against references, both normalised first."""
    errors, words = np.array(
        list(_counts([normalize(text) for text in references], [normalize(text) for text in hypotheses]))
    ).T
    low, high = _interval(errors, words)
    return WordErrorRate(
        value=float(errors.sum() / words.sum()),
        errors=int(errors.sum()),
        words=int(words.sum()),
        low=low,
        high=high,
        hypotheses=tuple(hypotheses),
        clip_errors=tuple(errors.tolist()),
        clip_words=tuple(words.tolist()),
    )


def difference(original: Sequence[int], compressed: Sequence[int], words: Sequence[int]) -> Difference:
    """How much higher the compressed model's rate is, from both models' errors in each clip and the words in it.

    The interval draws the same clips for both models. Raises RocketError if these are not of the same clips.
    """
    if not len(original) == len(compressed) == len(words):
        raise RocketError("two word error rates of different clips cannot be compared; measure both on the same")
    more, said = np.subtract(compressed, original), np.array(words)
    return Difference(float(more.sum() / said.sum()), *_interval(more, said))


def _interval(errors: Any, words: Any, seed: int = 0) -> tuple[float, float]:
    """2.5 % and 97.5 % percentiles of Σ errors / Σ words over clips drawn with replacement (Bisani and Ney 2004)."""
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(words), np.full(len(words), 1 / len(words)), size=RESAMPLES)
    low, high = np.percentile((draws @ errors) / (draws @ words), [2.5, 97.5])
    return float(low), float(high)


def _counts(references: Sequence[str], hypotheses: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(errors, words) of each clip."""
    jiwer = _jiwer()
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        found = jiwer.process_words(reference, hypothesis)
        yield found.substitutions + found.deletions + found.insertions, len(reference.split())


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError:
        raise RocketError("word error rates need a package: pip install jiwer") from None
    return jiwer


def _check(samples: Sequence[Sample], processor: Any, batch_size: int, normalize: Callable[[str], str]) -> None:
    if batch_size < 1:
        raise RocketError(f"batch_size {batch_size}: must be at least 1")
    if not samples:
        raise RocketError("no clip to measure the word error rate on; give samples with audio and text")
    for number, sample in enumerate(samples):
        if sample.audio is None or sample.text is None:
            missing = "audio" if sample.audio is None else "transcript"
            raise RocketError(f"sample {number} has no {missing}; word error rates need clips with transcripts")
        if not any(letter.isalnum() for letter in normalize(sample.text)):
            raise RocketError(
                f"sample {number}: {sample.text[:40]!r} has no word once normalised; leave such clips out"
            )
    check_clips(processor, samples)
    _jiwer()
