"""Sparse plus low-rank: its algebra against numpy, and what it finds."""

import numpy as np
import pytest
import torch

from rocket.factorization import sparse
from rocket.factorization.sparse import ScaledProblem, scale_problem
from rocket.factorization.sparse_low_rank import Deflated

OUT, IN, RANK = 40, 32, 3


@pytest.fixture(scope="module")
def scaled(make_problem) -> ScaledProblem:
    return scale_problem(make_problem(OUT, IN, "loss", shrinkage=0.2).tempered)


def planted(gram: torch.Tensor, rank: int, kept: int) -> ScaledProblem:
    """A weight that is exactly sparse plus low-rank."""
    generator = torch.Generator().manual_seed(1)
    size = len(gram)
    low_rank = torch.randn(2 * size, rank, generator=generator) @ torch.randn(rank, size, generator=generator)
    order = torch.randperm(2 * size * size, generator=generator).view(2 * size, size)
    sparse = 10 * torch.randn(2 * size, size, generator=generator) * (order < kept)
    ones = torch.ones(2 * size, dtype=torch.float64)
    return ScaledProblem(sparse + low_rank, gram, ones, ones[:size])


def squared_error(scaled: ScaledProblem, approximation: torch.Tensor) -> float:
    delta = (scaled.weight - approximation).double()
    return float(((delta @ scaled.gram.double()) * delta).sum())


def test_atoms_are_orthonormal_in_the_gram_matrix(scaled):
    deflated = Deflated(scaled, RANK)
    for _ in range(3):
        gram = deflated.atoms @ scaled.gram @ deflated.atoms.T
        torch.testing.assert_close(gram, torch.eye(RANK), atol=1e-5, rtol=0)
        torch.testing.assert_close(deflated.images, scaled.gram @ deflated.atoms.T, atol=1e-5, rtol=1e-4)
        deflated.adapt(torch.zeros_like(scaled.weight))


def test_the_deflated_quadratic_is_the_error_at_the_best_coefficients(scaled):
    deflated = Deflated(scaled, RANK)
    sparse = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    root = np.linalg.cholesky(scaled.gram.double().numpy())
    rest = (scaled.weight - sparse).double().numpy() @ root
    atoms = deflated.atoms.double().numpy() @ root
    best = np.linalg.lstsq(atoms.T, rest.T, rcond=None)[0].T
    np.testing.assert_allclose((scaled.weight - sparse) @ deflated.images, best, rtol=1e-3, atol=1e-4)
    delta = scaled.weight - sparse
    error = float((delta * deflated.times_gram(delta)).sum())
    assert error == pytest.approx(np.square(rest - best @ atoms).sum(), rel=1e-4)


def test_relaxing_solves_its_normal_equations(scaled):
    deflated = Deflated(scaled, RANK)
    generator = torch.Generator().manual_seed(0)
    kept, dual = (torch.randn(OUT, IN, generator=generator) for _ in range(2))
    gram, images = scaled.gram.double().numpy(), deflated.images.double().numpy()
    reduced = gram - images @ images.T
    right = 0.3 * (kept - dual).double().numpy() + scaled.weight.double().numpy() @ reduced
    expected = np.linalg.solve(reduced + 0.3 * np.eye(IN), right.T).T
    np.testing.assert_allclose(deflated.relax(kept, dual, 0.3), expected, rtol=1e-3, atol=1e-4)


def test_the_atoms_of_nothing_sparse_are_the_leading_singular_vectors():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 5, generator=generator) @ torch.randn(5, 20, generator=generator)
    ones = torch.ones(60, dtype=torch.float64)
    deflated = Deflated(ScaledProblem(weight, torch.eye(20), ones, ones[:20]), 5)
    torch.testing.assert_close(weight @ deflated.images @ deflated.atoms, weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_what_was_planted_is_found(correlation):
    distance = (torch.arange(48)[:, None] - torch.arange(48)).abs()
    scaled = planted(correlation ** distance.float(), rank=2, kept=400)
    deflated = Deflated(scaled, 2)
    sparse, mask, coefficients = deflated.decompose(400, repeats=12)
    assert int(mask.sum()) == 400
    assert not sparse[~mask].any()
    alone, _ = scaled.sparsify(400 + 2 * (48 + 96))
    assert squared_error(scaled, sparse + coefficients @ deflated.atoms) < 0.02 * squared_error(scaled, alone)


def test_more_iterations_err_less(scaled):
    errors = []
    for repeats in (1, 4, 12):
        deflated = Deflated(scaled, RANK)
        sparse, _, coefficients = deflated.decompose(600, repeats)
        errors.append(squared_error(scaled, sparse + coefficients @ deflated.atoms))
    assert errors == sorted(errors, reverse=True)


def test_a_layer_of_zeros_stays_one():
    ones = torch.ones(8, dtype=torch.float64)
    deflated = Deflated(ScaledProblem(torch.zeros(8, 6), torch.eye(6), ones, ones[:6]), 2)
    sparse, _, coefficients = deflated.decompose(10, repeats=2)
    assert not (sparse + coefficients @ deflated.atoms).any()


def test_rounded_products_find_as_good_a_layer(make_problem, monkeypatch):
    problem = make_problem(96, 64, "loss", shrinkage=0.2)
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(sparse, "coarse_type", lambda matrix, dtype=dtype: dtype)
        scaled = scale_problem(problem.tempered)
        deflated = Deflated(scaled, 4)
        rest, _, coefficients = deflated.decompose(3000, repeats=4)
        errors.append(squared_error(scaled, rest + coefficients @ deflated.atoms))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[1] != errors[0]
