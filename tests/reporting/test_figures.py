"""Pictures for papers."""

import struct

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from rocket.evaluation import Evaluation, TaskResult
from rocket.reporting.figures import draw_plan, draw_report


def size_of(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def test_a_run(summary, tmp_path, drawn):
    quality, plan = draw_report(summary, tmp_path)
    assert (quality.name, plan.name) == ("size-quality.png", "plan.png")
    assert min(size_of(quality)) > 600
    assert min(size_of(plan)) > 300
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_label() == "predicted, knapsack"
    letters = [text.get_text() for text in drawn[1].axes[0].texts]
    assert len(letters) == len(summary.plan.choices)


def test_each_tower_has_a_map(invent, tmp_path, drawn):
    summary = invent(["encoder.0.x", "encoder.1.x", "decoder.0.x", "decoder.0.y", "decoder.1.x"])
    draw_report(summary, tmp_path)
    encoder, decoder, _ = drawn[1].axes  # and the colour bar
    assert [label.get_text() for label in encoder.get_yticklabels()] == ["x"]
    assert [label.get_text() for label in decoder.get_yticklabels()] == ["x", "y"]
    assert [text.get_text() for text in encoder.texts] == ["s", "·"]


def test_charts_fill_the_rows(invent, tmp_path, drawn):
    tasks = {name: TaskResult(name, "acc", 0.5, 0.1, 9, 0.5, ()) for name in ("arc_easy", "boolq", "piqa")}
    evaluation = Evaluation({}, tasks)
    draw_report(invent(["m.0.x", "m.0.y"], original=evaluation, compressed=evaluation), tmp_path)
    assert len(drawn[0].axes) == 4


def test_prices_beside_the_map(summary, tmp_path):
    path = tmp_path / "curve.png"
    draw_plan(summary.planner, summary.planner.curve(), summary.plan, path)
    assert min(size_of(path)) > 400


def test_without_anything_to_show(invent, tmp_path, monkeypatch):
    """All prices zero and nothing evaluated."""
    monkeypatch.setattr("rocket.reporting.figures.size_quality_charts", lambda summary: [])
    assert all(path.stat().st_size for path in draw_report(invent(["a.0.x"]), tmp_path))
