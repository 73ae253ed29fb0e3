import logging

import pytest
import torch

from rocket.config.errors import RocketError
from rocket.data import pack_tokens, packing

EOS, BOS, W = 1, 2, 3


def words(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


def test_windows_follow_the_documents_in_order(make_tokenizer):
    windows = pack_tokens([words(0, 3), words(3, 4), words(7, 1)], make_tokenizer(), 4, None, seed=0)
    # 3 words, eos, 4 words, eos, 1 word: ten tokens, of which the last two fill no window.
    assert windows.tolist() == [[W, W + 1, W + 2, EOS], [W + 3, W + 4, W + 5, W + 6]]
    assert windows.dtype == torch.int64


def test_tokenizer_without_eos(make_tokenizer):
    windows = pack_tokens([words(0, 2), words(2, 2)], make_tokenizer(eos=False), 4, None, seed=0)
    assert windows.tolist() == [[W, W + 1, W + 2, W + 3]]


def test_every_window_starts_with_the_token_that_the_tokenizer_puts_first(make_tokenizer):
    windows = pack_tokens([words(0, 3), words(3, 2)], make_tokenizer(leading_bos=True), 4, None, seed=0)
    assert windows.tolist() == [[BOS, W, W + 1, W + 2], [BOS, EOS, W + 3, W + 4]]


def test_samples_are_windows_of_the_stream_drawn_once(make_tokenizer):
    document = words(0, 400)
    tokenizer = make_tokenizer()
    everything = {tuple(window) for window in pack_tokens([document], tokenizer, 8, None, seed=0).tolist()}
    drawn = [tuple(window) for window in pack_tokens([document], tokenizer, 8, 20, seed=0).tolist()]
    assert len(set(drawn)) == 20
    assert set(drawn) < everything


def test_same_seed_same_samples(make_tokenizer):
    documents, tokenizer = [words(i, 9) for i in range(100)], make_tokenizer()
    first, again, other = (pack_tokens(documents, tokenizer, 8, 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_state_is_left_alone(make_tokenizer):
    state = torch.get_rng_state()
    pack_tokens([words(0, 400)], make_tokenizer(), 8, 4, seed=5)
    assert torch.equal(state, torch.get_rng_state())


def test_only_as_many_documents_are_tokenised_as_the_samples_need(make_tokenizer):
    tokenizer, tokenised = make_tokenizer(), []

    def counting(text: str, **options):
        tokenised.append(text)
        return tokenizer(text, **options)

    for name in ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"):
        setattr(counting, name, getattr(tokenizer, name))
    assert pack_tokens([words(0, 32)] * 1000, counting, 8, 2, seed=0).shape == (2, 8)
    # 2 samples of 8 tokens, sixteen times over: 256 tokens, eight documents; and one look for a leading token.
    assert packing.OVERSAMPLING == 16
    assert len(tokenised) == 8 + 1


def test_long_documents_raise_no_tokenizer_warning(make_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        pack_tokens([words(0, 100)], make_tokenizer(), 8, None, seed=0)
    assert not caplog.records


def test_fewer_windows_than_asked_warns_and_uses_all(make_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        assert pack_tokens([words(0, 24)], make_tokenizer(), 8, 256, seed=0).shape == (3, 8)
    assert "3 sequences" in caplog.text
    assert "256" in caplog.text


@pytest.mark.parametrize(("documents", "tokens"), [([words(0, 5), words(0, 5)], 11), ([], 0)])
def test_not_even_one_sequence(make_tokenizer, documents, tokens):
    match = rf"text has {tokens} tokens, shorter than one sequence of seq_len=512"
    with pytest.raises(RocketError, match=match):
        pack_tokens(documents, make_tokenizer(), 512, 4, seed=0)


@pytest.mark.parametrize(("seq_len", "num_samples", "match"), [(1, 4, "seq_len=1: "), (8, 0, "num_samples=0: ")])
def test_sizes_that_make_no_sense(make_tokenizer, seq_len, num_samples, match):
    with pytest.raises(RocketError, match=match):
        pack_tokens([words(0, 50)], make_tokenizer(), seq_len, num_samples, seed=0)


def test_spare_windows_come_behind_the_same_samples(make_tokenizer):
    arguments = ([words(0, 400), words(1, 400)], make_tokenizer(), 8, 4)
    samples, both = pack_tokens(*arguments, seed=5), pack_tokens(*arguments, seed=5, spare=6)
    assert both.shape == (10, 8)
    assert torch.equal(both[:4], samples)
    assert len({tuple(window) for window in both.tolist()}) == 10
