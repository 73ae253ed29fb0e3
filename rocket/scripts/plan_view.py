"""A plan and the curve of prices, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from rocket.allocation import CurvePoint, Plan, Planner
from rocket.reporting.charts import COSTS
from rocket.reporting.layout import layers_by_kind
from rocket.scripts.cli import console


def show_curve(planner: Planner, points: Sequence[CurvePoint]) -> None:
    """Every size and its price; corrected, and as a factor on the perplexity, where plans were measured."""
    price = f"predicted {COSTS[planner.profiling.cost]}"
    table = Table("removed %", "parameters", "bytes", price, title="size and its price")
    if planner.measured:
        table.add_column("corrected (nats)")
        table.add_column("perplexity x")
    for point in points:
        row = [f"{100 * point.removed_ratio:.1f}", f"{point.parameters:,}", f"{point.bytes:,}", f"{point.cost:.4g}"]
        if point.loss_increase is not None:
            row += [f"{point.loss_increase:.4f}", f"{math.exp(min(point.loss_increase, 700.0)):.3f}"]
        table.add_row(*row)
    console.print(table)
    for measured in planner.measured:
        console.print(
            f"measured at {100 * measured.removed_ratio:.1f} % removed: {measured.loss_increase:.4f} nats, "
            f"predicted {measured.cost:.4g}"
        )


def show_plan(planner: Planner, plan: Plan) -> None:
    """The plan by kind of layer: how many take each form, and how much of them goes."""
    forms = sorted(plan.forms())
    dense = {profile.layer: profile.parameters for profile in planner.profiles}
    table = Table("layers", *forms, "removed %", title=f"{plan.budget.name}: what becomes of which layers")
    for kind, layers in layers_by_kind(plan.choices).items():
        counts = [sum(plan.choices[layer].label == form for layer in layers) for form in forms]
        share = 1 - sum(plan.choices[layer].parameters for layer in layers) / sum(dense[layer] for layer in layers)
        table.add_row(kind, *(str(count) if count else "" for count in counts), f"{100 * share:.1f}")
    console.print(table)
    console.print(f"{plan.budget.name}: cost {plan.cost:.4g}; {plan.bytes:,} bytes")
