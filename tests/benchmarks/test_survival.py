"""What the survival benchmark calls equal, and where it says that a run was killed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.survival import differences, kill, stages, start, wait


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two directories of the same plan and the same tensors."""
    for name in ("a", "b"):
        (tmp_path / name / "models" / "m").mkdir(parents=True)
        (tmp_path / name / "plans").mkdir()
        (tmp_path / name / "plans" / "p.json").write_text("{}")
        save_file({"t": torch.tensor([0.0, float("nan")])}, tmp_path / name / "models" / "m" / "t.safetensors")
        (tmp_path / name / "log.jsonl").write_text(name)
    return tmp_path / "a", tmp_path / "b"


def test_equal_runs(runs):
    assert differences(*runs) == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"t": torch.tensor([-0.0, float("nan")])},
        {"t": torch.tensor([0.0, float("nan")], dtype=torch.float64)},
        {"t": torch.tensor([[0.0, float("nan")]])},
        {"u": torch.tensor([0.0, float("nan")])},
    ],
)
def test_other_bits(runs, tensors):
    save_file(tensors, runs[1] / "models" / "m" / "t.safetensors")
    assert differences(*runs) == ["models/m/t.safetensors"]


def test_other_files(runs):
    (runs[1] / "plans" / "p.json").write_text("{ }")
    (runs[0] / "models" / "m" / "config.json").write_text("{}")
    (runs[1] / "models" / "m" / "t.safetensors").unlink()
    assert differences(*runs) == ["models/m/config.json", "models/m/t.safetensors", "plans/p.json"]


def test_stages_of_a_log_that_was_cut(tmp_path):
    events = [{"event": "plan", "skipped": True}, {"event": "load"}, {"event": "compress"}, {"event": "load"}]
    lines = [json.dumps(event) for event in events]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"event": "eval')
    assert stages(tmp_path) == ["load", "compress"]
    assert stages(tmp_path / "nowhere") == []


def test_exit_codes(tmp_path):
    (tmp_path / "config.yaml").write_text("modle: 3")
    assert wait(start(tmp_path / "config.yaml", tmp_path / "run")) == 2
    assert kill(start(tmp_path / "config.yaml", tmp_path / "run")) in (-9, 2)
