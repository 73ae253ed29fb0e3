"""Console entry point: the whole pipeline."""

from __future__ import annotations

from rocket import pipeline
from rocket.scripts.cli import ConfigOption, SetOption, entry_point, run, show_summary


def run_pipeline(config: ConfigOption = None, set_: SetOption = None) -> None:
    """Calibrate, profile, plan, compress, heal if the config says so, evaluate.

    Again: redoes nothing; another budget reuses profiles.
    """
    show_summary(run(pipeline.run_pipeline, config, set_))


main = entry_point(run_pipeline)
