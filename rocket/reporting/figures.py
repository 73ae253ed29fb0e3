"""Pictures for papers, by matplotlib (the extra ``report``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocket.allocation import CurvePoint, Plan, Planner
from rocket.reporting.charts import COSTS, Chart, over_what, predicted_series, size_quality_charts
from rocket.reporting.layout import Tower, form_letters, towers_of
from rocket.reporting.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

DPI = 200


def draw_report(summary: Summary, directory: Path) -> list[Path]:
    """size-quality.png and plan.png. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    charts = size_quality_charts(summary)
    columns = min(3, len(charts)) or 1
    rows = math.ceil(len(charts) / columns) or 1
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    for axes, chart in zip(figure.subplots(rows, columns, squeeze=False).flat, charts, strict=False):
        _draw_chart(axes, chart)
    for axes in figure.axes[len(charts) :]:
        axes.remove()
    quality, layers = directory / "size-quality.png", directory / "plan.png"
    figure.savefig(quality, dpi=DPI)
    towers = towers_of(summary.planner, summary.plan)
    figure = Figure(figsize=_map_size(towers), layout="constrained")
    _draw_towers(figure, towers, summary.plan)
    figure.savefig(layers, dpi=DPI)
    return [quality, layers]


def draw_plan(planner: Planner, points: Sequence[CurvePoint], plan: Plan, path: Path) -> None:
    """The curve of prices beside the map of a plan. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    towers = towers_of(planner, plan)
    width, height = _map_size(towers)
    figure = Figure(figsize=(5 + width, max(4.0, height)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[5, width])[0]
    series, unit = predicted_series(planner, points), COSTS[planner.profiling.cost]
    _draw_chart(left.subplots(), Chart("", unit, series, log=True, over=over_what(planner)))
    _draw_towers(right, towers, plan)
    figure.savefig(path, dpi=130)


def _draw_chart(axes: Any, chart: Chart) -> None:
    for series in chart.series:
        x, y = [point.x for point in series.points], [point.y for point in series.points]
        if series.line:
            axes.plot(x, y, "-" if series is chart.series[0] else "--", label=series.name)
            continue
        low = [point.y - (point.y if point.low is None else point.low) for point in series.points]
        high = [(point.y if point.high is None else point.high) - point.y for point in series.points]
        axes.errorbar(x, y, [low, high] if any(low + high) else None, fmt="o", capsize=3, label=series.name)
    axes.set(title=chart.title, xlabel=chart.over, ylabel=chart.unit, yscale="log" if chart.log else "linear")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)


def _map_size(towers: Sequence[Tower]) -> tuple[float, float]:
    """Inches: cells of a quarter inch beside and below what is written."""
    rows = sum(len(tower.kinds) + 3 for tower in towers)
    return 3.0 + 0.25 * max(len(tower.blocks) for tower in towers), 0.8 + 0.25 * rows


def _draw_towers(figure: Figure | SubFigure, towers: Sequence[Tower], plan: Plan) -> None:
    """Block by kind, shaded by the removed share, with the letters of the forms."""
    heights = [len(tower.kinds) + 2 for tower in towers]
    panels = figure.subplots(len(towers), 1, squeeze=False, height_ratios=heights)[:, 0]
    most = 100 * max(cell.removed_ratio for tower in towers for cell in tower.cells.values())
    for axes, tower in zip(panels, towers, strict=True):
        shares = [[math.nan] * len(tower.blocks) for _ in tower.kinds]
        for (block, kind), cell in tower.cells.items():
            column, row = tower.blocks.index(block), tower.kinds.index(kind)
            shares[row][column] = share = 100 * cell.removed_ratio
            color = "white" if share > 0.6 * most else "black"
            letters = form_letters(cell.forms)
            axes.text(column, row, letters, ha="center", va="center", fontsize=6, color=color)
        image = axes.imshow(shares, aspect="auto", cmap="YlOrRd", vmin=0, vmax=max(most, 1.0))
        step = math.ceil(len(tower.blocks) / 20)
        axes.set(xlabel=f"{tower.name} (block)" if tower.name else "block", yticks=range(len(tower.kinds)))
        axes.set_xticks(range(0, len(tower.blocks), step), tower.blocks[::step])
        axes.set_yticklabels(list(tower.kinds))
    panels[0].set_title("  ".join(f"{form_letters([form])} {form}" for form in sorted(plan.forms())), fontsize=8)
    figure.colorbar(image, ax=list(panels), label="removed, %")
