"""What is read of a source for evaluation: no more than is measured."""

import importlib
import itertools
from functools import partial

import pytest

from rocket.config.schema import EvaluationConfig
from rocket.data import sources
from rocket.data.samples import Sample, SampleCorpus
from rocket.data.splits import Corpus
from rocket.evaluation import evaluate


def test_an_endless_stream_is_not_waited_for(model, tokenizer, monkeypatch):
    read = itertools.count()
    texts = (f"text {next(read)} of a stream that has no end" for _ in itertools.count())
    monkeypatch.setitem(sources.SOURCES, "endless", lambda: Corpus({"held_out": texts}, streamed=True))
    settings = EvaluationConfig(texts=["endless"], seq_len=32, max_tokens=64)
    found, _ = evaluate(settings, model, tokenizer)
    assert found.perplexities["endless"] > 1
    assert next(read) <= 513


def test_so_many_samples_are_read(monkeypatch):
    corpus = SampleCorpus({"held_out": [(str(number), partial(Sample, label=number)) for number in range(9)]})
    monkeypatch.setitem(sources.SAMPLE_SOURCES, "embedded:test", lambda: corpus)
    taken = []

    def stop(model, processor, samples, batch_size):
        taken.extend(samples)
        raise InterruptedError

    monkeypatch.setitem(vars(importlib.import_module("rocket.evaluation.evaluate")), "sample_batches", stop)
    with pytest.raises(InterruptedError):
        evaluate(EvaluationConfig(texts=[], samples=["embedded:test"], max_samples=4), None, None)
    assert len(taken) == 4
