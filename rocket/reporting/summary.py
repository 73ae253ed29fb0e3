"""A finished run, as its table, its report and its pictures tell of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rocket.allocation import Plan, Planner
from rocket.config.schema import AllocationConfig, Config
from rocket.evaluation import Evaluation
from rocket.usage import Usage


@dataclass(frozen=True)
class MeasuredSize:
    """A size of the same profiles that was built and evaluated, and how its options were chosen."""

    plan: Plan
    allocation: AllocationConfig
    evaluation: Evaluation

    @property
    def chosen_by(self) -> str:
        return f"{self.allocation.method}{', error cap' if self.allocation.error_cap else ''}"


@dataclass(frozen=True)
class Summary:
    """A finished run.

    ``path`` is the checkpoint in the run directory: the healed one, if the config heals. ``sizes`` is everything that
    was measured there in the same way and by the same profiles, this run's own plan among them, by size. ``usages`` is
    what each stage took when it last ran.
    """

    path: Path
    config: Config
    planner: Planner
    plan: Plan
    original: Evaluation
    compressed: Evaluation
    healed: Evaluation | None
    sizes: Sequence[MeasuredSize]
    usages: Mapping[str, Usage]

    @property
    def smaller(self) -> list[Evaluation]:
        """What was measured of the compressed model, and of the healed one if there is one."""
        return [self.compressed, *([self.healed] if self.healed else [])]

    @property
    def run_directory(self) -> Path:
        return self.path.parents[1]

    @property
    def report(self) -> Path:
        """The report in the run directory."""
        return self.run_directory / "report.html"
