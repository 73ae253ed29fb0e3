"""What a run will take of memory, told before it begins, and whether its model must be streamed for that."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rocket.calib import SENSITIVITY_BATCH, sensitivity_samples
from rocket.config import Config, RocketError
from rocket.config.schema import ProfilingConfig
from rocket.evaluation import TASK_BATCH
from rocket.factorization.sparse import KEPT_INVERSES
from rocket.models import (
    LinearLayer,
    block_of,
    features_of,
    find_blocks,
    is_causal_lm,
    resolve_device,
    stacked_experts,
    target_layers,
)
from rocket.models.load import locate, open_empty
from rocket.models.rewriting import SHARD_BYTES
from rocket.usage import process_bytes

# What the largest step of a form holds of in x in and of in x out numbers, in units of float32, where a layer has fewer
# inputs than outputs, and where it has more; of benchmarks/streaming.py and benchmarks/compression_speed.py.
FORMS_HOLD = {
    "dense": ((0.0, 1.0), (0.0, 1.0)),
    "low_rank": ((4.0, 12.0), (3.0, 5.0)),
    "dictionary": ((4.0, 17.0), (3.0, 12.0)),
    "sparse": ((4.5, 12.0), (4.5, 9.0)),
    "sparse_low_rank": ((5.5, 12.0), (5.5, 12.0)),
}
INVERSES = {"sparse": 4.0, "sparse_low_rank": 6.0}  # squares more, where several inverses are kept
INT8_HOLDS = 6.0  # rectangles more, while rounding to int8 is measured: a layer's values three times in float64
PANELS = 0.6  # of a square matrix, which Gram sums take
SHARD = 1_000_000_000
LOGIT_COPIES = 14  # bytes of scores, their float32 copy, its logarithm and gradient, beside the scores' own type
LOSSES_BYTES = 250_000_000  # what losses take of a decoder's scores, which they read a part at a time
TASK_TOKENS, TASK_BYTES = 200, 4  # of a question and its answer; a token's score in float32, beside its own type
TEXT_BYTES = 500_000_000  # a text being tokenised
UNTOLD_BYTES = 500_000_000  # about what the libraries take, where the system does not tell
UNITS = 1e9
REMEDIES = {
    "gather activations": "lower calib.batch_size or calib.seq_len",
    "measure sensitivities": "lower calib.sensitivity_samples or calib.seq_len",
    "profile layers": "set profiling.forms=[low_rank, dictionary], which take less than sparse forms",
    "compress": "set profiling.forms=[low_rank, dictionary], which take less than sparse forms",
    "evaluate": "lower evaluation.batch_size or evaluation.seq_len",
    "zero-shot tasks": "lower evaluation.batch_size",
}
MOUNTED, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CGROUPS = (  # the limit, what is used of it, and what of that is only a cache of files, by its key in memory.stat
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class Need:
    """Bytes of a stage: with the whole model in memory, and with its blocks coming one by one.

    ``states`` are those of the latter that hidden states take, which may wait on disk.
    """

    resident: float
    streamed: float
    states: float = 0.0


@dataclass(frozen=True)
class Memory:
    """The estimate. ``available`` is the budget, or what the machine has free; ``device`` what its accelerator has.

    ``rewriting`` is what it takes to write the ``weights`` again, should their files not hold them as the model does.
    """

    needs: Mapping[str, Need]
    rewriting: float
    weights: int
    available: int
    budgeted: bool
    device: int | None = None

    @property
    def streams(self) -> bool:
        """Whether the model is to be streamed: in memory it would not fit."""
        on_device = self.device is not None and self.weights > 0.8 * self.device
        return on_device or max(need.resident for need in self.needs.values()) > self.available

    @property
    def spills(self) -> bool:
        """Whether hidden states must wait on disk, too."""
        return self.streams and max(need.streamed for need in self.needs.values()) > self.available

    def used(self) -> dict[str, float]:
        """Bytes that each stage is going to take."""
        if not self.streams:
            return {stage: need.resident for stage, need in self.needs.items()}
        return {stage: need.streamed - self.spills * need.states for stage, need in self.needs.items()}

    def check(self) -> None:
        """Raise RocketError if the run would not keep to ``memory_budget`` even so."""
        used = self.used()
        stage = max(used, key=lambda stage: used[stage])
        self._check(stage, used[stage], f"allow more, or {REMEDIES[stage]}")

    def check_rewriting(self) -> None:
        """Raise RocketError if writing the weights again would not keep to ``memory_budget``."""
        self._check("rewrite model", self.rewriting, "allow more, or set model.dtype to the type of its files")

    def _check(self, stage: str, needed: float, remedy: str) -> None:
        if self.budgeted and needed > self.available:
            raise RocketError(
                f"memory_budget={self.available / UNITS:.3g}GB: {stage!r} needs about {needed / UNITS:.1f} GB "
                f"with the model streamed; {remedy}"
            )

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {value / UNITS:.1f}" for stage, value in self.used().items())
        how = "blocks of the model come one by one" if self.streams else "the model stays in memory"
        how += ", hidden states wait on disk" if self.spills else ""
        limit = "allowed" if self.budgeted else "free"
        return f"memory in GB, about: {stages}; {self.available / UNITS:.1f} {limit}: {how}"


def estimate_memory(config: Config) -> Memory | None:
    """Estimate from a model's config.json alone, before any weight is read; None for models that come otherwise.

    Upper bounds of what is known beforehand: which layers share an input is not, so each counts.
    """
    location = locate(config.model.path)
    if location.file is not None or location.embedded is not None:
        return None
    try:
        model = open_empty(config.model)
        layers = target_layers(model, config.model.targets, config.model.ignore)
    except RocketError:
        raise
    except Exception:  # whatever a stranger's config.json makes transformers raise: loading it will say what is wrong
        return None
    device = resolve_device(config.model.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Memory(
        _needs(config, model, layers),
        _rewriting_bytes(model),
        _bytes(model),
        config.memory_budget or _free_memory(),
        config.memory_budget is not None,
        free,
    )


def _needs(config: Config, model: Any, layers: Mapping[str, LinearLayer]) -> dict[str, Need]:
    calib, evaluation = config.calib, config.evaluation
    text = model.config.get_text_config()
    itemsize = getattr(torch, config.model.dtype).itemsize
    hidden = getattr(text, "hidden_size", 0) * itemsize
    scores = getattr(text, "vocab_size", 0) * (itemsize + LOGIT_COPIES)
    blocks = find_blocks(model)
    inside = {id(tensor) for block in blocks.values() for tensor in block.parameters()}
    outside = max((_size(tensor) for tensor in model.parameters() if id(tensor) not in inside), default=0)
    weights, block = _bytes(model), max(_bytes(part) for part in blocks.values())
    base = _base_bytes()
    grouped: dict[str, list[tuple[int, int]]] = {}
    for name, layer in layers.items():
        grouped.setdefault(block_of(name, list(blocks)), []).append(features_of(layer))
    for name, stack in stacked_experts(model).items():  # each becomes a layer, either way round
        count, *shape = stack.shape
        grouped.setdefault(block_of(name, list(blocks)), []).extend([(min(shape), max(shape))] * count)
    widths = [sum(out + inputs for out, inputs in shapes) for shapes in grouped.values()]
    grams = max(_gram_bytes([inputs for _, inputs in shapes]) for shapes in grouped.values())
    states = calib.num_samples * calib.seq_len * hidden
    step = calib.batch_size * calib.seq_len * max(max(shape) for shapes in grouped.values() for shape in shapes) * 12
    needs = {
        "gather activations": Need(
            base + weights + 2 * states + step + grams,
            base + 2 * states + step + max(block + grams, outside),  # what entered the first block stays, too
            states,
        )
    }
    if samples := sensitivity_samples(calib, config.profiling):
        pair = min(SENSITIVITY_BATCH, samples) * calib.seq_len
        graph, loss = pair * max(widths) * 4, pair * scores
        kept = samples * calib.seq_len * hidden * (len(blocks) + 2)
        needs["measure sensitivities"] = Need(
            base + weights + pair * hidden * (len(blocks) + 2) + max(graph, loss),
            base + kept + max(block + graph, outside + loss),
            kept,
        )
    largest = max(_layer_bytes(out, inputs, config.profiling) for shapes in grouped.values() for out, inputs in shapes)
    needs["profile layers"] = Need(base + weights + largest, base + largest)
    copies = 2 * max(min(SHARD, weights), outside)
    needs["compress"] = Need(base + 2 * weights + largest, base + max(largest, copies))
    if evaluation.texts:
        tokens = evaluation.max_tokens or 2**20
        written = evaluation.batch_size * evaluation.seq_len
        if is_causal_lm(model):
            batch = written * getattr(text, "vocab_size", 0) * itemsize + LOSSES_BYTES + TEXT_BYTES
        else:
            batch = written * scores + TEXT_BYTES
        states = tokens * hidden
        needs["evaluate"] = Need(base + weights + batch, base + 2 * states + batch + max(block, outside), states)
    if evaluation.tasks:
        requests = TASK_BATCH * evaluation.batch_size * TASK_TOKENS
        batch = requests * getattr(text, "vocab_size", 0) * (itemsize + TASK_BYTES)
        needs["zero-shot tasks"] = Need(base + weights + batch, base + batch + max(block, outside))
    return needs


def _rewriting_bytes(model: nn.Module) -> float:
    """What is outside of the blocks, a shard, and the largest tensor of a block twice (`models.rewrite`)."""
    inside = [_size(tensor) for block in find_blocks(model).values() for tensor in block.parameters()]
    return _base_bytes() + _bytes(model) - sum(inside) + SHARD_BYTES + 2 * max(inside)


def _base_bytes() -> int:
    return process_bytes("VmRSS") or UNTOLD_BYTES


def _gram_bytes(features: Sequence[int]) -> float:
    """Sums in float64 of inputs of these widths, and what the widest takes to finish."""
    return sum(PANELS * 8 * n * n for n in features) + 6 * max(features) ** 2


def _layer_bytes(out_features: int, in_features: int, settings: ProfilingConfig) -> float:
    square, rectangle = 4 * in_features * in_features, 4 * in_features * out_features
    is_wide = in_features > out_features
    rounding = INT8_HOLDS if "int8" in settings.precisions else 0.0
    most = 0.0
    for form in ("dense", *settings.forms):
        squares, rectangles = FORMS_HOLD.get(form, ((4.0, 16.0),) * 2)[is_wide]
        if in_features <= KEPT_INVERSES:
            squares += INVERSES.get(form, 0.0)
        most = max(most, squares * square + (rectangles + rounding) * rectangle)
    return most


def _bytes(module: nn.Module) -> int:
    return sum(_size(tensor) for tensor in module.parameters())


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _free_memory() -> int:
    """What the machine can give this process without swapping, or its container; if that is not told, no limit.

    Several processes of a run on one machine share it.
    """
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    limits = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for controller, limit, used, cache in CGROUPS:
        for group in _own_groups(controller):
            try:
                allowed = int((group / limit).read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                limits.append(allowed - int((group / used).read_text()) + int(statistics[cache]))
            except (OSError, ValueError, KeyError):  # no such file, or no limit
                continue
    return min(limits, default=2**62) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _own_groups(controller: str) -> list[Path]:
    """The control groups that limit this process: its own, and those which that one is in."""
    mounted = MOUNTED / controller
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    inside = [path for line in lines for _, kind, path in [line.split(":", 2)] if controller in kind.split(",")]
    group = mounted / (inside[0] if inside else "").lstrip("/")
    return [place for place in (group, *group.parents) if place.is_relative_to(mounted)]
