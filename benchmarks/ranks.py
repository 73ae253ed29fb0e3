"""Several processes against one: the same plan, and how much sooner.

Every run is the ``rocket`` command on the embedded model, one thread a process. With ``--namespaces`` (root on Linux)
two processes work in two network namespaces, too: each has an address of its own and reaches the other over a virtual
cable alone, as if on another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import write_results

TARGETS = r"['re:.*layers\.[0-1]\..*']"  # two of thirty blocks
STAGES = ("gather activations", "measure sensitivities", "profile layers", "compress")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SPACES = {"rocket-a": "10.77.0.1", "rocket-b": "10.77.0.2"}


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


def run(directory: Path, samples: int, ranks: int, in_spaces: bool = False) -> dict[str, float]:
    """Seconds of each stage."""
    command = ["-m", "rocket", "run", *settings(directory, samples)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if in_spaces:
        with cable():
            finish([subprocess.Popen(line, env=environment) for line in lines_in_spaces(command)])
    elif ranks == 1:
        finish([subprocess.Popen([sys.executable, *command], env=environment)])
    else:
        launch = ["--standalone", f"--nproc-per-node={ranks}"]
        finish([subprocess.Popen([*TORCHRUN, *launch, *command], env=environment)])
    usage = json.loads((directory / "usage.json").read_text())["content"]
    return {stage: usage[stage]["seconds"] for stage in STAGES}


def why_no_spaces() -> str | None:
    """What keeps this machine from making network namespaces; None if nothing does."""
    if shutil.which("ip") is None:
        return "there is no command `ip` (Linux, package iproute2)"
    if subprocess.run(["ip", "netns", "add", "rocket-try"], capture_output=True, check=False).returncode:
        return "network namespaces need root"
    subprocess.run(["ip", "netns", "del", "rocket-try"], check=True)
    return None


@contextmanager
def cable() -> Iterator[None]:
    """While it lasts there are two network namespaces with a cable between them."""
    ends = [f"{space}-0" for space in SPACES]
    try:
        for space in SPACES:
            subprocess.run(["ip", "netns", "add", space], check=True)
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for (space, address), end in zip(SPACES.items(), ends, strict=True):
            subprocess.run(["ip", "link", "set", end, "netns", space], check=True)
            inside = ["ip", "-n", space]
            subprocess.run([*inside, "addr", "add", f"{address}/24", "dev", end], check=True)
            for device in (end, "lo"):
                subprocess.run([*inside, "link", "set", device, "up"], check=True)
        yield
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "del", space], check=False)


def lines_in_spaces(command: Sequence[str]) -> list[list[str]]:
    """The command line of each namespace, as of each of two machines."""
    launch = [*TORCHRUN, "--nnodes=2", f"--master-addr={next(iter(SPACES.values()))}", "--master-port=29577"]
    lines = []
    for number, (space, address) in enumerate(SPACES.items()):
        # Torch asks for the names of addresses, and no server answers in there.
        settings = [f"GLOO_SOCKET_IFNAME={space}-0", "RES_OPTIONS=timeout:1 attempts:1"]
        own = [f"--node-rank={number}", f"--local-addr={address}"]
        lines.append(["ip", "netns", "exec", space, "env", *settings, *launch, *own, *command])
    return lines


def plan_of(directory: Path) -> Any:
    (file,) = (path for path in (directory / "plans").glob("*.json"))
    return json.loads(file.read_text())["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--namespaces", action="store_true", help="two processes with addresses of their own, too")
    args = parser.parse_args()
    cases = [(ranks, False) for ranks in args.ranks]
    if args.namespaces:
        reason = why_no_spaces()
        if reason is None:
            cases.append((2, True))
        else:
            print(f"no run in two namespaces: {reason}", file=sys.stderr)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        alone = run(Path(temporary, "1"), args.samples, 1)
        plan = plan_of(Path(temporary, "1"))
        rows = [{"ranks": 1, "network": "none", "stage": stage, "seconds": alone[stage]} for stage in STAGES]
        for ranks, in_spaces in cases:
            directory = Path(temporary, f"{ranks}-{in_spaces}")
            seconds = run(directory, args.samples, ranks, in_spaces)
            rows += [
                {
                    "ranks": ranks,
                    "network": "two namespaces" if in_spaces else "one machine",
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
