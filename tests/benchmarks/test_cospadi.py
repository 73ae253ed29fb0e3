import pytest
import torch

from benchmarks.baselines import cospadi
from rocket.factorization.dictionary import factorize as one_shot
from rocket.factorization.problem import LayerProblem


def make_problem(out_features: int, in_features: int) -> LayerProblem:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4 * in_features, in_features, generator=generator)
    inputs = inputs @ torch.randn(in_features, in_features, generator=generator) * torch.rand(in_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    return LayerProblem(weight, inputs.T @ inputs / len(inputs), cost="activation")


def omp_by_hand(dictionary: torch.Tensor, column: torch.Tensor, support: int) -> torch.Tensor:
    """Orthogonal matching pursuit from its definition: a least squares at every step."""
    chosen: list[int] = []
    residual = column
    for _ in range(support):
        scores = (dictionary.T @ residual).abs()
        scores[chosen] = -1.0
        chosen.append(int(scores.argmax()))
        fitted = torch.linalg.lstsq(dictionary[:, chosen], column[:, None]).solution[:, 0]
        residual = column - dictionary[:, chosen] @ fitted
    coefficients = torch.zeros(dictionary.shape[1], dtype=column.dtype)
    coefficients[chosen] = fitted
    return coefficients


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_pursuit_matches_least_squares_at_every_step(monkeypatch, chunk_bytes):
    monkeypatch.setitem(cospadi.CHUNK_BYTES, "cpu", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    dictionary /= dictionary.norm(dim=0)
    target = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    expected = torch.stack([omp_by_hand(dictionary, column, 5) for column in target.T], dim=1)
    torch.testing.assert_close(cospadi.pursue(dictionary, target, 5), expected, rtol=1e-9, atol=1e-9)


def test_pursuit_survives_repeated_atoms():
    dictionary = torch.eye(4)[:, [0, 0, 1]]
    target = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    coefficients = cospadi.pursue(dictionary, target, 3)
    torch.testing.assert_close(dictionary @ coefficients, torch.diag(torch.tensor([1.0, 1, 0, 0])) @ target)


def test_atom_updates_keep_the_residual_and_never_hurt():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(10, 30, generator=generator, dtype=torch.float64)
    dictionary = torch.linalg.qr(torch.randn(10, 6, generator=generator, dtype=torch.float64)).Q
    coefficients = cospadi.pursue(dictionary, target, 2)
    residual = target - dictionary @ coefficients
    before, mask = float(residual.norm()), coefficients != 0
    cospadi.update_atoms(dictionary, coefficients, residual)
    torch.testing.assert_close(residual, target - dictionary @ coefficients)
    torch.testing.assert_close(dictionary.norm(dim=0), torch.ones(6, dtype=torch.float64))
    assert torch.equal(coefficients != 0, mask)
    assert float(residual.norm()) < before


@pytest.mark.parametrize(("shape", "rank", "support"), [((40, 24), 16, 8), ((24, 40), 20, 8), ((30, 30), 24, 20)])
def test_no_worse_than_the_one_shot_factorization(shape, rank, support):
    problem = make_problem(*shape)
    root = torch.linalg.cholesky(problem.gram.double()).T
    target = root @ problem.weight.double().T
    dictionary, coefficients = cospadi.factorize(target, rank, support, iterations=10)
    assert (coefficients != 0).sum(dim=0).max() <= support
    error = float((target - dictionary.double() @ coefficients.double()).square().sum())
    atoms, codes, _ = one_shot(problem, rank, support)
    delta = root @ (codes @ atoms - problem.weight.double()).T
    assert error < 0.99 * float(delta.square().sum())


def test_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="support"):
        cospadi.factorize(torch.eye(4), rank=2, support=3)
