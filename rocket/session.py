"""One run: its config, its directory, its model, and what each artifact in the directory depends on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import transformers
from transformers import PreTrainedModel

from rocket.allocation import Budget, select_allocator
from rocket.config import Config, dump_config
from rocket.data import check_source, source_stamp
from rocket.forms import select_forms
from rocket.models import LinearLayer, identify_model, load_model, target_layers, unstack_experts
from rocket.run import RunDirectory, Usage, fingerprint, measure

logger = logging.getLogger(__name__)


class Session:
    """One run: its config, its directory, and the model, which is loaded when a stage first needs it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._reported: set[str] = set()
        self.model_identity = identify_model(config.model)
        self.forms = select_forms(config.profiling.forms)
        self.budget = Budget.from_config(config.compression)
        select_allocator(config.allocation.method)
        healing = [config.healing.source] if config.healing else []
        for source in (config.calib.source, *config.evaluation.texts, *config.evaluation.samples, *healing):
            check_source(source)
        identity = {
            "model": config.model.path,
            "model files": self.model_identity,
            **{f"calib.{key}": value for key, value in config.calib.model_dump().items() if key != "batch_size"},
        }
        self.run = RunDirectory(config.output_dir, identity)
        self.run.write_text("config.yaml", dump_config(config))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, Any]:
        with self.stage("load model"):
            model, tokenizer = load_model(self.config.model)
            unstack_experts(model)
            return model, tokenizer

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded[0]

    @cached_property
    def layers(self) -> dict[str, LinearLayer]:
        return target_layers(self.model, self.config.model.targets, self.config.model.ignore)

    def release_model(self) -> None:
        """Forget the original model, so that it and the compressed one need not be in memory together."""
        self.__dict__.pop("loaded", None)
        self.__dict__.pop("layers", None)

    @cached_property
    def calibration_fingerprint(self) -> str:
        return fingerprint(
            model=self.model_identity,
            names=transformers.__version__.partition(".")[0],  # which layers of some families are called by
            loading=self.config.model.model_dump(exclude={"device"}),
            calib=self.config.calib.model_dump(exclude={"batch_size"}),
            source=source_stamp(self.config.calib.source),
        )

    @cached_property
    def profile_fingerprint(self) -> str:
        return fingerprint(calibration=self.calibration_fingerprint, profiling=self.config.profiling.model_dump())

    @cached_property
    def plan_fingerprint(self) -> str:
        return fingerprint(
            profiles=self.profile_fingerprint,
            allocation=self.config.allocation.model_dump(),
            budget=vars(self.budget),
        )

    @cached_property
    def healing_fingerprint(self) -> str:
        healing = self.config.healing
        assert healing is not None
        return fingerprint(
            plan=self.plan_fingerprint,
            healing=healing.model_dump(exclude={"gradient_checkpointing", "save_steps"}),
            source=source_stamp(healing.source),
        )

    def evaluation_fingerprint(self, subject: str) -> str:
        settings = self.config.evaluation
        return fingerprint(
            subject=subject,
            evaluation=settings.model_dump(exclude={"batch_size"}),
            sources=[source_stamp(source) for source in (*settings.texts, *settings.samples)],
        )

    @property
    def checkpoint(self) -> str:
        """Where in the run directory the compressed model lies."""
        return f"models/{self.budget.name}"

    @property
    def healed_checkpoint(self) -> str:
        """Where in the run directory the healed model lies."""
        return f"{self.checkpoint}-healed"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, note its peak memory, and log both."""
        logger.info("%s ...", name)
        self._reported.add(name)
        with measure() as usage:
            yield
        self.run.log(name, **asdict(usage))
        usages = self.usages()
        usages[name] = usage
        content = {stage: asdict(entry) for stage, entry in usages.items()}
        self.run.write_json("usage.json", fingerprint(), content)
        logger.info("%s: %.1f s, peak memory %.0f MB", name, usage.seconds, usage.peak_mb)

    def usages(self) -> dict[str, Usage]:
        """What each stage took when it last ran."""
        content = self.run.read_json("usage.json", fingerprint()) or {}
        return {name: Usage(**values) for name, values in content.items()}

    def skip(self, name: str) -> None:
        """Say that a stage need not run; once, and not of one that this session ran itself."""
        if name in self._reported:
            return
        self._reported.add(name)
        logger.info("%s: skipped, its artifact is in %s", name, self.run.path)
        self.run.log(name, skipped=True)
