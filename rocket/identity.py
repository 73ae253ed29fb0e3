"""What each artifact of a run depends on, as fingerprints: it is made anew when its own changes, and only then."""

from __future__ import annotations

from functools import cached_property

import torch
import transformers

from rocket.allocation import Budget
from rocket.config import Config
from rocket.config.schema import AllocationConfig
from rocket.data import source_stamp
from rocket.models import identify_model, resolve_device
from rocket.ranks import ranks
from rocket.run import fingerprint

TRANSFORMERS = transformers.__version__.partition(".")[0]
"""What layers and weights of some families are called depends on it."""


class Identity:
    """The fingerprints of one run's artifacts. Each holds those of what the artifact is made from."""

    def __init__(self, config: Config, budget: Budget) -> None:
        self._config = config
        self._budget = budget
        self._model = identify_model(config.model)

    @property
    def run(self) -> dict[str, object]:
        """What the run directory is about: with another model or calibration set it is another run."""
        calib = self._config.calib.model_dump(exclude={"batch_size"})
        return {
            "model": self._config.model.path,
            "model files": self._model,
            **{f"calib.{key}": value for key, value in calib.items()},
        }

    @property
    def rewritten(self) -> str:
        loading = self._config.model.model_dump(include={"path", "revision", "dtype", "trust_remote_code"})
        return fingerprint(model=self._model, names=TRANSFORMERS, loading=loading)

    @cached_property
    def calibration(self) -> str:
        return fingerprint(
            model=self._model,
            names=TRANSFORMERS,
            loading=self._config.model.model_dump(exclude={"device"}),
            calib=self._config.calib.model_dump(exclude={"batch_size"}),
            source=source_stamp(self._config.calib.source),
        )

    @property
    def hidden_states(self) -> str:
        """Of a calibration pass, to the bit."""
        return fingerprint(
            calibration=self.calibration,
            batch_size=self._config.calib.batch_size,
            device=str(resolve_device(self._config.model.device)),
            processes=ranks.count,
            versions=[torch.__version__, transformers.__version__],
        )

    @cached_property
    def profiles(self) -> str:
        return fingerprint(calibration=self.calibration, profiling=self._config.profiling.model_dump())

    @property
    def prices(self) -> str:
        return fingerprint(profiles=self.profiles, allocation=self._config.allocation.model_dump())

    @cached_property
    def plan(self) -> str:
        return self.plan_of(self._budget, self._config.allocation)

    def plan_of(self, budget: Budget, allocation: AllocationConfig) -> str:
        return fingerprint(profiles=self.profiles, allocation=allocation.model_dump(), budget=vars(budget))

    @cached_property
    def healed(self) -> str:
        healing = self._config.healing
        assert healing is not None
        return fingerprint(
            plan=self.plan,
            healing=healing.model_dump(exclude={"gradient_checkpointing", "save_steps"}),
            source=source_stamp(healing.source),
        )

    @property
    def dense(self) -> str:
        """The finished model as plain weights."""
        return fingerprint(dense=self.plan if self._config.healing is None else self.healed)

    @property
    def original(self) -> str:
        """The model as it came, as a subject of `evaluation`."""
        return fingerprint(model=self._model, dtype=self._config.model.dtype)

    def evaluation(self, subject: str) -> str:
        """What is measured of a model: the original, or a checkpoint with the fingerprint ``subject``."""
        settings = self._config.evaluation
        return fingerprint(
            subject=subject,
            evaluation=settings.model_dump(exclude={"batch_size"}),
            sources=[source_stamp(source) for source in (*settings.texts, *settings.samples)],
        )
