"""Products with bitmap-packed matrices as torch ops (`torch.ops.rocket`): CPU, CUDA and, through torch, anywhere else.

They are for inference and have no gradient, but for `expand`, through which layers train. x may have any number of
leading dimensions. x, values, dictionary, weight and bias share one dtype and device; all but x must be contiguous.
Where a `scale` is given, the values that it belongs to are int8 (`kernels.int8`), and it has the dtype of x instead.
`offsets` is `bitmap.row_offsets(mask)`, which the caller keeps. NaN and infinity in x spread as they do in the dense
product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rocket.kernels import by_torch, cpu, operands
from rocket.kernels.operands import Optionals, Tensors

_library = torch.library.Library("rocket", "DEF")
for _schema in (
    "sparse_linear(Tensor x, Tensor values, Tensor mask, Tensor offsets, int cols, Tensor? bias=None,"
    " Tensor? scale=None) -> Tensor",
    "packed_linears(Tensor x, Tensor[] values, Tensor?[] scales, Tensor[] masks, Tensor[] offsets, Tensor?[] biases,"
    " Tensor?[] dictionaries, Tensor?[] dictionary_scales, int[] columns) -> Tensor[]",
    "factor_linear(Tensor x, Tensor dictionary, Tensor values, Tensor mask, Tensor offsets, Tensor? bias=None,"
    " Tensor? dictionary_scale=None, Tensor? scale=None, bool beside_input=False) -> Tensor",
    "dense_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scale=None) -> Tensor",
    "expand(Tensor values, Tensor mask, Tensor offsets, int cols, Tensor? scale=None) -> Tensor",
    "pick(Tensor dense, Tensor mask, int count) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_sparse_linear = torch.ops.rocket.sparse_linear.default
_packed_linears = torch.ops.rocket.packed_linears.default
_factor_linear = torch.ops.rocket.factor_linear.default
_dense_linear = torch.ops.rocket.dense_linear.default
_expand = torch.ops.rocket.expand.default
_pick = torch.ops.rocket.pick.default


def direct(x: Tensor) -> bool:
    """Whether a product of x may go to the CPU's functions past torch's dispatcher, which takes as long as a small one.

    Not where anything takes part in it: a gradient, a compiler, tracer or profiler, a mode, a function transform, a
    subclass, or x is more than numbers in memory.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or is_transformed()
        or type(x) is not Tensor
        or not x.is_cpu
        or x.layout is not torch.strided
        or x.is_neg()
        or is_in_torch_dispatch_mode()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
    )


def is_transformed() -> bool:
    """Whether a function transform (vmap, jvp) or forward-mode differentiation is at work, unknown to the ops."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def sparse_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """x Sᵀ + bias for a bitmap-packed S.

    Args:
        x: [..., cols].
        values: 1-D, the kept values of S.
        mask: uint8 [out, 8 * ceil(cols / 64)].
        offsets: int64 [out + 1], `bitmap.row_offsets(mask)`.
        cols: columns of S.
        bias: [out].
        scale: [out], where the values are int8.

    Returns:
        [..., out]; on a CPU summed in float32 and rounded once.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if direct(x):
        return cpu.sparse_linear(x, values, mask, offsets, cols, bias, scale)
    result: Tensor = _sparse_linear(x, values, mask, offsets, cols, bias, scale)
    return result


def packed_linears(
    x: Tensor,
    values: Tensors,
    scales: Optionals,
    masks: Tensors,
    offsets: Tensors,
    biases: Optionals,
    dictionaries: Optionals,
    dictionary_scales: Optionals,
    columns: Sequence[int],
) -> list[Tensor]:
    """`sparse_linear` or, where there is a dictionary, `factor_linear` of one x with several matrices.

    In one parallel pass over all dictionaries, and one over all that is sparse. ``columns`` are those of the sparse
    matrices, which tell whether they multiply x beside x Dᵀ. The values of all are int8, or those of none.
    """
    parts = values, scales, masks, offsets, biases, dictionaries, dictionary_scales
    if direct(x):
        return cpu.packed_linears(x, *parts, columns)
    result: list[Tensor] = _packed_linears(x, *parts, columns)
    return result


