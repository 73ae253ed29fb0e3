"""Sparse approximation: the support, and least squares on it, against numpy."""

import numpy as np
import pytest
import torch

from rocket.factorization import sparse
from rocket.factorization.sparse import (
    DAMPING,
    ScaledProblem,
    SupportSearch,
    keep_top,
    scale_problem,
    size_exceeded,
)


def scaled_layer(make_problem, seed: int = 0, cost: str = "activation") -> ScaledProblem:
    return scale_problem(make_problem(24, 32, cost, seed=seed, shrinkage=0.2).tempered)


def search(scaled: ScaledProblem) -> SupportSearch:
    return SupportSearch(scaled.weight, scaled.gram)


def squared_error(scaled: ScaledProblem, approximation: torch.Tensor) -> float:
    """tr((T - X) N (T - X)ᵀ)."""
    delta = scaled.weight - approximation
    return float(((delta @ scaled.gram) * delta).sum(dtype=torch.float64))


def exact_fit(scaled: ScaledProblem, mask: torch.Tensor) -> np.ndarray:
    """Least squares of each row on its own support: minimise ‖R(t - x)‖ with N = RᵀR."""
    root = np.linalg.cholesky(scaled.gram.double().numpy()).T
    solution = np.zeros(mask.shape)
    for row, keep in enumerate(mask.numpy()):
        if keep.any():
            target = root @ scaled.weight[row].double().numpy()
            solution[row, keep] = np.linalg.lstsq(root[:, keep], target, rcond=None)[0]
    return solution


def test_hand_solved():
    # Keeping x₁ of t = (1, 1) with correlation 1/2: x₁ takes over half of what x₂ did.
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    solution = SupportSearch(torch.ones(1, 2), gram).fit(torch.tensor([[True, False]]), torch.ones(1, 2))
    assert solution.tolist() == [[1.5, 0.0]]


