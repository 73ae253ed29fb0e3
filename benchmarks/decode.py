"""Speed of compressed layers and models against the original's.

    python -m benchmarks.decode                                     # some layers, and a model of SmolLM2's shapes
    python -m benchmarks.decode --models 1b --dtypes bfloat16 float32 --removed 0.2 0.3 0.5

Weights are random: speed does not depend on their values. Layer rows time one product with weights that come from
memory (each contender goes through copies that exceed the last cache), contenders taking turns in every round; ratios
are of medians. `stream_share` is the rate at which the contender reads its own weights, over the best rate at which
this machine reads at all. Model rows are tokens a second of `generate` (greedy, after a short prompt) and of a prefill,
the contenders taking turns as well. Memory rows are of a fresh process that opens a checkpoint, optimizes it and
generates: `resident_ratio` is what it then holds beyond its imports, over the bytes of the checkpoint's tensors, and
`peak_ratio` the most that it held while generating; `anonymous_ratio` leaves out pages mapped from the file, which the
system can drop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import rocket
from benchmarks.harness import write_results
from rocket.factorization.sparse import keep_top
from rocket.forms import dictionary, sparse_low_rank
from rocket.kernels import bitmap, library, ops
from rocket.models import target_layers
from rocket.nn import CompressedLinear, LayerSpec, attach_quantizer, replace_module
from rocket.nn.fuse import SharedInput
from rocket.nn.layers import PackedLinear, Precision, empty_layer

LAYERS = ["576x1536", "1536x576", "2048x2048", "2048x8192", "8192x2048", "4096x14336"]
RANK_SUPPORT_RATIO = 2.0
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
    "qwen-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}


class Kind(NamedTuple):
    """What layers are timed: a form, the share of the parameters that it removes, and the precision of its values."""

    form: str
    removed_ratio: float
    precision: Precision = "float"


def kinds(args: argparse.Namespace) -> list[Kind]:
    """All that were asked for; where int8 was, the plain int8 layer that removes nothing too."""
    found = [Kind(*kind) for kind in itertools.product(args.forms, args.removed, args.precisions)]
    return found + [Kind("dense", 0.0, "int8")] * ("int8" in args.precisions)


def random_layer(
    out_features: int, in_features: int, kind: Kind, dtype: torch.dtype, input_group: str = "benchmark"
) -> CompressedLinear:
    """A compressed layer of random values."""
    form, removed, precision = kind
    generator = torch.Generator().manual_seed(0)
    rank, nnz = 0, int((1 - removed) * out_features * in_features)
    if form == "dictionary":
        rank, support = dictionary.sizes_for(out_features, in_features, removed, RANK_SUPPORT_RATIO)
        nnz = support * out_features
    elif form == "sparse_low_rank":
        rank, count = sparse_low_rank.sizes_for(out_features, in_features, removed) or (0, 0)
        nnz = rank * out_features + count
    spec = LayerSpec(form, in_features, out_features, rank, 0 if form == "dense" else nnz, input_group, precision)
    with torch.device("meta"):
        layer = empty_layer(spec, bias=False)
    state = {"weight": torch.randn(nnz, generator=generator)}
    if rank:
        state["dictionary"] = torch.randn(rank, in_features, generator=generator)
    for name, values in list(state.items()):
        if precision == "float":
            state[name] = (values * 0.02).to(dtype)
        else:
            state[name] = (values * 32).clamp(-127, 127).to(torch.int8)
            state[f"{name}_scale"] = torch.full((out_features if name == "weight" else rank,), 0.08, dtype=dtype)
    if form != "dense":
        scores = torch.rand(out_features, spec.columns, generator=generator)
        if form == "sparse_low_rank":
            scores[:, :rank] = 2.0  # every output uses all atoms
        state["mask"] = bitmap.pack_mask(keep_top(scores, nnz))
    layer.load_state_dict(state, assign=True)
    layer.use_kernels()
    return layer.requires_grad_(False)


def cache_bytes() -> int:
    """Bytes of the last-level cache as Linux tells them; 64 MiB where it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=64 << 20)


def stream_bandwidth(rounds: int) -> float:
    """Bytes a second that this process can read, all threads: the best of torch's sum and our dense product."""
    buffer = torch.ones(1 << 28, dtype=torch.bfloat16)
    matrix, vector = buffer.view(-1, 4096), torch.ones(1, 4096, dtype=torch.bfloat16)
    whole = buffer.view(torch.int64)
    times = []
    for _ in range(rounds):
        for read in (lambda: whole.sum(), lambda: ops.dense_linear(vector, matrix)):
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
    return buffer.numel() * buffer.element_size() / min(times)


