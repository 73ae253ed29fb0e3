"""Console entry point: the profiling stage."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from rocket import pipeline
from rocket.scripts.cli import ConfigOption, SetOption, console, entry_point, run
from rocket.session import Session


def parse_shard(value: str) -> tuple[int, int]:
    """(i, n) of "i/n", 1 <= i <= n."""
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{value!r} is no part of a whole; write 1/4 for the first of four")
    return int(match[1]), int(match[2])


def profile_layers(
    config: ConfigOption = None,
    set_: SetOption = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Profile only this part of the layers, for machines that share output_dir but no network: run all N "
            "parts, at once if you like, after `rocket gather`.",
        ),
    ] = None,
) -> None:
    """Measure what every option of every layer costs. Independent of the budget: any size reuses it."""
    if shard is not None:
        left = run(_profile_shard, config, set_, parse_shard(shard))
        console.print(f"shard {shard} is profiled; {left} layers of other shards are not yet")
        return
    planner = run(pipeline.profile_layers, config, set_)
    options = sum(len(profile.options) for profile in planner.profiles)
    console.print(f"{len(planner.profiles)} layers, {options:,} options, cost: {planner.profiling.cost}")


def _profile_shard(session: Session) -> int:
    calibration, _ = pipeline.gather_activations(session)
    return sum(content is None for content in pipeline.profile_share(session, calibration).values())


main = entry_point(profile_layers)
