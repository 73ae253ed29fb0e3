"""Fine-tune a compressed checkpoint, on all devices that the config leaves it."""

from __future__ import annotations

import json
import os
import socket
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from rocket.compression import save_checkpoint
from rocket.config.errors import RocketError
from rocket.config.schema import HealingConfig, ModelConfig
from rocket.healing.parameters import check_unchanged, choose_parameters, settle_parameters
from rocket.healing.trainer import Examples, Healing, fit
from rocket.models import load_model, open_checkpoint, resolve_device

SUMMARY = "healing.json"


@dataclass(frozen=True)
class Job:
    """All that a process needs to heal: ``checkpoint`` to ``output``, with its own checkpoints in ``scratch``."""

    checkpoint: Path
    model: ModelConfig
    healing: HealingConfig
    examples: Examples
    scratch: Path
    output: Path
    processes: int


def heal(
    checkpoint: Path,
    model: ModelConfig,
    healing: HealingConfig,
    examples: Examples,
    scratch: Path,
    output: Path,
    processes: int | None = None,
) -> Healing:
    """Heal a compressed checkpoint; the healed one, of the same format and size, lies in ``output`` afterwards.

    ``model`` is the original, which distillation loads as well. ``scratch`` takes the Trainer's checkpoints: with the
    same one, a run that was killed goes on from the last. ``processes`` are as many as there are CUDA devices by
    default, each with its share of every batch; 1 on a CPU.

    Memory: both models, and for each trained value 16 bytes (float32 value, gradient and two moments). Raises
    RocketError when model and settings do not belong together.
    """
    device = resolve_device(model.device)
    if device.index is not None:
        raise RocketError(
            f"model.device={model.device!r}: healing takes every CUDA device; write cuda, and choose among them with "
            "CUDA_VISIBLE_DEVICES"
        )
    if device.type == "cpu" and model.dtype == "float16":
        raise RocketError("healing in float16 needs a CUDA device; use model.dtype=bfloat16 or float32")
    if healing.tokens is not None and not isinstance(examples, Tensor):
        raise RocketError("healing.tokens counts tokens of text; limit healing on samples by healing.minutes")
    count = processes or (torch.cuda.device_count() if device.type == "cuda" else 1)
    job = Job(checkpoint, model, healing, examples, scratch, output, count)
    if count == 1:
        _heal(job)
    else:
        _spawn(job)
    check_unchanged(checkpoint, output)
    return read_summary(output)


def read_summary(healed: Path) -> Healing:
    """What the healing of a checkpoint took."""
    return Healing(**json.loads((healed / SUMMARY).read_text()))


def _spawn(job: Job) -> None:
    try:
        spawn(_heal_as_one_of, (_free_port(), job), nprocs=job.processes)
    except ProcessRaisedException as error:
        kind, _, message = str(error).strip().splitlines()[-1].partition(": ")  # of a traceback, as text
        if kind.endswith(RocketError.__name__):
            raise RocketError(message) from None
        raise


def _free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _heal_as_one_of(rank: int, port: int, job: Job) -> None:
    """One of several processes, as torchrun would start it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(job.processes)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    _heal(job)
    torch.distributed.destroy_process_group()


def _heal(job: Job) -> None:
    import rocket  # noqa: F401 (a new process must know the checkpoint's format)

    on_cpu = job.model.model_copy(update={"device": "cpu"})
    model, processor = open_checkpoint(job.checkpoint, on_cpu)
    original = load_model(on_cpu)[0] if job.healing.objective == "distillation" else None
    choose_parameters(model, job.healing)
    healing = fit(model, processor, original, job.model, job.healing, job.examples, job.scratch, job.processes)
    if int(os.environ.get("RANK", 0)) == 0:
        settle_parameters(model, getattr(torch, job.model.dtype))
        save_checkpoint(model, processor, job.output)
        (job.output / SUMMARY).write_text(json.dumps(asdict(healing), indent=1) + "\n")
