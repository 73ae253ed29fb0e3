"""Compressed checkpoints of tiny models."""

from dataclasses import replace
from itertools import cycle

import pytest

import rocket


@pytest.fixture(scope="session")
def save_compressed(make_model, token_ids, quick_settings, tmp_path_factory):
    """Saves a tiny compressed float32 model of a family once, its layers taking the forms in turn; gives the folder.

    A form is called by the label of its options, such as ``sparse int8``.
    """
    calib, profiling = quick_settings
    profiling = profiling.model_copy(update={"precisions": ["float", "int8"]})
    paths = {}

    def save(family: str, *forms: str):
        if (family, forms) not in paths:
            model = make_model(family)
            planner = rocket.plan(model, token_ids, calib=calib, profiling=profiling)
            choices = {
                profile.layer: next(option for option in profile.options[::-1] if option.label == form)
                for profile, form in zip(planner.profiles, cycle(forms), strict=False)
            }
            plan = replace(planner.at(removed_ratio=0.2), choices=choices)
            paths[family, forms] = tmp_path_factory.mktemp(family)
            rocket.compress(model, plan).save_pretrained(paths[family, forms])
        return paths[family, forms]

    return save
