"""Batches of samples, made by the model's own processor: its tokenizer, image processor or feature extractor."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rocket.config.errors import RocketError
from rocket.data import Sample
from rocket.data.samples import SAMPLING_RATE
from rocket.models.inputs import (
    AUDIO_INPUTS,
    GIVE_BATCHES,
    IGNORED,
    Batch,
    forward_arguments,
    is_causal_lm,
    is_encoder_decoder,
    labels_of,
    learns_to_write,
    placeholders,
)

logger = logging.getLogger(__name__)

SHORTEST_CLIP = 400
"""What the first convolutions of wav2vec2 take in at once, as Whisper's frames do: 25 ms."""
QUESTION = {"role": "user", "content": [{"type": "image"}]}


def sample_batches(model: nn.Module, processor: Any, samples: Sequence[Sample], batch_size: int) -> list[Batch]:
    """Batches of samples, made by the model's own processor.

    - speech: features of the audio; the transcript is the labels of an encoder-decoder model
    - images: pixels
    - image and text (CLIP): pixels, and tokens padded to one length
    - image and text (a vision-language model): the chat of an image answered by the text, which is the labels

    Raises RocketError if the model does not take what the samples hold, or not whole, or the processor cannot make it.
    """
    make = _batch_maker(model, processor, samples)
    known = forward_arguments(model) | {"labels"}
    batches: list[Batch] = []
    for start in range(0, len(samples), batch_size):
        made = make(samples[start : start + batch_size])
        batches.append({name: value for name, value in made.items() if name in known and isinstance(value, Tensor)})
    return batches


def _batch_maker(
    model: nn.Module, processor: Any, samples: Sequence[Sample]
) -> Callable[[Sequence[Sample]], dict[str, Any]]:
    name, takes = type(model).__name__, forward_arguments(model)
    has = {field: all(getattr(sample, field) is not None for sample in samples) for field in ("audio", "image", "text")}
    if has["audio"] and not takes.isdisjoint(AUDIO_INPUTS):
        if "input_ids" in takes and not is_encoder_decoder(model):
            raise RocketError(f"{name} reads audio beside a text that asks about it; {GIVE_BATCHES}")
        check_clips(processor, samples)
        return lambda part: _speech(model, processor, part)
    if has["image"] and "pixel_values" in takes:
        if "input_ids" not in takes:
            return lambda part: _images(model, processor, part)
        if is_encoder_decoder(model):
            raise RocketError(f"{name} reads images beside a text that asks about them; {GIVE_BATCHES}")
        if not has["text"]:
            raise RocketError(f"{name} reads images with text, and some of these samples have no text")
        if is_causal_lm(model):
            return lambda part: _dialogues(model, processor, part)
        return lambda part: _pairs(processor, part)
    held = " and ".join(field for field, present in has.items() if present) or "nothing that all have in common"
    raise RocketError(f"{name} takes {', '.join(_inputs(takes))}; the samples hold {held}")


def _inputs(takes: frozenset[str]) -> list[str]:
    words = {"input_ids": "text", "pixel_values": "images", "input_features": "speech", "input_values": "speech"}
    return sorted({words[name] for name in takes if name in words})


