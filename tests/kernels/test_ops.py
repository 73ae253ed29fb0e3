"""The ops on every instruction set that this machine has, against the dense product in float64."""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from rocket.config.errors import RocketError
from rocket.kernels import bitmap, cpu, int8, library, ops

# Relative to the sum of absolute products: float32 as promised, else half a unit in the last place and its summation.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}
DTYPES = tuple(TOLERANCE)

_default = library.load()
PATHS = (*(_default.available if _default else ()), "torch")
if _default is None:
    print("no compiled kernels: testing the torch fallback alone; build with `python setup.py build_ext --inplace`")


@contextmanager
def forced(path: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.PATH_VARIABLE, path)
        library.load.cache_clear()
        try:
            yield
        finally:
            library.load.cache_clear()


class Quantized(NamedTuple):
    """A matrix in int8: dense, packed where ``keep`` says, and what it stands for, in float64."""

    values: Tensor
    packed: Tensor
    scale: Tensor
    exact: Tensor

    @classmethod
    def of(cls, dense: Tensor, keep: Tensor, dtype: torch.dtype) -> "Quantized":
        values, scale = int8.quantize(torch.where(keep, dense.float(), 0), dtype)
        return cls(values, bitmap.pack(values, keep)[0], scale, values.double() * (scale.double() / 127)[:, None])


class Sparse(NamedTuple):
    values: Tensor
    mask: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, dense: Tensor, keep: Tensor) -> "Sparse":
        values, mask = bitmap.pack(dense, keep)
        return cls(values, mask, bitmap.row_offsets(mask))


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y is x Wᵀ + bias, rounded once, or by torch, before the bias and after it."""
    torch_did_it = library.load() is None or math.prod(x.shape[:-1]) > cpu.MAX_KERNEL_BATCH
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected, size = F.linear(*wide), F.linear(*(None if t is None else t.abs() for t in wide))
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    # The smallest normal number bounds the error of what is subnormal, which some instruction sets flush to zero.
    bound = TOLERANCE[x.dtype] * size * (2 if torch_did_it else 1) + torch.finfo(x.dtype).tiny
    assert torch.all((y.double() - expected).abs() <= bound)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x, possibly not contiguous, a dictionary, a dense matrix, what is kept of it, and a bias."""
    out, cols, in_features = (draw(st.integers(1, 300)) for _ in range(3))
    leading = draw(st.sampled_from([(1,), (), (2,), (0,), (3,), (4,), (2, 3), (8,), (15,), (16,), (17,), (1, 33)]))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dense, dictionary = torch.randn(out, cols).to(dtype), torch.randn(cols, in_features).to(dtype)
    keep = torch.rand(out, cols) < draw(st.floats(0, 1))
    keep[torch.rand(out) < draw(st.sampled_from((0.0, 0.5)))] = False
    x = torch.randn(*leading, cols).to(dtype)
    match draw(st.sampled_from(("contiguous", "transposed", "strided"))):
        case "transposed" if len(leading) > 0:
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        case "strided":
            x = torch.stack([x, x], dim=-1)[..., 0]
    return x, dictionary, dense, keep, torch.randn(out).to(dtype) if draw(st.booleans()) else None


@pytest.mark.parametrize("path", PATHS)
@given(case=products())
@settings(max_examples=60, deadline=None)
def test_products_agree_with_the_dense_ones(
    path: str, case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
) -> None:
    x, dictionary, dense, keep, bias = case
    weight, sparse = torch.where(keep, dense, 0), Sparse.of(dense, keep)
    with forced(path):
        assert torch.equal(ops.expand(*sparse, keep.shape[1]), weight)
        assert_product(ops.sparse_linear(x, *sparse, keep.shape[1], bias), x, weight, bias)
        assert_product(ops.dense_linear(x, weight, bias), x, weight, bias)
        u = torch.randn(*x.shape[:-1], dictionary.shape[1]).to(x.dtype)
        hidden = ops.dense_linear(u, dictionary)
        fused = ops.factor_linear(u, dictionary, *sparse, bias)
        assert_product(fused, hidden, weight, bias)
        if path != "torch":
            assert torch.equal(fused, ops.sparse_linear(hidden, *sparse, keep.shape[1], bias))
        rank = min(dictionary.shape[1], keep.shape[1])  # as many atoms, the other columns are those of the input
        u, atoms = x[..., rank:], torch.randn(rank, keep.shape[1] - rank).to(x.dtype)
        beside = ops.factor_linear(u, atoms, *sparse, bias, None, None, True)
        assert_product(beside, torch.cat([ops.dense_linear(u, atoms), u], dim=-1), weight, bias)


