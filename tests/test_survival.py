"""Bad conditions, through the whole pipeline: a clear message, or a sound result."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rocket
from benchmarks import tiny
from benchmarks.survival import differences
from rocket.calib import sensitivity, waypoints
from rocket.calib.gram import GramAccumulator
from rocket.config import RocketError, load_config
from rocket.config.schema import CalibConfig, ProfilingConfig
from rocket.forms import FORMS
from rocket.pipeline import run_pipeline
from rocket.run import MANIFEST, seal_json
from rocket.session import Session


def run(config: Path, *overrides: str):
    with Session(load_config(config, overrides)) as session:
        return run_pipeline(session)


def refusal(config: Path, *overrides: str) -> str | None:
    """What a run ends with; None if it succeeds."""
    try:
        run(config, *overrides)
    except RocketError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run beside its config. Do not change it; copy it (`damaged`)."""
    root = tmp_path_factory.mktemp("finished")
    run(tiny.write_run(root))
    return root


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["gather activations", "measure sensitivities"])
def test_calibration_goes_on_where_it_was(tmp_path, monkeypatch, stage):
    config = tiny.write_run(tmp_path, layers=3)
    run(config)
    monkeypatch.setattr(waypoints, "SECONDS", 0.0)
    with monkeypatch.context() as patch:
        # in the last of three blocks with four inputs, on the second of two batches; in the second of two batches
        owner, name, last = {
            "gather activations": (GramAccumulator, "add", 23),
            "measure sensitivities": (sensitivity, "_score", 2),
        }[stage]
        work, calls = getattr(owner, name), []

        def dying(*arguments):
            calls.append(1)
            if len(calls) == last:
                raise Killed
            return work(*arguments)

        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            run(config, f"output_dir={tmp_path / 'killed'}")
    calibration = tmp_path / "killed" / "calibration"
    before = {file.name: file.stat().st_mtime_ns for file in calibration.glob("model.*")}
    assert len(before) == (8 if stage == "gather activations" else 12)
    assert (calibration / "waypoints").exists()
    run(config, f"output_dir={tmp_path / 'killed'}")
    assert {name: (calibration / name).stat().st_mtime_ns for name in before} == before
    assert not (calibration / "waypoints").exists()
    assert differences(tmp_path / "run", tmp_path / "killed") == []


