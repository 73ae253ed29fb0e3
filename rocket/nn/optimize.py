"""Run a compressed model by the kernels: `optimize`, and `explain`, which says what each layer runs and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rocket.kernels import library, macko, ops
from rocket.nn.eligibility import kernels_apply, why_odd
from rocket.nn.fuse import share_inputs
from rocket.nn.layers import CompressedLinear, PackedLinear

Backend = Literal["auto", "trivial", "macko"]
Model = TypeVar("Model", bound=nn.Module)


class DenseLinear(nn.Linear):
    """``nn.Linear`` through `ops.dense_linear`, which reads the weight at memory speed for a few rows of input."""

    def forward(self, inputs: Tensor) -> Tensor:
        if kernels_apply(self, inputs):
            return ops.dense_linear(inputs, self.weight, self.bias)
        return F.linear(inputs, self.weight, self.bias)


@dataclass(frozen=True)
class LayerExplanation:
    """What a linear layer runs. ``form`` is a compressed layer's, or ``dense``; ``path`` is ``torch`` or a kernel's."""

    layer: str
    form: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.form}, {self.path} ({self.reason})"


def optimize(model: Model, backend: Backend = "auto") -> Model:
    """Make a model's linear layers run by the kernels, in place; the result is the model itself.

    Compressed layers multiply by their packed matrices instead of expanding them first, those that read the same
    input in one product (`nn.fuse`), and on a CPU the dense layers (the output embedding too) take a matrix-vector
    product that reads memory at full speed. Tensors and checkpoints stay as they are. Where a gradient is wanted,
    layers go the trivial way by themselves. Calling it again changes nothing; `explain` tells what was chosen.

    ``backend="trivial"`` takes it all back. ``backend="macko"`` is ``auto``, but single rows of input to float16 sparse
    matrices on a CUDA device go to `macko_spmv`, if that is installed.

    Raises ValueError for an unknown backend, or one whose package is not installed.
    """
    if backend not in ("auto", "trivial", "macko"):
        raise ValueError(f"backend={backend!r}: there are 'auto', 'trivial' and 'macko'")
    if backend == "macko":
        macko.load()
    wanted = backend != "trivial"
    compressed = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    for module in compressed:
        if _offloaded(module):
            continue
        if module.uses_kernels != wanted or (module.macko is not None and backend != "macko"):
            module.use_kernels(wanted)
        if backend == "macko" and module.macko is None:
            module.use_macko()
    if wanted:
        share_inputs(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if wanted and _left_dense(child) is None:
                setattr(parent, name, _like(child, DenseLinear))
            elif not wanted and type(child) is DenseLinear:
                setattr(parent, name, _like(child, nn.Linear))
    return model


def attach_optimize(model_class: Any) -> None:
    """Give a class of models the method ``optimize``, unless it has one of its own.

    The class, because a method that a model holds is a cycle of references and does not survive pickling.
    """
    if not hasattr(model_class, "optimize"):
        model_class.optimize = optimize


def explain(model: nn.Module) -> list[LayerExplanation]:
    """What each linear layer of a model runs, in the order of the module tree, and why."""
    return [_explain(name, module) for name, module in model.named_modules() if isinstance(module, _LINEAR)]


_LINEAR = (CompressedLinear, nn.Linear)
_ON_DEVICE = "torch's own product is good on this device"


def _explain(name: str, module: nn.Module) -> LayerExplanation:
    parameter = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if parameter is None:  # packed by somebody else
        return LayerExplanation(name, "dense", "torch", "its weight is no matrix of floating numbers")
    kernel = _kernel(parameter)
    dense_kernel = kernel if parameter.device.type == "cpu" else None
    few = "memory-speed product for few rows of input"
    odd = why_odd(module)
    if not isinstance(module, CompressedLinear):
        if not isinstance(module, DenseLinear):
            return LayerExplanation(name, "dense", "torch", _left_dense(module) or "not optimized")
        if odd:
            return LayerExplanation(name, "dense", "torch", odd)
        reason = few if dense_kernel else _ON_DEVICE if kernel else _why_no_kernel(parameter)
        return LayerExplanation(name, "dense", dense_kernel or "torch", reason)
    form = module.form if module.spec.precision == "float" else f"{module.form} {module.spec.precision}"
    if not module.uses_kernels:
        reason = "its tensors are offloaded" if _offloaded(module) else f"not optimized: {_made_dense(module)}"
        return LayerExplanation(name, form, "torch", reason)
    if odd:
        return LayerExplanation(name, form, "torch", odd)
    if kernel is None:
        return LayerExplanation(name, form, "torch", _why_no_kernel(parameter))
    if not module.is_sparse and module.spec.precision == "int8":
        return LayerExplanation(name, form, kernel, few)
    if not module.is_sparse:
        return LayerExplanation(name, form, dense_kernel or "torch", few if dense_kernel else _ON_DEVICE)
    if module.macko is not None:
        return LayerExplanation(name, form, "macko", f"one row of input; {kernel} for more")
    reason = "packed values, expanded only for many rows of input"
    if isinstance(module, PackedLinear) and module.shared_input is not None and len(module.shared_input.layers) > 1:
        reason += f"; one product for {len(module.shared_input.layers)} layers of this input"
    return LayerExplanation(name, form, kernel, reason)


def _made_dense(layer: CompressedLinear) -> str:
    if layer.spec.precision == "int8":
        return "int8 values are converted first"
    return "sparse matrices are expanded first" if layer.is_sparse else "torch's own products"


def _offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the tensors elsewhere and brings them for each call."""
    return next(module.parameters()).device.type == "meta"


def _left_dense(module: nn.Module) -> str | None:
    """Why a module is not to become a `DenseLinear`; None if it is."""
    if type(module) is not nn.Linear:
        return "not a plain nn.Linear"
    if module.weight.device.type != "cpu":
        return _ON_DEVICE
    if odd := why_odd(module):
        return odd
    if _kernel(module.weight) is None:
        return _why_no_kernel(module.weight)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "forward" in vars(module) or any(hooks):
        return "hooks are attached to it"
    return None


def _kernel(parameter: Tensor) -> str | None:
    """The kernel that multiplies by values like these; None where torch does."""
    if parameter.dtype not in library.TYPES:
        return None
    if parameter.device.type == "cuda":
        return "triton" if ops.has_triton() else None
    kernels = library.load() if parameter.device.type == "cpu" else None
    return None if kernels is None else library.PATHS[kernels.path]


def _why_no_kernel(parameter: Tensor) -> str:
    if parameter.dtype not in library.TYPES:
        return f"no kernel for {parameter.dtype}"
    if parameter.device.type == "cpu":
        return "the compiled kernels are not installed, or switched off"
    if parameter.device.type == "cuda":
        return "Triton is not installed"
    return f"no kernel for {parameter.device.type}"


def _like(linear: nn.Module, kind: Callable[..., nn.Linear]) -> nn.Linear:
    """A layer of another class with the very same parameters."""
    assert isinstance(linear, nn.Linear)
    with torch.device("meta"):
        replacement = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
    replacement.weight, replacement.bias = linear.weight, linear.bias
    return replacement.train(linear.training)
