"""The cost that an option promises is the cost of the matrix that is built."""

from dataclasses import replace

import pytest
import torch

from rocket.config.schema import ProfilingConfig
from rocket.factorization.problem import LayerProblem
from rocket.forms import FORMS
from rocket.forms.knots import interpolate

COSTS = ["weight", "activation", "loss"]
SHAPES = [(48, 96), (96, 48), (64, 64)]
ONE_SHOT = ProfilingConfig(
    removed_ratios=[0.05, 0.2, 0.5, 0.7],
    rank_support_ratios=[1.0, 1.5, 2.0, 3.0],
    importance_exponent=0.5,
    thresholds="column",
    refits=0,
)


def promised_and_real(problem, form, dense_weight, settings) -> list[tuple[float, float]]:
    options = FORMS[form].options(problem, settings)
    assert len(options) == len(settings.removed_ratios)
    pairs = []
    for option in options:
        state = FORMS[form].build(problem, option, settings)
        weight = dense_weight(state, option.spec(problem.in_features, problem.out_features, "").columns)
        pairs.append((option.cost, problem.evaluate(weight)))
    return pairs


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["dictionary", "low_rank"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_closed_forms_keep_their_promise(make_problem, dense_weight, form, shape, cost, shrinkage):
    problem = make_problem(*shape, cost, shrinkage=shrinkage)
    for settings in (ONE_SHOT, ONE_SHOT.model_copy(update={"thresholds": "matrix", "importance_exponent": 0.0})):
        for promised, real in promised_and_real(problem, form, dense_weight, settings):
            assert promised == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("cost", ["activation", "loss"])
@pytest.mark.parametrize("shape", [(128, 192), (192, 128), (160, 160)])
@pytest.mark.parametrize("refits", [1, 3, 8])
def test_dictionaries_are_priced_by_what_refits_gain(make_problem, dense_weight, shape, cost, refits):
    problem = make_problem(*shape, cost)
    settings = ProfilingConfig(removed_ratios=[0.3, 0.4, 0.5], rank_support_ratios=[2.5], refits=refits)
    one_shot = FORMS["dictionary"].options(problem, settings.model_copy(update={"refits": 0}))
    foretold = promised_and_real(problem, "dictionary", dense_weight, settings)
    for (promised, real), before in zip(foretold, one_shot, strict=True):
        assert promised == pytest.approx(real, rel=0.2)
        assert abs(promised - real) < 0.5 * (before.cost - real)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("weight", [torch.zeros(64, 64), torch.ones(64, 64)])
def test_layers_without_anything_to_refit(weight, cost):
    gram = torch.eye(64) + 0.5
    problem = LayerProblem(weight, gram, torch.ones(64), cost, 0.2)
    whole = problem.evaluate(torch.zeros_like(weight))
    for option in FORMS["dictionary"].options(problem, ProfilingConfig(removed_ratios=[0.2, 0.5, 0.9])):
        assert 0.0 <= option.cost <= 1e-3 * whole


@pytest.mark.parametrize("shape", [(128, 192), (192, 128), (160, 160)])
@pytest.mark.parametrize("removed_ratio", [0.2, 0.4])
def test_dictionaries_have_the_size_that_is_best_after_refits(make_problem, dense_weight, shape, removed_ratio):
    problem = make_problem(*shape, "loss")

    def real(ratios: list[float]) -> float:
        settings = ProfilingConfig(removed_ratios=[removed_ratio], rank_support_ratios=ratios)
        return promised_and_real(problem, "dictionary", dense_weight, settings)[0][1]

    ratios = [1.0, 1.5, 2.0, *([2.5, 3.0] if removed_ratio > 0.2 or shape[0] <= shape[1] else [])]  # those with room
    assert real(ratios) <= 1.1 * min(real([ratio]) for ratio in ratios)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", [(128, 192), (192, 128)])  # costs of smaller ones are rough in themselves
def test_sparse_costs_are_interpolated_within_a_tenth(make_problem, dense_weight, shape, cost):
    for promised, real in promised_and_real(make_problem(*shape, cost), "sparse", dense_weight, ProfilingConfig()):
        assert promised == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("ratios", [[0.5, 0.6, 0.7], [0.1, 0.2], [0.3, 0.4], [0.1, 0.15, 0.2, 0.25, 0.3], [0.4]])
def test_sparse_costs_of_few_sizes(make_problem, dense_weight, ratios):
    settings = ProfilingConfig(removed_ratios=ratios)
    for promised, real in promised_and_real(make_problem(128, 192, "loss"), "sparse", dense_weight, settings):
        assert promised == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("form", ["low_rank", "dictionary", "sparse", "sparse_low_rank"])
@pytest.mark.parametrize("cost", COSTS)
def test_removing_more_costs_more(make_problem, form, cost):
    options = FORMS[form].options(make_problem(64, 96, cost), ProfilingConfig())
    costs = [option.cost for option in options]
    assert costs == sorted(costs)
    sizes = [option.parameters for option in options]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", [(256, 384), (384, 256)])
@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_sparse_plus_low_rank_is_priced_by_what_further_iterations_gain(
    make_problem, dense_weight, shape, cost, shrinkage
):
    settings = ProfilingConfig(removed_ratios=[0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7])
    problem = make_problem(*shape, cost, shrinkage=shrinkage)
    for promised, real in promised_and_real(problem, "sparse_low_rank", dense_weight, settings):
        assert promised == pytest.approx(real, rel=0.15 if cost == "weight" else 0.3)  # the one is the other's root


@pytest.mark.parametrize("decay", [0.75, 1.0])  # of the inputs' deviations: their Gram matrix falls twice as fast
@pytest.mark.parametrize("cost", ["activation", "loss"])
def test_where_further_iterations_gain_little_the_price_says_so(dense_weight, decay, cost):
    """Steep spectra, and no shrinkage to flatten them."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(192, 192, generator=generator)).Q
    gram = (basis * (1.0 + torch.arange(192)) ** (-2 * decay)) @ basis.T
    weight = torch.randn(128, 192, generator=generator)
    problem = LayerProblem(weight, gram, torch.randn(128, generator=generator).exp(), cost, 0.0)
    for promised, real in promised_and_real(
        problem, "sparse_low_rank", dense_weight, ProfilingConfig(removed_ratios=[0.1, 0.2, 0.3, 0.5, 0.7])
    ):
        assert 0.8 * real < promised < 1.4 * real


@pytest.mark.parametrize("shape", [(128, 192), (192, 128)])
def test_sparse_plus_low_rank_beats_sparse_where_there_is_a_low_rank_part(make_problem, dense_weight, shape):
    problem = make_problem(*shape, "loss")
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    problem = replace(problem, weight=problem.weight + 3 * low_rank)
    settings = ProfilingConfig(removed_ratios=[0.05, 0.1, 0.2, 0.3, 0.5, 0.7])
    options = FORMS["sparse_low_rank"].options(problem, settings)
    assert len(options) == 5  # where 5 % is removed there is no room for a low-rank part that is worth its while
    plain = dict(zip(settings.removed_ratios[1:], FORMS["sparse"].options(problem, settings)[1:], strict=True))
    for option, twin in zip(options, plain.values(), strict=True):
        state = FORMS["sparse_low_rank"].build(problem, option, settings)
        real = problem.evaluate(dense_weight(state, option.rank + problem.in_features))
        assert 0.5 * option.cost < real < 1.5 * option.cost
        assert option.parameters > 0.85 * problem.weight.numel() or real < twin.cost


def degenerate(kind: str, size: int, generator: torch.Generator) -> torch.Tensor:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    match kind:
        case "rank one":
            return normal(size, 1) @ normal(1, size)
        case "rank two":
            return normal(size, 2) @ normal(2, size)
        case "equal rows":
            return normal(1, size).expand(size, size).contiguous()
        case "constant rows":
            return normal(size, 1).expand(size, size).contiguous()
        case "few entries":
            return normal(size, size) * (torch.rand(size, size, generator=generator) < 0.02)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["rank one", "rank two", "equal rows", "constant rows", "few entries"])
@pytest.mark.parametrize("tokens", [None, 64, 512])
def test_weights_of_lower_rank_than_there_are_atoms(dense_weight, kind, tokens):
    """There the low-rank part alone is exact, and what is left for the sparse one is rounding."""
    size = 192
    generator = torch.Generator().manual_seed(0)
    weight = degenerate(kind, size, generator)
    inputs = torch.eye(size) * size**0.5 if tokens is None else torch.randn(tokens, size, generator=generator)
    gram = inputs.T @ inputs / len(inputs)
    problem = LayerProblem(weight, gram, torch.rand(size, generator=generator), "loss", 0.2)
    settings = ProfilingConfig(removed_ratios=[0.1, 0.3, 0.5, 0.7])
    whole = problem.evaluate(torch.zeros_like(weight))
    for option in FORMS["sparse_low_rank"].options(problem, settings):
        assert 0.0 <= option.cost < 1e-3 * whole
        state = FORMS["sparse_low_rank"].build(problem, option, settings)
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
        assert problem.evaluate(dense_weight(state, option.rank + size)) < 1e-3 * whole


def test_interpolation_meets_its_knots():
    knots, costs = [0.05, 0.3, 0.5, 0.7], [0.001, 0.05, 0.2, 0.5]
    assert [interpolate(knot, knots, costs) for knot in knots] == pytest.approx(costs)
    assert interpolate(0.3, [0.3], [0.7]) == pytest.approx(0.7)
    assert interpolate(0.2, [0.1, 0.3], [0.0, 1.0]) == pytest.approx(0.5)  # no logarithm of 0
