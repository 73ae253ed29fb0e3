"""The picture and the table of what benchmarks.quality measured."""

import json

import pytest

from benchmarks.draw import collect, draw, merge, read_rows


def test_means_over_seeds(tmp_path):
    def row(method, size, seed, excess, predicted=None):
        return {
            "method": method,
            "text": "own",
            "target_removed_ratio": size,
            "seed": seed,
            "excess_loss": excess,
            "predicted_excess_loss": predicted,
        }

    first = [row("rocket", 0.2, 0, 0.1, 0.12), row("paper", 0.2, 0, 0.5), {"task": "piqa", "accuracy": 0.5}]
    second = [row("rocket", 0.2, 1, 0.3, 0.12), row("rocket", 0.4, 1, 0.9, 0.7)]
    for name, rows in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    rows = read_rows([tmp_path / "a.json", tmp_path / "b.json"])
    values = collect(rows, "excess_loss")
    assert values["rocket", "own", 0.2] == [0.1, 0.3]
    draw(values, collect(rows, "predicted_excess_loss"), ["paper", "rocket"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_merges_only_what_is_comparable(tmp_path):
    part = {"command": "a", "date": "2026-01-01", "machine": {"cpu": "x"}, "versions": {"torch": "2"}, "rows": [1]}
    paths = [tmp_path / name for name in ("a", "b")]
    paths[0].write_text(json.dumps(part))
    paths[1].write_text(json.dumps({**part, "command": "b", "date": "2026-01-02", "rows": [2]}))
    merged = merge(paths)
    assert (merged["command"], merged["date"], merged["rows"]) == ("a ; b", "2026-01-02", [1, 2])
    paths[1].write_text(json.dumps({**part, "machine": {"cpu": "y"}}))
    with pytest.raises(ValueError, match="differ in machine"):
        merge(paths)
