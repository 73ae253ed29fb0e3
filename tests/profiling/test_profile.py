"""Per-layer error curves."""

import json

import pytest

from rocket.config.errors import RocketError
from rocket.config.schema import ProfilingConfig
from rocket.forms import select_forms
from rocket.profiling import LayerProfile, profile_layer

SETTINGS = ProfilingConfig(removed_ratios=[0.2, 0.4, 0.6], rank_support_ratios=[1.0, 2.0])


def test_options_of_all_forms_dense_first(make_problem):
    problem = make_problem(24, 32, "activation")
    profile = profile_layer("a.b", "a.c", problem, select_forms(["low_rank", "dictionary", "sparse"]), SETTINGS)
    assert (profile.layer, profile.input_group, profile.cost) == ("a.b", "a.c", "activation")
    assert (profile.in_features, profile.out_features, profile.parameters) == (32, 24, 768)
    forms = [option.form for option in profile.options]
    assert forms == ["dense", *["low_rank"] * 3, *["dictionary"] * 3, *["sparse"] * 3]
    assert profile.options[0].cost == 0.0
    assert all(option.cost > 0 for option in profile.options[1:])


def test_a_matrix_too_small_for_a_form_has_fewer_options(make_problem):
    profile = profile_layer("a", "a", make_problem(1, 5), select_forms(["low_rank", "dictionary", "sparse"]), SETTINGS)
    assert {option.form for option in profile.options} == {"dense", "sparse"}


def test_round_trip_through_json(make_problem):
    profile = profile_layer("a", "a", make_problem(8, 12), select_forms(["sparse"]), SETTINGS)
    assert LayerProfile.from_dict(json.loads(json.dumps(profile.to_dict())), "a") == profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "b"}, "the profile of a is that of 'b'"),
        ({"options": []}, "the profile of a has no options"),
        ({"in_features": True}, "the profile of a: in_features: Input should be a valid integer"),
        ({"in_features": 2**70}, "the profile of a: in_features: Input should be less than or equal to 1099511627776"),
        ({"options": [{"form": "sparse"}]}, r"the profile of a: options\.0\.parameters: Field required"),
        ({"damping": "none"}, "the profile of a: damping: Input should be a valid number"),
    ],
)
def test_malformed_profiles(make_problem, change, message):
    profile = profile_layer("a", "a", make_problem(8, 12), select_forms(["sparse"]), SETTINGS)
    with pytest.raises(RocketError, match=message):
        LayerProfile.from_dict({**json.loads(json.dumps(profile.to_dict())), **change}, "a")
