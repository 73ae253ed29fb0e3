"""Several processes on one machine against one: the same plan, and how much sooner.

Every run is the ``rocket`` command on the embedded model, one thread a process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import write_results

TARGETS = r"['re:.*layers\.[0-1]\..*']"  # two of thirty blocks
STAGES = ("gather activations", "measure sensitivities", "profile layers", "compress")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def settings(directory: Path, samples: int) -> list[str]:
    changes = {
        "model.targets": TARGETS,
        "output_dir": directory,
        "calib.num_samples": samples,
        "calib.batch_size": 4,
        "calib.sensitivity_samples": max(2, samples // 4),
        "profiling.removed_ratios": "[0.1, 0.2, 0.3, 0.4]",
        "evaluation.texts": "[]",
        "evaluation.tasks": "[]",
    }
    return [argument for key, value in changes.items() for argument in ("--set", f"{key}={value}")]


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def run(directory: Path, samples: int, ranks: int) -> dict[str, float]:
    """Seconds of each stage."""
    command = ["-m", "rocket", "run", *settings(directory, samples)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks == 1:
        finish([subprocess.Popen([sys.executable, *command], env=environment)])
    else:
        launch = ["--standalone", f"--nproc-per-node={ranks}"]
        finish([subprocess.Popen([*TORCHRUN, *launch, *command], env=environment)])
    usage = json.loads((directory / "usage.json").read_text())["content"]
    return {stage: usage[stage]["seconds"] for stage in STAGES}


def plan_of(directory: Path) -> Any:
    (file,) = (path for path in (directory / "plans").glob("*.json"))
    return json.loads(file.read_text())["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        alone = run(Path(temporary, "1"), args.samples, 1)
        plan = plan_of(Path(temporary, "1"))
        rows = [{"ranks": 1, "stage": stage, "seconds": alone[stage]} for stage in STAGES]
        for ranks in args.ranks:
            directory = Path(temporary, str(ranks))
            seconds = run(directory, args.samples, ranks)
            rows += [
                {
                    "ranks": ranks,
                    "stage": stage,
                    "seconds": seconds[stage],
                    "speedup": alone[stage] / seconds[stage],
                    "ideal": min(ranks, cores),
                    "same_plan": plan_of(directory) == plan,
                }
                for stage in STAGES
            ]
    write_results("ranks", rows)


if __name__ == "__main__":
    main()
