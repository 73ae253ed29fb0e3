"""No option takes more than its removed ratio leaves, and each takes exactly what it says."""

from fractions import Fraction

import pytest
import torch

from rocket.config.errors import RocketError
from rocket.config.schema import ProfilingConfig
from rocket.forms import FORMS, Option, select_forms
from rocket.nn import LAYERS
from rocket.nn.layers import empty_layer

SHAPES = [(1, 12), (12, 1), (3, 7), (48, 16), (16, 48), (20, 70)]
RATIOS = [0.05, 0.1, 0.3, 0.35, 0.5, 0.7, 0.95]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [name for name in FORMS if name != "dense"])
def test_options_stay_within_the_budget(make_problem, form, shape):
    problem = make_problem(*shape)
    found = 0
    for ratio in RATIOS:
        options = FORMS[form].options(problem, ProfilingConfig(removed_ratios=[ratio]))
        assert len(options) <= 1
        for option in options:
            found += 1
            assert 0 < option.parameters <= (1 - Fraction(str(ratio))) * shape[0] * shape[1]
            assert 0 <= option.rank <= min(shape)
            assert 0.0 <= option.cost < float("inf")
            assert_built_as_said(problem, option, draft=False)
            assert_built_as_said(problem, option, draft=True)
    assert found or form != "sparse"


def assert_built_as_said(problem, option: Option, draft: bool) -> None:
    state = FORMS[option.form].build(problem, option, ProfilingConfig(), draft=draft)
    mask = state.pop("mask", torch.empty(0, dtype=torch.uint8))
    assert sum(tensor.numel() for tensor in state.values()) == option.parameters
    assert 8 * mask.numel() == option.mask_bits
    assert option.bytes(2) == 2 * option.parameters + mask.numel()
    layer = empty_layer(option.spec(problem.in_features, problem.out_features, ""), bias=False)
    layer.load_state_dict({**state, "mask": mask} if mask.numel() else state)
    assert type(layer) is LAYERS[option.form]
    assert layer.stored_values() == option.parameters
    assert torch.isfinite(layer.dense_weight()).all()


def test_hand_counted_sizes(make_problem):
    problem = make_problem(40, 20)  # 30 % removed leaves 560 values
    settings = ProfilingConfig(removed_ratios=[0.3], rank_support_ratios=[2.0])
    (low_rank,) = FORMS["low_rank"].options(problem, settings)
    assert (low_rank.rank, low_rank.parameters) == (9, 9 * 60)
    (dictionary,) = FORMS["dictionary"].options(problem, settings)
    assert (dictionary.rank, dictionary.nnz, dictionary.parameters) == (14, 7 * 40, 14 * 20 + 7 * 40)
    (sparse,) = FORMS["sparse"].options(problem, settings)
    assert (sparse.rank, sparse.nnz, sparse.parameters, sparse.mask_bits) == (0, 560, 560, 40 * 64)
    (both,) = FORMS["sparse_low_rank"].options(problem, settings)  # a tenth of 800 values makes one atom of 60
    assert (both.rank, both.nnz, both.parameters, both.mask_bits) == (1, 540, 560, 40 * 64)


def test_options_beyond_the_matrix_do_not_exist(make_problem):
    problem = make_problem(32, 32)
    # s = 0.95·32/(ρ + 1), k = ρ s: only ρ = 1 (k = 15) and 2 (k = 20) stay within rank 32.
    settings = ProfilingConfig(removed_ratios=[0.05], rank_support_ratios=[1.0, 2.0, 1000.0])
    (option,) = FORMS["dictionary"].options(problem, settings)
    assert option.rank in (15, 20)
    assert (
        FORMS["dictionary"].options(problem, ProfilingConfig(removed_ratios=[0.05], rank_support_ratios=[1000.0])) == []
    )


def test_dense_stays_as_it_is(make_problem):
    problem = make_problem(6, 5)
    (option,) = FORMS["dense"].options(problem, ProfilingConfig())
    assert option == Option("dense", 30, 0, 0.0)
    assert torch.equal(FORMS["dense"].build(problem, option, ProfilingConfig())["weight"], problem.weight.double())


def test_registry():
    assert all(form.name == name for name, form in FORMS.items())
    assert [form.name for form in select_forms(["sparse", "sparse"])] == ["dense", "sparse"]
    with pytest.raises(RocketError, match="no form 'dictonary'; did you mean 'dictionary'"):
        select_forms(["dictonary"])
