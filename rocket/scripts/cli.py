"""What all commands share: their options, how they end, how results are shown."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from safetensors import SafetensorError

from rocket.config import RocketError, load_config
from rocket.ranks import ranks
from rocket.reporting.measured import measured_rows
from rocket.reporting.summary import Summary
from rocket.session import Session

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file; see rocket/config/*.yaml. Default: rocket/config/default.yaml."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override a key, e.g. --set calib.num_samples=64. Repeatable."
    ),
]
DEFAULT_CONFIG = Path(__file__).parents[1] / "config" / "default.yaml"
Result = TypeVar("Result")

console = Console(markup=False, emoji=False)  # paths may hold brackets and colons


def run(
    stage: Callable[[Session], Result],
    config: Path | None,
    overrides: list[str] | None,
    shard: tuple[int, int] | None = None,
) -> Result:
    """Run one stage (and what it needs) on a config; end with exit code 2 and one line if the input is at fault.

    Of several processes that torchrun started, the first one speaks.
    """
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )
    logging.getLogger("rocket").setLevel(logging.INFO)
    try:
        ranks.join()
        if ranks.rank > 0:
            console.quiet = True
            logging.getLogger("rocket").setLevel(logging.ERROR)
        with Session(load_config(config or DEFAULT_CONFIG, overrides or ()), shard) as session:
            result = stage(session)
        ranks.leave()
        return result
    except RocketError as error:
        _fail(str(error), 2)
    except SafetensorError as error:
        _fail(f"{error}; what was finished before is kept", 2)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.filename or 'file'}: {error.strerror or error}; what was finished before is kept", 2)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on from here", 130)


def _fail(message: str, code: int) -> NoReturn:
    # What a stranger's file is quoted with must not steer the terminal.
    print("error: " + "".join(letter if letter.isprintable() else "?" for letter in message), file=sys.stderr)
    raise typer.Exit(code)


def entry_point(command: Callable[..., None]) -> Callable[[], None]:
    """A console command of a single function."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command)
    return app


def show_summary(summary: Summary) -> None:
    """The final table: original, compressed and healed side by side, then what each stage took."""
    plan = summary.plan
    table = Table(title=f"{plan.budget.name}: {plan}")
    for column in ("", "original", "compressed", "healed")[: 2 + len(summary.smaller)]:
        table.add_column(column, justify="left" if not column else "right")
    for name, before, after in (
        ("parameters", plan.size.parameters, plan.parameters),
        ("  of the target layers", plan.size.target_parameters, plan.kept_target_parameters),
        ("bytes of tensors", plan.size.bytes, plan.bytes),
    ):
        table.add_row(name, f"{before:,}", *[f"{after:,}"] * len(summary.smaller))
    for row in measured_rows(summary.original, *summary.smaller):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"bytes saved: {100 * plan.bytes_removed_ratio:.1f} % of the whole model (masks take 1 bit a position; "
        f"embeddings stay).  forms: {', '.join(f'{count} {form}' for form, count in sorted(plan.forms().items()))}"
    )
    stages = Table(title="stages")
    for column in ("stage", "seconds", "peak memory MB"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for stage, usage in summary.usages.items():
        stages.add_row(stage, f"{usage.seconds:.1f}", f"{usage.peak_mb:.0f}")
    console.print(stages)
    console.print(f"{'healed' if summary.healed else 'compressed'} model: {summary.path}", soft_wrap=True)
    console.print(f"report:           {summary.report}", soft_wrap=True)
    console.print(f"run directory:    {summary.run_directory}", soft_wrap=True)
