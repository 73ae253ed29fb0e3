"""The paper's factorization, against numpy's SVD and least squares, and against itself built step by step."""

import numpy as np
import pytest
import torch

from rocket.factorization.dictionary import (
    factorize,
    fit_dictionary,
    gram_factor,
    importance,
    keep_largest,
    projection_error,
    threshold,
)
from rocket.factorization.problem import LayerProblem

SHAPES = [(12, 20), (20, 12), (16, 16), (1, 9), (9, 1)]
COSTS = ["weight", "activation", "loss"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output_weights(problem: LayerProblem) -> np.ndarray:
    return problem.sensitivity.double().numpy() ** 0.5 if problem.cost == "loss" else np.ones(problem.out_features)


def whitened(problem: LayerProblem) -> tuple[np.ndarray, ...]:
    """Z = S Wᵀ (columns weighted as the cost says) and its singular value decomposition, in numpy."""
    root = np.linalg.cholesky(problem.gram.double().numpy()).T
    target = root @ (problem.weight.double().numpy().T * output_weights(problem))
    return target, *np.linalg.svd(target, full_matrices=False)


def whitened_svd(problem: LayerProblem, rank: int) -> np.ndarray:
    """SVD-LLM (arXiv 2403.07378) in numpy: truncate Z, take S back out."""
    root = np.linalg.cholesky(problem.gram.double().numpy()).T
    _, left, values, right = whitened(problem)
    truncated = left[:, :rank] * values[:rank] @ right[:rank]
    return (np.linalg.solve(root, truncated) / output_weights(problem)).T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cost", COSTS)
def test_full_support_is_the_whitened_svd(make_problem, shape, cost):
    problem = make_problem(*shape, cost)
    for rank in {1, max(1, min(shape) // 2), min(shape)}:
        dictionary, coefficients, mask = factorize(problem, rank, rank)
        assert mask.all()
        np.testing.assert_allclose(coefficients @ dictionary, whitened_svd(problem, rank), rtol=0, atol=2e-5)


def test_hand_solved_rank_one():
    # Whitening by diag(1, 2) turns rows (3, 0) and (0, 2) of W into columns (3, 0) and (0, 4): the second wins.
    problem = LayerProblem(
        torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.diag(torch.tensor([1.0, 4.0])), cost="activation"
    )
    dictionary, coefficients, _ = factorize(problem, 1, 1)
    torch.testing.assert_close((coefficients @ dictionary).float(), torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    assert problem.evaluate(coefficients @ dictionary) == pytest.approx(9 / 25)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cost", ["activation", "loss"])
def test_basis_is_numpys_svd(make_problem, shape, cost):
    problem = make_problem(*shape, cost)
    target, left, values, right = whitened(problem)
    basis = problem.basis
    np.testing.assert_allclose(basis.scales, values, rtol=1e-5)
    np.testing.assert_allclose(np.abs(basis.rows.numpy() * right).sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(problem.target.T @ problem.target, target.T @ target, atol=1e-6 * values[0] ** 2)
    assert problem.target.shape == (min(shape), shape[0])
    root = np.linalg.cholesky(problem.gram.double().numpy()).T
    expected = np.linalg.norm(np.linalg.solve(root, left * values), axis=0)
    np.testing.assert_allclose(problem.weight_scales, expected, rtol=1e-4)


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, [12.0, 2.0]), (1.0, [3.0, 18.0]), (0.5, [6.0, 6.0])])
def test_importance_weighs_whitened_against_weight_space(exponent, expected):
    # Coefficients 12 and 2 of atoms whose weight-space norms are 1/4 and 9; eq. 6 is their geometric mean.
    weight, gram = torch.diag(torch.tensor([3.0, 18.0])), torch.diag(torch.tensor([16.0, 1 / 81]))
    problem = LayerProblem(weight, gram, cost="activation")
    assert importance(problem, exponent).diagonal().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 3, 6, 7, 9])
def test_keep_largest_keeps_the_earlier_of_equals(count):
    scores = torch.randint(0, 4, (7, 50), generator=torch.Generator().manual_seed(0)).float()
    order = np.argsort(-scores.numpy(), axis=0, kind="stable")[:count]
    expected = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(expected, order, True, axis=0)
    np.testing.assert_array_equal(keep_largest(scores, count), expected)


def test_threshold_keeps_as_many_in_either_way():
    scores = torch.tensor([[9.0, 1.0], [8.0, 2.0], [7.0, 3.0]])
    assert threshold(scores, 1, "column").tolist() == [[True, False], [False, False], [False, True]]
    assert threshold(scores, 1, "matrix").tolist() == [[True, False], [True, False], [False, False]]


