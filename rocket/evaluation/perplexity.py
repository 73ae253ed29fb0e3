"""Perplexity of a causal language model on held-out text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rocket.config.errors import RocketError
from rocket.data import cut_windows, leading_token
from rocket.models import evaluation_mode, is_streamed, most_positions, run_forward, sweep
from rocket.usage import track

# Logit entries upcast to fp32 at once: 64 MiB.
_CHUNK_VALUES = 1 << 24
_FEWEST_CHARACTERS, _CHARACTERS_A_TOKEN = 1 << 24, 64


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measured.

    value: exp(loss). loss: mean nats per predicted token. tokens: predicted tokens, (seq_len - 1) a window.
    window_losses: mean nats per token of each window, in text order, so that two models can be compared pairwise.
    """

    value: float
    loss: float
    tokens: int
    seq_len: int
    window_losses: tuple[float, ...]


def perplexity(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    seq_len: int = 1024,
    batch_size: int = 4,
    max_tokens: int | None = None,
) -> Perplexity:
    """Perplexity by the convention of GPTQ, SparseGPT and SVD-LLM, but for the token that begins a text.

    The documents are joined by a blank line and tokenised once, the tokens are cut into non-overlapping windows of
    `seq_len`, the rest is dropped, and each window is predicted from its own context only: its first token is context,
    the other seq_len - 1 count. Every predicted token weighs the same. If the tokenizer puts a token before each text
    (Llama, Gemma), each window starts with it, as in calibration (`rocket.data.pack_tokens`); the convention has it in
    the first window alone, where Gemma, for one, is of no use in the others. Values depend on `seq_len` and on the
    tokenizer's vocabulary; compare only what shares both.

    model: a causal language model whose output has `logits` [batch, seq_len, vocabulary]; it stays on its device and
    its training mode is restored. max_tokens: use only as many windows as fit into it, spread evenly over the whole
    text, so that a short measurement does not hang on the first documents; of a text many times as long over every
    second document, or every fourth, and so on.

    Cost: one forward pass over the windows that are used; the loss is taken in fp32 from slices of the logits, so
    memory is the logits of one batch in the model's own dtype plus about 128 MiB, and while text is tokenised some
    hundred bytes for each byte of it.

    Raises RocketError if the text is shorter than one window, or a window longer than the model's positions.

    Source: Frantar et al. 2022 (arXiv 2210.17323), evaluation code.
    """
    _check(model, seq_len, batch_size)
    # verbose: the whole text is longer than the model's context by intention
    text = "\n\n".join(documents if max_tokens is None else _enough(documents, max_tokens))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = cut_windows(torch.tensor(ids, dtype=torch.int64), seq_len, leading_token(tokenizer))
    count = len(windows) if max_tokens is None else min(len(windows), max_tokens // seq_len)
    if not count:
        usable = len(ids) if max_tokens is None else min(len(ids), max_tokens)
        raise RocketError(
            f"the evaluation text has {usable} tokens, fewer than one window of seq_len {seq_len}; "
            "give more text, raise max_tokens or lower seq_len"
        )
    windows = spread_windows(windows, count)

    window_losses = window_losses_of(model, track(windows.split(batch_size), "perplexity"))
    loss = window_losses.mean().item()
    value = math.inf if loss > 700 else math.exp(loss)
    return Perplexity(value, loss, len(windows) * (seq_len - 1), seq_len, tuple(window_losses.tolist()))


def _enough(documents: Sequence[str], tokens: int) -> Sequence[str]:
    """As many of the documents, at even distances, as a few times so many tokens may take, whatever tokens are."""
    most = max(_FEWEST_CHARACTERS, _CHARACTERS_A_TOKEN * tokens)
    while len(documents) > 1 and sum(map(len, documents)) > most:
        documents = documents[::2]
    return documents


def window_losses_of(model: Any, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean nats per predicted token of each window, fp64 [windows], for batches of token ids [batch, seq_len]."""

    def losses_of(batch: torch.Tensor) -> torch.Tensor:
        logits = run_forward(model, {"input_ids": batch}).logits
        return _window_losses(logits, batch.to(logits.device)).cpu()

    with evaluating(model):
        if is_streamed(model):
            return torch.cat(sweep(model, [partial(losses_of, batch) for batch in batches]))
        return torch.cat([losses_of(batch) for batch in batches])


def spread_windows(windows: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` of the windows [n, seq_len] at even distances, the middle one of each stretch."""
    stretch = len(windows) / count
    return windows[[int((index + 0.5) * stretch) for index in range(count)]]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without autograd; the model's training mode is restored afterwards."""
    with evaluation_mode(model), torch.inference_mode():
        yield


def _window_losses(logits: torch.Tensor, ids: torch.Tensor, chunk_values: int = _CHUNK_VALUES) -> torch.Tensor:
    """Mean nats per predicted token of each window, fp64 [batch], from logits [batch, seq, vocabulary]."""
    rows = max(1, chunk_values // logits.shape[-1])
    return torch.stack(
        [
            sum(
                (
                    F.cross_entropy(scores.float(), targets, reduction="none").double().sum()
                    for scores, targets in zip(window[:-1].split(rows), target[1:].split(rows), strict=True)
                ),
                start=torch.zeros((), dtype=torch.float64, device=logits.device),
            )
            for window, target in zip(logits, ids, strict=True)
        ]
    ) / (ids.shape[1] - 1)


def _check(model: Any, seq_len: int, batch_size: int) -> None:
    if seq_len < 2:
        raise RocketError(f"seq_len {seq_len}: a window needs at least 2 tokens, one of context and one to predict")
    if batch_size < 1:
        raise RocketError(f"batch_size {batch_size}: must be at least 1")
    positions = most_positions(model)
    if positions is not None and seq_len > positions:
        raise RocketError(f"seq_len {seq_len} exceeds the model's {positions} positions; lower seq_len")
