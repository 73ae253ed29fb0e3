"""Console entry point: evaluation."""

from __future__ import annotations

from rich.table import Table

from rocket import pipeline
from rocket.evaluation import Evaluation
from rocket.reporting.measured import measured_rows
from rocket.scripts.cli import ConfigOption, SetOption, console, entry_point, run
from rocket.session import Session


def evaluate(config: ConfigOption = None, set_: SetOption = None) -> None:
    """The original beside the compressed model: perplexity, zero-shot accuracy, or what fits the kind of model."""

    def stage(session: Session) -> list[Evaluation]:
        evaluations = [*pipeline.evaluate_models(session), pipeline.evaluate_healed(session)]
        return [evaluation for evaluation in evaluations if evaluation is not None]

    evaluations = run(stage, config, set_)
    table = Table("", *("original", "compressed", "healed")[: len(evaluations)])
    for row in measured_rows(*evaluations):
        table.add_row(*row)
    console.print(table)


main = entry_point(evaluate)