def factor_linear(
    x: Tensor,
    dictionary: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    dictionary_scale: Tensor | None = None,
    scale: Tensor | None = None,
    beside_input: bool = False,
) -> Tensor:
    """(x Dᵀ) Sᵀ + bias in one call, for a dense dictionary D [k, in] and a bitmap-packed S [out, k].

    ``beside_input``: S is [out, k + in] and multiplies x Dᵀ with x beside it.
    x Dᵀ is rounded to the dtype of x, so that the result is that of `dense_linear` followed by `sparse_linear`, whose
    arguments and errors it shares. Both matrices have int8 values, with scales [k] and [out], or neither.
    """
    tensors = dictionary, values, mask, offsets, bias, dictionary_scale, scale
    if direct(x):
        return cpu.factor_linear(x, *tensors, beside_input)
    result: Tensor = _factor_linear(x, *tensors, beside_input)
    return result


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """`F.linear`, at memory speed for a few rows of x on a CPU: x [..., in], weight [out, in], bias and scale [out]."""
    if direct(x):
        return cpu.dense_linear(x, weight, bias, scale)
    result: Tensor = _dense_linear(x, weight, bias, scale)
    return result


def expand(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    """The dense [out, cols] at memory speed, differentiable in the values where they are not int8.

    Arguments as for `sparse_linear`; values that are not plain, too. Function transforms see through it.
    """
    if not operands.is_plain(values) or (not torch.compiler.is_compiling() and is_transformed()):
        return by_torch.expand(values, mask, offsets, cols, scale)
    result: Tensor = _expand(values, mask, offsets, cols, scale)
    return result


# CUDA, through Triton: imported at the first call, so that nothing here needs it; through torch where it is missing.


@cache
def has_triton() -> bool:
    """Whether products on CUDA go to Triton's kernels."""
    return find_spec("triton") is not None


def _sparse_linear_cuda(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    operands.check_sparse(mask, offsets, cols)
    operands.check_product(x, values, cols, scale, mask.shape[0], bias)
    if not has_triton():
        return by_torch.sparse_linear(x, values, mask, offsets, cols, bias, scale)
    from rocket.kernels import gpu

    return gpu.sparse_linear(x, values, mask, offsets, cols, bias, scale)


def _dense_linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    if scale is None:
        return F.linear(x, weight, bias)
    operands.check_product(x, weight, weight.shape[1], scale, weight.shape[0], bias)
    if not has_triton():
        return by_torch.dense_linear(x, weight, bias, scale)
    from rocket.kernels import gpu

    return gpu.dense_linear(x, weight, bias, scale)


def _expand_cuda(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    operands.check_sparse(mask, offsets, cols)
    operands.check_scale(values, scale, mask.shape[0])
    if not has_triton():
        return by_torch.expand(values, mask, offsets, cols, scale)
    from rocket.kernels import gpu

    return gpu.expand(values, mask, offsets, cols, scale)


# Shapes alone, for torch.compile.


def _sparse_linear_fake(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


def _packed_linears_fake(x: Tensor, values: Tensors, scales: Optionals, masks: Tensors, *_: object) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], mask.shape[0])) for mask in masks]


def _factor_linear_fake(
    x: Tensor,
    dictionary: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    dictionary_scale: Tensor | None = None,
    scale: Tensor | None = None,
    beside_input: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


def _dense_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _expand_fake(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    return values.new_empty((mask.shape[0], cols), dtype=operands.value_type(values, scale))


def _pick_fake(dense: Tensor, mask: Tensor, count: int) -> Tensor:
    return dense.new_empty(count)


for _name, _fake, _cuda in (
    ("sparse_linear", _sparse_linear_fake, _sparse_linear_cuda),
    ("packed_linears", _packed_linears_fake, by_torch.packed_linears),
    ("factor_linear", _factor_linear_fake, by_torch.factor_linear),
    ("dense_linear", _dense_linear_fake, _dense_linear_cuda),
    ("expand", _expand_fake, _expand_cuda),
    ("pick", _pick_fake, by_torch.pick),
):
    _library.impl(_name, getattr(by_torch, _name), "CompositeExplicitAutograd")
    _library.impl(_name, getattr(cpu, _name, getattr(by_torch, _name)), "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"rocket::{_name}", cast(Callable[..., Any], _fake), lib=_library)


def _remember_mask(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, Tensor | None], output: Tensor) -> None:
    values, mask, *_ = inputs
    ctx.save_for_backward(mask)
    ctx.count = values.numel()


def _expand_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    """Each value takes the gradient of the place where it lies."""
    return _pick(gradient, ctx.saved_tensors[0], ctx.count), None, None, None, None


torch.library.register_autograd("rocket::expand", _expand_backward, setup_context=_remember_mask, lib=_library)
