"""Healing of a tiny model from checkpoint to checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rocket
from rocket.config.errors import RocketError
from rocket.config.schema import HealingConfig, ModelConfig
from rocket.data import Sample
from rocket.healing import distillation, heal
from rocket.healing.trainer import Pace, last_checkpoint
from rocket.models import run_forward

STEPS = 12
QUICK = {"seq_len": 32, "batch_size": 4, "tokens": STEPS * 4 * 32, "learning_rate": 3e-3, "save_steps": 5}


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture
def healed(pair, tmp_path):
    """Heals the pair with changed settings; the directory and what it took."""

    def run(name: str = "healed", scratch: str | None = None, processes: int | None = None, **changes: object):
        settings, output = HealingConfig(**{**QUICK, **changes}), tmp_path / name
        output.mkdir(exist_ok=True)
        work = tmp_path / (scratch or f"{name}-work")
        return output, heal(pair.compressed, pair.original, settings, pair.windows, work, output, processes)

    return run


def divergence(pair, checkpoint) -> float:
    original = AutoModelForCausalLM.from_pretrained(pair.original.path)
    model, batch = AutoModelForCausalLM.from_pretrained(checkpoint), {"input_ids": pair.windows}
    with torch.no_grad():
        return float(distillation(model, run_forward(model, batch), run_forward(original, batch), batch, 1.0))


@pytest.mark.parametrize("train", ["values", "dictionary", "lora"])
def test_distillation_comes_closer_to_the_original(pair, healed, train):
    output, took = healed(train=train)
    assert divergence(pair, output) < 0.9 * divergence(pair, pair.compressed)
    assert (took.steps, took.tokens) == (STEPS, STEPS * 4 * 32)

    before, after = tensors_of(pair.compressed), tensors_of(output)
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    dictionaries = {name for name in before if name.endswith(".dictionary")}
    compressed = {name for name in before if f"{name.rpartition('.')[0]}.mask" in before or name in dictionaries}
    weights = {name for name in before if "_proj." in name and name.endswith(".weight")}
    expected = {"values": weights | dictionaries, "dictionary": dictionaries, "lora": weights}[train]
    assert changed == expected
    assert not any(name.endswith(".mask") for name in changed)
    assert compressed
    if train != "lora":
        assert took.parameters == sum(after[name].numel() for name in expected)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_nothing_but_values_changes(pair, healed, gradient_checkpointing):
    output, _ = healed(tokens=4 * 32, gradient_checkpointing=gradient_checkpointing)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((output / name).read_text()) == json.loads((pair.compressed / name).read_text())


def test_language_modelling_lowers_the_loss(pair, healed):
    output, _ = healed(objective="language_modelling")
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path)(input_ids=pair.windows, labels=pair.windows).loss
            for path in (pair.compressed, output)
        )
    assert after < before - 0.1


@pytest.mark.parametrize("train", ["values", "lora"])
def test_a_killed_run_ends_like_an_undisturbed_one(healed, monkeypatch, train, tmp_path):
    undisturbed, took = healed("undisturbed", train=train)

    def killed(self, args, state, control, **_):
        if state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pace, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            healed("resumed", train=train)
    assert last_checkpoint(tmp_path / "resumed-work").endswith("checkpoint-5")
    (tmp_path / "resumed-work" / "checkpoint-6").mkdir()  # as if killed while writing it
    resumed, again = healed("resumed", train=train)
    assert again.steps == took.steps
    assert again.loss == pytest.approx(took.loss)
    before, after = tensors_of(undisturbed), tensors_of(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_accumulated_batches_are_one_large_batch(healed):
    whole, _ = healed("whole")
    parts, _ = healed("parts", batch_size=2, gradient_accumulation=2)
    checkpointed, _ = healed("checkpointed", gradient_checkpointing=True)
    for other in (parts, checkpointed):
        for name, tensor in tensors_of(whole).items():
            torch.testing.assert_close(tensors_of(other)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_share_a_batch(healed):
    whole, took = healed("whole")
    shared, again = healed("shared", batch_size=2, processes=2)
    assert (again.steps, again.tokens) == (took.steps, took.tokens)
    assert again.loss == pytest.approx(took.loss, rel=1e-3)
    for name, tensor in tensors_of(whole).items():
        torch.testing.assert_close(tensors_of(shared)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_heal_experts_that_get_no_token(make_model, token_ids, quick_settings, byte_tokenizer, tmp_path):
    calib, profiling = quick_settings
    model = make_model("qwen3_moe", num_experts=16)
    compressed = rocket.compress(
        model, rocket.plan(model, token_ids, calib=calib, profiling=profiling).at(removed_ratio=0.3)
    )
    for name, saved in (("original", model), ("compressed", compressed)):
        saved.save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "healed").mkdir()
    settings = HealingConfig(seq_len=8, batch_size=1, tokens=3 * 2 * 8, gradient_checkpointing=True)
    config = ModelConfig(path=str(tmp_path / "original"), dtype="float32", device="cpu")
    places = tmp_path / "work", tmp_path / "healed"
    assert heal(tmp_path / "compressed", config, settings, token_ids[:, :8], *places, processes=2).steps == 3


@pytest.mark.slow
def test_a_mistake_is_told_from_whichever_process_it_is_found_in(healed):
    with pytest.raises(RocketError, match=r"^healing diverged: .*; lower healing.learning_rate$"):
        healed(learning_rate=1e30, processes=2)


def test_time_runs_out(healed, tmp_path):
    _, took = healed(tokens=None, minutes=1e-6)
    assert took.steps == 1
    assert took.seconds > 0


def test_no_step_is_wasted(healed, monkeypatch):
    rates = []
    monkeypatch.setattr(
        Pace, "on_step_begin", lambda self, *_, optimizer, **__: rates.append(optimizer.param_groups[0]["lr"])
    )
    healed(warmup=0.5, tokens=4 * 4 * 32)
    assert rates == pytest.approx([QUICK["learning_rate"] * share for share in (0.25, 0.75, 0.75, 0.25)])


def test_time_of_earlier_attempts_counts():
    pace = Pace(limit=100.0, max_steps=10)
    before = {"args": {}, "attributes": {"seconds": 60.0, "loss_sum": 2.0}}
    state = type("State", (), {"stateful_callbacks": {"Pace": before}})
    pace.on_train_begin(None, state, None)
    pace.on_optimizer_step(None, state, None)
    assert 0.6 < pace.share(1) < 0.7
    assert pace.share(8) == 0.8
    assert 60 < pace.state()["attributes"]["seconds"] < 70


def test_bfloat16_values_move_by_less_than_their_precision(make_pair, tmp_path):
    """Steps of 1e-5 of a value: in bfloat16 it would never move, in float32 many of them add up."""
    pair = make_pair("bfloat16")
    settings = HealingConfig(**{**QUICK, "learning_rate": 2e-4, "tokens": 60 * 4 * 32})
    (tmp_path / "healed").mkdir()
    heal(pair.compressed, pair.original, settings, pair.windows, tmp_path / "work", tmp_path / "healed")
    before, after = tensors_of(pair.compressed), tensors_of(tmp_path / "healed")
    name = "model.layers.1.mlp.up_proj.weight"
    assert after[name].dtype == torch.bfloat16
    assert float((before[name].bfloat16() != after[name]).float().mean()) > 0.5


def test_settings_that_cannot_be(pair, tmp_path):
    def attempt(model: ModelConfig, examples=pair.windows, **changes: object) -> None:
        heal(pair.compressed, model, HealingConfig(**{**QUICK, **changes}), examples, tmp_path, tmp_path)

    half = pair.original.model_copy(update={"dtype": "float16"})
    with pytest.raises(RocketError, match=r"float16 needs a CUDA device; use model.dtype=bfloat16 or float32"):
        attempt(half)
    with pytest.raises(RocketError, match=r"healing.tokens counts tokens of text"):
        attempt(pair.original, [Sample(text="a")])
    with pytest.raises(RocketError, match=r"the loss is no number any more; lower healing.learning_rate"):
        attempt(pair.original, learning_rate=1e30)
