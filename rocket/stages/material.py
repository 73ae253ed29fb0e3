"""What a run calibrates and heals on, as its model takes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from rocket.config import RocketError
from rocket.config.schema import HealingConfig
from rocket.data import (
    Sample,
    check_documents,
    check_samples,
    holds_samples,
    load_documents,
    load_samples,
    pack_tokens,
)
from rocket.evaluation import check_tasks, check_tokenizer
from rocket.models import (
    Batch,
    is_causal_lm,
    most_positions,
    sample_batches,
    takes_media,
    takes_text_alone,
    token_batches,
)
from rocket.models.processor import tokenizer_of
from rocket.session import Session

HUB_DOCUMENTS_A_SAMPLE = 16
FEWEST_TOKENS_A_DOCUMENT = 256

logger = logging.getLogger(__name__)


def check_sources(session: Session) -> None:
    """Whether the model takes what the config gives it: said before any work, not after."""
    calib, evaluation = session.config.calib, session.config.evaluation
    model = session.model
    name = type(model).__name__
    if not reads_samples(session, calib.source) and not takes_text_alone(model):
        raise RocketError(f"calib.source={calib.source!r}: {name} reads no text alone; name images or speech")
    if evaluation.texts and not takes_text_alone(model):
        raise RocketError(f"evaluation.texts={evaluation.texts}: {name} reads no text alone; write [] and name samples")
    if evaluation.samples and not takes_media(model):
        raise RocketError(f"evaluation.samples={evaluation.samples}: {name} takes neither images nor speech; write []")
    if evaluation.tasks and not is_causal_lm(model):
        raise RocketError(f"evaluation.tasks={evaluation.tasks}: {name} is no text decoder; write []")
    check_tasks(evaluation.tasks)
    if evaluation.tasks:
        check_tokenizer(tokenizer_of(session.loaded[1]))
    _check_splits(session)
    lengths = {"evaluation.seq_len": evaluation.seq_len} if evaluation.texts else {}
    if not reads_samples(session, calib.source):
        lengths = {"calib.seq_len": calib.seq_len, **lengths}
    healing = session.config.healing
    if healing is not None and not reads_samples(session, healing.source):
        lengths["healing.seq_len"] = healing.seq_len
    for key, length in lengths.items():
        _check_length(model, key, length)


def _check_splits(session: Session) -> None:
    """Whether each source holds something of the split that it is going to be read for."""
    config = session.config
    for key, section in {"calib.source": config.calib, "healing.source": config.healing}.items():
        if section is not None:
            with _named(key):
                if reads_samples(session, section.source):
                    check_samples(section.source, "calibration")
                else:
                    check_documents(section.source, "calibration", section.text_field)
    for source in config.evaluation.texts:
        with _named("evaluation.texts"):
            check_documents(source, "held_out", config.evaluation.text_field)
    for source in config.evaluation.samples:
        with _named("evaluation.samples"):
            check_samples(source, "held_out")


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Errors say which key of the config they are of: it may be one that has its default."""
    try:
        yield
    except RocketError as error:
        raise RocketError(f"{key}: {error}") from None


def _check_length(model: PreTrainedModel, key: str, length: int) -> None:
    positions = most_positions(model)
    if positions is not None and length > positions:
        raise RocketError(f"{key}={length} exceeds the model's {positions} positions; lower it")


def reads_samples(session: Session, source: str) -> bool:
    """Whether the model reads images or speech of a source, rather than text."""
    return takes_media(session.model) and holds_samples(source)


def calibration_batches(session: Session) -> Callable[[int | None, int], Sequence[Batch]]:
    """(the first so many samples, how many a batch) -> batches."""
    model, processor = session.loaded
    config = session.config.calib
    if not reads_samples(session, config.source):
        tokens = calibration_tokens(session)
        return lambda count, size: token_batches(model, tokens[:count], size)
    samples = load_samples(config.source, "calibration", config.num_samples, config.seed)
    if len(samples) < config.num_samples:
        logger.warning("%s has only %d samples, not %d: using all", config.source, len(samples), config.num_samples)
    return lambda count, size: sample_batches(model, processor, samples[:count], size)


def calibration_tokens(session: Session, spare: int = 0) -> Tensor:
    config = session.config.calib
    documents = load_documents(
        config.source,
        "calibration",
        text_field=config.text_field,
        stream_limit=max(512, HUB_DOCUMENTS_A_SAMPLE * config.num_samples),
    )
    tokenizer = tokenizer_of(session.loaded[1])
    return pack_tokens(documents, tokenizer, config.seq_len, config.num_samples, config.seed, spare=spare)


def healing_examples(session: Session, config: HealingConfig) -> Tensor | Sequence[Sample]:
    """Windows of tokens [n, seq_len], or samples, of the calibration part of healing's source."""
    model, processor = session.loaded
    if reads_samples(session, config.source):
        return load_samples(config.source, "calibration")
    _check_length(model, "healing.seq_len", config.seq_len)
    limit = None if config.tokens is None else max(512, config.tokens // FEWEST_TOKENS_A_DOCUMENT)
    documents = load_documents(config.source, "calibration", text_field=config.text_field, stream_limit=limit)
    return pack_tokens(documents, tokenizer_of(processor), config.seq_len, None, config.seed)
