"""A tiny model compressed with every form, on disk, beside its original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import rocket
from rocket.config.schema import ModelConfig


@dataclass(frozen=True)
class Pair:
    """``compressed`` is a checkpoint of the model that ``original`` names; ``windows`` [16, 32] are its text."""

    original: ModelConfig
    compressed: Path
    windows: Tensor


@pytest.fixture(scope="session")
def planner(planned, quick_settings):
    """Of the planned model, with int8 options."""
    calib, profiling = quick_settings
    both = profiling.model_copy(update={"precisions": ["float", "int8"]})
    return rocket.plan(planned.model, planned.tokens, calib=calib, profiling=both)


def with_forms(planned, planner, forms: list[str]) -> PreTrainedModel:
    """The planned model with its layers taking these forms in turn, each at about 60 % of its size."""
    plan = planner.at(removed_ratio=0.3)
    kinds = cycle(forms)
    choices = {}
    for profile in planner.profiles:
        label = next(kinds)
        dense = profile.options[0].parameters
        options = [option for option in profile.options if option.label == label]
        choices[profile.layer] = min(options, key=lambda option: abs(option.parameters - 0.6 * dense))
    return rocket.compress(planned.model, replace(plan, choices=choices))


@pytest.fixture(scope="session")
def make_compressed(planned, planner) -> Callable[..., PreTrainedModel]:
    """Compresses the tiny llama, in the type given."""

    def make(*forms: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return with_forms(planned, planner, list(forms or ("sparse", "dictionary", "low_rank", "sparse_low_rank"))).to(
            dtype
        )

    return make


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory, planned, make_compressed, byte_tokenizer) -> Callable[[str], Pair]:
    def make(dtype: str) -> Pair:
        root = tmp_path_factory.mktemp(dtype)
        for name, model in (("original", planned.model), ("compressed", make_compressed())):
            model.save_pretrained(root / name)
            byte_tokenizer.save_pretrained(root / name)
        config = ModelConfig(path=str(root / "original"), dtype=dtype, device="cpu")
        return Pair(config, root / "compressed", planned.tokens)

    return make


@pytest.fixture(scope="session")
def pair(make_pair) -> Pair:
    """In float32. Do not change its files."""
    return make_pair("float32")
