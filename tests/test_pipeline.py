"""The whole pipeline on tiny models from a config file: complete, resumable, and never redoing what is there."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rocket import pipeline, session
from rocket import run as run_module
from rocket.compression import merge, stored_values
from rocket.config import RocketError, load_config
from rocket.data.splits import is_held_out
from rocket.healing.trainer import HealingTrainer
from rocket.nn import CompressedLinear
from rocket.pipeline import run_pipeline
from rocket.session import Session
from rocket.stages import compress, evaluate, profile


@pytest.fixture
def write_config(tmp_path, model_dir, text_file):
    """Writes the config of a run that takes a second or two; keywords change its sections."""

    def write(family: str = "llama", **changes: dict) -> Path:
        sections = {
            "model": {"path": str(model_dir(family)), "dtype": "float32", "device": "cpu"},
            "calib": {"source": str(text_file), "num_samples": 8, "seq_len": 32, "sensitivity_samples": 4},
            "profiling": {"removed_ratios": [0.1, 0.3, 0.5, 0.7], "rank_support_ratios": [1.0, 1.5, 2.0, 2.5]},
            "compression": {"removed_ratio": 0.3},
            "evaluation": {"texts": [str(text_file)], "seq_len": 32, "max_tokens": 96},
        }
        for name, fields in changes.items():
            sections[name] = fields if name == "compression" else {**sections.get(name, {}), **fields}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), **sections}))
        return path

    return write


def run(path: Path, *overrides: str, stage=run_pipeline):
    with Session(load_config(path, overrides)) as opened:
        return stage(opened)


def logged(path: Path) -> list[tuple[str, bool]]:
    """(stage, whether it was skipped) of everything in a run's log."""
    log = path.parent / "run" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(line["event"], line.get("skipped", False)) for line in lines]