@pytest.fixture
def damaged(finished, tmp_path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def flipped(content: bytes, place: float) -> bytes:
    position = min(int(place * len(content)), len(content) - 1)
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGE = {
    "cut in half": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "first bit": lambda content: flipped(content, 0.0),
    "a bit near the beginning": lambda content: flipped(content, 0.1),
    "a bit in the middle": lambda content: flipped(content, 0.5),
    "last bit": lambda content: flipped(content, 1.0),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_artifact_that_is_damaged(finished, damaged, kind):
    """Told by its name, or made again with the same bits."""
    files = [file for file in damaged.rglob("*") if file.is_file() and file.stat().st_size]
    told = set()
    for file in files:
        content = file.read_bytes()
        file.write_bytes(DAMAGE[kind](content))
        message = refusal(finished / "config.yaml", f"output_dir={damaged}")
        if message is not None:
            assert str(file.parent if file.name == MANIFEST else file) in message
            assert "delete" in message
            told.add(file.name)
            file.write_bytes(content)
        assert differences(finished / "run", damaged) == []
    if kind == "cut in half":
        assert {"index.json", "sensitivities.safetensors", "removed-0.30.json", "model.safetensors", "run.json"} <= told


def test_missing_shard(tmp_path):
    config = tiny.write_run(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    tiny.make_model().save_pretrained(tmp_path / "model", max_shard_size="10KB")
    run(config)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(RocketError, match=rf"no model that can be opened: .*{shard.name}"):
        run(config, f"output_dir={tmp_path / 'other'}")


def test_disk_that_fills_up(finished, tmp_path):
    """Whatever is written when the disk is full, the run goes on from there when it is not."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        failures = []
        for size in (40, 80, 100, 120, 4000):
            failures.append(refusal(finished / "config.yaml", f"output_dir={tmp_path / 'run'}"))
            subprocess.run(["mount", "-o", f"remount,size={size}k", tmp_path], check=True)
        assert refusal(finished / "config.yaml", f"output_dir={tmp_path / 'run'}") is None
        assert differences(finished / "run", tmp_path / "run") == []
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    told = [message for message in failures if message is not None]
    assert len({message.partition(" cannot be written")[0] for message in told}) > 1
    for message in told:
        assert "cannot be written: " in message
        assert "No space left on device" in message
        assert f"(disk mounted at {tmp_path}, 0 MB free); what was finished before is kept" in message


@pytest.mark.parametrize("sensitivity_samples", [0, 4])
@pytest.mark.parametrize(
    "weight",
    ["model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.norm", "lm_head"],
)
def test_nan_weights_are_named(tmp_path, weight, sensitivity_samples):
    sections = {"calib": {"source": str(tmp_path / "texts.txt"), "num_samples": 4, "seq_len": 16}}
    sections["calib"]["sensitivity_samples"] = sensitivity_samples
    if not sensitivity_samples:
        sections["profiling"] = {"cost": "activation", "removed_ratios": [0.3, 0.6]}
    config = tiny.write_run(tmp_path, **sections)
    model = tiny.make_model()
    with torch.no_grad():
        model.get_submodule(weight).weight.view(-1)[5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        RocketError, match=rf"{weight}(\.weight holds NaN or infinity|: the weight has 1 values that are)"
    ):
        run(config)


def dead_channel(model) -> None:
    model.model.embed_tokens.weight[:, 3] = 0
    for layer in model.model.layers:
        layer.input_layernorm.weight[3] = layer.post_attention_layernorm.weight[3] = 0


def constant_activations(model) -> None:
    model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[1]


def layer_of_zeros(model) -> None:
    model.model.layers[0].mlp.up_proj.weight.zero_()


def equal_rows(model) -> None:
    weight = model.model.layers[0].mlp.gate_proj.weight
    weight[:] = weight[0]


def huge_values(model) -> None:
    model.model.layers[0].self_attn.v_proj.weight.mul_(1e15)


@pytest.mark.parametrize("cost", ["loss", "activation", "weight"])
@pytest.mark.parametrize(
    ("change", "tokens", "config"),
    [
        (dead_channel, 256, {}),
        (constant_activations, 256, {}),
        (layer_of_zeros, 256, {}),
        (equal_rows, 256, {}),
        (huge_values, 256, {}),
        (lambda model: None, 8, {}),
        (lambda model: None, 256, {"intermediate_size": 1}),
    ],
    ids=["dead channel", "constant", "zeros", "equal rows", "huge", "8 tokens", "one output, one input"],
)
def test_degenerate_layers(tmp_path, change, tokens, config, cost):
    """Every form of every layer is built, finite, of the planned size, and reopens as it was."""
    model = tiny.make_model(**config)
    with torch.no_grad():
        change(model)
    ids = torch.randint(1, 257, (tokens // 8, 8), generator=torch.Generator().manual_seed(0))
    forms = [name for name in FORMS if name != "dense"]
    planner = rocket.plan(
        model,
        ids,
        calib=CalibConfig(num_samples=len(ids), seq_len=8, sensitivity_samples=min(len(ids), 4)),
        profiling=ProfilingConfig(forms=forms, removed_ratios=[0.2, 0.5], rank_support_ratios=[1.0, 2.0], cost=cost),
    )
    for form in forms:
        plan = planner.at(removed_ratio=0.1)
        choices = {
            profile.layer: next((o for o in profile.options[::-1] if o.form == form), profile.options[0])
            for profile in planner.profiles
        }
        if form == "sparse_low_rank" and all(option.is_original for option in choices.values()):
            assert config  # where layers are so small that there is no room for an atom
            continue
        small = rocket.compress(model, type(plan)(**{**vars(plan), "choices": choices}))
        assert all(parameter.isfinite().all() for parameter in small.parameters())
        small.save_pretrained(tmp_path / form)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / form)
        with torch.no_grad():
            logits = small(input_ids=ids[:2]).logits
            assert logits.isfinite().all()
            assert torch.equal(again(input_ids=ids[:2]).logits, logits)
        stored = load_file(tmp_path / form / "model.safetensors")
        assert sum(values.numel() for name, values in stored.items() if not name.endswith("mask")) == (
            sum(option.parameters for option in choices.values()) + plan.size.other_parameters
        )


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("plans/removed-0.30.json", "choices", "is not of the profiled layers; delete it and run again"),
        (
            "evaluation/removed-0.30.json",
            "perplexities",
            "does not tell what original.json does; delete both and run again",
        ),
        (
            "evaluation/original.json",
            "perplexities",
            "does not tell what original.json does; delete both and run again",
        ),
    ],
)
def test_files_that_leave_something_out(damaged, finished, name, part, message):
    """Whoever can write the directory can write a checksum: the report must not stumble over what is not there."""
    file = damaged / name
    artifact = json.loads(file.read_text())
    artifact["content"][part].popitem()
    file.write_text(json.dumps(seal_json(name, artifact["fingerprint"], artifact["content"])))
    told = refusal(finished / "config.yaml", f"output_dir={damaged}")
    place = damaged / name.replace("original", "removed-0.30")
    assert told == f"{place} {message}"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("evaluation/original.json", {"accuracies": {"piqa": {"accuracy": 0.5}}}, "accuracies.piqa.task: Field req"),
        ("evaluation/original.json", {"accuracies": {"piqa": 0.5}}, "accuracies.piqa: Input should be"),
        ("plans/other.json", {"budget": {"kind": "bytes"}}, "value: Field required"),
        ("plans/other.json", {"budget": 3}, "content: Input should be"),
    ],
)
def test_files_that_say_something_else(damaged, finished, name, change, message):
    file = damaged / name
    stored = file if file.exists() else damaged / "plans" / "removed-0.30.json"
    artifact = json.loads(stored.read_text())
    file.write_text(json.dumps(seal_json(name, artifact["fingerprint"], {**artifact["content"], **change})))
    told = refusal(finished / "config.yaml", f"output_dir={damaged}")
    assert told is not None
    assert told.startswith(f"{file}: {message}")
