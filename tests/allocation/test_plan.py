"""From profiles to a plan, for three budgets and two allocators, on a tiny model and on options set by hand."""

import copy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from rocket.allocation import ModelSize, Plan, Planner
from rocket.config.errors import RocketError
from rocket.config.schema import AllocationConfig, ProfilingConfig
from rocket.forms import Option
from rocket.profiling import LayerProfile


def hand_made(*layers: list[tuple[str, int, int, float]], **allocation: object) -> Planner:
    """Layers of 100 dense values and options (form, parameters, mask bits, cost); 50 more values of 4 bytes."""
    profiles = [
        LayerProfile(
            f"layer{number}",
            "layer0",
            10,
            10,
            "loss",
            0.0,
            (Option("dense", 100, 0, 0.0), *(Option(*fields) for fields in options)),
        )
        for number, options in enumerate(layers)
    ]
    size = ModelSize(100 * len(layers), 50, 200, itemsize=2)
    return Planner(profiles, size, ProfilingConfig(), AllocationConfig(**allocation))


TWO = ([("low_rank", 60, 0, 1.0), ("sparse", 55, 640, 0.5)], [("low_rank", 60, 0, 3.0), ("sparse", 90, 640, 0.1)])


def test_hand_solved():
    plan = hand_made(*TWO).at(removed_ratio=0.25)  # 150 values: sparse 55 + sparse 90 costs 0.6
    assert [option.parameters for option in plan.choices.values()] == [55, 90]
    assert plan.cost == pytest.approx(0.6)
    assert (plan.kept_target_parameters, plan.parameters) == (145, 195)
    assert plan.removed_ratio == pytest.approx(1 - 145 / 200)
    assert plan.bytes == 2 * 145 + 2 * 80 + 200
    assert plan.bytes_removed_ratio == pytest.approx(1 - 650 / 600)  # masks can cost more than they save
    assert plan.forms() == {"sparse": 2}


def test_bytes_count_masks():
    # 500 bytes leave 300: sparse layers take 190 and 260, low-rank ones 120, dense 200. Only 120 + 120 fits.
    plan = hand_made(*TWO).at(bytes=500)
    assert plan.forms() == {"low_rank": 2}
    assert plan.bytes == 440


def test_kept_parameters_count_the_whole_model():
    plan = hand_made(*TWO).at(kept_parameters=205)  # 155 for the layers: sparse 55 + dense 100 costs 0.5
    assert plan.parameters == 205
    assert plan.forms() == {"dense": 1, "sparse": 1}


@pytest.mark.parametrize(
    ("budget", "reach"),
    [
        ({"removed_ratio": 0.5}, "removed-0.50 cannot be reached: the profiled options remove at most 0.4250"),
        ({"kept_parameters": 160}, "keep at least 165 parameters"),
        ({"kept_parameters": 10}, "keep at least 165 parameters"),
        ({"bytes": 439}, "take at least 440 bytes"),
        ({"bytes": 1}, "take at least 440 bytes"),
    ],
)
@pytest.mark.parametrize("method", ["knapsack", "uniform"])
def test_budget_that_no_option_reaches(budget, reach, method):
    with pytest.raises(RocketError, match=reach):
        hand_made(*TWO, method=method).at(**budget)


def test_uniform_gives_every_layer_the_same_share():
    # 61 % kept: the cheapest option of each layer within 61 values, though the first could pay for the second.
    plan = hand_made(*TWO, method="uniform").at(removed_ratio=0.39)
    assert [option.parameters for option in plan.choices.values()] == [55, 60]
    with pytest.raises(RocketError, match=r"layer1 has no option that keeps at most 0\.58.. of it; .* 0\.6000"):
        hand_made(*TWO, method="uniform").at(removed_ratio=0.42)


def test_unknown_method():
    with pytest.raises(RocketError, match=r"allocation\.method='greedy': there are knapsack, uniform"):
        hand_made(*TWO, method="greedy").at(removed_ratio=0.2)


def test_cap_is_applied_before_the_choice():
    layers = ([("sparse", 80, 0, 0.1), ("sparse", 60, 0, 0.25)], [("sparse", 80, 0, 0.3), ("sparse", 100, 0, 0.0)])
    # Mean error at 80 % is 0.2. Uncapped, ruining the first layer (0.25 in all) beats sharing (0.4). Capped at
    # 1.3 · 0.2 its option of 0.25 is allowed again, for 1.0 to 1.2 leave 180 values.
    assert hand_made(*layers).at(removed_ratio=0.2).cost == pytest.approx(0.25)
    capped = hand_made(*layers, error_cap=True).at(removed_ratio=0.2)
    assert capped.cost == pytest.approx(0.25)
    layers[1].append(("sparse", 79, 0, 0.2))  # now α = 1.0 reaches 159 and forbids 0.25
    capped = hand_made(*layers, error_cap=True).at(removed_ratio=0.2)
    assert [option.parameters for option in capped.choices.values()] == [80, 79]


