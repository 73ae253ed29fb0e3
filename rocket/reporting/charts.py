"""Size against quality: what is drawn of it, in report.html and for papers alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rocket.allocation import CurvePoint, Plan, Planner
from rocket.config.schema import AllocationConfig
from rocket.evaluation import Evaluation
from rocket.reporting.measured import loss_increases
from rocket.reporting.summary import MeasuredSize, Summary

COSTS = {
    "loss": "loss increase, nats a token",
    "weight": "relative weight errors, summed",
    "activation": "relative output errors, summed",
}
REMOVED = "removed, % of the target layers' parameters"
BYTES_REMOVED = "removed, % of the whole checkpoint's bytes"
MANY_LAYERS = 5000
FEW_SIZES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Of more layers than `MANY_LAYERS` only these sizes are planned: there a knapsack takes seconds, not milliseconds."""


class Point(NamedTuple):
    """``x`` in per cent removed; ``low`` and ``high`` are the 95 % interval of ``y`` where one is known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together. A ``line`` was computed; without one they were measured."""

    name: str
    points: Sequence[Point]
    line: bool = False


@dataclass(frozen=True)
class Chart:
    """Series over the removed share; ``log`` where all values are positive and a logarithm shows them better.

    ``over`` says what is removed: values, or bytes where values have different sizes.
    """

    title: str
    unit: str
    series: Sequence[Series]
    log: bool = False
    over: str = REMOVED


def size_quality_charts(summary: Summary) -> list[Chart]:
    """Predicted and measured loss in one chart where the plan predicts a loss, then one for every other score."""
    cost, over = summary.planner.profiling.cost, over_what(summary.planner)
    predicted, measured = predicted_series(summary.planner), list(_loss_series(summary))
    if cost == "loss":
        charts = [_chart("Predicted and measured", COSTS[cost], [*predicted, *measured], log=True)]
    else:
        charts = [
            _chart("Predicted", COSTS[cost], predicted, log=True),
            _chart("Measured", COSTS["loss"], measured, log=True),
        ]
    return [replace(chart, over=over) for chart in [*charts, *_score_charts(summary)] if chart.series]


def over_what(planner: Planner) -> str:
    """What sizes are shares of."""
    return BYTES_REMOVED if planner.by_bytes else REMOVED


def _share(planner: Planner, size: CurvePoint | Plan) -> float:
    """The removed share of that."""
    return 1 - size.bytes / planner.size.bytes if planner.by_bytes else size.removed_ratio


def _chart(title: str, unit: str, series: Sequence[Series], log: bool = False) -> Chart:
    filled = [one for one in series if one.points]
    return Chart(title, unit, filled, log and all(point.y > 0 for one in filled for point in one.points))


def predicted_series(planner: Planner, points: Sequence[CurvePoint] | None = None) -> list[Series]:
    """The price of each size as planned, corrected by measured plans, and what other choices of the options predict.

    ``points`` is the planner's curve, where it is known. Prices of 0 are left out: nothing of a curve is seen there.
    Models of very many experts have few sizes and no comparison.
    """
    many = len(planner.profiles) > MANY_LAYERS
    if points is None:
        points = planner.curve(FEW_SIZES if many else None)
    prices = ((_share(planner, point), point.cost) for point in points)
    series = [_line(f"predicted, {planner.allocation.method}", prices)]
    if planner.measured:
        corrected = ((_share(planner, point), point.loss_increase or 0.0) for point in points)
        series.append(_line("corrected by measured plans", corrected))
    if planner.measured and not planner.by_bytes:
        found = [Point(100 * point.removed_ratio, point.loss_increase) for point in planner.measured]
        series.append(Series("measured plans", found))
    for name, other in () if many else _other_planners(planner):
        series.append(_line(name, ((_share(planner, point), point.cost) for point in other.curve())))
    return series


def _line(name: str, values: Iterator[tuple[float, float]]) -> Series:
    return Series(name, [Point(100 * ratio, value) for ratio, value in values if value > 0], line=True)


def _other_planners(planner: Planner) -> Iterator[tuple[str, Planner]]:
    """What the plan is to be compared with: the same share for every layer, and the paper's form alone."""
    planner = replace(planner, measured=())
    if planner.allocation.method != "uniform":
        yield "predicted, uniform", replace(planner, allocation=AllocationConfig(method="uniform"))
    if {"dictionary"} < set(planner.profiling.forms) and "float" in planner.profiling.precisions:
        profiles = [
            replace(profile, options=tuple(one for one in profile.options if one.label in ("dense", "dictionary")))
            for profile in planner.profiles
        ]
        yield "predicted, dictionaries only", replace(planner, profiles=profiles)


def _loss_series(summary: Summary) -> Iterator[Series]:
    """Measured increase of the loss, a series for each text and each way in which options were chosen."""
    for chosen_by, sizes in _by_choice(summary.sizes):
        increases = [
            (_share(summary.planner, size.plan), loss_increases(summary.original, size.evaluation)) for size in sizes
        ]
        for text in dict.fromkeys(text for _, found in increases for text in found):
            points = [Point(100 * ratio, found[text]) for ratio, found in increases if text in found]
            yield Series(_named(f"measured, {text}", chosen_by, summary), points)
    if summary.healed:
        ratio = _share(summary.planner, summary.plan)
        for text, increase in loss_increases(summary.original, summary.healed).items():
            yield Series(f"healed, {text}", [Point(100 * ratio, increase)])


def _score_charts(summary: Summary) -> Iterator[Chart]:
    """A chart for each task and each score that is no perplexity; the original is at 0 % removed."""
    for name in dict.fromkeys([*_scores(summary.original), *_scores(summary.compressed)]):
        series = []
        for chosen_by, sizes in _by_choice(summary.sizes):
            measured = [(_share(summary.planner, size.plan), _scores(size.evaluation)) for size in sizes]
            values = [(0.0, _scores(summary.original)), *measured]
            points = [scores[name]._replace(x=100 * ratio) for ratio, scores in values if name in scores]
            series.append(Series(_named("measured", chosen_by, summary), points))
        if summary.healed and (point := _scores(summary.healed).get(name)):
            series.append(Series("healed", [point._replace(x=100 * _share(summary.planner, summary.plan))]))
        yield _chart(name, "", series)


def _scores(evaluation: Evaluation) -> dict[str, Point]:
    """Scores by the name that they have in tables, at no size."""
    found = {
        f"{score.name}, {source}": Point(0.0, score.value, score.low, score.high)
        for source, scores in evaluation.scores.items()
        for score in scores
        if score.name != "perplexity"
    }
    for task, result in evaluation.accuracies.items():
        accuracy, margin = 100 * result.accuracy, 196 * result.stderr
        found[f"{task}, accuracy, %"] = Point(0.0, accuracy, accuracy - margin, accuracy + margin)
    return {name: point for name, point in found.items() if math.isfinite(point.y)}


def _by_choice(sizes: Sequence[MeasuredSize]) -> Iterator[tuple[str, list[MeasuredSize]]]:
    for chosen_by in dict.fromkeys(size.chosen_by for size in sizes):
        yield chosen_by, [size for size in sizes if size.chosen_by == chosen_by]


def _named(name: str, chosen_by: str, summary: Summary) -> str:
    """The name, with the choice beside it only where the run directory holds several."""
    several = len({size.chosen_by for size in summary.sizes}) > 1
    return f"{name} ({chosen_by})" if several else name
