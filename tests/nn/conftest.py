"""Compressed checkpoints of tiny models."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import rocket


class Wrapped(Tensor):
    """A tensor without memory of its own that knows torch's ops, as those of torchao and of tensor parallelism."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor):
        wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace == "rocket":
            raise NotImplementedError(f"{function}: not known")
        result = function(*tree_map_only(cls, lambda wrapped: wrapped.inner, args), **(kwargs or {}))
        return cls(result) if function is torch.ops.aten.detach.default else result


def wrapped(values: Tensor) -> Tensor:
    return Wrapped(values)


def scattered(values: Tensor) -> Tensor:
    return torch.stack([values, values], dim=-1)[..., 0]


@pytest.fixture(params=[wrapped, scattered])
def make_odd(request):
    """Makes a parameter that holds the same values otherwise than one after the other in memory."""
    return lambda values: nn.Parameter(request.param(values.detach()), requires_grad=False)


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
