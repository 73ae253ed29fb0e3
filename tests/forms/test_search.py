"""The dictionary's search skips options; what it chooses costs at most 0.1 % more than the exhaustive search's."""

import pytest
import torch

from rocket.calib import collect_grams, measure_sensitivities
from rocket.calib.collect import Calibration
from rocket.config.schema import ProfilingConfig
from rocket.factorization.dictionary import importance, projection_error, threshold
from rocket.forms import dictionary
from rocket.forms.dictionary import search, sizes_for

GRID = {
    "removed_ratios": [round(0.05 * i, 2) for i in range(1, 15)],
    "rank_support_ratios": [round(1 + 0.1 * i, 1) for i in range(21)],
}
PAPER = ProfilingConfig(**GRID, importance_exponent=0.5, thresholds="column", refits=0)
OURS = ProfilingConfig(**GRID, refits=0)
TOLERANCE = 1.001


def tempered_cost(problem, rank: int, support: int, settings: ProfilingConfig) -> float:
    """What the search minimises: the cost of the problem that is fitted."""
    basis = problem.tempered.basis
    scores = importance(problem.tempered, settings.importance_exponent)
    rows = basis.rows[:rank] * threshold(scores[:rank], support, settings.thresholds)
    squared_error = projection_error(problem.tempered.cost_target, problem.tempered.squared_norm, rows)
    return problem.tempered.to_cost(squared_error)


def exhaustive(problem, settings: ProfilingConfig) -> dict[float, float]:
    """The least cost of each removed ratio over all ρ, by the definition of the search (14 × 21 in the paper)."""
    best = {}
    for removed_ratio in settings.removed_ratios:
        costs = []
        for ratio in settings.rank_support_ratios:
            rank, support = sizes_for(problem.out_features, problem.in_features, removed_ratio, ratio)
            if 0 < support <= rank <= problem.max_rank:
                costs.append(tempered_cost(problem, rank, support, settings))
        if costs:
            best[removed_ratio] = min(costs)
    return best


def assert_as_good_as_exhaustive(problem, settings: ProfilingConfig) -> None:
    best = exhaustive(problem, settings)
    options = dictionary.options(problem, settings)
    assert len(options) == len(best)
    found = [tempered_cost(problem, o.rank, o.nnz // problem.out_features, settings) for o in options]
    worst = max(cost / least for cost, least in zip(found, best.values(), strict=True))
    assert worst <= TOLERANCE


SHAPES_AND_DECAYS = [((256, 256), 0.6), ((448, 192), 0.3), ((192, 448), 0.8), ((256, 256), 1.2)]
COSTS_AND_SETTINGS = [("weight", PAPER), ("activation", PAPER), ("loss", OURS)]


def synthetic_cases():
    for shape, decay in SHAPES_AND_DECAYS:
        for cost, settings in COSTS_AND_SETTINGS:
            yield pytest.param(shape, decay, cost, settings, id=f"{shape}-{decay}-{cost}")


# Small layers are left out: rounding k and s down to whole numbers roughens their error in ρ.
@pytest.mark.parametrize(("shape", "decay", "cost", "settings"), synthetic_cases())
def test_synthetic_layers(make_problem, shape, decay, cost, settings):
    assert_as_good_as_exhaustive(make_problem(*shape, cost, decay=decay), settings)


@pytest.mark.parametrize("shape", [(256, 256), (192, 448), (448, 192)])
def test_what_refits_gain_is_searched_too(make_problem, monkeypatch, shape):
    monkeypatch.setattr(dictionary, "_pace", lambda *_: 1.0)  # else it depends on the ratios there are
    problem = make_problem(*shape, "activation")
    settings = ProfilingConfig(**GRID)
    best: dict[float, float] = {}
    for removed_ratio in settings.removed_ratios:
        for ratio in settings.rank_support_ratios:
            alone = {"removed_ratios": [removed_ratio], "rank_support_ratios": [ratio]}
            for option in dictionary.options(problem, settings.model_copy(update=alone)):
                best[removed_ratio] = min(option.cost, best.get(removed_ratio, option.cost))
    options = dictionary.options(problem, settings)
    assert len(options) == len(best)
    for option, least in zip(options, best.values(), strict=True):
        assert option.cost <= TOLERANCE * least


@pytest.mark.parametrize("start", [None, 0, 7, 20])
def test_walk_finds_the_bottom_through_noise(start):
    errors = [abs(index - 13) + (0.9 if index % 2 else 0.0) for index in range(21)]
    asked: set[int] = set()

    def error(index: int) -> float:
        asked.add(index)
        return errors[index]

    valid = [index != 20 for index in range(21)]
    assert errors[search(error, valid, start)] == min(errors[:20])
    assert 20 not in asked


@pytest.fixture(scope="module")
def real_layers(smollm2) -> tuple[dict[str, torch.nn.Linear], Calibration]:
    names = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.3.self_attn.v_proj",
        "model.layers.15.mlp.up_proj",
        "model.layers.15.self_attn.o_proj",
        "model.layers.29.mlp.down_proj",
    ]
    layers = smollm2.layers(*names)
    batches = [{"input_ids": ids} for ids in smollm2.tokens.split(4)]
    statistics = collect_grams(smollm2.model, layers, batches)
    sensitivities = measure_sensitivities(smollm2.model, layers, [{"input_ids": smollm2.tokens[:2]}])
    return layers, Calibration(statistics.inputs, statistics.grams, statistics.tokens, sensitivities)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "cost", "settings"),
    [
        ("model.layers.0.self_attn.q_proj", "weight", PAPER),
        ("model.layers.3.self_attn.v_proj", "activation", PAPER),
        ("model.layers.15.self_attn.o_proj", "loss", OURS),
        ("model.layers.15.mlp.up_proj", "weight", PAPER),
        ("model.layers.29.mlp.down_proj", "loss", OURS),
    ],
)
def test_real_layers(real_layers, layer, cost, settings):
    layers, calibration = real_layers
    assert_as_good_as_exhaustive(
        calibration.problem(layer, layers[layer].weight, settings.model_copy(update={"cost": cost})), settings
    )
