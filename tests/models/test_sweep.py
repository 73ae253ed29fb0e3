"""All batches in step, block by block: as if each had gone through the model alone."""

from functools import partial

import pytest
import torch

from rocket.models import find_blocks, run_forward, sweep
from rocket.models.sweep import run_calls


def test_every_batch_reaches_a_block_before_any_passes_it(make_model, token_ids):
    model = make_model("llama")
    visits = []

    def visit(block, calls):
        visits.append((block, [call.task for call in calls]))
        yield from run_calls(block, calls)

    batches = [{"input_ids": ids} for ids in token_ids.split(6)]
    with torch.no_grad():
        results = sweep(model, [partial(run_forward, model, batch) for batch in batches], visit)
        assert visits == [("model.layers.0", [0, 1, 2]), ("model.layers.1", [0, 1, 2])]
        for result, batch in zip(results, batches, strict=True):
            assert torch.equal(result.logits, model(**batch).logits)


def test_what_a_visit_returns_is_what_the_model_goes_on_with(make_model, token_ids):
    model = make_model("llama")

    def skip_the_second(block, calls):
        for call in calls:
            yield call.args[0] if block == "model.layers.1" else call.run()

    with torch.no_grad():
        (result,) = sweep(model, [partial(run_forward, model, {"input_ids": token_ids})], skip_the_second)
        model.model.layers = model.model.layers[:1]
        assert torch.equal(result.logits, model(input_ids=token_ids).logits)


def test_batches_that_take_other_ways_do_not_wait_for_each_other(make_model, token_ids):
    model = make_model("llama")
    first, second = find_blocks(model).values()
    hidden = torch.randn(1, 4, 32)
    position = torch.arange(4)[None]
    embeddings = model.model.rotary_emb(hidden, position)

    def one_way():
        return second(first(hidden, position_embeddings=embeddings), position_embeddings=embeddings)

    def other_way():
        return first(second(hidden, position_embeddings=embeddings), position_embeddings=embeddings)

    with torch.no_grad():
        results = sweep(model, [one_way, other_way, lambda: "without blocks"])
        assert torch.equal(results[0], one_way())
        assert torch.equal(results[1], other_way())
    assert results[2] == "without blocks"


def test_gradient_modes_do_not_leak_between_batches(make_model, token_ids):
    model = make_model("llama")
    modes = []

    def frozen():
        with torch.no_grad():
            model(input_ids=token_ids[:1])
            modes.append(torch.is_grad_enabled())

    def learning():
        model(input_ids=token_ids[:1])
        modes.append(torch.is_grad_enabled())

    with torch.enable_grad():
        sweep(model, [frozen, learning, frozen])
        assert torch.is_grad_enabled()
    assert modes == [False, True, False]


def test_a_failure_ends_all_and_leaves_the_model_as_it_was(make_model, token_ids):
    model = make_model("llama")
    wrong = torch.full((1, 4), 100_000)
    with pytest.raises(IndexError), torch.no_grad():
        sweep(model, [partial(model, input_ids=ids) for ids in (token_ids[:1], wrong)])
    assert not any("forward" in vars(block) for block in find_blocks(model).values())
    assert model.config.use_cache
    with torch.no_grad():
        assert model(input_ids=token_ids[:1]).logits.shape == (1, 32, 257)
