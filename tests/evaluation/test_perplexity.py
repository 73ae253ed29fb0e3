import copy
import math
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rocket.config.errors import RocketError
from rocket.evaluation import perplexity as measure
from rocket.evaluation.perplexity import _window_losses


def test_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(model, tokenizer):
    model.lm_head.weight.data.zero_()
    result = measure(model, tokenizer, ["some text", "and more of it"], seq_len=8)
    assert result.value == pytest.approx(257)
    assert result.loss == pytest.approx(math.log(257))


def test_windows_do_not_overlap_and_see_only_themselves(model, tokenizer):
    documents = ["ab", "cdefg", "hijklmn"]
    result = measure(model, tokenizer, documents, seq_len=5, batch_size=2)

    ids = tokenizer("ab\n\ncdefg\n\nhijklmn", return_tensors="pt").input_ids[0]
    assert len(ids) == 18
    expected = []
    for start in (0, 5, 10):
        window = ids[start : start + 5]
        log_probabilities = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        expected.append(-sum(log_probabilities[i, window[i + 1]].item() for i in range(4)) / 4)
    assert result.window_losses == pytest.approx(expected, rel=1e-5)
    assert result.tokens == 3 * 4
    assert result.seq_len == 5
    assert result.loss == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert result.value == pytest.approx(math.exp(result.loss))


def test_each_window_starts_with_the_token_that_begins_a_text(model, tokenizer):
    beginning = copy.deepcopy(tokenizer)
    beginning.add_special_tokens({"bos_token": "<eos>"})
    beginning.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    seen = []
    model.register_forward_hook(lambda _, __, kwargs, ___: seen.extend(kwargs["input_ids"]), with_kwargs=True)
    result = measure(model, beginning, ["abcdefghijk"], seq_len=5, batch_size=1)
    ids = tokenizer("abcdefgh")["input_ids"]
    assert [window.tolist() for window in seen] == [[0, *ids[:4]], [0, *ids[4:]]]
    assert result.tokens == 8


def test_slicing_the_logits_changes_nothing():
    logits, ids = torch.randn(2, 7, 11, dtype=torch.bfloat16), torch.randint(11, (2, 7))
    whole = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    sliced = _window_losses(logits, ids, chunk_values=25)
    torch.testing.assert_close(sliced, whole.mean(1).double(), rtol=1e-6, atol=1e-6)


def test_max_tokens_and_training_mode(model, tokenizer):
    model.train()
    assert measure(model, tokenizer, ["x" * 100], seq_len=8, max_tokens=20).tokens == 2 * 7
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_max_tokens_spreads_windows_over_the_text(model, tokenizer):
    text = "".join(letter * 8 for letter in "abcdefghijkl")
    whole = measure(model, tokenizer, [text], seq_len=8).window_losses
    assert measure(model, tokenizer, [text], seq_len=8, max_tokens=24).window_losses == pytest.approx(whole[2::4])


def test_text_shorter_than_a_window(model, tokenizer):
    with pytest.raises(RocketError, match=r"5 tokens.*seq_len 8.*max_tokens"):
        measure(model, tokenizer, ["short"], seq_len=8)
    with pytest.raises(RocketError, match="0 tokens"):
        measure(model, tokenizer, [], seq_len=8)


@pytest.mark.parametrize(("arguments", "message"), [({"seq_len": 1}, "at least 2"), ({"batch_size": 0}, "at least 1")])
def test_bad_arguments(model, tokenizer, arguments, message):
    with pytest.raises(RocketError, match=message):
        measure(model, tokenizer, ["text"], **arguments)


def test_window_longer_than_the_models_positions(model, tokenizer):
    with pytest.raises(RocketError, match=r"5000 exceeds the model's 4096"):
        measure(model, tokenizer, ["text"], seq_len=5000)


def test_no_more_text_is_tokenised_than_windows_may_take(model, tokenizer, monkeypatch):
    """The same as of every fourth document, which is what fits."""
    documents = [f"this is sentence number {number} of a long text" for number in range(64)]
    expected = measure(model, tokenizer, documents[::4], seq_len=16, max_tokens=64)
    module = sys.modules["rocket.evaluation.perplexity"]  # the package has a function of that name
    monkeypatch.setattr(module, "_FEWEST_CHARACTERS", len("".join(documents)) // 3)
    monkeypatch.setattr(module, "_CHARACTERS_A_TOKEN", 1)
    assert measure(model, tokenizer, documents, seq_len=16, max_tokens=64) == expected
