"""The Triton kernels: interpreted and compiled to PTX anywhere, run on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from rocket.kernels import bitmap, int8, ops

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(1, 1), (5, 64), (17, 65), (20, 513)]
BATCHES = [(1, 0.5), (2, 0.3), (16, 0.7), (17, 1.0)]
# Triton's interpreter cuts bfloat16 off where a GPU rounds.
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2 ** -(7 if INTERPRETED else 8) * 1.01, torch.float16: 2**-11 * 1.01}


def check_products(
    shape: tuple[int, int], dtype: torch.dtype, batch: int, density: float, device: str, quantized: bool
) -> None:
    """The kernels themselves, on whatever device: `ops` would not send a CPU tensor to them."""
    from rocket.kernels import gpu

    out, cols = shape
    torch.manual_seed(out + batch)
    dense, keep = torch.randn(out, cols, device=device).to(dtype), torch.rand(out, cols, device=device) < density
    keep[out // 2] = False
    bias = torch.randn(out, device=device).to(dtype) if batch % 2 else None
    weight, scale = torch.where(keep, dense, 0), None
    values, mask = bitmap.pack(dense, keep)
    offsets = bitmap.row_offsets(mask)
    if quantized:
        whole, scale = int8.quantize(weight.float(), dtype)
        values, weight = bitmap.pack(whole, keep)[0], whole.double() * (scale.double() / 127)[:, None]
        torch.testing.assert_close(
            gpu.expand(values, mask, offsets, cols, scale).double(), weight, rtol=DTYPES[dtype], atol=1e-6
        )
    else:
        assert torch.equal(gpu.expand(values, mask, offsets, cols), weight)

    x = torch.randn(batch, cols, device=device).to(dtype)
    y = gpu.sparse_linear(x, values, mask, offsets, cols, bias, scale)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected, size = F.linear(*wide), F.linear(*(None if t is None else t.abs() for t in wide))
    roundings = 2 if quantized and batch > gpu.MAX_KERNEL_BATCH else 1  # of the expanded weights, too
    assert torch.all((y.double() - expected).abs() <= roundings * DTYPES[dtype] * size + torch.finfo(dtype).tiny)

    if quantized:
        whole, scale = int8.quantize(dense.float(), dtype)
        exact = whole.double() * (scale.double() / 127)[:, None]
        y, size = (
            gpu.dense_linear(x, whole, bias, scale),
            F.linear(*(t if t is None else t.double().abs() for t in (x, exact, bias))),
        )
        expected = F.linear(x.double(), exact, wide[2])
        assert torch.all((y.double() - expected).abs() <= roundings * DTYPES[dtype] * size + torch.finfo(dtype).tiny)
        scale = int8.quantize(weight, dtype)[1]

    x[0, -1] = float("nan")
    y = gpu.sparse_linear(x, values, mask, offsets, cols, bias, scale)
    assert torch.equal(y.isnan(), F.linear(x, weight.to(dtype), bias).isnan())


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "products", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not INTERPRETED, reason="runs inside test_interpreted")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "density"), BATCHES)
@pytest.mark.parametrize("quantized", [False, True])
def test_products(shape: tuple[int, int], dtype: torch.dtype, batch: int, density: float, quantized: bool) -> None:
    check_products(shape, dtype, batch, density, "cpu", quantized)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "bf16"), (80, "fp16"), (90, "fp32")])
@pytest.mark.parametrize("name", ["vector", "batch", "expand"])
@pytest.mark.parametrize(("sparse", "quantized"), [(True, False), (True, True), (False, True)])
def test_compiles_without_a_gpu(name: str, dtype: str, capability: int, sparse: bool, quantized: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rocket.kernels import gpu

    kernel = getattr(gpu, f"{name}_kernel")
    if name == "expand" and not sparse:
        pytest.skip("a dense matrix is not expanded")
    constants = {
        "SPARSE": sparse,
        "INT8": quantized,
        "HAS_BIAS": True,
        "WIDEN": False,
        "BLOCK_ROWS": gpu.ROWS_A_PROGRAM[name],
    }
    types = {
        "values": "*i8" if quantized else f"*{dtype}",
        "mask": "*i32",
        "offsets": "*i64",
        **dict.fromkeys(("batch", "out", "cols", "words"), "i32"),
    }
    signature = {a: "constexpr" if a in constants else types.get(a, f"*{dtype}") for a in kernel.arg_names}
    constants = {a: value for a, value in constants.items() if a in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (1536, 576), (2048, 8192)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "density"), BATCHES)
@pytest.mark.parametrize("quantized", [False, True])
def test_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype, batch: int, density: float, quantized: bool) -> None:
    check_products(shape, dtype, batch, density, "cuda", quantized)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 4, 40])
def test_ops_and_cuda_graphs_on_a_gpu(batch: int) -> None:
    dense, keep = torch.randn(96, 200, device="cuda").half(), torch.rand(96, 200, device="cuda") < 0.5
    values, mask = bitmap.pack(dense, keep)
    offsets, dictionary = bitmap.row_offsets(mask), torch.randn(200, 64, device="cuda").half()
    x = torch.randn(batch, 64, device="cuda").half()
    arguments = (x, dictionary, values, mask, offsets)
    torch.library.opcheck(torch.ops.rocket.factor_linear.default, arguments)
    compiled = torch.compile(ops.factor_linear, mode="reduce-overhead", fullgraph=True)
    expected = F.linear(F.linear(x, dictionary), torch.where(keep, dense, 0))
    for _ in range(3):
        torch.testing.assert_close(compiled(*arguments), expected, rtol=1e-2, atol=0.5)
