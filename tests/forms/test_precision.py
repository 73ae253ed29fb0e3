"""Options with int8 values: what they cost, what they take, and what is built."""

import pytest
import torch

from rocket.config.schema import ProfilingConfig
from rocket.forms import build, options_of, select_forms
from rocket.forms.precision import quantize_state
from rocket.kernels import bitmap
from rocket.nn.layers import empty_layer

BOTH = ProfilingConfig(removed_ratios=[0.2, 0.4, 0.6], precisions=["float", "int8"])
FORMS = ["dense", "low_rank", "dictionary", "sparse", "sparse_low_rank"]


def layer_of(problem, option, dtype=torch.float32):
    layer = empty_layer(option.spec(problem.in_features, problem.out_features, ""), bias=False)
    layer.load_state_dict(build(problem, option, BOTH, dtype))
    return layer


def multiplied_out(problem, option, form):
    return problem.weight if form == "dense" else layer_of(problem, option).double().dense_weight().detach()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cost", ["weight", "activation", "loss"])
def test_costs_are_those_of_the_rounded_layer(make_problem, form, cost):
    problem = make_problem(96, 128, cost)
    options = options_of(problem, select_forms([form]), BOTH)
    rounded = [option for option in options if option.scales and option.form == form]
    exact = [option for option in options if not option.scales and option.form == form]
    assert len(rounded) == len(exact) > 0
    power = 2 if cost == "weight" else 1
    for option, twin in zip(rounded, exact, strict=True):
        assert (option.parameters, option.mask_bits, option.rank, option.nnz) == (
            *(twin.parameters, twin.mask_bits),
            *(twin.rank, twin.nnz),
        )
        assert option.cost >= twin.cost
        real = problem.evaluate(layer_of(problem, option).dense_weight().detach())
        added = option.cost**power - twin.cost**power
        exact_cost = problem.evaluate(multiplied_out(problem, twin, form))
        assert added == pytest.approx(real**power - exact_cost**power, rel=0.4, abs=1e-3 * real**power)
        if form == "dense":
            assert option.cost == pytest.approx(real, rel=0.02)
        else:  # interpolated, or foretold
            assert option.cost == pytest.approx(real, rel=0.3)


def test_rounding_costs_little_beside_removing(make_problem):
    options = options_of(make_problem(96, 128, "activation"), select_forms(["sparse", "dictionary"]), BOTH)
    dense = next(option for option in options if option.label == "dense int8")
    assert 0 < dense.cost < 1e-3
    assert dense.cost < 0.2 * min(option.cost for option in options if option.form != "dense")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(make_problem, form, dtype):
    problem = make_problem(40, 72, "activation")
    for option in options_of(problem, select_forms([form]), BOTH):
        tensors = build(problem, option, BOTH, dtype)
        stored = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        assert option.bytes(dtype.itemsize) == size


@pytest.mark.parametrize(
    ("precisions", "labels"),
    [
        (["float"], {"dense", "sparse"}),
        (["int8"], {"dense int8", "sparse int8"}),
        (["int8", "float"], {"dense", "sparse", "dense int8", "sparse int8"}),
    ],
)
def test_the_precisions_that_are_asked_for(make_problem, precisions, labels):
    settings = BOTH.model_copy(update={"precisions": precisions})
    options = options_of(make_problem(24, 32, "activation"), select_forms(["sparse"]), settings)
    assert {option.label for option in options} == labels
    assert options[0].form == "dense"


def test_atoms_of_very_different_length_are_balanced_first():
    """Each output's coefficients share a scale; an atom in other units must not take all of its steps."""
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(8, 30, generator=generator).double() * torch.logspace(-3, 3, 8)[:, None]
    coefficients = torch.randn(20, 8, generator=generator).double() / torch.logspace(-3, 3, 8)
    weight, mask = bitmap.pack(coefficients, torch.ones(20, 8, dtype=torch.bool))
    state = quantize_state({"dictionary": dictionary, "weight": weight, "mask": mask}, 8, torch.float32)
    steps = bitmap.unpack(state["weight"], state["mask"], 8) * (state["weight_scale"] / 127)[:, None]
    atoms = state["dictionary"] * (state["dictionary_scale"] / 127)[:, None]
    exact = coefficients @ dictionary
    assert (steps.double() @ atoms.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["dictionary", "sparse_low_rank"])
def test_rounding_is_priced_on_drafts(make_problem, monkeypatch, name):
    (_, form), built = select_forms([name]), []

    def watch(problem, option, settings, draft=False, build=form.build):
        state = build(problem, option, settings, draft)
        built.append((option, draft, state))
        return state

    monkeypatch.setattr(form, "build", watch)
    problem = make_problem(40, 72, "activation")
    options_of(problem, [form], BOTH)
    assert [draft for _, draft, _ in built] == [True, True]
    for option, _, drafted in built.copy():
        kept = form.build(problem, option, BOTH)
        assert problem.evaluate(dense(problem, option, kept)) < problem.evaluate(dense(problem, option, drafted))


def dense(problem, option, state):
    layer = empty_layer(option.spec(problem.in_features, problem.out_features, ""), bias=False).double()
    layer.load_state_dict(state)
    return layer.dense_weight().detach()