@pytest.mark.parametrize("path", PATHS)
@given(case=products())
@settings(max_examples=60, deadline=None)
def test_products_of_int8_agree_with_the_dense_ones(
    path: str, case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
) -> None:
    x, dictionary, dense, keep, bias = case
    mask, cols = bitmap.pack_mask(keep), keep.shape[1]
    offsets = bitmap.row_offsets(mask)
    weight, atoms = (
        Quantized.of(dense, keep, x.dtype),
        Quantized.of(dictionary, torch.ones_like(dictionary, dtype=torch.bool), x.dtype),
    )
    with forced(path):
        expanded = ops.expand(weight.packed, mask, offsets, cols, weight.scale)
        assert expanded.dtype == x.dtype
        torch.testing.assert_close(expanded.double(), weight.exact, rtol=TOLERANCE[x.dtype], atol=1e-7)
        packed = (weight.packed, mask, offsets)
        sparse = ops.sparse_linear(x, *packed, cols, bias, weight.scale)
        # Rows that torch multiplies are rounded on the way from int8, too.
        rounded = library.load() is None or math.prod(x.shape[:-1]) > cpu.MAX_KERNEL_BATCH
        exact = expanded if rounded else weight.exact
        assert_product(sparse, x, exact, bias)
        assert_product(ops.dense_linear(x, weight.values, bias, weight.scale), x, exact, bias)
        u = torch.randn(*x.shape[:-1], dictionary.shape[1]).to(x.dtype)
        hidden = ops.dense_linear(u, atoms.values, None, atoms.scale)
        fused = ops.factor_linear(u, atoms.values, *packed, bias, atoms.scale, weight.scale)
        assert_product(fused, hidden, exact, bias)
        rank = min(dictionary.shape[1], cols)
        atoms = Quantized.of(torch.randn(rank, cols - rank), torch.ones(rank, cols - rank, dtype=torch.bool), x.dtype)
        u = x[..., rank:]
        beside = ops.factor_linear(u, atoms.values, *packed, bias, atoms.scale, weight.scale, True)
        hidden = ops.dense_linear(u, atoms.values, None, atoms.scale)
        assert_product(beside, torch.cat([hidden, u], dim=-1), exact, bias)
        twice = [[part] * 2 for part in packed]
        nothing = [None, None]
        both = ops.packed_linears(
            x, twice[0], [weight.scale] * 2, *twice[1:], [bias, None], nothing, nothing, [cols, cols]
        )
        assert torch.equal(both[0], sparse)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 8, 16, 20])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spread_as_in_the_dense_product(
    path: str, dtype: torch.dtype, batch: int, special: float
) -> None:
    torch.manual_seed(0)
    dense, keep = torch.randn(9, 100).to(dtype), torch.rand(9, 100) < 0.5
    keep[3] = False
    x = torch.randn(batch, 100).to(dtype)
    x[batch // 2, 98] = special
    weight, sparse = torch.where(keep, dense, 0), Sparse.of(dense, keep)
    expected = F.linear(x.double(), weight.double())
    with forced(path):
        for y in (ops.sparse_linear(x, *sparse, 100), ops.dense_linear(x, weight)):
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())
            assert torch.equal(y[y.isinf()].sign(), expected[expected.isinf()].float().sign().to(dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_overflows_becomes_infinity_and_nan_weights_stay(path: str, dtype: torch.dtype) -> None:
    dense = torch.full((2, 64), torch.finfo(dtype).max).to(dtype)
    dense[1, 63] = math.nan
    sparse = Sparse.of(dense, torch.ones(2, 64, dtype=torch.bool))
    with forced(path):
        y = ops.sparse_linear(torch.ones(1, 64, dtype=dtype), *sparse, 64)
        assert ops.expand(*sparse, 64)[1, 63].isnan()
    assert y[0, 0] == math.inf
    assert y[0, 1].isnan()


@pytest.mark.parametrize("path", PATHS)
def test_results_do_not_depend_on_the_number_of_threads(path: str) -> None:
    torch.manual_seed(0)
    dense = torch.randn(1024, 512)
    sparse, x = Sparse.of(dense, torch.rand(1024, 1) * torch.rand(1024, 512) < 0.3), torch.randn(4, 512)
    threads = torch.get_num_threads()
    try:
        with forced(path):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(ops.sparse_linear(x, *sparse, 512))
    finally:
        torch.set_num_threads(threads)
    if path == "torch":
        pytest.skip("torch's own product")
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("path", PATHS)
def test_large_batches_are_expanded_piece_by_piece(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SCRATCH_BYTES", 4 * 100 * 7)
    torch.manual_seed(0)
    dense, keep, x, bias = torch.randn(30, 100), torch.rand(30, 100) < 0.5, torch.randn(2, 20, 100), torch.randn(30)
    with forced(path):
        assert_product(ops.sparse_linear(x, *Sparse.of(dense, keep), 100, bias), x, torch.where(keep, dense, 0), bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 3, 16, 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_several_matrices_at_once(path: str, dtype: torch.dtype, batch: int, threads: int) -> None:
    torch.manual_seed(0)
    x, before = torch.randn(batch, 130).to(dtype), torch.get_num_threads()
    weights = [torch.randn(out, 130).to(dtype) for out in (700, 0, 1, 33)]
    keeps = [torch.rand(weight.shape) < density for weight, density in zip(weights, (0.5, 0.5, 1.0, 0.0), strict=True)]
    biases = [torch.randn(700).to(dtype), None, None, torch.randn(33).to(dtype)]
    packed = [Sparse.of(weight, keep) for weight, keep in zip(weights, keeps, strict=True)]
    values, masks, offsets = zip(*packed, strict=True)
    try:
        torch.set_num_threads(threads)
        with forced(path):
            nothing = [None] * 4
            outputs = ops.packed_linears(x, values, nothing, masks, offsets, biases, nothing, nothing, [130] * 4)
            for y, sparse, bias in zip(outputs, packed, biases, strict=True):
                assert torch.equal(y, ops.sparse_linear(x, *sparse, 130, bias))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 3, 16, 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_matrices_with_and_without_dictionaries_at_once(
    path: str, dtype: torch.dtype, batch: int, threads: int
) -> None:
    torch.manual_seed(0)
    x, before = torch.randn(batch, 130).to(dtype), torch.get_num_threads()
    dictionaries = [torch.randn(rank, 130).to(dtype) if rank else None for rank in (0, 70, 7, 0, 130)]
    columns = [130, 70, 137, 130, 130]
    weights = [torch.randn(out, cols).to(dtype) for out, cols in zip((300, 33, 700, 0, 5), columns, strict=True)]
    packed = [Sparse.of(weight, torch.rand(weight.shape) < 0.5) for weight in weights]
    values, masks, offsets = zip(*packed, strict=True)
    biases = [None, torch.randn(33).to(dtype), torch.randn(700).to(dtype), None, None]
    nothing = [None] * 5
    try:
        torch.set_num_threads(threads)
        with forced(path):
            parts = values, nothing, masks, offsets, biases, dictionaries, nothing
            outputs = ops.packed_linears(x, *parts, columns)
            for y, sparse, bias, atoms, cols in zip(outputs, packed, biases, dictionaries, columns, strict=True):
                if atoms is None:
                    expected = ops.sparse_linear(x, *sparse, cols, bias)
                else:
                    hidden = ops.dense_linear(x, atoms)
                    hidden = hidden if cols == len(atoms) else torch.cat([hidden, x], dim=-1)
                    expected = ops.sparse_linear(hidden, *sparse, cols, bias)
                assert torch.equal(y, expected)
    finally:
        torch.set_num_threads(before)


def together(
    x: Tensor,
    sparse: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    dictionary: Tensor | None,
    cols: int,
    scale: Tensor | None = None,
    dictionary_scale: Tensor | None = None,
) -> tuple[object, ...]:
    """Arguments of `packed_linears` for one matrix, twice: the second time without a bias."""
    values, mask, offsets = sparse
    kinds = (values, scale, mask, offsets, bias, dictionary, dictionary_scale)
    return x, *([part, None if part is bias else part] for part in kinds), [cols] * 2


@pytest.mark.parametrize("path", PATHS)
def test_empty_matrices(path: str) -> None:
    with forced(path):
        for out, cols in ((0, 5), (5, 0), (0, 0)):
            weight = torch.randn(out, cols)
            sparse = Sparse.of(weight, torch.ones(out, cols, dtype=torch.bool))
            x, bias = torch.randn(2, cols), torch.randn(out)
            assert torch.equal(ops.sparse_linear(x, *sparse, cols, bias), F.linear(x, weight, bias))
            assert torch.equal(ops.dense_linear(x, weight, bias), F.linear(x, weight, bias))
            assert ops.expand(*sparse, cols).shape == (out, cols)
            mask = bitmap.pack_mask(torch.ones(out, cols, dtype=torch.bool))
            packed = Quantized.of(weight, torch.ones(out, cols, dtype=torch.bool), torch.float32)
            parts = packed.packed, mask, bitmap.row_offsets(mask)
            y = ops.sparse_linear(x, *parts, cols, bias, packed.scale)
            assert torch.equal(y, F.linear(x, ops.expand(*parts, cols, packed.scale), bias))
        empty = Sparse.of(torch.zeros(4, 0), torch.zeros(4, 0, dtype=torch.bool))
        assert torch.equal(ops.factor_linear(torch.randn(2, 3), torch.zeros(0, 3), *empty), torch.zeros(2, 4))


def test_other_dtypes_go_through_torch() -> None:
    dense, keep, x = torch.randn(7, 9).double(), torch.rand(7, 9) < 0.5, torch.randn(2, 9).double()
    expected = F.linear(x, torch.where(keep, dense, 0))
    torch.testing.assert_close(ops.sparse_linear(x, *Sparse.of(dense, keep), 9), expected)


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("bias", [None, torch.randn(6)])
def test_opcheck(batch: int, bias: Tensor | None) -> None:
    dense, x, dictionary = torch.randn(6, 70), torch.randn(batch, 2, 70), torch.randn(70, 5)
    sparse = Sparse.of(dense, torch.rand(6, 70) < 0.5)
    for op, arguments in (
        (torch.ops.rocket.sparse_linear, (x, *sparse, 70, bias)),
        (torch.ops.rocket.packed_linears, together(x, sparse, bias, None, 70)),
        (torch.ops.rocket.packed_linears, together(x[..., :5], sparse, bias, dictionary, 70)),
        (torch.ops.rocket.factor_linear, (x[..., :5], dictionary, *sparse, bias)),
        (torch.ops.rocket.factor_linear, (x[..., :65], torch.randn(5, 65), *sparse, bias, None, None, True)),
        (torch.ops.rocket.dense_linear, (x, dense, bias)),
        (torch.ops.rocket.expand, (*sparse, 70)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("bias", [None, torch.randn(6)])
def test_opcheck_of_int8(batch: int, bias: Tensor | None) -> None:
    keep, x = torch.rand(6, 70) < 0.5, torch.randn(batch, 2, 70)
    weight = Quantized.of(torch.randn(6, 70), keep, torch.float32)
    atoms = Quantized.of(torch.randn(70, 5), torch.ones(70, 5, dtype=torch.bool), torch.float32)
    mask = bitmap.pack_mask(keep)
    packed = (weight.packed, mask, bitmap.row_offsets(mask))
    for op, arguments in (
        (torch.ops.rocket.sparse_linear, (x, *packed, 70, bias, weight.scale)),
        (torch.ops.rocket.packed_linears, together(x, packed, bias, None, 70, weight.scale)),
        (
            torch.ops.rocket.packed_linears,
            together(x[..., :5], packed, bias, atoms.values, 70, weight.scale, atoms.scale),
        ),
        (torch.ops.rocket.factor_linear, (x[..., :5], atoms.values, *packed, bias, atoms.scale, weight.scale)),
        (torch.ops.rocket.dense_linear, (x, weight.values, bias, weight.scale)),
        (torch.ops.rocket.expand, (*packed, 70, weight.scale)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bias", [torch.zeros(3), torch.zeros(6, dtype=torch.float64), torch.zeros(7)])
def test_a_bias_that_does_not_fit(rows: int, bias: Tensor) -> None:
    sparse = Sparse.of(torch.randn(6, 70), torch.rand(6, 70) < 0.5)
    x, dictionary = torch.randn(rows, 70), torch.randn(70, 70)
    with torch.no_grad():
        for product in (
            lambda: ops.sparse_linear(x, *sparse, 70, bias),
            lambda: ops.packed_linears(*together(x, sparse, bias, None, 70)),
            lambda: ops.factor_linear(x, dictionary, *sparse, bias),
            lambda: ops.dense_linear(x, dictionary[:6].contiguous(), bias),
        ):
            with pytest.raises((ValueError, RuntimeError), match=r"bias is|must have the same dtype|size|shape|expand"):
                product()


def test_a_compiled_model_is_one_graph() -> None:
    sparse = Sparse.of(torch.randn(6, 70), torch.rand(6, 70) < 0.5)
    dictionary = torch.randn(70, 6)

    def model(x: Tensor) -> Tensor:
        x = torch.relu(ops.sparse_linear(x, *sparse, 70))
        x = ops.factor_linear(x, dictionary, *sparse) + ops.dense_linear(x, dictionary.T.contiguous() @ dictionary)
        return x @ ops.expand(*sparse, 70)

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (1, 5, 40):
        x = torch.randn(batch, 70)
        torch.testing.assert_close(compiled(x), model(x))


def test_whoever_watches_sees_the_op() -> None:
    """Only where nobody does is the dispatcher passed by."""
    sparse = Sparse.of(torch.randn(6, 70), torch.rand(6, 70) < 0.5)
    x, plain = torch.randn(2, 70), torch.randn(9, 2, 70)
    expected = ops.sparse_linear(plain, *sparse, 70)

    def product(x: Tensor) -> Tensor:
        return ops.sparse_linear(x, *sparse, 70)

    with torch.no_grad():
        assert ops.direct(x)
        graph = make_fx(product)(x)
        assert "rocket.sparse_linear" in graph.code
        assert "rocket::sparse_linear" in str(torch.jit.trace(product, x).graph)
        torch.testing.assert_close(torch.func.vmap(product)(plain), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert product(mode.from_tensor(x)).shape == (2, 6)
        assert product(torch.nn.Parameter(x)).shape == (2, 6)
        negated = torch._neg_view(x)
        torch.testing.assert_close(product(negated), -product(x))
        torch.testing.assert_close(product(x.to_sparse()), product(x))
        with torch.profiler.profile() as profile:
            product(x)
        assert any(event.name == "rocket::sparse_linear" for event in profile.events())
        assert ops.packed_linears(x, [], [], [], [], [], [], [], []) == []
        with pytest.raises(ValueError, match="x is on the CPU, a matrix on meta"):
            ops.dense_linear(x, torch.ones(6, 70, device="meta"))
    assert not ops.direct(x)  # with gradients


def test_mistakes_are_told() -> None:
    sparse = Sparse.of(torch.randn(6, 70), torch.rand(6, 70) < 0.5)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[1, 69\]; the matrix needs torch.float32 \[..., 70\]"):
        ops.sparse_linear(torch.randn(1, 69), *sparse, 70)
    with pytest.raises(ValueError, match="the matrix needs"):
        ops.sparse_linear(torch.randn(1, 70).bfloat16(), *sparse, 70)
    with pytest.raises(ValueError, match=r"values are torch.float32, their scale \[6\]: int8 needs a scale \[6\]"):
        ops.sparse_linear(torch.randn(1, 70), *sparse, 70, None, torch.ones(6))
    whole = torch.ones(6, 70, dtype=torch.int8)
    packed = torch.ones_like(sparse.values, dtype=torch.int8)
    for path in ("torch", PATHS[0]):
        with forced(path), pytest.raises(ValueError, match=r"their scale \[1\]: int8 needs a scale \[6\]"):
            ops.expand(packed, *sparse[1:], 70, torch.ones(1))
        with forced(path), pytest.raises(ValueError, match=r"values are torch\.float32, their scale"):
            ops.expand(*sparse, 70, torch.ones(6))
    for batch in (1, 20):
        with pytest.raises(ValueError, match=r"their scale \[5\]: int8 needs a scale \[6\]"):
            ops.dense_linear(torch.randn(batch, 70), whole, None, torch.ones(5))
    if _default is None:
        pytest.skip("the rest is checked on the way to the compiled kernels")
    mixed = [sparse.values, torch.ones_like(sparse.values, dtype=torch.int8)]
    scales, nothing = [None, torch.ones(6)], [None, None]
    masks, offsets = [sparse.mask] * 2, [sparse.offsets] * 2
    with pytest.raises(ValueError, match="values of one type"):
        ops.packed_linears(torch.randn(1, 70), mixed, scales, masks, offsets, nothing, nothing, nothing, [70, 70])
    for dictionary, columns, message in (
        (torch.randn(69), 69, r"dictionary is \[69\]; x has 69 columns, the matrix behind it 70"),
        (None, 69, "a matrix of 70 columns does not multiply x of 69"),
        (torch.randn(70, 68), 69, r"dictionary is \[70, 68\]; x has 69 columns, the matrix behind it 70"),
        (torch.randn(2, 69), 69, r"dictionary is \[2, 69\]; x has 69 columns, the matrix behind it 70"),
    ):
        for path in ("torch", PATHS[0]):
            with forced(path), pytest.raises(ValueError, match=message):
                ops.packed_linears(*together(torch.randn(1, columns), sparse, None, dictionary, 70))
    with pytest.raises(ValueError, match="mask is"):
        ops.expand(sparse.values, sparse.mask, sparse.offsets, 129)
    with pytest.raises(RuntimeError, match="offsets and values disagree"):
        ops.sparse_linear(torch.randn(1, 70), sparse.values[:-1], sparse.mask, sparse.offsets, 70)
    fake = FakeTensorMode().from_tensor(torch.randn(70, 6))
    for weight, what in (
        (torch.randn(6, 70).T, "not contiguous"),
        (torch.randn(70, 6).to_sparse(), "of layout torch.sparse_coo"),
        (fake, "of class FakeTensor"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=rf"one of shape \[70, 6\] is {what}"):
            ops.dense_linear(torch.randn(1, 6), weight)


def test_an_instruction_set_that_cannot_run_is_refused() -> None:
    if _default is None:
        pytest.skip("no compiled kernels")
    with forced("sse9"), pytest.raises(RocketError, match="ROCKET_KERNEL=sse9 cannot run here; choose one of: torch"):
        library.load()


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_a_library_torch_does_it(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / f"_cpu{library.EXTENSION_SUFFIXES[0]}").write_bytes(content)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv(library.PATH_VARIABLE, raising=False)
    library.load.cache_clear()
    try:
        assert library.load() is None
        dense, keep, x = torch.randn(7, 9), torch.rand(7, 9) < 0.5, torch.randn(2, 9)
        assert_product(ops.sparse_linear(x, *Sparse.of(dense, keep), 9), x, torch.where(keep, dense, 0), None)
    finally:
        library.load.cache_clear()


def test_importing_the_ops_loads_no_library_and_no_triton() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); from rocket.kernels import library, ops;"
        "assert library.load.cache_info().currsize == 0; assert not {'triton'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime() -> None:
    if _default is None:
        pytest.skip("no compiled kernels")
    ops.dense_linear(torch.randn(1, 512), torch.randn(2048, 512))
    runtimes = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_is_differentiable_in_the_values(path, dtype):
    keep, scale = torch.rand(5, 70) < 0.5, torch.randn(5, 70, dtype=dtype)
    sparse = Sparse.of(torch.randn(5, 70, dtype=dtype), keep)
    values = sparse.values.requires_grad_()
    with forced(path):
        (ops.expand(*sparse, 70) * scale).sum().backward()
    assert torch.equal(values.grad, scale[keep])


def test_gradient_of_expand_compiles():
    keep, scale = torch.rand(5, 70) < 0.5, torch.randn(5, 70)
    sparse = Sparse.of(torch.randn(5, 70), keep)
    values = sparse.values.requires_grad_()
    torch.compile(lambda values: (ops.expand(values, *sparse[1:], 70) * scale).sum())(values).backward()
    assert torch.equal(values.grad, scale[keep])