BUDGETS = [
    *({"removed_ratio": ratio} for ratio in (0.05, 0.2, 0.33, 0.5, 0.7)),
    *({"kept_parameters": share} for share in (0.95, 0.7)),
    *({"bytes": share} for share in (0.95, 0.7)),
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", ["knapsack", "uniform"])
def test_never_over_budget(planned, budget, method):
    planner = replace(planned.planner, allocation=AllocationConfig(method=method))
    ((kind, value),) = budget.items()
    if kind != "removed_ratio":
        value = int(value * getattr(planner.size, {"kept_parameters": "parameters"}.get(kind, kind)))
    plan = planner.at(**{kind: value})
    if kind == "removed_ratio":
        assert plan.removed_ratio >= value
        assert plan.kept_target_parameters <= (1 - value) * plan.size.target_parameters
    else:
        assert getattr(plan, {"kept_parameters": "parameters"}.get(kind, kind)) <= value
    assert set(plan.choices) == {profile.layer for profile in planner.profiles}


def test_knapsack_is_the_cheapest_combination():
    rng = np.random.default_rng(0)
    layers = [[("sparse", int(size), 0, float(rng.random())) for size in rng.integers(20, 99, 4)] for _ in range(4)]
    planner = hand_made(*layers)
    best = min(
        sum(option.cost for option in choice)
        for choice in product(*(profile.options for profile in planner.profiles))
        if sum(option.parameters for option in choice) <= 260
    )
    assert planner.at(removed_ratio=0.35).cost == pytest.approx(best)


def test_knapsack_is_no_worse_than_uniform(planned):
    uniform = replace(planned.planner, allocation=AllocationConfig(method="uniform"))
    for ratio in (0.2, 0.5):
        assert planned.planner.at(removed_ratio=ratio).cost <= uniform.at(removed_ratio=ratio).cost


def test_round_trip(planned):
    import json

    plan = planned.planner.at(removed_ratio=0.3)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())), plan.calibration)
    assert again == plan
    assert again.calibration is plan.calibration


STORED = {
    "budget": {"kind": "removed_ratio", "value": 0.3},
    "size": {"target_parameters": 100, "other_parameters": 1, "other_bytes": 4, "itemsize": 2},
    "profiling": {},
    "choices": {
        "a": {"form": "sparse", "parameters": 3, "mask_bits": 64, "cost": 1.0, "rank": 0, "nnz": 3, "input_group": "a"}
    },
}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("budget", "value"), 7.0, "removed_ratio=7.0 must lie between 0 and 1"),
        (("budget", "kind"), "size", "the plan: budget.kind: Input should be 'removed_ratio'"),
        (("size", "itemsize"), True, "the plan: size.itemsize: Input should be a valid integer"),
        (("size", "target_parameters"), 0, "the plan: size.target_parameters: Input should be greater than"),
        (("size",), None, "the plan: size: Input should be an object"),
        (("profiling", "forms"), "all", "the plan: profiling.forms: Input should be a valid array"),
        (("choices",), [], "the plan: choices: Input should be an object"),
        (("choices", "a", "nnz"), 3.0, "the plan: choices.a.nnz: Input should be a valid integer"),
        (("choices", "a", "nnz"), 2**64, "the plan: choices.a.nnz: Input should be less than or equal to"),
        (("choices", "a", "rank"), -1, "the plan: choices.a.rank: Input should be greater than or equal to 0"),
        (("choices", "a", "cost"), float("nan"), "the plan: choices.a.cost: Input should be a finite number"),
        (("choices", "a", "form"), {"a": 1}, "the plan: choices.a.form: Input should be a valid string"),
        (("choices", "a", "input_group"), None, "the plan: choices.a.input_group: Input should be a valid string"),
    ],
)
def test_malformed_plans(path, value, message):
    values = copy.deepcopy(STORED)
    assert Plan.from_dict(values).choices == {"a": Option("sparse", 3, 64, 1.0, 0, 3)}
    *parents, last = path
    section = values
    for parent in parents:
        section = section[parent]
    section[last] = value
    with pytest.raises(RocketError) as error:
        Plan.from_dict(values)
    assert message in str(error.value)


def test_sizes_beyond_32_bits():
    """Two layers of 2^33 values: sums of their sizes and the budget are 64-bit integers."""
    values = 2**33
    options = (Option("dense", values, 0, 0.0), Option("sparse", values // 2 + 1, values, 1.0))
    profiles = [LayerProfile(name, name, 2**17, 2**16, "loss", 0.0, options) for name in "ab"]
    planner = Planner(profiles, ModelSize(2 * values, 0, 0, itemsize=2), ProfilingConfig())
    plan = planner.at(removed_ratio=0.2)
    assert sorted(option.form for option in plan.choices.values()) == ["dense", "sparse"]
    assert plan.kept_target_parameters == values + values // 2 + 1
    assert plan.bytes == 2 * plan.kept_target_parameters + values // 8
    assert planner.at(bytes=plan.bytes).choices == plan.choices
    assert planner.at(bytes=plan.bytes - 1).cost == 2.0


def test_curve_stops_where_options_end(planned):
    curve = planned.planner.curve()
    assert [point.removed_ratio for point in curve] == sorted(point.removed_ratio for point in curve)
    assert [point.cost for point in curve] == sorted(point.cost for point in curve)
    assert len(hand_made(*TWO).curve()) == 8  # 0.05 to 0.40; 0.425 is the most
    (point,) = planned.planner.curve([0.3])
    plan = planned.planner.at(removed_ratio=0.3)
    assert (point.parameters, point.bytes, point.cost) == (plan.parameters, plan.bytes, plan.cost)
