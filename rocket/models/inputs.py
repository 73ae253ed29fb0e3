"""Batches: the keyword arguments of a model's forward, by what it takes; what it learns from them; those of tokens.

Those of samples, which hold images or audio, are made by the model's processor (`models.processor`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rocket.config.errors import RocketError

Batch = Mapping[str, Tensor]
IGNORED = -100
AUDIO_INPUTS = ("input_features", "input_values")
MEDIA_INPUTS = ("pixel_values", *AUDIO_INPUTS)
GIVE_BATCHES = "give rocket.plan batches of what its forward takes"


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """The names of the arguments of a model's forward."""
    return frozenset(inspect.signature(type(model).forward).parameters)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model reads one sequence and has a decoder for another (T5, BART, Whisper).

    The config alone does not tell: an encoder that is used by itself has that of the whole model.
    """
    by_config = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return by_config and "decoder_input_ids" in forward_arguments(model)


def learns_to_write(model: nn.Module) -> bool:
    """Whether ``labels`` are what an encoder-decoder model is to write: not a classifier's, nor of one without head."""
    return is_encoder_decoder(model) and _generates(model) and "labels" in forward_arguments(model)


def _generates(model: nn.Module) -> bool:
    can_generate: Callable[[], bool] | None = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate()


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model predicts each token of its input from those before it, images beside them or not."""
    return _generates(model) and not is_encoder_decoder(model)


def takes_media(model: nn.Module) -> bool:
    """Whether a model takes images or audio, with text or without."""
    return not forward_arguments(model).isdisjoint(MEDIA_INPUTS)


def takes_text_alone(model: nn.Module) -> bool:
    """Whether a model can read text without images or audio: CLIP, for one, wants both."""
    return "input_ids" in forward_arguments(model) and (not takes_media(model) or is_causal_lm(model))


def most_positions(model: nn.Module) -> int | None:
    """The tokens that a text may have; None if the model's config does not say.

    RoBERTa and its kin count positions from behind the padding's, so that their table has more rows than positions.
    """
    config: Any = getattr(model, "config", None)
    count = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    if not isinstance(count, int):
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return min(count, module.num_embeddings - module.padding_idx - 1)
    return count


def run_forward(model: nn.Module, batch: Batch, scores: bool = True, through: nn.Module | None = None) -> Any:
    """The model's output for a batch, on its device and in its type, without a cache.

    Without ``scores``, models that can leave out those of all tokens but the last do so. ``through`` is what to call in
    the model's place: what wraps it, for training on several devices.

    ``labels`` are passed on where the decoder's input is made from them, and nowhere else; ``attention_mask`` not to
    speech models that normalise over time (wav2vec2-base), which were trained without. What is no tensor is passed on.
    """
    parameter = next(model.parameters())
    unread = set() if learns_to_write(model) else {"labels"}
    if getattr(getattr(model, "config", None), "feat_extract_norm", None) == "group":
        unread.add("attention_mask")
    arguments: dict[str, Any] = {name: _like(parameter, batch[name]) for name in batch if name not in unread}
    if "use_cache" in forward_arguments(model):
        arguments["use_cache"] = False
    if not scores and "logits_to_keep" in forward_arguments(model):
        # Counted as a number, Gemma 4 runs whole blocks on so many tokens only.
        arguments["logits_to_keep"] = torch.tensor([-1], device=parameter.device)
    with without_cache(model), with_padding_token(model):
        return (through or model)(**arguments)


def _like(parameter: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)


@contextmanager
def with_padding_token(model: nn.Module) -> Iterator[None]:
    """While it lasts, a classifier has a token for padding: decoders look for the last token before it.

    That is the one that ends a text, or a number that no token has, where the config names neither.
    """
    whole: Any = getattr(model, "config", None)
    config = whole.get_text_config() if type(model).__name__.endswith("ForSequenceClassification") else None
    if config is None or getattr(config, "pad_token_id", -1) is not None:
        yield
        return
    ends = getattr(config, "eos_token_id", None)
    end = ends[0] if isinstance(ends, list) else ends
    config.pad_token_id = -1 if end is None else end
    try:
        yield
    finally:
        config.pad_token_id = None


def without_cache(model: nn.Module) -> AbstractContextManager[object]:
    """While it lasts, no part of a model keeps keys and values: not all models take ``use_cache`` as an argument."""
    stack = ExitStack()
    configs: dict[int, Any] = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    for config in configs.values():
        if getattr(config, "use_cache", False):
            config.use_cache = False
            stack.callback(setattr, config, "use_cache", True)
    return stack


def labels_of(model: nn.Module, batch: Batch) -> Tensor | None:
    """The labels of a batch, `IGNORED` where there is none; None if the model has nothing to learn from it.

    Those of the batch, or else, for a causal language model, its ``input_ids`` without padding and placeholders. Nor is
    a text's first token one where padding stands before it, which knows nothing of what comes.
    """
    if "labels" in batch or not is_causal_lm(model) or "input_ids" not in batch:
        return batch.get("labels")
    ids = batch["input_ids"]
    hidden = placeholders(model, ids)
    if batch.get("attention_mask") is not None:
        padding = batch["attention_mask"] == 0
        hidden |= padding
        hidden[:, 1:] |= padding[:, :-1]
    return ids.masked_fill(hidden, IGNORED)


def label_scores(model: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The scores [n, vocabulary] in float32 and the labels [n] of all positions that have one.

    A causal language model scores a label at the position before it. ``logits`` are [..., vocabulary], ``labels``
    [...]; only the scores that count are made float32.
    """
    if is_causal_lm(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    counted = labels != IGNORED
    return logits[counted].float(), labels[counted]


def placeholders(model: nn.Module, ids: Tensor) -> Tensor:
    """True where a token stands for a piece of an image, a video or audio."""
    config = getattr(model, "config", None)
    names = [f"{medium}_token_{end}" for medium in ("image", "video", "audio") for end in ("id", "index")]
    known = {value for name in names if isinstance(value := getattr(config, name, None), int)}
    return torch.isin(ids, torch.tensor(sorted(known), dtype=ids.dtype, device=ids.device))


def token_batches(model: nn.Module, tokens: Tensor, batch_size: int) -> list[Batch]:
    """Batches of windows of tokens [n, seq_len], none of them padding.

    An encoder-decoder model reads a window's first half and learns to write its second.
    """
    if not takes_text_alone(model):
        raise RocketError(
            f"{type(model).__name__} reads no text alone; give it samples of what it takes (a folder of images or "
            "audio, or a .jsonl file that names them)"
        )
    if not is_encoder_decoder(model):
        return [{"input_ids": ids} for ids in tokens.split(batch_size)]
    written = "labels" if learns_to_write(model) else "decoder_input_ids"
    if written != "labels" and "labels" in forward_arguments(model):
        raise RocketError(f"{type(model).__name__} generates no text from text; {GIVE_BATCHES}")
    halves = tokens[:, : tokens.shape[1] // 2 * 2].chunk(2, dim=1)
    read, answer = (half.contiguous().split(batch_size) for half in halves)
    return [{"input_ids": ids, written: labels} for ids, labels in zip(read, answer, strict=True)]


def is_padded(batch: Batch) -> bool:
    """Whether some text of a batch is shorter than its longest."""
    mask = batch.get("attention_mask")
    return mask is not None and mask.ndim == 2 and not bool(mask.all())


def without_padding(model: nn.Module, batch: Batch) -> list[Batch]:
    """The texts of a padded batch one by one, each as long as it is; the batch itself where it cannot be parted.

    It can if each tensor is [batch, seq_len, ...], [n, batch, seq_len] or [1, seq_len] (positions), or [batch, ...],
    and there are not two sides of texts, an encoder's and a decoder's.
    """
    if not is_padded(batch) or is_encoder_decoder(model):
        return [batch]
    mask = batch["attention_mask"]
    texts = [_text(batch, mask.shape, number, row.nonzero()[:, 0]) for number, row in enumerate(mask) if row.any()]
    return [batch] if None in texts else [text for text in texts if text is not None]


def _text(batch: Batch, shape: torch.Size, number: int, places: Tensor) -> Batch | None:
    parts: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            parts[name] = value
        elif value.shape[:2] == shape:
            parts[name] = value[number : number + 1, places]
        elif value.shape[1:] == shape:
            parts[name] = value[:, number : number + 1, places]
        elif value.shape == (1, shape[1]):
            parts[name] = value[:, places]
        elif value.shape[:1] == shape[:1]:
            parts[name] = value[number : number + 1]
        else:
            return None
    return parts


def first_batches(batches: Sequence[Batch], samples: int | None) -> list[Batch]:
    """The first of some batches that hold at least so many samples together; None: all."""
    chosen: list[Batch] = []
    held = 0
    for batch in batches:
        if samples is not None and held >= samples:
            break
        chosen.append(batch)
        # Vision-language models may stack the pieces of all images in pixel_values: ids tell the samples.
        tensors = (value for value in batch.values() if isinstance(value, Tensor))
        held += len(batch["input_ids"] if "input_ids" in batch else next(tensors))
    return chosen
