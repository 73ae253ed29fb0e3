"""Compress a checkpoint that is larger than the memory allowed: peak memory, and where the time goes.

The model has the shape of a real one and random weights, written shard by shard. The run is the ``rocket run`` command
in a process of its own, whose memory is watched from outside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import write_results
from benchmarks.tiny import make_tokenizer

LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama-3.2-1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "tiny": {**LLAMA, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
}
WATCH_SECONDS = 0.1


def make_checkpoint(directory: Path, shape: str, blocks: int | None) -> int:
    """A random-weight Llama in bfloat16 with a tokenizer of bytes, one shard a block; returns its bytes of weights."""
    changes = {"num_hidden_layers": blocks} if blocks else {}
    config = AutoConfig.for_model("llama", **{**SHAPES[shape], **changes}, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    shards: dict[str, list[str]] = {}
    for name in tensors:
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else name, []).append(name)
    files = {key: f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number, key in enumerate(shards, start=1)}
    total = sum(tensor.numel() * 2 for tensor in tensors.values())
    places = {name: files[key] for key, names in shards.items() for name in names}
    if (directory / "model.safetensors.index.json").exists():
        return total
    directory.mkdir(parents=True, exist_ok=True)
    for number, (key, names) in enumerate(shards.items()):
        if not (directory / files[key]).exists():
            generator = torch.Generator().manual_seed(number)
            made = {name: _random(tensors[name].shape, generator) for name in names}
            save_file(made, directory / "unfinished.safetensors", {"format": "pt"})
            (directory / "unfinished.safetensors").rename(directory / files[key])
    config.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    )
    return total


def _random(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    for rows in tensor.split(1024):
        rows.copy_(torch.randn(rows.shape, generator=generator) * shape[-1] ** -0.5)
    return tensor


def watch(command: Sequence[str]) -> float:
    """Peak resident MB of a command, sampled from outside. Raises CalledProcessError if it fails."""
    peak = 0
    process = psutil.Popen(command)
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(WATCH_SECONDS)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--blocks", type=int, help="blocks of the checkpoint; default: all of the shape's")
    parser.add_argument("--compress", type=int, nargs="+", help="compress only these blocks; default: all")
    parser.add_argument("--budget", default="6GB")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--forms", nargs="+", default=["dictionary"])
    parser.add_argument(
        "--directory", type=Path, default=Path("output/streaming"), help="disk for about 3 x the weights"
    )
    args = parser.parse_args()

    total = make_checkpoint(args.directory / args.shape, args.shape, args.blocks)
    targets = [f"re:.*layers\\.({'|'.join(map(str, args.compress))})\\..*"] if args.compress else []
    config = {
        "output_dir": str(args.directory / "run"),
        "memory_budget": args.budget,
        "model": {"path": str(args.directory / args.shape), "dtype": "bfloat16", "device": "cpu", "targets": targets},
        "calib": {"num_samples": args.samples, "seq_len": args.seq_len, "batch_size": 2, "sensitivity_samples": 2},
        "profiling": {"forms": args.forms, "removed_ratios": [0.3], "rank_support_ratios": [2.0], "refits": 0},
        "compression": {"removed_ratio": 0.25},
        "evaluation": {"texts": ["embedded"], "seq_len": args.seq_len, "max_tokens": 2 * args.seq_len, "batch_size": 1},
    }
    path = args.directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    watched_mb = watch([sys.executable, "-m", "rocket", "run", "--config", str(path)])
    usage = json.loads((args.directory / "run" / "usage.json").read_text())["content"]
    shared = {
        "shape": args.shape,
        "checkpoint_gb": total / 1e9,
        "budget": args.budget,
        "calibration_tokens": args.samples * args.seq_len,
        "compressed_blocks": len(args.compress) if args.compress else SHAPES[args.shape]["num_hidden_layers"],
        "threads": torch.get_num_threads(),
    }
    peak_mb = max(watched_mb, *(stage["peak_mb"] for stage in usage.values()))
    rows = [
        {"stage": "all", "seconds": sum(stage["seconds"] for stage in usage.values()), "peak_mb": peak_mb, **shared}
    ]
    rows += [{"stage": stage, "seconds": u["seconds"], "peak_mb": u["peak_mb"], **shared} for stage, u in usage.items()]
    write_results("streaming", rows)


if __name__ == "__main__":
    main()
