"""report.html: one file that shows a run, without any request to elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rocket.allocation import Prediction
from rocket.config import dump_config
from rocket.reporting.card import how_trained
from rocket.reporting.charts import COSTS, size_quality_charts
from rocket.reporting.energy import METHODS
from rocket.reporting.environment import machine, versions
from rocket.reporting.layout import Cell, Tower, form_letters, towers_of
from rocket.reporting.measured import loss_increases, measured_rows
from rocket.reporting.summary import Summary

SHADES = 8
COST_DECADES = 4


def render_report(summary: Summary) -> str:
    """The HTML of a run: headline, size against quality, the plan as a map, error curves of each layer, what it took.

    Scripts, styles and data are inlined. The page's own policy forbids it to load anything.
    """
    environment = Environment(
        loader=PackageLoader("rocket.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": readable_bytes, "count": readable_count, "figure": figure}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    loader = environment.loader
    assert loader is not None

    def asset(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    towers = towers_of(summary.planner, summary.plan)
    shades = Shades(towers)
    energies = [usage for usage in summary.usages.values() if usage.energy_kwh is not None]
    return environment.get_template("report.html.j2").render(
        css=asset("report.css"),
        js=asset("report.js"),
        summary=summary,
        plan=summary.plan,
        trained=how_trained(summary.healed is not None),
        size=summary.plan.size,
        cost_unit=COSTS[summary.planner.profiling.cost],
        rows=measured_rows(summary.original, *summary.smaller),
        increases=loss_increases(summary.original, summary.compressed),
        healed_increases=loss_increases(summary.original, summary.healed) if summary.healed else {},
        corrected=_corrected(summary),
        towers=towers,
        shades=shades,
        letters=form_letters,
        describe=describe,
        forms=sorted(summary.plan.forms().items()),
        usages=summary.usages,
        has_gpu=any(usage.gpu_peak_mb is not None for usage in summary.usages.values()),
        energies=energies,
        energy_methods=list(dict.fromkeys(METHODS[usage.energy_source] for usage in energies if usage.energy_source)),
        command=f"rocket run --config {summary.run_directory / 'config.yaml'}",
        settings=dump_config(summary.config),
        machine=machine(),
        versions=versions(),
        data=finite(
            {
                "charts": [asdict(chart) for chart in size_quality_charts(summary)],
                "layers": dict(_layers(summary)),
                "unit": COSTS[summary.planner.profiling.cost],
            }
        ),
    )


class Shades:
    """How dark cells are: by the removed share in tenths, by the cost in halves of a decade below the largest."""

    def __init__(self, towers: list[Tower]) -> None:
        self.largest = max((cell.cost for tower in towers for cell in tower.cells.values()), default=0.0)

    def removed(self, cell: Cell) -> int:
        return min(SHADES, math.ceil(10 * cell.removed_ratio - 1e-9))

    def cost(self, cell: Cell) -> int:
        if cell.cost <= 0:
            return 0
        decades = math.log10(cell.cost / self.largest)
        return max(1, SHADES + math.floor(decades * SHADES / COST_DECADES + 1e-9))


def describe(cell: Cell) -> str:
    """A cell in words.

    >>> describe(Cell(("a", "b"), {"dense": 1, "sparse": 1}, 0.25, 0.0125))
    '2 layers (1 dense, 1 sparse), 25.0 % removed, cost 0.0125'
    """
    if len(cell.layers) == 1:
        what = ", ".join(cell.forms)
    else:
        what = f"{len(cell.layers)} layers ({', '.join(f'{count} {form}' for form, count in cell.forms.items())})"
    return f"{what}, {100 * cell.removed_ratio:.1f} % removed, cost {figure(cell.cost)}"


def _corrected(summary: Summary) -> float | None:
    """The predicted increase of the loss as measured plans correct it; None without any."""
    if not summary.planner.measured:
        return None
    return Prediction.fit(summary.planner.measured)(summary.plan.cost)


def _layers(summary: Summary) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each layer its shape, every profiled option by form as [removed %, cost], and the chosen one."""
    for profile in summary.planner.profiles:
        choice, itemsize = summary.plan.choices[profile.layer], summary.plan.size.itemsize_of(profile.layer)
        options: dict[str, list[list[float]]] = {}
        for option in profile.options:
            removed = 100 * (1 - option.parameters / profile.parameters)
            options.setdefault(option.label, []).append([round(removed, 2), float(f"{option.cost:.4g}")])
        yield (
            profile.layer,
            {
                "shape": [profile.out_features, profile.in_features],
                "options": options,
                "chosen": [
                    choice.label,
                    round(100 * (1 - choice.parameters / profile.parameters), 2),
                    float(f"{choice.cost:.4g}"),
                ],
                "bytes": choice.bytes(itemsize),
                "dense_bytes": profile.parameters * itemsize,
            },
        )


def finite(value: Any) -> Any:
    """The same data with None for numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def figure(value: float) -> str:
    """Three digits that count.

    >>> figure(0.01234), figure(1234.5), figure(999.7), figure(0.0)
    ('0.0123', '1,234', '1,000', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def readable_count(value: float) -> str:
    """
    >>> readable_count(134_515_008), readable_count(8.2e9), readable_count(950)
    ('134.5 M', '8.2 B', '950')
    """
    return _scaled(value, ["", "K", "M", "B", "T"])


def readable_bytes(value: float) -> str:
    """
    >>> readable_bytes(269_060_552), readable_bytes(512)
    ('269.1 MB', '512 B')
    """
    return _scaled(value, ["B", "KB", "MB", "GB", "TB"])


def _scaled(value: float, units: list[str]) -> str:
    power = 0
    while value >= 999.95 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.1f}".removesuffix(".0") + f" {units[power]}" * bool(units[power])