def test_fit_dictionary_is_least_squares():
    target, coefficients = random(9, 40), random(6, 40, seed=1) * (random(6, 40, seed=2) > 0)
    expected = np.linalg.lstsq(coefficients.numpy().T, target.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(fit_dictionary(target, coefficients), expected, rtol=1e-8, atol=1e-10)


def test_atoms_that_no_output_uses_need_only_a_ridge():
    coefficients = random(4, 10)
    coefficients[2] = 0
    coefficients[3] = coefficients[1]
    dictionary = fit_dictionary(random(5, 10, seed=1), coefficients)
    expected = np.linalg.lstsq(coefficients.numpy().T, random(5, 10, seed=1).numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(dictionary @ coefficients, expected @ coefficients.numpy(), atol=1e-4)


def test_gram_factor_refuses_what_no_ridge_can_mend():
    with pytest.raises(ValueError, match="not positive definite"):
        gram_factor(torch.full((2, 3), float("nan")))


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("rank", "support"), [(4, 2), (8, 3), (10, 10)])
def test_projection_error_is_the_cost_of_the_built_dictionary(make_problem, shape, cost, rank, support):
    """The identity that the search rests on: Ŵᵀ = S⁻¹DC = WᵀΠ in any metric, with no dictionary formed."""
    problem = make_problem(*shape, cost)
    basis = problem.basis
    mask = keep_largest(importance(problem)[:rank], support)
    short = problem.to_cost(projection_error(problem.cost_target, problem.squared_norm, basis.rows[:rank] * mask))

    coefficients = basis.rows[:rank].double() * mask
    target = torch.from_numpy(whitened(problem)[0])
    root = torch.linalg.cholesky(problem.gram.double()).T
    weight = torch.linalg.solve(root, fit_dictionary(target, coefficients)) @ coefficients / output_weights(problem)
    assert short == pytest.approx(problem.evaluate(weight.T), rel=1e-4)


@pytest.mark.parametrize("cost", COSTS)
def test_factorize_stores_what_it_says(make_problem, cost):
    problem = make_problem(24, 32, cost)
    dictionary, coefficients, mask = factorize(problem, rank=10, support=4)
    assert dictionary.shape == (10, 32)
    assert coefficients.shape == mask.shape == (24, 10)
    assert (mask.sum(dim=1) == 4).all()
    assert (coefficients[~mask] == 0).all()
    # Balanced, so that half precision holds both factors alike.
    torch.testing.assert_close(dictionary.abs().amax(dim=1), coefficients.abs().amax(dim=0))


def test_closed_form_update_beats_the_eigenvectors(make_problem):
    problem = make_problem(24, 32, "activation")
    mask = keep_largest(importance(problem)[:12], 4)
    target, left, values, right = whitened(problem)
    before = target - left[:, :12] * values[:12] @ (right[:12] * mask.numpy())
    dictionary, coefficients, _ = factorize(problem, 12, 4)
    after = problem.evaluate(coefficients @ dictionary)
    assert after < problem.to_cost(float((before**2).sum()))


@pytest.mark.parametrize("cost", ["activation", "loss"])
@pytest.mark.parametrize("thresholds", ["column", "matrix"])
def test_refits_lower_the_error_and_keep_the_count(make_problem, cost, thresholds):
    problem = make_problem(48, 64, cost)
    errors = []
    for refits in (0, 1, 3):
        dictionary, coefficients, mask = factorize(problem, 20, 8, exponent=0.0, thresholds=thresholds, refits=refits)
        assert int(mask.sum()) == 8 * 48
        assert not coefficients[~mask].any()
        errors.append(problem.evaluate(coefficients @ dictionary))
    assert errors[2] < errors[1] < errors[0]


def test_exponent_is_used(make_problem):
    problem = make_problem(24, 32)
    masks = [factorize(problem, 12, 4, exponent=exponent)[2] for exponent in (0.0, 0.5, 1.0)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_dead_channels_and_few_tokens(make_problem):
    problem = make_problem(12, 30, "activation", tokens=10)
    gram = problem.gram.clone()
    gram[3], gram[:, 3] = 0, 0
    problem = LayerProblem(problem.weight, gram, cost="activation")
    dictionary, coefficients, _ = factorize(problem, 10, 10)
    assert torch.isfinite(coefficients @ dictionary).all()
    assert problem.evaluate(coefficients @ dictionary) < 1e-3  # ten tokens span ten directions


def test_small_errors_survive_a_dominant_direction(make_problem):
    """Massive activations: one input channel holds nearly all of the output, what is left is still measured."""
    problem = make_problem(64, 64, "activation")
    problem.gram[3] *= 1e4
    problem.gram[:, 3] *= 1e4
    rows = problem.basis.rows[:48]
    mask = keep_largest(importance(problem)[:48], 24)
    cost = problem.to_cost(projection_error(problem.cost_target, problem.squared_norm, rows * mask))
    dictionary, coefficients, _ = factorize(problem, 48, 24)
    exact = problem.evaluate(coefficients @ dictionary)
    assert exact < 1e-4
    assert cost == pytest.approx(exact, rel=0.02)


def test_a_layer_of_zeros():
    """Nothing to approximate: every factor is zero and finite, and the error is zero."""
    problem = LayerProblem(torch.zeros(6, 8), torch.eye(8), torch.ones(6), "loss")
    dictionary, coefficients, _ = factorize(problem, rank=3, support=2, refits=2)
    assert torch.equal(coefficients @ dictionary, torch.zeros(6, 8, dtype=torch.float64))
    assert projection_error(problem.cost_target, problem.squared_norm, torch.zeros(3, 6)) == 0.0
