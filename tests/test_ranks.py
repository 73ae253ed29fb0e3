"""Several processes started by torchrun, and shards that know nothing of each other: the plan of one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.ranks import cable, lines_in_spaces, why_no_spaces
from rocket.ranks import shares
from rocket.scripts.main import main


@pytest.fixture
def write_config(tmp_path, model_dir, text_file):
    path = str(model_dir("llama"))

    def write(name: str) -> Path:
        sections = {
            "output_dir": str(tmp_path / name),
            "model": {"path": path, "dtype": "float32", "device": "cpu"},
            "calib": {"source": str(text_file), "num_samples": 12, "seq_len": 32, "batch_size": 2},
            "profiling": {"removed_ratios": [0.1, 0.3, 0.5], "rank_support_ratios": [1.5, 2.0]},
            "compression": {"removed_ratio": 0.3},
            "evaluation": {"texts": [str(text_file)], "seq_len": 32, "max_tokens": 96},
        }
        sections["calib"]["sensitivity_samples"] = 6
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(sections))
        return file

    return write


def torchrun(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[1],
    )


def plan_of(run: Path) -> dict:
    return json.loads((run / "plans" / "removed-0.30.json").read_text())["content"]


def same_checkpoints(one: Path, other: Path) -> bool:
    first, second = (load_file(run / "models" / "removed-0.30" / "model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def alone(write_config, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = CliRunner().invoke(main, ["run", "--config", str(write_config("alone"))])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return tmp_path / "alone"


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_makes_the_same_plan(alone, write_config, tmp_path, processes):
    config = write_config("together")
    result = torchrun(processes, "-m", "rocket", "run", "--config", str(config))
    assert result.returncode == 0, result.stderr
    together = tmp_path / "together"
    assert plan_of(together) == plan_of(alone)
    assert same_checkpoints(together, alone)
    assert result.stdout.count("compressed model:") == 1  # one of them speaks
    events = [json.loads(line)["event"] for line in (together / "log.jsonl").open()]
    assert events.count("profile layers") == 1


@pytest.mark.slow
def test_two_machines_make_the_same_plan(alone, write_config, tmp_path):
    """As far as two network namespaces are two machines: each has its own addresses."""
    reason = why_no_spaces()
    if reason is not None:
        pytest.skip(reason)
    config = write_config("together")
    with cable():
        lines = lines_in_spaces(["-m", "rocket", "run", "--config", str(config)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen(line, env=environment, cwd=Path(__file__).parents[1]) for line in lines]
        assert [process.wait(300) for process in processes] == [0, 0]
    assert plan_of(tmp_path / "together") == plan_of(alone)
    assert same_checkpoints(tmp_path / "together", alone)


DYING = """
import os, signal
from rocket.calib import gram, waypoints
from rocket.scripts.main import main
from rocket.stages import profile as stage
waypoints.SECONDS = 0.0
owner, name, last = {"gather": (gram.GramAccumulator, "add", 14), "profile": (stage, "profile_layer", 3)}[STAGE]
work, done = getattr(owner, name), []
def dying(*args):
    done.append(1)
    if len(done) == last and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*args)
setattr(owner, name, dying)
main()
"""


@pytest.mark.parametrize("stage", ["gather", "profile"])
def test_a_killed_process_ends_all_and_the_same_command_goes_on(alone, write_config, tmp_path, stage):
    config, together = write_config("together"), tmp_path / "together"
    script = tmp_path / "die.py"
    script.write_text(DYING.replace("STAGE", repr(stage)))
    first = torchrun(2, str(script), "run", "--config", str(config))
    assert first.returncode != 0
    assert "Signal 9 (SIGKILL)" in first.stderr
    again = torchrun(2, "-m", "rocket", "run", "--config", str(config))
    assert again.returncode == 0, again.stderr
    assert ("going on from block 2 of 2" in again.stderr) == (stage == "gather")
    assert plan_of(together) == plan_of(alone)
    assert not (together / "calibration" / "waypoints").exists()

    config, recovered = write_config("recovered"), tmp_path / "recovered"
    result = torchrun(2, "--max-restarts=3", str(script), "run", "--config", str(config))
    assert result.returncode == 0, result.stderr
    assert plan_of(recovered) == plan_of(alone)
    assert same_checkpoints(recovered, alone)


def test_shards_make_the_whole(alone, write_config, tmp_path):
    config, sharded = write_config("sharded"), tmp_path / "sharded"

    def rocket(*arguments: str):
        return CliRunner().invoke(main, [*arguments, "--config", str(config)])

    early = rocket("profile", "--shard", "1/3")
    assert early.exit_code == 2
    assert "run `rocket gather` on this config first" in early.output
    torch.set_num_threads(1)
    assert rocket("gather").exit_code == 0
    seen = []
    for number in (2, 3, 1):
        result = rocket("profile", "--shard", f"{number}/3")
        assert result.exit_code == 0, result.output
        seen.append(int(re.search(r"(\d+) layers of other shards", result.output)[1]))
    assert sorted(seen, reverse=True) == seen
    assert seen[-1] == 0
    done = {file.name: file.stat().st_mtime_ns for file in (sharded / "profiles").iterdir()}
    assert rocket("run").exit_code == 0
    assert {file.name: file.stat().st_mtime_ns for file in (sharded / "profiles").iterdir()} == done
    assert plan_of(sharded) == plan_of(alone)
    for wrong in ("0/3", "4/3", "third"):
        assert "is no part of a whole" in rocket("profile", "--shard", wrong).output


def test_more_processes_than_batches_are_refused(write_config, tmp_path):
    config = write_config("few")
    result = torchrun(2, "-m", "rocket", "run", "--config", str(config), "--set", "calib.batch_size=16")
    assert result.returncode != 0
    assert "1 batches cannot be shared by 2 processes; lower calib.batch_size" in result.stderr


def test_shares_are_even():
    costs = {f"layer {number}": float(number % 7 + 1) for number in range(50)}
    parts = shares(costs, 4)
    assert sorted(name for part in parts for name in part) == sorted(costs)
    totals = [sum(costs[name] for name in part) for part in parts]
    assert max(totals) - min(totals) <= 7
