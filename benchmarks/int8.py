"""Values in int8 beside values in bfloat16, at the same bytes: what the loss says, and how fast the model decodes.

    python -m benchmarks.int8                                   # SmolLM2-135M
    python -m benchmarks.int8 --megabytes 160 120 --tokens 32

Rows are models whose checkpoints take about the same bytes: the original; `float`, the default's forms in bfloat16;
`int8`, every layer dense in int8 and nothing else, as plain weight-only quantization stores it; and `both`, any form in
either type, which the knapsack chooses by bytes. All are planned from the same profiles. `excess_loss` is in nats a
token over the original's, `predicted` the plan's. Speed is tokens a second of `generate` at batch 1 after `optimize()`,
all models taking turns, ratios of medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import rocket
from benchmarks.decode import generate, take_turns
from benchmarks.harness import write_results
from benchmarks.healing import CONFIG, measure
from rocket.allocation import Plan, Planner
from rocket.config import load_config
from rocket.forms import Option
from rocket.models import load_model
from rocket.pipeline import gather_activations, profile_layers
from rocket.session import Session

KINDS: dict[str, Callable[[Option], bool]] = {
    "float": lambda option: not option.scales,
    "int8": lambda option: option.label == "dense int8",
    "both": lambda option: True,
}


def plans(planner: Planner, megabytes: list[float]) -> Iterator[tuple[str, Plan]]:
    """Of each kind the plans for these sizes; plain int8 has but one size."""
    for kind, allowed in KINDS.items():
        profiles = [replace(one, options=tuple(filter(allowed, one.options))) for one in planner.profiles]
        chosen = replace(planner, profiles=profiles)
        for size in [planner.size.bytes / 1e6] if kind == "int8" else megabytes:
            try:
                yield kind, chosen.at(bytes=1e6 * size)
            except rocket.RocketError as error:
                print(f"{kind}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=float, default=[200, 165, 130], help="of a checkpoint")
    parser.add_argument("--texts", nargs="+", default=["embedded", "embedded:boolq"])
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=24576, help="of each text")
    parser.add_argument("--tokens", type=int, default=32, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--run", type=Path, help="the run directory to use again; a temporary one by default")
    parser.add_argument("--output", default="int8", help="name of the results file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        config = load_config(CONFIG, [f"output_dir={args.run or temporary}", "profiling.precisions=[float, int8]"])
        with Session(config) as session:
            calibration, _ = gather_activations(session)
            planner = profile_layers(session)
            models["original"], processor = session.loaded
            original = measure(models["original"], processor, args)
            for kind, plan in plans(planner, args.megabytes):
                model = rocket.compress(models["original"], plan, calibration)
                found = measure(model, processor, args)
                name = f"{kind}, {plan.bytes / 1e6:.0f} MB"
                models[name] = model
                rows += [
                    {
                        "model": name,
                        "precision": kind,
                        "megabytes": plan.bytes / 1e6,
                        "original_megabytes": plan.size.bytes / 1e6,
                        "values_removed_ratio": plan.removed_ratio,
                        "forms": "+".join(sorted(plan.forms())),
                        "text": text,
                        "perplexity": math.exp(found[text]),
                        "excess_loss": found[text] - original[text],
                        "predicted": plan.cost,
                    }
                    for text in args.texts
                ]
                print(rows[-1], flush=True)
    works = {
        name: generate(rocket.optimize(model), 1, 16, args.tokens)
        for name, model in models.items()
        if name != "original"
    }
    works["original"] = generate(models["original"], 1, 16, args.tokens)
    works["original, our dense"] = generate(rocket.optimize(load_model(config.model)[0]), 1, 16, args.tokens)
    taken = take_turns(works, args.rounds)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    for name, values in taken.items():
        rows.append(
            {
                "model": name,
                "kind": "decode",
                "tokens_per_second": args.tokens / seconds[name],
                "over original": seconds["original"] / seconds[name],
                "over our dense": seconds["original, our dense"] / seconds[name],
                "relative_spread": (max(values) - min(values)) / seconds[name],
                "threads": torch.get_num_threads(),
            }
        )
    write_results(args.output, rows)


if __name__ == "__main__":
    main()
