"""A plan and the curve of prices, as tables and as a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rocket.allocation import CurvePoint, Plan, Planner
from rocket.scripts.cli import console

COSTS = {
    "loss": "predicted loss increase (nats)",
    "weight": "relative weight errors, summed",
    "activation": "relative output errors, summed",
}
LETTERS = {"dense": "·", "low_rank": "l", "dictionary": "d", "sparse": "s"}


def show_curve(planner: Planner, points: Sequence[CurvePoint]) -> None:
    """Every size and its price; corrected, and as a factor on the perplexity, where plans were measured."""
    table = Table("removed %", "parameters", "bytes", COSTS[planner.profiling.cost], title="size and its price")
    if planner.measured:
        table.add_column("corrected (nats)")
        table.add_column("perplexity x")
    for point in points:
        row = [f"{100 * point.removed_ratio:.1f}", f"{point.parameters:,}", f"{point.bytes:,}", f"{point.cost:.4f}"]
        if point.loss_increase is not None:
            row += [f"{point.loss_increase:.4f}", f"{math.exp(min(point.loss_increase, 700.0)):.3f}"]
        table.add_row(*row)
    console.print(table)
    for measured in planner.measured:
        console.print(
            f"measured at {100 * measured.removed_ratio:.1f} % removed: {measured.loss_increase:.4f} nats, "
            f"predicted {measured.cost:.4f}"
        )


def show_plan(planner: Planner, plan: Plan) -> None:
    """The plan by kind of layer: how many take each form, and how much of them goes."""
    forms, dense = sorted(plan.forms()), _dense_sizes(planner)
    table = Table("layers", *forms, "removed %", title=f"{plan.budget.name}: what becomes of which layers")
    for kind, layers in _by_kind(plan).items():
        counts = [sum(plan.choices[layer].form == form for layer in layers) for form in forms]
        share = 1 - sum(plan.choices[layer].parameters for layer in layers) / sum(dense[layer] for layer in layers)
        table.add_row(kind, *(str(count) if count else "" for count in counts), f"{100 * share:.1f}")
    console.print(table)
    console.print(f"{plan.budget.name}: cost {plan.cost:.4f}; {plan.bytes:,} bytes")


def draw_plan(planner: Planner, points: Sequence[CurvePoint], plan: Plan, path: Path) -> None:
    """The curve of prices, and a map of the plan by block and kind of layer. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    curve, layers = figure.subplots(1, 2)
    removed = [100 * point.removed_ratio for point in points]
    curve.plot(removed, [point.cost for point in points], label="predicted")
    if planner.measured:
        curve.plot(removed, [point.loss_increase for point in points], "--", label="corrected by measured plans")
        sizes = [100 * point.removed_ratio for point in planner.measured]
        curve.plot(sizes, [point.loss_increase for point in planner.measured], "o", label="measured")
    curve.set(xlabel="removed, % of the target layers' parameters", ylabel=COSTS[planner.profiling.cost], yscale="log")
    curve.grid(alpha=0.3)
    curve.legend()

    kinds, dense = _by_kind(plan), _dense_sizes(planner)
    blocks = list(dict.fromkeys(_block(layer) for layer in plan.choices))
    shares = [[math.nan] * len(blocks) for _ in kinds]
    for row, names in enumerate(kinds.values()):
        for column, block in enumerate(blocks):
            here = [name for name in names if _block(name) == block]
            if here:
                kept = sum(plan.choices[name].parameters for name in here) / sum(dense[name] for name in here)
                shares[row][column] = 100 * (1 - kept)
                letters = "".join(sorted({LETTERS.get(plan.choices[name].form, "?") for name in here}))
                layers.text(column, row, letters, ha="center", va="center", fontsize=6)
    image = layers.imshow(shares, aspect="auto", cmap="YlOrRd", vmin=0)
    layers.set(xlabel="block", yticks=range(len(kinds)), yticklabels=list(kinds))
    layers.set_title("  ".join(f"{LETTERS.get(form, '?')} {form}" for form in sorted(plan.forms())), fontsize=8)
    figure.colorbar(image, ax=layers, label="removed, %")
    figure.savefig(path, dpi=130)


def _dense_sizes(planner: Planner) -> dict[str, int]:
    return {profile.layer: profile.parameters for profile in planner.profiles}


def _by_kind(plan: Plan) -> dict[str, list[str]]:
    """Layers by their name within the block, numbers (of experts) left out, in the order of the model."""
    kinds: dict[str, list[str]] = {}
    for layer in plan.choices:
        inside = layer.removeprefix(_block(layer)).removeprefix(".") or layer
        kinds.setdefault(re.sub(r"\d+", "*", inside), []).append(layer)
    return kinds


def _block(layer: str) -> str:
    """A layer's name up to its first number: ``model.layers.7``."""
    found = re.match(r"(.*?\.\d+)(?:\.|$)", layer)
    return found[1] if found else layer