@pytest.mark.parametrize("cost", ["activation", "loss"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_scaled_error_is_that_of_shrunk_correlations_and_tempered_sensitivities(make_problem, cost, shrinkage):
    problem = make_problem(24, 32, cost, shrinkage=shrinkage)
    scaled = scale_problem(problem.tempered)
    gram = problem.gram.double().numpy()
    floored = gram + np.eye(32) * DAMPING * gram.diagonal().mean()
    shrunk = (1 - shrinkage) * floored + shrinkage * np.diag(floored.diagonal())
    approximation = scaled.weight * (torch.rand(24, 32, generator=torch.Generator().manual_seed(0)) < 0.5)
    delta = problem.weight.double().numpy() - scaled.unscale(approximation).numpy()
    importance = np.ones(24) if cost == "activation" else problem.sensitivity.double().numpy() ** 0.5
    expected = float(importance @ ((delta @ shrunk) * delta).sum(axis=1))
    assert squared_error(scaled, approximation) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cost", ["activation", "loss"])
def test_scaling_is_undone(make_problem, cost):
    problem = make_problem(24, 32, cost)
    scaled = scale_problem(problem)
    torch.testing.assert_close(scaled.unscale(scaled.weight).float(), problem.weight)
    torch.testing.assert_close(scaled.gram.diagonal(), torch.ones(32))


def test_fit_is_least_squares_on_the_support(make_problem):
    scaled = scaled_layer(make_problem)
    mask = torch.rand(24, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[3] = False
    fitted = search(scaled).fit(mask, scaled.weight, iterations=60)
    np.testing.assert_allclose(fitted, exact_fit(scaled, mask), atol=1e-4)
    assert not fitted[~mask].any()


def test_default_iterations_are_enough(make_problem):
    scaled = scaled_layer(make_problem)
    fitted, mask = scaled.sparsify(384)
    exact = squared_error(scaled, torch.from_numpy(exact_fit(scaled, mask)).float())
    assert squared_error(scaled, fitted) <= 1.01 * exact


@pytest.mark.parametrize("count", [0, 1, 17, 59, 60, 100])
def test_keep_top_keeps_the_earlier_of_equals(count):
    scores = torch.randint(0, 5, (6, 10), generator=torch.Generator().manual_seed(0)).float()
    expected = np.zeros(60, dtype=bool)
    expected[np.argsort(-scores.numpy().ravel(), kind="stable")[:count]] = True
    np.testing.assert_array_equal(keep_top(scores, count), expected.reshape(6, 10))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_selected_support_is_no_worse_than_the_largest_weights(make_problem, seed, share):
    scaled = scaled_layer(make_problem, seed)
    count = int(share * scaled.weight.numel())
    selected, _ = search(scaled).select_support(count, scaled.weight)
    errors = [
        squared_error(scaled, torch.from_numpy(exact_fit(scaled, mask)).float())
        for mask in (selected, keep_top(scaled.weight.abs(), count))
    ]
    assert errors[0] <= errors[1]


def test_relaxing_solves_its_normal_equations(make_problem):
    scaled = scaled_layer(make_problem)
    generator = torch.Generator().manual_seed(0)
    kept, dual = (torch.randn(24, 32, generator=generator) for _ in range(2))
    gram = scaled.gram.double().numpy()
    right = 0.3 * (kept - dual).double().numpy() + scaled.weight.double().numpy() @ gram
    expected = np.linalg.solve(gram + 0.3 * np.eye(32), right.T).T
    np.testing.assert_allclose(search(scaled).relax(kept, dual, 0.3), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
@pytest.mark.parametrize("removed", [0.05, 0.3])
def test_rounded_products_find_as_good_a_layer(make_problem, monkeypatch, removed, shrinkage):
    problem = make_problem(96, 64, "activation", decay=1.0, shrinkage=shrinkage)
    count = int((1 - removed) * 96 * 64)
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(sparse, "coarse_type", lambda matrix, dtype=dtype: dtype)
        scaled = scale_problem(problem.tempered)
        errors.append(squared_error(scaled, scaled.sparsify(count)[0]))
        *coarse, last = sparse.PENALTIES
        assert set(scaled.inverses) == {*((penalty, dtype) for penalty in coarse), (last, torch.float32)}
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[1] != errors[0]


@pytest.mark.parametrize(
    ("device", "columns", "has_it", "dtype"),
    [
        ("cpu", 256, True, torch.bfloat16),
        ("cpu", 255, True, torch.float32),
        ("cpu", 256, False, torch.float32),
        ("meta", 256, True, torch.float32),
    ],
)
def test_products_are_rounded_where_that_is_faster(monkeypatch, device, columns, has_it, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    assert sparse.coarse_type(torch.empty(2, columns, device=device)) == dtype


def test_the_start_is_left_alone(make_problem):
    scaled = scaled_layer(make_problem)
    before = scaled.weight.clone()
    for repeats in (0, 1):
        scaled.sparsify(100, repeats)
        assert torch.equal(scaled.weight, before)


@pytest.mark.parametrize(("limit", "kept"), [(32, {0.3, 0.36}), (31, {0.36})])
def test_of_wide_layers_only_the_last_penalty_keeps_its_inverses(make_problem, monkeypatch, limit, kept):
    monkeypatch.setattr(sparse, "KEPT_INVERSES", limit)
    scaled = scaled_layer(make_problem)
    searching = SupportSearch(scaled.weight, scaled.gram, scaled.inverses)
    for penalty in (0.3, 0.36):
        exact = searching.damped_inverse(penalty, torch.float32)
        searching.damped_inverse(penalty, torch.bfloat16)
        expected = np.linalg.inv(scaled.gram.double().numpy() + penalty * np.eye(32))
        np.testing.assert_allclose(exact, expected, rtol=1e-3, atol=1e-4)
    types = (torch.float32, torch.bfloat16)
    assert set(scaled.inverses) == {(penalty, dtype) for penalty in kept for dtype in types}


@pytest.mark.parametrize("count", [0, 1, 100, 767, 768])
def test_sparsify_keeps_exactly_so_many(make_problem, count):
    scaled = scaled_layer(make_problem, cost="loss")
    approximation, mask = scaled.sparsify(count)
    assert int(mask.sum()) == count
    assert torch.isfinite(approximation).all()
    assert not approximation[~mask].any()
    if count == 768:
        torch.testing.assert_close(approximation, scaled.weight, rtol=1e-3, atol=1e-3)


def test_dead_channels_are_dropped_first(make_problem):
    problem = make_problem(8, 16, "activation")
    problem.gram[5], problem.gram[:, 5] = 0, 0
    _, mask = scale_problem(problem).sparsify(64)
    assert not mask[:, 5].any()


@pytest.mark.parametrize("columns", [1024, 1088, 17 * 19 * 8])
def test_samples_see_all_columns(columns):
    sizes = torch.ones(200, columns) * torch.linspace(0.1, 3.0, columns)  # as large as their column says
    count = sizes.numel() // 2
    assert abs(int((sizes > size_exceeded(sizes, count)).sum()) - count) < 0.02 * count


def test_one_column_in_seventeen_may_be_large():
    sizes = torch.rand(1000, 1088, generator=torch.Generator().manual_seed(0))
    sizes[:, ::17] += 5.0
    count = sizes.numel() // 2
    assert abs(int((sizes > size_exceeded(sizes, count)).sum()) - count) < 0.02 * count
