"""One run: its config, its directory and its model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from rocket.allocation import Budget, select_allocator
from rocket.config import Config, RocketError, dump_config
from rocket.config.records import read_record
from rocket.data import check_source
from rocket.forms import select_forms
from rocket.identity import Identity
from rocket.memory import Memory, estimate_memory
from rocket.models import (
    LinearLayer,
    load_model,
    release_pages,
    resolve_device,
    rewrite,
    target_layers,
    unlike_model,
    unstack_experts,
    weight_of,
)
from rocket.ranks import ranks, shares
from rocket.reporting.energy import EnergyMeter
from rocket.run import RunDirectory, fingerprint
from rocket.usage import Usage, measure

REWRITTEN = "original"

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


class Session:
    """One run: its config, its directory, and the model, which is loaded when a stage first needs it.

    ``shard`` (i, n) is the part that this process has of the profiling, where several work on one directory without
    knowing of each other.
    """

    def __init__(self, config: Config, shard: tuple[int, int] | None = None) -> None:
        self.config = config
        self.shard = shard
        self._reported: set[str] = set()
        self.budget = Budget.from_config(config.compression)
        self.identity = Identity(config, self.budget)
        self.forms = select_forms(config.profiling.forms)
        select_allocator(config.allocation.method)
        if config.healing is not None and ranks.count > 1:
            raise RocketError(
                "healing starts a process for each GPU by itself; leave it out under torchrun (--set healing=null) "
                "and run `rocket heal` afterwards, alone"
            )
        self._energy = EnergyMeter(config.reporting)
        healing = [config.healing.source] if config.healing else []
        for source in (config.calib.source, *config.evaluation.texts, *config.evaluation.samples, *healing):
            check_source(source)
        if self.leads:
            self.run = RunDirectory(config.output_dir, self.identity.run, lock="shared" if shard else "alone")
            self.run.write_text("config.yaml", dump_config(config))
        self.wait()
        if not self.leads:
            self.run = RunDirectory(config.output_dir, self.identity.run, lock=None)
        if ranks.count > 1:  # processes agree on it, and some of them may never load the model
            _ = self.rewritten

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, Any]:
        streams, states, rewritten = self.streams, self.states, self.rewritten
        with self.stage("load model"):
            model, processor = load_model(self.config.model, streams, states, rewritten)
            unstack_experts(model)
            return model, processor

    @cached_property
    def rewritten(self) -> Path | None:
        """Where the weights of a streamed model are, if its own files do not hold them as the model has them."""
        tensor = self.agree(unlike_model(self.config.model)) if self.streams else None
        if tensor is None:
            return None
        made_of = self.identity.rewritten
        if self.leads and not self.run.has_directory(REWRITTEN, made_of):
            if self.shard:
                raise RocketError(
                    f"{tensor} is not stored as the model has it, and several shards must not write the weights again "
                    "at once: run `rocket gather` first, with the same memory_budget"
                )
            logger.info("%s is not stored as the model has it: the weights are written again", tensor)
            if self.memory is not None:
                self.memory.check_rewriting()
            with self.stage("rewrite model"), self.run.new_directory(REWRITTEN, made_of) as directory:
                rewrite(self.config.model, directory)
        self.wait()
        return self.run.path / REWRITTEN

    @cached_property
    def memory(self) -> Memory | None:
        """What the run will take of it; found out, and said, before anything is read."""
        memory = self.agree(estimate_memory(self.config))
        if memory is not None:
            logger.info("%s", memory)
            memory.check()
        elif self.config.memory_budget is not None:
            raise RocketError(
                f"memory_budget cannot be kept with model.path={self.config.model.path!r}: only models in "
                "safetensors are streamed"
            )
        return memory

    @property
    def streams(self) -> bool:
        """Whether the model's blocks come into memory one by one."""
        return self.memory is not None and self.memory.streams

    @property
    def states(self) -> Path | None:
        """Where hidden states wait while blocks come and go; None: in memory."""
        return self.run.path / "states" if self.memory is not None and self.memory.spills else None

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded[0]

    @cached_property
    def layers(self) -> dict[str, LinearLayer]:
        return target_layers(self.model, self.config.model.targets, self.config.model.ignore)

    def weight(self, layer: LinearLayer) -> Tensor:
        """The weight [out, in] of a layer, where it is to be worked on."""
        return weight_of(layer).to(resolve_device(self.config.model.device))

    def let_go(self, *tensors: Tensor) -> None:
        """Give the memory of mapped tensors back, where the model's weights do not stay in memory."""
        if self.streams:
            release_pages(tensors)

    @property
    def leads(self) -> bool:
        """Whether this process does what only one of several does: it is the first."""
        return ranks.rank == 0

    def my_share(self, costs: Mapping[str, float]) -> list[str]:
        """What of the work, by name, is this process's own."""
        number, parts = self.shard or (ranks.rank + 1, ranks.count)
        return shares(costs, parts)[number - 1]

    def agree(self, item: Item) -> Item:
        """What the first process thinks, so that all go the same way whatever they find in the directory by then."""
        return ranks.broadcast(item, source=0)

    def wait(self) -> None:
        """Until all processes have come here."""
        ranks.barrier()

    def release_model(self) -> None:
        """Forget the original model, so that it and the compressed one need not be in memory together."""
        self.__dict__.pop("loaded", None)
        self.__dict__.pop("layers", None)

    @property
    def checkpoint(self) -> str:
        """Where in the run directory the compressed model lies."""
        return f"models/{self.budget.name}"

    @property
    def healed_checkpoint(self) -> str:
        """Where in the run directory the healed model lies."""
        return f"models/{self.budget.healed_name}"

    @property
    def finished_checkpoint(self) -> str:
        """Where the model lies that the run is for: the healed one, if the config heals."""
        return self.checkpoint if self.config.healing is None else self.healed_checkpoint

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, note its peak memory (and its energy, where that is wanted), and log all."""
        logger.info("%s ...", name)
        self._reported.add(name)
        with measure() as usage, self._energy.measure(usage):
            yield
        if not self.leads:
            return
        self.run.log(name, **asdict(usage))
        if self.shard:  # others would overwrite it
            return
        usages = self.usages()
        usages[name] = usage
        content = {stage: asdict(entry) for stage, entry in usages.items()}
        self.run.write_json("usage.json", fingerprint(), content)
        logger.info("%s: %.1f s, peak memory %.0f MB", name, usage.seconds, usage.peak_mb)

    def usages(self) -> dict[str, Usage]:
        """What each stage took when it last ran."""
        content = self.run.read_json("usage.json", fingerprint()) or {}
        return read_record(dict[str, Usage], content, self.run.path / "usage.json")

    def skip(self, name: str) -> None:
        """Say that a stage need not run; once, and not of one that this session ran itself."""
        if name in self._reported:
            return
        self._reported.add(name)
        logger.info("%s: skipped, its artifact is in %s", name, self.run.path)
        if self.leads:
            self.run.log(name, skipped=True)
