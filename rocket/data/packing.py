"""From documents to equally long token sequences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rocket.config.errors import RocketError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Tokenise this many times the tokens that the samples need: many documents to draw from, few for a large source.
OVERSAMPLING = 16


def pack_tokens(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    num_samples: int | None,
    seed: int,
    spare: int = 0,
) -> torch.Tensor:
    """Join documents into one stream of tokens and cut it into sequences that do not overlap.

    Documents are parted by the tokenizer's end-of-sequence token, or its separator, if it has one. If the tokenizer
    puts a beginning-of-sequence token (Llama, Gemma) or a class token (BERT) before each text, each sequence starts
    with it and has room for `seq_len - 1` tokens of text: such models are badly off without it.

    With `num_samples`, documents are shuffled, tokenised until there are sixteen times the tokens asked for (one
    document at a time, so a source of any size costs the same), and the samples drawn from those sequences without
    replacement.
    With None, all documents are used, in order. The same arguments always give the same result.

    Args:
        documents: Texts, as `load_documents` reads them.
        tokenizer: A transformers tokenizer.
        seq_len: Tokens in a sequence, at least 2.
        num_samples: Sequences wanted; None for all. If the text has fewer, all are used and a warning says so.
        seed: Of the shuffle and the draw.
        spare: Further sequences to return behind the samples, as many as there are; the samples do not depend on it.

    Returns:
        Token ids, int64 [num_samples + spare, seq_len]; without padding.

    Raises:
        RocketError: The text does not fill one sequence, or a size is out of range.
    """
    if seq_len < 2:
        raise RocketError(f"seq_len={seq_len}: a sequence needs at least 2 tokens")
    if num_samples is not None and num_samples < 1:
        raise RocketError(f"num_samples={num_samples}: must be at least 1")
    start = leading_token(tokenizer)
    stride = seq_len - len(start)
    generator = torch.Generator().manual_seed(seed)
    if num_samples is None:
        stream = _tokenise(documents, tokenizer, None)
    else:
        order = torch.randperm(len(documents), generator=generator, device="cpu").tolist()
        stream = _tokenise([documents[i] for i in order], tokenizer, OVERSAMPLING * num_samples * stride)
    windows = cut_windows(stream, seq_len, start)
    count = len(windows)
    if count == 0:
        raise RocketError(
            f"the text has {len(stream)} tokens, shorter than one sequence of seq_len={seq_len}: "
            "add documents or lower seq_len"
        )
    if num_samples is None:
        return windows
    if count < num_samples:
        logger.warning("the text makes only %d sequences of %d tokens, not %d: using all", count, seq_len, num_samples)
    return windows[torch.randperm(count, generator=generator, device="cpu")[: num_samples + spare]]


def _tokenise(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, enough: int | None) -> torch.Tensor:
    """Tokens of the documents [n], stopping after the document with which n reaches `enough`."""
    between = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None][:1]
    pieces: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64)]
    length = 0
    for text in documents:
        # verbose=False: a document longer than the model's context is no mistake here, it will be cut.
        tokens = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        pieces.append(torch.tensor([*between, *tokens] if length else tokens, dtype=torch.int64))
        length += len(pieces[-1])
        if enough is not None and length >= enough:
            break
    return torch.cat(pieces)


def cut_windows(tokens: torch.Tensor, seq_len: int, start: Sequence[int]) -> torch.Tensor:
    """Windows [n, seq_len] of tokens [m] that do not overlap, each beginning with ``start``; the rest is dropped.

    >>> cut_windows(torch.arange(5), 3, [9]).tolist()
    [[9, 0, 1], [9, 2, 3]]
    """
    stride = seq_len - len(start)
    count = len(tokens) // stride
    beginnings = torch.tensor(start, dtype=torch.int64).expand(count, -1)
    return torch.cat([beginnings, tokens[: count * stride].view(count, stride)], dim=1)


def leading_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence or class token, if the tokenizer itself puts it before a text; else nothing."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    known = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return [token for token in first if token in known]
