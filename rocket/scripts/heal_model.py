"""Console entry point: healing."""

from __future__ import annotations

from rocket import pipeline
from rocket.scripts.cli import ConfigOption, SetOption, console, entry_point, run


def heal(config: ConfigOption = None, set_: SetOption = None) -> None:
    """Fine-tune the compressed model with its sparsity kept; without a healing section: --set healing.minutes=20."""
    path = run(pipeline.heal_model, config, set_)
    console.print(f"healed model: {path}\nrocket run with the same settings measures it", soft_wrap=True)


main = entry_point(heal)
