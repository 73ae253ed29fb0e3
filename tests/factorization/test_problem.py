"""The three costs, against the expectations that they stand for."""

import numpy as np
import pytest
import torch

from rocket.factorization.problem import LayerProblem
from rocket.factorization.sparse import scale_problem

OUT, IN, TOKENS = 5, 7, 300


@pytest.fixture
def sample():
    """Weight, another weight, inputs [tokens, in] and output gradients' squares φ [out], in numpy."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(OUT, IN))
    return (
        weight,
        weight + 0.3 * rng.normal(size=(OUT, IN)),
        rng.normal(size=(TOKENS, IN)) + 1,
        rng.exponential(size=OUT),
    )


def problem(weight, inputs, sensitivity, cost) -> LayerProblem:
    gram = inputs.T @ inputs / len(inputs)
    return LayerProblem(*(torch.from_numpy(array) for array in (weight, gram, sensitivity)), cost)


def brute_force(weight, other, inputs, sensitivity, cost) -> float:
    """Sums over samples, from the definition."""
    if cost == "weight":
        return np.linalg.norm(other - weight) / np.linalg.norm(weight)
    errors = np.array([(other - weight) @ x for x in inputs])
    if cost == "activation":
        return np.mean([e @ e for e in errors]) / np.mean([(weight @ x) @ (weight @ x) for x in inputs])
    return 0.5 * np.mean([np.sum(sensitivity * e**2) for e in errors])


@pytest.mark.parametrize("cost", ["weight", "activation", "loss"])
def test_cost_is_the_expectation_over_samples(sample, cost):
    weight, other, inputs, sensitivity = sample
    question = problem(weight, inputs, sensitivity, cost)
    expected = brute_force(weight, other, inputs, sensitivity, cost)
    assert question.evaluate(torch.from_numpy(other)) == pytest.approx(expected, rel=1e-6)
    assert question.evaluate(torch.from_numpy(weight)) == 0.0


@pytest.mark.parametrize("cost", ["weight", "activation", "loss"])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_squared_norm_is_the_error_of_removing_the_layer(cost, shape, make_problem):
    question = make_problem(*shape, cost)
    removed = question.evaluate(torch.zeros(shape))
    assert question.to_cost(question.squared_norm) == pytest.approx(removed, rel=1e-5)
    if cost != "loss":
        assert removed == pytest.approx(1.0)


def test_outputs_without_gradient_still_cost_a_little():
    question = LayerProblem(torch.eye(2), torch.eye(2), torch.tensor([4.0, 0.0]), "loss")
    assert question.column_weights.tolist() == pytest.approx([2.0, 1e-3])
    assert question.evaluate(torch.diag(torch.tensor([1.0, 0.0]))) == pytest.approx(0.5e-6)


def test_tempered_problems_trust_correlations_and_sensitivities_less():
    gram, sensitivity = torch.tensor([[4.0, 2.0], [2.0, 9.0]]), torch.tensor([16.0, 81.0])
    question = LayerProblem(torch.eye(2), gram, sensitivity, "loss", shrinkage=0.25)
    assert question.tempered.sensitivity.tolist() == pytest.approx([4.0, 9.0])
    assert question.tempered.trust == question.tempered.tempered.trust == 0.75
    assert LayerProblem(torch.eye(2), gram, sensitivity, "activation", 0.25).tempered.sensitivity is None
    untouched = LayerProblem(torch.eye(2), gram, sensitivity, "weight")
    assert untouched.tempered is untouched


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("cost", ["activation", "loss"])
def test_less_trust_is_a_gram_matrix_with_smaller_correlations(make_problem, shape, cost):
    tempered = make_problem(*shape, cost, shrinkage=0.3).tempered
    gram = 0.7 * tempered.gram.double()
    gram.diagonal().copy_(tempered.gram.diagonal())
    same = LayerProblem(tempered.weight, gram, tempered.sensitivity, cost)
    other = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert tempered.evaluate(other) == pytest.approx(same.evaluate(other), rel=1e-6)
    torch.testing.assert_close(tempered.output_gram, same.output_gram)
    torch.testing.assert_close(tempered.basis.scales, same.basis.scales)
    scaled, expected = scale_problem(tempered), scale_problem(same)
    torch.testing.assert_close(scaled.gram, expected.gram)
    torch.testing.assert_close(scaled.weight, expected.weight)


def test_a_layer_of_zeros_costs_nothing():
    assert LayerProblem(torch.zeros(2, 3), torch.eye(3)).evaluate(torch.zeros(2, 3)) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.eye(2)), r"weight \(2, 3\) needs a Gram of \[3, 3\]"),
        ((torch.ones(2, 3), torch.eye(3), None, "loss"), "needs the layer's sensitivity"),
        ((torch.ones(2, 3), torch.eye(3), torch.ones(3)), r"sensitivity must be \[2\], got \(3,\)"),
    ],
)
def test_parts_that_do_not_belong_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerProblem(*arguments)
