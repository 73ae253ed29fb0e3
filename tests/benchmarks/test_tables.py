"""Results as tables, by hand."""

import json

import pytest

from benchmarks import tables
from benchmarks.tables import pivot, source, table

RESULTS = [
    {"method": "b", "size": 0.4, "seed": 0, "loss": 1.0, "items": 500},
    {"method": "a", "size": 0.2001, "seed": 0, "loss": 0.1, "items": 500},
    {"method": "a", "size": 0.1999, "seed": 1, "loss": 0.3, "items": None},
    {"method": "a", "size": 0.4, "seed": 0, "note": "no loss measured"},
]


def test_means_over_what_is_no_row_or_column():
    assert pivot(RESULTS, ["method"], ["loss"], "size", format=".2f").splitlines() == [
        "| method | size 0.2 | size 0.4 |",
        "| --- | --- | --- |",
        "| b |  | 1.00 |",
        "| a | 0.20 |  |",
    ]


def test_spread_choice_and_order():
    choice = {"method": ["a", "b"], "seed": [0, 1]}
    lines = pivot(RESULTS, ["method"], ["loss"], "size", where=choice, format=".1f", spread=True).splitlines()
    assert lines[2:] == ["| a | 0.2 (0.1 to 0.3) |  |", "| b |  | 1.0 |"]
    assert pivot(RESULTS, ["method"], ["loss"], where={"method": ["b"]}).splitlines()[2:] == ["| b | 1 |"]


def test_several_values_and_sizes_in_words():
    rows = [{"over_original": 3.126, "removed_ratio": 0.3, "form": "sparse", "low": 1}]
    assert pivot(rows, ["form"], ["over_original", "low"], "removed_ratio").splitlines() == [
        "| form | over original, 30 % removed | low, 30 % removed |",
        "| --- | --- | --- |",
        "| sparse | 3.13 | 1 |",
    ]
    assert pivot(rows, ["form"], ["low"], "removed_ratio").splitlines()[0] == "| form | 30 % removed |"


def test_stacked_values():
    rows = [{"predicted": 0.2, "measured": 0.1, "removed_ratio": 0.3}, {"measured": 0.4, "removed_ratio": 0.5}]
    assert pivot(rows, [], ["predicted", "measured"], "removed_ratio", stacked=True).splitlines() == [
        "|  | 30 % removed | 50 % removed |",
        "| --- | --- | --- |",
        "| predicted | 0.2 |  |",
        "| measured | 0.1 | 0.4 |",
    ]


def test_words_stay_words():
    rows = [{"machine": "x", "kernel": "avx2", "at": None}, {"machine": "x", "kernel": "amx", "at": None}]
    assert pivot(rows, ["machine", "at"], ["kernel"]).splitlines()[2:] == ["| x |  | avx2, amx |"]


def test_nothing_to_show():
    with pytest.raises(ValueError, match="no result has los where"):
        pivot(RESULTS, ["method"], ["los"], where={"method": ["a"]})


def test_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    content = {
        "command": "python -m benchmarks.one ; python -m benchmarks.two",
        "date": "2026-01-02",
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 24, "gpu": None},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "rocket": None},
        "rows": RESULTS,
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    assert table("one.json", rows=["method"], values=["items"]).splitlines()[2:] == ["| b | 500 |", "| a | 500 |"]
    assert source("one.json").splitlines() == [
        "[one.json](../benchmarks/results/one.json), 2026-01-02, on A CPU, 2 cores, 24 GiB, no GPU; python 3.11.7, "
        "torch 2.13.0.",
        "",
        "<!-- not run: the measurement itself -->",
        "```bash",
        "python -m benchmarks.one",
        "python -m benchmarks.two",
        "```",
    ]
