"""Draw what benchmarks.quality measured, and print it as a table: what each method loses at each size, on each text.

    python -m benchmarks.draw benchmarks/results/quality.json --output docs/quality.png

Values are means over the calibration seeds in the files; bars reach from the least to the largest. The dotted line is
what the plan predicted beforehand. Runs of different seeds and methods can be made one after the other or side by side,
each with its `--output`; name all their files here, and `--merge` makes one of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.tables import pivot

TITLES = {"embedded": "calibration domain, held out", "embedded:boolq": "another domain (Wikipedia)"}
METHODS = ["svd-llm", "paper", "rocket-dictionary", "wanda", "sparsegpt", "rocket-sparse", "rocket"]
Values = Mapping[tuple[str, str, float], Sequence[float]]


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of result files that are about a text."""
    return [row for path in paths for row in json.loads(path.read_text())["rows"] if "excess_loss" in row]


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Result files as one. Raises ValueError unless they come from the same kind of machine and the same versions."""
    parts = [json.loads(path.read_text()) for path in paths]
    for field in ("machine", "versions"):
        if any(part[field] != parts[0][field] for part in parts):
            raise ValueError(f"{', '.join(map(str, paths))} differ in {field}; they are not comparable")
    return {
        "command": " ; ".join(part["command"] for part in parts),
        "date": max(part["date"] for part in parts),
        "machine": parts[0]["machine"],
        "versions": parts[0]["versions"],
        "rows": [row for part in parts for row in part["rows"]],
    }


def check_one_calibration(rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError for rows of several calibration sets, which would be taken for seeds of one."""
    sets = {(row.get("calibration", "embedded"), row.get("calibration_tokens")) for row in rows}
    if len(sets) > 1:
        raise ValueError(f"calibrated on {sorted(sets)}: draw them apart")


def collect(rows: Iterable[Mapping[str, Any]], field: str) -> Values:
    """Values of a field by method, text and removed ratio, one for each seed."""
    found: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for row in rows:
        if row.get(field) is not None:
            found[row["method"], row["text"], row["target_removed_ratio"]].append(row[field])
    return found


def draw(values: Values, predicted: Values, methods: Sequence[str], path: Path) -> None:
    """A panel a text; loss increase over size, on a logarithmic scale."""
    texts = list(dict.fromkeys(text for _, text, _ in values))
    figure = Figure(figsize=(5 * len(texts), 3.8), layout="constrained")
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        for method in methods:
            sizes = sorted(size for name, where, size in values if (name, where) == (method, text))
            if not sizes:
                continue
            cells = [values[method, text, size] for size in sizes]
            means = [statistics.mean(cell) for cell in cells]
            below = [mean - min(cell) for mean, cell in zip(means, cells, strict=True)]
            above = [max(cell) - mean for mean, cell in zip(means, cells, strict=True)]
            removed = [100 * size for size in sizes]
            axes.errorbar(removed, means, [below, above], label=method, marker="o", capsize=3)
        sizes = sorted(size for name, where, size in predicted if (name, where) == ("rocket", text))
        means = [statistics.mean(predicted["rocket", text, size]) for size in sizes]
        axes.plot([100 * size for size in sizes], means, "k:", label="rocket, predicted beforehand")
        axes.set(title=TITLES.get(text, text), xlabel="removed, % of the target layers' parameters", yscale="log")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("loss increase, nats a token")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of benchmarks.quality")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--merge", type=Path, help="write the rows of all files into this one")
    parser.add_argument("--output", type=Path, default=Path("docs/quality.png"))
    args = parser.parse_args()
    if args.merge:
        merged = json.dumps(merge(args.results), indent=1, sort_keys=True)
        args.merge.write_text(merged + "\n", encoding="utf-8")
    rows = read_rows(args.results)
    check_one_calibration(rows)
    values = collect(rows, "excess_loss")
    choice = {"method": args.methods}
    print(pivot(rows, ["method", "text"], ["excess_loss"], "target_removed_ratio", where=choice, format=".3f"))
    draw(values, collect(rows, "predicted_excess_loss"), args.methods, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