def artifacts(path: Path) -> dict[str, int]:
    """When each artifact was written; what every run writes anew is left out."""
    root = path.parent / "run"
    always = {"config.yaml", "log.jsonl", "usage.json", "report.html", ".lock"}
    files = (file for file in root.rglob("*") if file.is_file() and file.name not in always)
    return {str(file.relative_to(root)): file.stat().st_mtime_ns for file in files}


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "olmo2", "opt", "gpt2", "mixtral", "gpt_oss"]
)
def test_families(write_config, family):
    path = write_config(family)
    summary = run(path)
    plan = summary.plan

    assert summary.path == path.parent / "run" / "models" / "removed-0.30"
    assert plan.removed_ratio >= 0.3
    assert plan.removed_ratio < 0.35
    assert stored_values(summary.path, plan.choices) == plan.kept_target_parameters
    tensors = load_file(summary.path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.bytes

    model = AutoModelForCausalLM.from_pretrained(summary.path)
    compressed = [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]
    assert sorted(compressed) == sorted(name for name, option in plan.choices.items() if option.form != "dense")
    ids = AutoTokenizer.from_pretrained(summary.path)("the river", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    for evaluation in (summary.original, summary.compressed):
        (perplexity,) = evaluation.perplexities.values()
        assert 1 < perplexity < math.inf
        assert evaluation.accuracies == {}
    assert {"gather activations", "profile layers", "plan", "compress", "evaluate compressed"} <= summary.usages.keys()
    assert load_config(path.parent / "run" / "config.yaml") == load_config(path)


def test_second_run_skips_everything(write_config, monkeypatch):
    path = write_config()
    first = run(path)
    written, lines = artifacts(path), len(logged(path))
    assert not any(skipped for _, skipped in logged(path))

    left_by_a_kill = path.parent / "run" / "layers" / "removed-0.30" / "left.safetensors"
    of_another_size = path.parent / "run" / "layers" / "removed-0.50" / "left.safetensors"
    left_by_a_kill.parent.mkdir(parents=True)
    of_another_size.parent.mkdir()
    of_another_size.write_bytes(b"")
    left_by_a_kill.write_bytes(b"")

    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("the model was loaded again"))
    second = run(path)
    assert not left_by_a_kill.parent.exists()
    assert of_another_size.exists()
    of_another_size.unlink()
    assert dict(logged(path)[lines:]) == {
        "gather activations": True,
        "profile layers": True,
        "plan": True,
        "compress": True,
        "evaluate original": True,
        "evaluate removed-0.30": True,
    }
    assert artifacts(path) == written
    assert (second.plan, second.original, second.compressed) == (first.plan, first.original, first.compressed)


def test_another_size_reuses_the_profiles(write_config):
    path = write_config()
    run(path)
    before, lines = artifacts(path), len(logged(path))
    summary = run(path, "compression.removed_ratio=0.5")
    after = artifacts(path)
    assert {name: after[name] for name in before} == before
    assert {"plans/removed-0.50.json", "evaluation/removed-0.50.json"} <= after.keys() - before.keys()
    assert summary.plan.removed_ratio >= 0.5
    done = {stage for stage, skipped in logged(path)[lines:] if not skipped}
    assert done == {"plan", "load model", "compress", "evaluate compressed"}


@pytest.mark.parametrize(
    ("override", "redone"),
    [
        ("evaluation.max_tokens=64", {"load model", "evaluate original", "evaluate compressed"}),
        ("evaluation.batch_size=1", set()),
        ("allocation.method=uniform", {"plan", "load model", "compress", "evaluate compressed"}),
        ("profiling.cost=activation", {"load model", "profile layers", "plan", "compress", "evaluate compressed"}),
    ],
)
def test_a_change_redoes_what_depends_on_it(write_config, override, redone):
    path = write_config()
    run(path)
    lines = len(logged(path))
    run(path, override)
    assert {stage for stage, skipped in logged(path)[lines:] if not skipped} == redone


def count_profiled(monkeypatch, stop_after: int | None = None) -> list[str]:
    """Records which layers are profiled; interrupts before one more than ``stop_after``."""
    profiled: list[str] = []
    profile_layer = profile.profile_layer

    def counting(layer: str, *arguments):
        if len(profiled) == stop_after:
            raise KeyboardInterrupt
        profiled.append(layer)
        return profile_layer(layer, *arguments)

    monkeypatch.setattr(profile, "profile_layer", counting)
    return profiled


def test_killed_while_profiling(write_config, monkeypatch):
    path = write_config()
    with monkeypatch.context() as patch:
        first = count_profiled(patch, stop_after=5)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    assert len(first) == 5
    with monkeypatch.context() as patch:
        second = count_profiled(patch)
        resumed = run(path)
    assert len(second) == 14 - 5
    assert not set(first) & set(second)

    for name in (first[0], second[0]):
        (path.parent / "run" / "profiles" / f"{name}.json").unlink()
    third = count_profiled(monkeypatch)
    assert run(path).plan == resumed.plan
    assert sorted(third) == sorted([first[0], second[0]])


def test_killed_while_building(write_config, monkeypatch):
    path = write_config()
    built = []
    build = compress.build_tensors

    def counting(*arguments):
        built.append(arguments)
        if len(built) == 4:
            raise KeyboardInterrupt
        return build(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(compress, "build_tensors", counting)
        with pytest.raises(KeyboardInterrupt):
            run(path)
        assert run(path).path.exists()
    plan = run(path).plan
    assert len(built) == 1 + len([option for option in plan.choices.values() if option.form != "dense"])


def test_killed_while_saving(write_config, monkeypatch):
    path = write_config()

    def interrupted(model, tokenizer, directory):
        model.save_pretrained(directory)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compress, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    assert not (path.parent / "run" / "models" / "removed-0.30").exists()
    before = artifacts(path)
    assert run(path).path.exists()
    kept = {name: time for name, time in before.items() if not name.startswith(("models/", "layers/"))}
    assert {name: artifacts(path)[name] for name in kept} == kept
    assert any(name.startswith("layers/") for name in before)  # built layers wait for the checkpoint
    assert not any(name.startswith("layers/") for name in artifacts(path))


def test_model_card_is_completed_by_the_evaluation(write_config, monkeypatch):
    path = write_config()
    card = run(path, stage=pipeline.compress_model) / "README.md"
    assert "Not measured yet" in card.read_text()
    summary = run(path)
    (perplexity,) = summary.compressed.perplexities.values()
    assert f"{perplexity:.2f}" in card.read_text()
    run(path, "evaluation.max_tokens=64", stage=pipeline.evaluate_models)
    assert "max_tokens: 64" in card.read_text()


@pytest.mark.parametrize("moment", ["before the card", "within the card"])
def test_killed_between_the_evaluation_and_the_card(write_config, monkeypatch, moment):
    path = write_config()
    card = run(path, stage=pipeline.compress_model) / "README.md"
    first = card.read_text()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted_at_the_card(temporary, target):
        return interrupted() if target.name == "README.md" else publish(temporary, target)

    publish = run_module._publish
    with monkeypatch.context() as patch:
        if moment == "before the card":
            patch.setattr(evaluate, "model_card", interrupted)
        else:
            patch.setattr(run_module, "_publish", interrupted_at_the_card)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    assert card.read_text() == first
    before = artifacts(path)
    assert any(name == "evaluation/removed-0.30.json" for name in before)
    summary = run(path)
    (perplexity,) = summary.compressed.perplexities.values()
    assert f"{perplexity:.2f}" in card.read_text()
    changed = {name for name, time in artifacts(path).items() if before.get(name) != time}
    assert changed == {"models/removed-0.30/README.md"}
    assert not list(card.parent.glob(".*"))


def test_energy_is_taken_where_wanted_and_redoes_nothing(write_config):
    pytest.importorskip("codecarbon", reason="pip install codecarbon")
    path = write_config()
    assert all(usage.energy_kwh is None for usage in run(path).usages.values())
    before = artifacts(path)
    run(path, "reporting.energy=true", "reporting.country=FRA")
    assert artifacts(path) == before
    usages = run(path, "reporting.energy=true", "reporting.country=FRA", "compression.removed_ratio=0.5").usages
    taken = {stage for stage, usage in usages.items() if usage.energy_kwh is not None}
    assert taken == {"plan", "load model", "compress", "evaluate compressed"}
    assert all(usages[stage].energy_kwh > usages[stage].co2_kg > 0 for stage in taken)


def test_report_shows_all_sizes_of_the_directory(write_config):
    path = write_config()
    assert [size.plan.budget.name for size in run(path).sizes] == ["removed-0.30"]
    summary = run(path, "compression.removed_ratio=0.5", "allocation.method=uniform")
    assert [(size.plan.budget.name, size.chosen_by) for size in summary.sizes] == [
        ("removed-0.30", "knapsack"),
        ("removed-0.50", "uniform"),
    ]
    assert summary.sizes[1].plan == summary.plan
    assert summary.sizes[1].evaluation == summary.compressed
    assert "removed-0.50" in summary.report.read_text()
    summary = run(path, "evaluation.max_tokens=64")  # what was measured otherwise is not comparable
    assert [size.plan.budget.name for size in summary.sizes] == ["removed-0.30"]


@pytest.mark.parametrize(
    "missing",
    ["model.layers.1.mlp.down_proj.safetensors", "sensitivities.safetensors", "sensitivities.json", "index.json"],
)
def test_missing_calibration_is_made_again(write_config, missing):
    path = write_config()
    plan = run(path, stage=pipeline.make_plan)
    (path.parent / "run" / "calibration" / missing).unlink()
    assert run(path, stage=pipeline.make_plan) == plan
    assert (path.parent / "run" / "calibration" / missing).exists()


@pytest.mark.parametrize(
    ("artifact", "stage"),
    [
        ("calibration/index.json", pipeline.gather_activations),
        ("calibration/sensitivities.safetensors", pipeline.gather_activations),
        ("profiles/model.layers.0.mlp.up_proj.json", pipeline.profile_layers),
        ("plans/removed-0.30.json", pipeline.make_plan),
        ("models/removed-0.30/model.safetensors", pipeline.compress_model),
        ("models/removed-0.30/config.json", pipeline.compress_model),
        ("evaluation/original.json", pipeline.evaluate_models),
    ],
)
def test_damage_is_told_and_nothing_else_lost(finished, artifact, stage):
    path = finished / "config.yaml"
    file = finished / "run" / artifact
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    before = artifacts(path)
    try:
        with pytest.raises(RocketError, match=r"truncated or was edited; delete"):
            run(path, stage=stage)
        assert artifacts(path) == before
    finally:
        file.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, furnish) -> Path:
    """A finished run, for tests that put back what they change."""
    root = tmp_path_factory.mktemp("finished")
    furnish(root)
    config = {
        "output_dir": str(root / "run"),
        "model": {"path": str(root / "model"), "dtype": "bfloat16", "device": "cpu"},
        "calib": {"source": str(root / "texts.txt"), "num_samples": 8, "seq_len": 32, "sensitivity_samples": 4},
        "profiling": {"removed_ratios": [0.3, 0.6], "rank_support_ratios": [1.5, 2.0]},
        "compression": {"removed_ratio": 0.3},
        "evaluation": {"texts": [str(root / "texts.txt")], "seq_len": 32, "max_tokens": 64},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    run(root / "config.yaml")
    return root


def test_dense_export(finished):
    path = run(finished / "config.yaml", stage=pipeline.export_dense)
    assert path.name == "removed-0.30-dense"
    dense = AutoModelForCausalLM.from_pretrained(path)
    assert not any(isinstance(module, CompressedLinear) for module in dense.modules())
    lines = len(logged(finished / "config.yaml"))
    assert run(finished / "config.yaml", stage=pipeline.export_dense) == path
    assert all(skipped for _, skipped in logged(finished / "config.yaml")[lines:])


HEALING = {"tokens": 1024, "seq_len": 32, "batch_size": 4, "learning_rate": 3e-3}


def test_healing(write_config, text_file):
    path = write_config(healing={**HEALING, "source": str(text_file)})
    summary = run(path)
    root = path.parent / "run"
    assert summary.path == root / "models" / "removed-0.30-healed"
    assert stored_values(summary.path, summary.plan.choices) == summary.plan.kept_target_parameters
    before, after = (load_file(root / "models" / name / "model.safetensors") for name in ("removed-0.30", summary.path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} <= {"weight", "dictionary"}
    assert {name.rpartition(".")[0] for name in changed} == {
        name for name, option in summary.plan.choices.items() if option.form != "dense"
    }
    (perplexity,) = summary.healed.perplexities.values()
    assert perplexity < next(iter(summary.compressed.perplexities.values()))
    assert not list((root / "healing").iterdir())
    card = (summary.path / "README.md").read_text()
    assert "healed by a short fine-tune" in card
    assert f"{perplexity:.2f}" in card

    lines = len(logged(path))
    assert run(path).healed == summary.healed
    assert dict(logged(path)[lines:])["heal"] is True
    assert all(skipped for _, skipped in logged(path)[lines:])

    lines = len(logged(path))
    run(path, "healing.train=lora")
    assert {stage for stage, skipped in logged(path)[lines:] if not skipped} == {
        "load model",
        "heal",
        "evaluate healed",
    }


def test_the_healed_model_is_exported(write_config, text_file):
    path = write_config(healing={**HEALING, "source": str(text_file)})
    exported = run(path, stage=pipeline.export_dense)
    assert exported.name == "removed-0.30-healed-dense"
    healed = merge(AutoModelForCausalLM.from_pretrained(exported.with_name("removed-0.30-healed")))
    for name, tensor in AutoModelForCausalLM.from_pretrained(exported).state_dict().items():
        assert torch.equal(tensor, healed.state_dict()[name])


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_healing_of_other_families(write_config, text_file, family):
    path = write_config(family, healing={**HEALING, "source": str(text_file)})
    healed = run(path, stage=pipeline.heal_model)
    before, after = (load_file(folder / "model.safetensors") for folder in (healed.with_name("removed-0.30"), healed))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_killed_healing_goes_on(write_config, text_file, monkeypatch):
    path = write_config(healing={**HEALING, "source": str(text_file), "save_steps": 2})
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(HealingTrainer, "training_step", interrupted_after(5, steps))
        with pytest.raises(KeyboardInterrupt):
            run(path, stage=pipeline.heal_model)
    with monkeypatch.context() as patch:
        patch.setattr(HealingTrainer, "training_step", interrupted_after(100, steps))
        assert run(path, stage=pipeline.heal_model).exists()
    assert len(steps) == 5 + 4  # 8 steps, of which 4 were in a checkpoint


def interrupted_after(count: int, steps: list[int]):
    training_step = HealingTrainer.training_step

    def step(self, *arguments):
        if len(steps) == count:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return training_step(self, *arguments)

    return step


def test_healing_that_was_not_asked_for(finished):
    with pytest.raises(RocketError, match=r"no healing section; add one, or say for example --set healing.minutes=20"):
        run(finished / "config.yaml", stage=pipeline.heal_model)


@pytest.mark.parametrize("method", ["knapsack", "uniform"])
def test_the_papers_method(write_config, method):
    path = write_config(
        calib={"sensitivity_samples": 0},
        profiling={"forms": ["dictionary"], "cost": "weight", "thresholds": "column", "refits": 0},
        allocation={"method": method, "error_cap": method == "knapsack"},
    )
    summary = run(path)
    assert set(summary.plan.forms()) <= {"dense", "dictionary"}
    assert summary.plan.removed_ratio >= 0.3
    assert not (path.parent / "run" / "calibration" / "sensitivities.safetensors").exists()


def test_costs_that_need_no_sensitivities_do_without(write_config):
    path = write_config(profiling={"cost": "activation"})
    run(path, stage=pipeline.make_plan)
    assert "measure sensitivities" not in dict(logged(path))
    run(path, "profiling.cost=loss", stage=pipeline.make_plan)
    assert "measure sensitivities" in dict(logged(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluation.texts=[{}]", "none of which falls into the held_out split"),
        ("healing.source={}", "none of which falls into the calibration split"),
    ],
)
def test_sources_are_looked_into_before_the_work(write_config, tmp_path, change, message):
    side = "held_out" in message
    text = next(text for number in range(99) if is_held_out(text := f"text {number}") != side)
    path, source = write_config(), tmp_path / "one.txt"
    source.write_text(text)
    with pytest.raises(RocketError, match=message):
        run(path, change.format(source), "healing.minutes=1")
    assert "gather activations" not in dict(logged(path))


@pytest.mark.parametrize("budget", [{"kept_parameters": 30_000}, {"bytes": "125KB"}])
def test_budgets_of_the_whole_model(write_config, budget):
    path = write_config(compression=budget)
    plan = run(path, stage=pipeline.make_plan)
    size = run(path, stage=pipeline.compress_model)
    tensors = load_file(size / "model.safetensors")
    ((kind, _),) = budget.items()
    if kind == "bytes":
        assert sum(tensor.nbytes for tensor in tensors.values()) == plan.bytes <= 125_000
    else:
        values = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(".mask"))
        assert values == plan.parameters <= 30_000


def test_chosen_layers_only(write_config):
    path = write_config(model={"targets": [r"re:model\.layers\.1\..*"], "ignore": ["down_proj"]})
    plan = run(path, stage=pipeline.make_plan)
    assert len(plan.choices) == 6
    assert all(name.startswith("model.layers.1.") for name in plan.choices)


@pytest.mark.slow
def test_real_model(smollm2, tmp_path):
    """Six layers of SmolLM2-135M: profile, compress at 20 %, reload bit by bit, still a language model."""
    import rocket
    from rocket.config.schema import CalibConfig, ProfilingConfig
    from rocket.data import load_documents
    from rocket.evaluation import perplexity

    planner = rocket.plan(
        smollm2.model,
        smollm2.tokens,
        calib=CalibConfig(num_samples=8, seq_len=256, batch_size=4, sensitivity_samples=2),
        profiling=ProfilingConfig(removed_ratios=[0.1, 0.2, 0.3, 0.5]),
        targets=[r"re:model\.layers\.(0|15)\..*\.(q|o|up)_proj"],
    )
    plan = planner.at(removed_ratio=0.2)
    assert len(plan.choices) == 6
    small = rocket.compress(smollm2.model, plan)
    small.save_pretrained(tmp_path)
    assert stored_values(tmp_path, plan.choices) == plan.kept_target_parameters <= 0.8 * plan.size.target_parameters

    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        ids = smollm2.tokens[:1, :64]
        assert torch.equal(again(ids).logits, small(ids).logits)
    held_out = load_documents("embedded", "held_out")
    before, after = (
        perplexity(model, smollm2.tokenizer, held_out, seq_len=256, max_tokens=1024).value
        for model in (smollm2.model, again)
    )
    assert before < after < 3 * before
