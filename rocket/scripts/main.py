"""The umbrella command: ``rocket run``, ``rocket plan``, ..."""

from __future__ import annotations

from typing import Annotated

import typer

from rocket import __version__, pipeline
from rocket.config import RocketError
from rocket.reporting.figures import draw_plan, draw_report
from rocket.scripts.cli import ConfigOption, SetOption, console, run
from rocket.scripts.compress_model import compress
from rocket.scripts.evaluate_model import evaluate
from rocket.scripts.gather_activations import gather_activations
from rocket.scripts.heal_model import heal
from rocket.scripts.plan_view import show_curve, show_plan
from rocket.scripts.profile_layers import profile_layers
from rocket.scripts.run_full_pipeline import run_pipeline
from rocket.session import Session

main = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Take 20-50 % of the weights out of a trained transformer, without training, and know beforehand what it "
    "costs.\n\n"
    "Start with: rocket run --set output_dir=output/first\n\n"
    "Each command runs the stages before it where their artifacts are missing from output_dir, and skips them "
    "otherwise.",
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        console.print(f"rocket {__version__}", highlight=False)
        raise typer.Exit


@main.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What is asked of no single command; the text of ``--help`` is the application's."""


def plan(
    config: ConfigOption = None,
    set_: SetOption = None,
    measure: Annotated[
        list[float] | None,
        typer.Option(
            metavar="RATIO",
            help="Build and measure the plan of this removed ratio, to correct the curve. At most twice.",
        ),
    ] = None,
) -> None:
    """Show what each size would cost before any is built, and the plan for the config's budget."""

    def stage(session: Session) -> None:
        planner = pipeline.measure_prices(session, measure) if measure else pipeline.profile_layers(session)
        points, chosen = planner.curve(), pipeline.make_plan(session)
        show_curve(planner, points)
        show_plan(planner, chosen)
        path = session.run.path / "plans" / "curve.png"
        try:
            draw_plan(planner, points, chosen, path)
        except ImportError:
            console.print("no picture of it: pip install matplotlib")
        else:
            console.print(f"picture: {path}", soft_wrap=True)

    run(stage, config, set_)


def export(
    dense: Annotated[bool, typer.Option("--dense", help="Multiply every layer out into plain weights.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Write the compressed model for engines that know nothing of rocket. It saves no memory there."""
    if not dense:
        raise typer.BadParameter("say --dense; models/BUDGET in the run directory is the compressed checkpoint itself")
    console.print(f"dense model: {run(pipeline.export_dense, config, set_)}", soft_wrap=True)


def report(
    config: ConfigOption = None,
    set_: SetOption = None,
    png: Annotated[bool, typer.Option("--png", help="Also size-quality.png and plan.png, for papers.")] = False,
) -> None:
    """Write report.html anew: size against quality, the plan as a map, error curves, what each stage took."""

    def stage(session: Session) -> None:
        summary = pipeline.run_pipeline(session)
        paths = [summary.report]
        if png:
            try:
                paths += draw_report(summary, summary.run_directory)
            except ImportError:
                raise RocketError("--png needs a package: pip install matplotlib") from None
        for path in paths:
            console.print(f"report: {path}", soft_wrap=True)

    run(stage, config, set_)


main.command("run")(run_pipeline)
main.command("gather")(gather_activations)
main.command("profile")(profile_layers)
main.command("plan")(plan)
main.command("compress")(compress)
main.command("heal")(heal)
main.command("evaluate")(evaluate)
main.command("report")(report)
main.command("export")(export)
