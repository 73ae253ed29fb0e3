"""Predicted loss, corrected by measured points."""

import pytest

from rocket.allocation.prediction import MeasuredPoint, Prediction


def fit(*points: tuple[float, float]) -> Prediction:
    return Prediction.fit([MeasuredPoint(0.3, cost, increase) for cost, increase in points])


def test_without_points_the_cost_itself():
    assert fit()(0.3) == pytest.approx(0.3)


def test_one_point_scales():
    assert fit((0.2, 0.3))(0.1) == pytest.approx(0.15)


def test_two_points_are_met_and_a_power_law_lies_between():
    # 2 c²: 0.02 at 0.1, 0.32 at 0.4
    prediction = fit((0.4, 0.32), (0.1, 0.02))
    assert [prediction(cost) for cost in (0.1, 0.2, 0.4)] == pytest.approx([0.02, 0.08, 0.32])


def test_nothing_lost_for_nothing():
    assert fit((0.1, 0.2))(0.0) == 0.0


@pytest.mark.parametrize("points", [[(0.1, -0.01), (0.4, 0.8)], [(0.0, 0.3), (0.4, 0.8)]])
def test_points_below_the_noise_are_passed_over(points):
    assert fit(*points) == fit((0.4, 0.8))


def test_a_loss_that_falls_with_the_cost_gives_the_least_exponent():
    prediction = fit((0.1, 0.5), (0.4, 0.2))
    assert [prediction(cost) for cost in (0.1, 0.4)] == pytest.approx([0.1, 0.2])


def test_points_close_together_do_not_extrapolate_wildly():
    # Through both points the exponent would be 7.3, and the price at 0.4 over a thousand nats.
    prediction = fit((0.10, 0.05), (0.11, 0.10))
    assert [prediction(cost) for cost in (0.11, 0.44)] == pytest.approx([0.10, 1.60])


def test_three_points_are_too_many():
    with pytest.raises(ValueError, match="at most 2 measured points, got 3"):
        fit(*[(0.1, 0.1)] * 3)