def take_turns(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the contenders taking turns; one untimed round first."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def for_each(items: Sequence[Any], product: Callable[[Any], object]) -> Callable[[], None]:
    def call() -> None:
        for item in items:
            product(item)

    return call


def layer_row(shape: str, dtype: torch.dtype, batch: int, kind: Kind, rounds: int, bandwidth: float) -> dict[str, Any]:
    out_features, in_features = (int(size) for size in shape.split("x"))
    inputs = torch.randn(batch, in_features).to(dtype)
    layer = random_layer(out_features, in_features, kind, dtype)
    size = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    dense_bytes = out_features * in_features * inputs.element_size()
    count = max(2, -(-2 * cache_bytes() // size))  # copies enough to be out of the cache when their turn comes
    weights = [torch.randn(out_features, in_features).mul_(0.02).to(dtype) for _ in range(count)]
    layers = [layer, *(_copy(layer) for _ in range(count - 1))]
    for copy in layers:
        if isinstance(copy, PackedLinear):
            SharedInput([copy])  # its product prepared, as in an optimized model
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, batch) for weight in weights]
    contenders: dict[str, Callable[[], object]] = {
        "ours": for_each(layers, lambda layer: layer(inputs)),
        "F.linear": for_each(weights, lambda weight: F.linear(inputs, weight)),
        "our dense": for_each(weights, lambda weight: ops.dense_linear(inputs, weight)),
        "oneDNN prepacked": for_each(
            packed, lambda weight: torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
        ),
    }
    if kind.form == "sparse" and dtype == torch.float32:  # torch has no product for CSR in half precision here
        matrices = [layer.dense_weight().to_sparse_csr() for layer in layers]
        contenders["torch CSR"] = for_each(matrices, lambda matrix: matrix @ inputs.T)
    found = take_turns(contenders, rounds)
    seconds = {name: statistics.median(values) / count for name, values in found.items()}
    return {
        "kind": "layer",
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        **kind._asdict(),
        "microseconds": 1e6 * seconds["ours"],
        "relative_spread": (max(found["ours"]) - min(found["ours"])) / statistics.median(found["ours"]),
        **{f"over {name}": seconds[name] / seconds["ours"] for name in seconds if name != "ours"},
        "limit over our dense": dense_bytes / size,
        "stream_share": size / seconds["ours"] / bandwidth,
    }


def _copy(layer: CompressedLinear) -> CompressedLinear:
    with torch.device("meta"):
        copy = empty_layer(layer.spec, bias=False)
    copy.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)
    copy.use_kernels()
    return copy.requires_grad_(False)


def random_model(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **MODELS[name], max_position_embeddings=2048)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def compressed_model(name: str, dtype: torch.dtype, kind: Kind) -> Any:
    model = random_model(name, dtype)
    for layer, module in target_layers(model).items():
        features = (module.out_features, module.in_features)
        replace_module(model, layer, random_layer(*features, kind, dtype, input_group_of(layer)))
    return model


def input_group_of(layer: str) -> str:
    """The first layer that reads the same input in a llama: q for k and v, gate for up."""
    block, _, kind = layer.rpartition(".")
    leaders = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    return f"{block}.{leaders.get(kind, kind)}"


def generate(model: Any, batch: int, prompt: int, tokens: int) -> Callable[[], object]:
    ids = torch.ones(batch, prompt, dtype=torch.int64)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def prefill(model: Any, tokens: int) -> Callable[[], object]:
    ids = torch.ones(1, tokens, dtype=torch.int64)

    def call() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return call


