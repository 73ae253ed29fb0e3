"""The square root of a Gram matrix: Cholesky where it can be, damped where it must be."""

import numpy as np
import pytest
import scipy.linalg
import torch

from rocket.factorization.whitening import DAMPINGS, whiten


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    return (inputs.T @ inputs / len(inputs)).float()


def samples(tokens: int, features: int) -> torch.Tensor:
    return torch.randn(tokens, features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def test_hand_solved():
    whitening = whiten(torch.tensor([[1.0, 2.0, 0.0], [2.0, 5.0, 3.0], [0.0, 3.0, 25.0]]))
    assert whitening.root.tolist() == [[1.0, 2.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.0, 4.0]]
    assert whitening.damping == 0.0


def test_equals_scipys_cholesky():
    gram = gram_of(samples(200, 24))
    whitening = whiten(gram)
    assert whitening.damping == 0.0
    np.testing.assert_allclose(whitening.root, scipy.linalg.cholesky(gram.double().numpy(), lower=False), rtol=1e-9)


def singular_grams() -> dict[str, torch.Tensor]:
    dead = samples(200, 16)
    dead[:, 5] = 0
    repeated = samples(200, 16)
    repeated[:, 7] = repeated[:, 2]
    return {
        "dead channel": gram_of(dead),
        "repeated channel": gram_of(repeated),
        "constant activations": gram_of(torch.full((200, 16), 3.0, dtype=torch.float64)),
        "fewer tokens than features": gram_of(samples(8, 32)),
    }


@pytest.mark.parametrize("kind", singular_grams())
def test_singular_gram_takes_little_damping(kind):
    gram = singular_grams()[kind]
    whitening = whiten(gram)
    assert 0 < whitening.damping <= 1e-5
    torch.testing.assert_close(whitening.root.T @ whitening.root, damped(gram, whitening.damping), rtol=0, atol=1e-9)
    assert torch.equal(whitening.root, whitening.root.triu())
    assert torch.isfinite(torch.linalg.inv(whitening.root)).all()


def test_damping_escalates_until_the_matrix_is_positive_definite():
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, -3e-6]))  # mean diagonal 0.75: needs 4e-6
    assert whiten(gram).damping == 1e-5
    assert 1e-5 in DAMPINGS


def test_indefinite_matrix_falls_back_to_the_eigen_root():
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # eigenvalues 3 and -1
    whitening = whiten(gram)
    assert torch.equal(whitening.root, whitening.root.T)
    values = np.linalg.eigvalsh(whitening.root.numpy() @ whitening.root.numpy())
    np.testing.assert_allclose(values, [DAMPINGS[-1], 3.0])


def test_dead_input_gives_the_identity():
    assert torch.equal(whiten(torch.zeros(3, 3)).root, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite(value):
    gram = torch.eye(4)
    gram[2, 2] = value
    with pytest.raises(ValueError, match=r"1 non-finite rows \(first: 2\)"):
        whiten(gram)


def test_not_square():
    with pytest.raises(ValueError, match=r"square, got shape \(2, 3\)"):
        whiten(torch.ones(2, 3))
