"""What is drawn of size and quality: the right points, from measured and predicted values alike."""

import math
from dataclasses import replace

import pytest

import rocket
from rocket.allocation import MeasuredPoint
from rocket.evaluation import Evaluation, Score, TaskResult
from rocket.reporting import charts
from rocket.reporting.charts import predicted_series, size_quality_charts
from rocket.reporting.measured import loss_increases

LAYERS = ["m.0.x", "m.0.y", "m.1.x", "m.1.y"]


def test_predicted_and_measured_of_a_run(summary):
    (chart,) = size_quality_charts(summary)
    series = {one.name: one for one in chart.series}
    (text,) = summary.original.perplexities
    assert list(series) == [
        "predicted, knapsack",
        "predicted, uniform",
        "predicted, dictionaries only",
        f"measured, {text} (uniform)",
        f"measured, {text} (knapsack)",
    ]
    curve = summary.planner.curve()
    assert series["predicted, knapsack"].points == [(100 * p.removed_ratio, p.cost, None, None) for p in curve]
    for other in ("predicted, uniform", "predicted, dictionaries only"):
        assert series[other].line
        for point in series[other].points:
            assert point.y >= summary.planner.at(removed_ratio=point.x / 100 - 1e-9).cost * (1 - 1e-9)
    sizes = [round(point.x) for point in series[f"measured, {text} (knapsack)"].points]
    assert sizes == [30, 50]
    assert not series[f"measured, {text} (knapsack)"].line
    increase = math.log(summary.compressed.perplexities[text] / summary.original.perplexities[text])
    assert series[f"measured, {text} (knapsack)"].points[0].y == pytest.approx(increase)


def test_measured_plans_correct_the_curve(invent):
    planner = replace(invent(LAYERS).planner, measured=[MeasuredPoint(0.25, 0.5, 1.0)])
    series = {one.name: one.points for one in predicted_series(planner)}
    predicted, corrected = series["predicted, knapsack"], series["corrected by measured plans"]
    assert [(point.x, point.y) for point in series["measured plans"]] == [(25.0, 1.0)]
    assert [point.y for point in corrected] == pytest.approx([2 * point.y for point in predicted])


def test_very_many_layers_have_few_sizes(invent, monkeypatch):
    planner = invent(LAYERS).planner
    names = [series.name for series in predicted_series(planner)]
    assert names == ["predicted, knapsack", "predicted, uniform", "predicted, dictionaries only"]
    monkeypatch.setattr(charts, "MANY_LAYERS", len(LAYERS) - 1)
    (few,) = predicted_series(planner)
    assert [point.x for point in few.points] == [12.5, 25.0, 37.5, 50.0, 50.0]


def test_other_costs_than_the_loss_have_a_chart_of_their_own(invent):
    before, after = Evaluation({"t": 10.0}, {}), Evaluation({"t": 12.0}, {})
    drawn = size_quality_charts(invent(LAYERS, cost="weight", original=before, compressed=after))
    assert [(chart.title, chart.unit) for chart in drawn] == [
        ("Predicted", "relative weight errors, summed"),
        ("Measured", "loss increase, nats a token"),
    ]
    assert drawn[1].series[0].points == [(25.0, pytest.approx(math.log(1.2)), None, None)]


@pytest.mark.parametrize(("perplexity", "log"), [(12.0, True), (9.0, False)])
def test_a_loss_that_fell_is_drawn_on_a_linear_scale(invent, perplexity, log):
    before, after = Evaluation({"t": 10.0}, {}), Evaluation({"t": perplexity}, {})
    (chart,) = size_quality_charts(invent(LAYERS, original=before, compressed=after))
    assert chart.log is log


def test_scores_have_a_chart_each_with_the_original_at_nothing_removed(invent):
    task = TaskResult("piqa", "acc", 0.5, 0.05, 100, 0.5, ())
    before = Evaluation({}, {"piqa": task}, {"clips": [Score("word error rate", 3.0, 2.0, 4.0)]})
    after = Evaluation({}, {"piqa": replace(task, accuracy=0.4)}, {"clips": [Score("word error rate", 5.0, 4.0, 6.0)]})
    drawn = {chart.title: chart for chart in size_quality_charts(invent(LAYERS, original=before, compressed=after))}
    assert drawn["word error rate, clips"].series[0].points == [(0.0, 3.0, 2.0, 4.0), (25.0, 5.0, 4.0, 6.0)]
    (piqa,) = drawn["piqa, accuracy, %"].series
    assert piqa.points[1] == pytest.approx((25.0, 40.0, 30.2, 49.8))


def test_perplexities_of_other_models_than_decoders_count_too():
    before = Evaluation({}, {}, {"text": [Score("perplexity", 10.0)]})
    after = Evaluation({}, {}, {"text": [Score("perplexity", 20.0)]})
    assert loss_increases(before, after) == {"text": pytest.approx(math.log(2))}


def test_infinite_perplexities_say_nothing(invent):
    before, after = Evaluation({"t": 10.0, "u": 10.0}, {}), Evaluation({"t": math.inf, "u": 11.0}, {})
    assert loss_increases(before, after) == {"u": pytest.approx(math.log(1.1))}
    (chart,) = size_quality_charts(invent(LAYERS, original=before, compressed=after))
    assert [one.name for one in chart.series if not one.line] == ["measured, u"]


def test_sizes_are_bytes_where_values_may_be_int8(planned, quick_settings):
    calib, profiling = quick_settings
    both = profiling.model_copy(update={"precisions": ["float", "int8"]})
    planner = rocket.plan(planned.model, planned.tokens, calib=calib, profiling=both)
    curve = planner.curve()
    assert [point.bytes for point in curve] == sorted((point.bytes for point in curve), reverse=True)
    assert all(point.bytes <= (1 - 0.05 * step) * planner.size.bytes for step, point in enumerate(curve, start=1))
    assert charts.over_what(planner) == charts.BYTES_REMOVED != charts.over_what(planned.planner)
    points = {one.name: one.points for one in predicted_series(planner)}["predicted, knapsack"]
    assert [point.x for point in points] == [100 * (1 - p.bytes / planner.size.bytes) for p in curve if p.cost > 0]


@pytest.mark.parametrize("perplexity", [0.0, -3.0, math.inf, math.nan])
def test_perplexities_that_are_none_say_nothing(perplexity):
    sound, broken = Evaluation({"t": 10.0}, {}), Evaluation({"t": perplexity}, {})
    assert loss_increases(sound, broken) == loss_increases(broken, sound) == {}


def test_losses_of_perplexities_at_both_ends():
    low, high = Evaluation({"t": 1e-300}, {}), Evaluation({"t": 1e300}, {})
    assert loss_increases(high, low) == {"t": pytest.approx(-600 * math.log(10))}
