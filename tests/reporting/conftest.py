"""A tiny run with three sizes, one of them by another allocator; and summaries of models that were only made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rocket.allocation import Budget, ModelSize, Plan, Planner
from rocket.config import load_config
from rocket.config.schema import AllocationConfig, CompressionConfig, Config, ModelConfig, ProfilingConfig
from rocket.evaluation import Evaluation
from rocket.forms import Option
from rocket.pipeline import run_pipeline
from rocket.profiling import LayerProfile
from rocket.reporting.summary import MeasuredSize, Summary
from rocket.session import Session
from rocket.usage import Usage


@pytest.fixture(scope="session")
def summary(tmp_path_factory, furnish) -> Summary:
    """Of a tiny llama at 30 % removed, in a directory where 10 % by `uniform` and 50 % were measured too."""
    root = tmp_path_factory.mktemp("report")
    furnish(root)
    config = {
        "output_dir": str(root / "run"),
        "model": {"path": str(root / "model"), "dtype": "float32", "device": "cpu"},
        "calib": {"source": str(root / "texts.txt"), "num_samples": 8, "seq_len": 32, "sensitivity_samples": 4},
        "profiling": {
            "forms": ["low_rank", "dictionary", "sparse"],
            "removed_ratios": [0.1, 0.3, 0.5, 0.7],
            "rank_support_ratios": [1.5, 2.0],
        },
        "evaluation": {"texts": [str(root / "texts.txt")], "seq_len": 32, "max_tokens": 64},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    for overrides in (
        ["compression.removed_ratio=0.1", "allocation.method=uniform"],
        ["compression.removed_ratio=0.5"],
        ["compression.removed_ratio=0.3"],
    ):
        with Session(load_config(root / "config.yaml", overrides)) as session:
            finished = run_pipeline(session)
    return finished


@pytest.fixture
def invent() -> Callable[..., Summary]:
    """A summary of layers of 10 x 10 with these names, in turn half sparse at cost 0.25 and dense."""

    def make(
        layers: list[str],
        model: str = "model",
        cost: str = "loss",
        original: Evaluation | None = None,
        compressed: Evaluation | None = None,
        healed: Evaluation | None = None,
    ) -> Summary:
        dense, half = Option("dense", 100, 0, 0.0), Option("sparse", 50, 640, 0.25, nnz=50)
        profiling = ProfilingConfig(cost=cost, forms=["low_rank", "dictionary", "sparse"])
        profiles = [LayerProfile(name, name, 10, 10, cost, 0.0, (dense, half)) for name in layers]
        size = ModelSize(100 * len(layers), 1000, 2000, 2)
        choices = {name: half if number % 2 == 0 else dense for number, name in enumerate(layers)}
        plan = Plan(Budget("removed_ratio", 0.2), choices, {name: name for name in layers}, size, profiling)
        original, compressed = original or Evaluation({}, {}), compressed or Evaluation({}, {})
        config = Config(
            output_dir=Path("run"),
            model=ModelConfig(path=model),
            compression=CompressionConfig(removed_ratio=0.2),
            profiling=profiling,
        )
        return Summary(
            Path("run/models/removed-0.20"),
            config,
            Planner(profiles, size, profiling),
            plan,
            original,
            compressed,
            healed,
            [MeasuredSize(plan, AllocationConfig(), compressed)],
            {"compress": Usage(2.5, 100.0)},
        )

    return make
