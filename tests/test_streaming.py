"""A model whose blocks come from its files one by one: the same plan and the same bits as with the model in memory."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rocket.config import RocketError, load_config
from rocket.memory import estimate_memory
from rocket.models import find_blocks, hold, is_streamed, load_model, release_pages
from rocket.models.residence import spill, unmapped
from rocket.pipeline import run_pipeline
from rocket.session import Session


@pytest.fixture
def write_config(tmp_path, model_dir, text_file):
    """Writes a config of a model of some size, in a run directory of its own."""

    def write(name: str, family: str = "llama", **changes: object):
        sections = {
            "output_dir": str(tmp_path / name),
            "model": {"path": str(model_dir(family, hidden_size=128)), "dtype": "float32", "device": "cpu"},
            "calib": {"source": str(text_file), "num_samples": 8, "seq_len": 32, "batch_size": 2},
            "profiling": {"removed_ratios": [0.1, 0.3, 0.5], "rank_support_ratios": [1.5, 2.0]},
            "compression": {"removed_ratio": 0.3},
            "evaluation": {"texts": [str(text_file)], "seq_len": 32, "max_tokens": 96},
        }
        sections["calib"]["sensitivity_samples"] = 4
        sections |= changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path

    return write


def run(path, monkeypatch, streams: bool):
    monkeypatch.setattr(Session, "streams", streams)
    monkeypatch.setattr(Session, "states", path.parent / "states" if streams else None)
    with Session(load_config(path)) as opened:
        summary = run_pipeline(opened)
        return summary, load_file(summary.path / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_streamed_is_the_same_to_the_bit(write_config, monkeypatch, tmp_path, family):
    in_memory, expected = run(write_config("memory", family), monkeypatch, streams=False)
    streamed, tensors = run(write_config("streamed", family), monkeypatch, streams=True)
    assert streamed.plan.to_dict() == in_memory.plan.to_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert (tmp_path / "states").is_dir()
    assert not any((tmp_path / "states").iterdir())
    assert streamed.original == in_memory.original
    assert streamed.compressed == in_memory.compressed


def test_a_model_that_is_streamed_lies_in_its_files(write_config):
    config = load_config(write_config("run")).model
    model, _ = load_model(config, streams=True)
    assert is_streamed(model)
    assert unmapped(model) is None
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    release_pages(model.parameters())
    with hold(model, next(iter(find_blocks(model)))), torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name])
    assert not is_streamed(load_model(config)[0])


def test_a_hidden_state_waits_on_disk(write_config, tmp_path):
    model, _ = load_model(load_config(write_config("run")).model, streams=True, states=tmp_path / "states")
    hidden = torch.randn(64, 128, requires_grad=True).clone()
    before, view = hidden.detach().clone(), hidden.view(-1)
    waiting = spill(model, (None, hidden))
    assert hidden.untyped_storage().nbytes() == 0
    assert len(list((tmp_path / "states").iterdir())) == 1
    waiting.load()
    waiting.load()
    assert torch.equal(hidden, before)
    assert torch.equal(view, before.view(-1))
    del waiting
    assert not any((tmp_path / "states").iterdir())
    assert spill(model, (hidden[:3], None)) is None  # a part of another tensor stays
    assert spill(load_model(load_config(write_config("other")).model)[0], (hidden,)) is None


def test_release_keeps_what_is_no_file():
    tensor = torch.randn(1 << 20)
    before = tensor.clone()
    release_pages([tensor, torch.empty(0)])
    assert torch.equal(tensor, before)


def test_what_had_to_be_converted_cannot_be_streamed(write_config, monkeypatch):
    monkeypatch.setattr("rocket.models.residence.SMALL", 1)
    path = write_config("run")
    config = load_config(path, ["model.dtype=bfloat16"]).model
    with pytest.raises(RocketError, match=r"layers\.0\.\S+ had to be copied into it: save the model as safetensors"):
        load_model(config, streams=True)


def test_the_budget_decides(write_config):
    path = write_config("run")
    memory = estimate_memory(load_config(path))
    assert not memory.streams
    assert "the model stays in memory" in str(memory)
    resident = max(need.resident for need in memory.needs.values())
    streamed = max(need.streamed for need in memory.needs.values())
    assert streamed < resident
    between = estimate_memory(load_config(path, [f"memory_budget={int((resident + streamed) / 2)}"]))
    assert between.streams
    assert "one by one" in str(between)
    between.check()
    with pytest.raises(RocketError, match=r"memory_budget=0\.1GB: '.+' needs about .* GB with the model streamed"):
        estimate_memory(load_config(path, ["memory_budget=100MB"])).check()


def test_the_estimate_is_said_before_anything_is_read(write_config, caplog):
    caplog.set_level("INFO", logger="rocket")
    path = write_config("run")
    with Session(load_config(path, ["memory_budget=100MB"])) as session, pytest.raises(RocketError, match="budget=0"):
        run_pipeline(session)
    assert "memory in GB, about: gather activations" in caplog.text
    assert not (path.parent / "run" / "calibration").exists()
    log = path.parent / "run" / "log.jsonl"
    assert not log.exists() or not any(json.loads(line)["event"] == "gather activations" for line in log.open())
