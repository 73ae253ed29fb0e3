"""Survival: `rocket run` is killed at random moments and started again; it must end with the same bits.

A tiny random Llama goes through the whole pipeline, from calibration to evaluation, once undisturbed. Then, each time
in a new directory, the same command is killed by SIGKILL after a time drawn evenly from the undisturbed run's duration,
and started again to the end. Its plan and every tensor of its checkpoint are compared with the undisturbed run's, bit
for bit. The stage in work is the first that the killed run's log lacks. Calibration leaves a waypoint at every block,
not one a minute, which so short a run would not see. Half of the runs are streamed, in bfloat16 from a checkpoint in
float32, so that it is written again first.

Each run is a process of its own, forked from one that has imported rocket and opened no run: a fresh interpreter would
spend most of its life in imports, where a kill is without danger.

    python -m benchmarks.survival --kills 100
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from benchmarks import tiny
from benchmarks.harness import write_results
from rocket.calib import waypoints
from rocket.models import residence, rewriting
from rocket.scripts.main import main as rocket_command
from rocket.session import Session

MODELS = {"in memory": False, "streamed": True}
FINISHED = "finished"
PATIENCE = 600.0


def start(config: Path, output: Path, streams: bool = False) -> int:
    """Start `rocket run` on a config in a new process; its number."""
    sys.stdout.flush()
    transformers_logging.disable_progress_bar()  # its lock is shared: one that is killed would keep it
    process = os.fork()
    if process:
        return process
    code = 1
    waypoints.SECONDS = 0.0
    changes = {"output_dir": str(output)}
    if streams:
        Session.streams = True  # type: ignore[assignment,method-assign]
        residence.SMALL = rewriting.SMALL = 1
        changes["model.dtype"] = "bfloat16"
    try:
        log = os.open(f"{output}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        settings = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        rocket_command(["run", "--config", str(config), *settings])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int) -> int:
    """The exit code of a process; that of a kill if it takes too long."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return kill(process)


def kill(process: int) -> int:
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def stages(output: Path) -> list[str]:
    """The stages that a run finished, in order."""
    log = output / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last one
    return list(dict.fromkeys(event["event"] for event in events if not event.get("skipped")))


def differences(first: Path, second: Path) -> list[str]:
    """Plans and checkpoint files in which two runs differ: tensors by their bits, everything else by its bytes."""
    names = {
        str(file.relative_to(root))
        for root in (first, second)
        for part in ("plans", "models")
        for file in (root / part).rglob("*")
        if file.is_file()
    }
    return sorted(name for name in names if not _same(first / name, second / name))


def _same(first: Path, second: Path) -> bool:
    if not (first.exists() and second.exists()):
        return False
    if first.suffix != ".safetensors":
        return first.read_bytes() == second.read_bytes()
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name, tensor in one.items()
    )


@dataclass
class Row:
    """What came of the kills in one stage, of runs with the model in memory or streamed."""

    model: str
    stage: str
    kills: int = 0
    resumed: int = 0
    bit_equal: int = 0


def survive(config: Path, home: Path, model: str, streams: bool, kills: int, moments: random.Random) -> Iterable[Row]:
    """Run once undisturbed, and ``kills`` times killed and started again; a row a stage."""
    home.mkdir()
    undisturbed = home / "undisturbed"
    wait(start(config, home / "warm-up", streams))
    began = time.perf_counter()
    if wait(start(config, undisturbed, streams)):
        raise SystemExit(Path(f"{undisturbed}.txt").read_text())
    duration = time.perf_counter() - began
    order = stages(undisturbed)
    print(f"undisturbed: {duration:.1f} s; {', '.join(order)}", flush=True)
    rows = {stage: Row(model, stage) for stage in (*order, FINISHED)}
    for number in range(kills):
        output = home / f"run-{number}"
        moment = moments.uniform(0.0, duration)
        process = start(config, output, streams)
        time.sleep(moment)
        kill(process)
        done = stages(output)
        stage = next((stage for stage in order if stage not in done), FINISHED)
        resumed = wait(start(config, output, streams)) == 0
        differing = differences(undisturbed, output) if resumed else []
        rows[stage].kills += 1
        rows[stage].resumed += resumed
        rows[stage].bit_equal += resumed and not differing
        if not resumed or differing:
            print(f"kill {number} after {moment:.2f} s, in {stage}: {differing}", flush=True)
            print(Path(f"{output}.txt").read_text(), flush=True)
        shutil.rmtree(output)
    return rows.values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of the threads that its parent started
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        config = tiny.write_run(home, layers=arguments.layers, hidden=32)
        rows: list[Row] = []
        for model, streams in MODELS.items():
            print(f"{model}:", flush=True)
            rows += survive(config, home / model.replace(" ", "-"), model, streams, arguments.kills // 2, moments)
    write_results("survival", [vars(row) for row in rows if row.kills])
    if any(row.bit_equal < row.kills for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