def model_rows(name: str, dtype: torch.dtype, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    original, ours = random_model(name, dtype), rocket.optimize(random_model(name, dtype))
    works: list[tuple[str, int, Callable[[Any], Callable[[], object]]]] = [
        ("decode", batch, lambda model, batch=batch: generate(model, batch, args.prompt, args.tokens))
        for batch in args.model_batches
    ]
    works.append(("prefill", 1, lambda model: prefill(model, args.prefill)))
    for kind in kinds(args):
        small = rocket.optimize(compressed_model(name, dtype, kind))
        for work, batch, make in works:
            tokens = args.prefill if work == "prefill" else batch * args.tokens
            contenders = {"original": make(original), "our dense": make(ours), "compressed": make(small)}
            found = take_turns(contenders, args.rounds)
            median = {key: statistics.median(values) for key, values in found.items()}
            trivial = None
            if args.trivial:
                rocket.optimize(small, backend="trivial")
                trivial = statistics.median(take_turns({"trivial": make(small)}, 1)["trivial"])
                rocket.optimize(small)
            rows.append(
                {
                    "kind": "model",
                    "model": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "work": work,
                    "batch": batch,
                    **kind._asdict(),
                    "tokens_per_second": tokens / median["compressed"],
                    "original_tokens_per_second": tokens / median["original"],
                    "trivial_tokens_per_second": None if trivial is None else tokens / trivial,
                    "relative_spread": (max(found["compressed"]) - min(found["compressed"])) / median["compressed"],
                    "over original": median["original"] / median["compressed"],
                    "over our dense": median["our dense"] / median["compressed"],
                }
            )
            print(rows[-1], flush=True)
        del small
    return rows


MEASURE_MEMORY = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
import rocket

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def use(path):
    model = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False).optimize()
    ids = torch.ones(1, int(sys.argv[3]), dtype=torch.int64)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    return model

use(sys.argv[1])  # a tiny model, for all that is imported and started but once
before, anonymous = status("VmRSS:"), status("RssAnon:")
Path("/proc/self/clear_refs").write_text("5")
model = use(sys.argv[2])
found = {"peak": status("VmHWM:") - before, "resident": status("VmRSS:") - before}
print(json.dumps({**found, "anonymous": status("RssAnon:") - anonymous}))
"""


def memory_row(name: str, dtype: torch.dtype, kind: Kind, prompt: int) -> dict[str, Any]:
    """Memory that opening, optimizing and running a compressed model takes, in a process of its own (Linux)."""
    with tempfile.TemporaryDirectory() as directory:
        tiny, real = Path(directory) / "tiny", Path(directory) / "real"
        for model_name, path in (("tiny", tiny), (name, real)):
            model = compressed_model(model_name, dtype, kind)
            modules = model.named_modules()
            attach_quantizer(model, {layer: m.spec for layer, m in modules if isinstance(m, CompressedLinear)})
            model.save_pretrained(path)
            del model
        stored = sum(path.stat().st_size for path in real.glob("*.safetensors"))
        command = [sys.executable, "-c", MEASURE_MEMORY, tiny, real, str(prompt)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "kind": "memory",
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        **kind._asdict(),
        "prompt": prompt,
        "stored_mb": stored / 1e6,
        "resident_ratio": found["resident"] / stored,
        "anonymous_ratio": found["anonymous"] / stored,
        "peak_ratio": found["peak"] / stored,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", default=["1536x576", "8192x2048"], help=f"shapes, as {' '.join(LAYERS)}")
    parser.add_argument("--models", nargs="*", default=["smollm2-135m"], choices=list(MODELS))
    forms = ["sparse", "dictionary", "sparse_low_rank"]
    parser.add_argument("--forms", nargs="+", default=forms, choices=forms)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--precisions", nargs="+", default=["float"], choices=get_args(Precision), help="of values")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="rows of input of the layer products")
    parser.add_argument("--model-batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=16, help="tokens before generation")
    parser.add_argument("--tokens", type=int, default=16, help="tokens generated for each sequence")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--trivial", action="store_true", help="also time the unoptimized compressed model")
    parser.add_argument("--memory", action="store_true", help="also the memory of the compressed models (Linux)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="decode", help="name of the results file")
    args = parser.parse_args()
    bandwidth = stream_bandwidth(2 * args.rounds)
    kernels = library.load()
    rows: list[dict[str, Any]] = [
        {
            "kind": "machine",
            "stream_gb_per_second": bandwidth / 1e9,
            "kernel": None if kernels is None else library.PATHS[kernels.path],
            "threads": torch.get_num_threads(),
        }
    ]
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for shape, batch, kind in itertools.product(args.layers, args.batches, kinds(args)):
            rows.append(layer_row(shape, dtype, batch, kind, args.rounds, bandwidth))
            print(rows[-1], flush=True)
        for name in args.models:
            rows += model_rows(name, dtype, args)
            if args.memory:
                for kind in kinds(args):
                    if kind.removed_ratio in (0.0, args.removed[-1]):
                        rows.append(memory_row(name, dtype, kind, args.prompt))
                        print(rows[-1], flush=True)
        write_results(args.output, rows)


if __name__ == "__main__":
    main()