def _part(processor: Any, *names: str) -> Any:
    """The tokenizer, image processor or feature extractor of a processor, or the processor itself if it is that."""
    return next((part for name in names if (part := getattr(processor, name, None)) is not None), processor)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the processor itself, if it is one."""
    return _part(processor, "tokenizer")


def longest_clip(processor: Any) -> int | None:
    """The one number of audio samples that a model like Whisper takes in; None where any length will do."""
    return getattr(_part(processor, "feature_extractor"), "n_samples", None)


def check_clips(processor: Any, samples: Sequence[Sample]) -> None:
    """Raise RocketError for the first sample with too little audio, or more than the model takes in, and would cut."""
    longest = longest_clip(processor)
    for number, sample in enumerate(samples):
        if sample.audio is not None and len(sample.audio) < SHORTEST_CLIP:
            raise RocketError(
                f"sample {number} has {len(sample.audio)} values of audio, fewer than the {SHORTEST_CLIP} of a frame; "
                "leave such clips out"
            )
        if longest is not None and sample.audio is not None and len(sample.audio) > longest:
            raise RocketError(
                f"sample {number} has {len(sample.audio) / SAMPLING_RATE:.1f} s of audio; this model takes in "
                f"{longest / SAMPLING_RATE:.0f} s, cut it into shorter clips"
            )


def _speech(model: nn.Module, processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    extractor = _part(processor, "feature_extractor")
    arguments = inspect.signature(extractor.__call__).parameters
    # Whisper reads 30 s, and its extractor pads to them by itself; others pad only when told, or always to one length.
    options: dict[str, Any] = {"padding": arguments["padding"].default or True} if "padding" in arguments else {}
    # Where the mask is not the model's, it still tells calibration which frames are padding.
    if options.get("padding") is True and "return_attention_mask" in arguments:
        options["return_attention_mask"] = True
    audio = [sample.audio for sample in samples]
    batch = dict(extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt", **options))
    if is_encoder_decoder(model):
        batch["labels"] = _written(model, processor, samples)
    return batch


def _images(model: nn.Module, processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    make = _part(processor, "image_processor")
    batch = dict(make(images=[sample.image for sample in samples], return_tensors="pt"))
    if is_encoder_decoder(model):
        batch["labels"] = _written(model, processor, samples)
    return batch


def _written(model: nn.Module, processor: Any, samples: Sequence[Sample]) -> Tensor:
    """Labels [n, tokens] that an encoder-decoder model is to write, without the token that its decoder starts with."""
    name, tokenizer = type(model).__name__, tokenizer_of(processor)
    if not learns_to_write(model):
        raise RocketError(f"{name} generates no text from what it takes; {GIVE_BATCHES}")
    if any(sample.text is None for sample in samples):
        raise RocketError(f"{name} writes text, and some of these samples have none (no transcript)")
    rows = [torch.tensor(tokenizer(sample.text)["input_ids"]) for sample in samples]
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    config: Any = model.config
    starts = bool((labels[:, 0] == config.decoder_start_token_id).all())
    labels = labels[:, 1:] if starts else labels
    most = getattr(config, "max_target_positions", None)
    if most is not None and labels.shape[1] > most:
        longest = samples[max(range(len(rows)), key=lambda number: len(rows[number]))].text or ""
        raise RocketError(
            f"{longest[:40]!r}... is a transcript of {labels.shape[1]} tokens; {name} writes at most {most}, cut the "
            "clip into shorter ones"
        )
    return labels


def _pairs(processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    # A text model that is given no mask (SigLIP) was trained on texts padded to its full length.
    masked = "attention_mask" in tokenizer_of(processor).model_input_names
    return dict(
        processor(
            images=[sample.image for sample in samples],
            text=[sample.text for sample in samples],
            padding=True if masked else "max_length",
            truncation=True,
            return_tensors="pt",
        )
    )


def _dialogues(model: nn.Module, processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    texts = [_dialogue(processor, sample.text or "") for sample in samples]
    images = [[sample.image] for sample in samples]
    tokenizer = tokenizer_of(processor)
    start = getattr(tokenizer, "bos_token", None)
    # Many chat templates write the token that begins a text, which the tokenizer would write once more.
    begun = {"add_special_tokens": False} if start and texts[0].startswith(start) else {}
    batch = dict(processor(images=images, text=texts, padding=True, return_tensors="pt", **begun))
    labels = labels_of(model, batch)
    assert labels is not None
    # What comes before and among the pieces of the image is the prompt's frame: system text, rows and columns.
    framed = placeholders(model, batch["input_ids"]).flip(1).cumsum(1).flip(1) > 0
    prompt = _prompt(processor)
    if prompt and all(text.startswith(prompt) for text in texts):
        before, *whole = (len(ids) for ids in tokenizer([prompt, *texts])["input_ids"])
        lengths = torch.tensor(whole)[:, None] - before
        framed |= batch["attention_mask"].flip(1).cumsum(1).flip(1) > lengths
    elif prompt:
        logger.warning("the chat template does not tell where an answer begins: all that follows the image is learned")
    return {**batch, "labels": labels.masked_fill(framed, IGNORED)}


def _prompt(processor: Any) -> str | None:
    """What a chat template writes before an answer to an image, which is not for the model to learn."""
    if not getattr(processor, "chat_template", None):
        return None
    prompt: str = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    return prompt


def _dialogue(processor: Any, text: str) -> str:
    """What a vision-language model reads: an image, answered by the text."""
    if getattr(processor, "chat_template", None):
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        dialogue: str = processor.apply_chat_template([QUESTION, answer])
        return dialogue
    token = getattr(processor, "image_token", None)
    if token is None:
        raise RocketError(f"{type(processor).__name__} has neither a chat template nor an image token; it needs one")
    return f"{token}{text}"
