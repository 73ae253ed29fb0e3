"""Console entry point: evaluation."""

from __future__ import annotations

from rich.table import Table

from rocket import pipeline
from rocket.reporting.measured import measured_rows
from rocket.scripts.cli import ConfigOption, SetOption, console, entry_point, run


def evaluate(config: ConfigOption = None, set_: SetOption = None) -> None:
    """The original beside the compressed model: perplexity, zero-shot accuracy, or what fits the kind of model."""
    original, compressed = run(pipeline.evaluate_models, config, set_)
    table = Table("", "original", "compressed")
    for row in measured_rows(original, compressed):
        table.add_row(*row)
    console.print(table)


main = entry_point(evaluate)
