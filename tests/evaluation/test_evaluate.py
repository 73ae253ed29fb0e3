"""What is read of a source for evaluation: no more than is measured."""

import importlib
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rocket.config.errors import RocketError
from rocket.config.schema import EvaluationConfig
from rocket.data import sources
from rocket.data.samples import Sample, SampleCorpus
from rocket.data.splits import Corpus
from rocket.evaluation import evaluate
from rocket.evaluation.evaluate import _measure
from rocket.evaluation.metrics import Subject, _accuracy


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


def test_what_has_nothing_to_predict_is_not_perfect(model, tokenizer):
    """All texts of a source empty, say: a perplexity of 1 would be the best there is."""
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.full((2, 8), -100)}
    subject = Subject(model, tokenizer, (), [batch], 2)
    with pytest.raises(RocketError, match="photos: there is nothing in it that the model could predict"):
        _measure({"photos": subject}, None)


def test_interval_of_an_accuracy():
    """Wilson's interval, in per cent: of 6 right of 6 and of 3 of 12, by its formula."""

    class Classifier(nn.Linear):
        def forward(self, pixel_values, labels=None):
            return SimpleNamespace(logits=pixel_values)

    for right, count, low, high in ((6, 6, 60.97, 100.0), (3, 12, 8.89, 53.23)):
        logits = torch.eye(2)[[0] * right + [1] * (count - right)]
        subject = Subject(Classifier(1, 1), None, [Sample(label=0)] * count, [{"pixel_values": logits}], 1)
        (score,) = _accuracy(subject).scores
        assert (score.low, score.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
