"""Perplexity and zero-shot accuracy of every method at the same calibration data, tokens and stored values.

    python -m benchmarks.quality                                   # svd-llm, paper, rocket at 20 %, one seed
    python -m benchmarks.quality --sizes 0.2 0.3 0.4 0.5 --seeds 0 1 2 --methods all --tasks piqa arc_easy --limit 500

Every method gets the Gram matrices of the same calibration sequences. A method's layers are multiplied out and put in
the model's place for the measurement, so that all run through the same products. Text of the calibration domain is held
out by document; BoolQ's Wikipedia passages are a domain that no method saw. Choices in the product (importance
exponent, refits, ADMM's schedule) were made on layer errors of calibration data; the shrinkage of correlations and
the tempering of sensitivities on the loss at 40 and 50 % removed on calibration documents set apart and on the
descriptions of installed Python packages; none on these texts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines import evopress, sparsegpt, threebasil, wanda
from benchmarks.harness import write_results
from rocket.allocation import Plan, Planner, measure_size
from rocket.calib import Calibration, calibrate
from rocket.compression.compress import build_layer
from rocket.config import load_config
from rocket.config.schema import AllocationConfig, ModelConfig, ProfilingConfig
from rocket.data import load_documents, pack_tokens
from rocket.evaluation import chance_corrected_mean, paired_bootstrap, perplexity, zero_shot
from rocket.forms import select_forms
from rocket.models import load_model, target_layers
from rocket.profiling import profile_layers
from rocket.run import track

Weights = dict[str, Tensor]
PAPER = Path(__file__).parents[1] / "rocket" / "config" / "paper.yaml"


@dataclass(frozen=True)
class Compressed:
    """A method's answer: dense equivalents of the layers it changed, and what they take."""

    weights: Weights
    removed_ratio: float
    bytes_removed_ratio: float
    forms: str
    predicted: float | None = None


@dataclass
class Bench:
    """One calibration seed of one model, with what the methods share computed once."""

    args: argparse.Namespace
    model: Any
    tokenizer: Any
    seed: int
    planners: dict[str, Planner] = field(default_factory=dict)

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        return target_layers(self.model)

    @cached_property
    def tokens(self) -> Tensor:
        """Calibration windows, and behind them as many again that no method calibrates on (for searches)."""
        documents = load_documents(self.args.calibration, "calibration")
        samples = self.args.samples + self.args.search_samples
        return pack_tokens(documents.texts, self.tokenizer, self.args.seq_len, samples, self.seed)

    @cached_property
    def calibration(self) -> Calibration:
        tokens = self.tokens[: self.args.samples]
        return calibrate(self.model, self.layers, tokens, 8, self.args.sensitivity_samples)

    def planner(self, name: str, profiling: ProfilingConfig, allocation: AllocationConfig) -> Planner:
        """Profile under ``name`` once; other allocations of the same profiles are free."""
        if name not in self.planners:
            forms = select_forms(profiling.forms)
            profiles = profile_layers(self.layers, self.calibration, forms, profiling)
            size = measure_size(self.model, self.layers.values())
            self.planners[name] = Planner(profiles, size, profiling, allocation, self.calibration)
        return replace(self.planners[name], allocation=allocation)

    def search_loss(self) -> float:
        """Mean loss on windows of the calibration domain that no method calibrated on."""
        total = 0.0
        windows = self.tokens[self.args.samples :]
        with torch.inference_mode():
            for ids in windows.split(8):
                ids = ids.to(self.model.device)
                logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        return total / (windows.numel() - len(windows))


@contextmanager
def swapped(layers: Mapping[str, nn.Linear], weights: Weights) -> Iterator[None]:
    """Put other weights into the layers for a while."""
    saved = {name: layers[name].weight.data for name in weights}
    try:
        for name, weight in weights.items():
            layers[name].weight.data = weight.to(saved[name])
        yield
    finally:
        for name, weight in saved.items():
            layers[name].weight.data = weight


def of_plan(bench: Bench, plan: Plan) -> Compressed:
    """Build a plan's layers and multiply them out."""
    weights: Weights = {}
    for name, option in track(plan.choices.items(), "build"):
        if option.form == "dense":
            continue
        linear = bench.layers[name]
        problem = bench.calibration.problem(name, linear.weight, plan.profiling.cost)
        layer = build_layer(linear, problem, option, plan.input_groups[name], plan)
        weights[name] = layer.float().dense_weight().detach().to(linear.weight.dtype)
    forms = "+".join(sorted(form for form in plan.forms() if form != "dense"))
    return Compressed(weights, plan.removed_ratio, plan.bytes_removed_ratio, forms, plan.cost)


def by_pruning(bench: Bench, removed_ratio: float, prune: Callable[[Tensor, Tensor, float], Tensor]) -> Compressed:
    """The same share of every layer pruned, stored like our sparse layers."""
    weights = {}
    for name, linear in track(list(bench.layers.items()), "prune"):
        gram = bench.calibration.gram(name).to(linear.weight.device)
        weights[name] = prune(linear.weight.detach().float(), gram, removed_ratio).to(linear.weight.dtype)
    size = measure_size(bench.model, bench.layers.values())
    kept = sum(int((weight != 0).sum()) for weight in weights.values())
    mask_bytes = sum(weight.shape[0] * 8 * -(-weight.shape[1] // 64) for weight in weights.values())
    stored = kept * size.itemsize + mask_bytes + size.other_bytes
    return Compressed(weights, 1 - kept / size.target_parameters, 1 - stored / size.bytes, "sparse")


def sparse_plus_low_rank(bench: Bench, removed_ratio: float) -> Compressed:
    """3BASiL at the same stored values a layer; the sparse part's mask takes its bits too."""
    weights, stored = {}, 0
    for name, linear in track(list(bench.layers.items()), "3basil"):
        gram = bench.calibration.gram(name).to(linear.weight.device)
        weight, values = threebasil.decompose(linear.weight.detach().float(), gram, removed_ratio)
        weights[name] = weight.to(linear.weight.dtype)
        stored += values
    size = measure_size(bench.model, bench.layers.values())
    mask_bytes = sum(weight.shape[0] * 8 * -(-weight.shape[1] // 64) for weight in weights.values())
    total = stored * size.itemsize + mask_bytes + size.other_bytes
    return Compressed(weights, 1 - stored / size.target_parameters, 1 - total / size.bytes, "sparse+low_rank")


def rocket_planner(bench: Bench, forms: list[str] | None = None, method: str = "knapsack") -> Planner:
    profiling = ProfilingConfig() if forms is None else ProfilingConfig(forms=forms)
    name = "rocket " + "+".join(profiling.forms)
    return bench.planner(name, profiling, AllocationConfig(method=method))


def paper_planner(bench: Bench, method: str = "knapsack") -> Planner:
    config = load_config(PAPER)
    return bench.planner("paper", config.profiling, AllocationConfig(method=method, error_cap=method == "knapsack"))


def svd_llm(bench: Bench, removed_ratio: float) -> Compressed:
    profiling = ProfilingConfig(forms=["low_rank"], cost="activation")
    planner = bench.planner("svd-llm", profiling, AllocationConfig(method="uniform"))
    return of_plan(bench, planner.at(removed_ratio=removed_ratio))


def evopress_from(bench: Bench, removed_ratio: float, start: str) -> Compressed:
    """EvoPress over the sparse options of every layer, scored by the loss on windows set apart for the search."""
    planner = rocket_planner(bench, ["sparse"], method=start)
    first = planner.at(removed_ratio=removed_ratio)
    sizes = [np.array([option.parameters for option in profile.options]) for profile in planner.profiles]
    begin = [profile.options.index(first.choices[profile.layer]) for profile in planner.profiles]
    built: dict[tuple[str, int], Tensor] = {}

    def weight(profile: Any, level: int) -> Tensor:
        key = (profile.layer, level)
        if key not in built:
            only = replace(first, choices={profile.layer: profile.options[level]})
            built.update({(name, level): value for name, value in of_plan(bench, only).weights.items()})
        return built[key]

    def chosen(levels: Any) -> Weights:
        return {
            profile.layer: weight(profile, level)
            for profile, level in zip(planner.profiles, levels, strict=True)
            if profile.options[level].form != "dense"
        }

    def evaluate(levels: Any) -> float:
        with swapped(bench.layers, chosen(levels)):
            return bench.search_loss()

    budget = int((1 - removed_ratio) * planner.size.target_parameters)
    levels, _ = evopress.search(evaluate, sizes, begin, budget, bench.args.evaluations, bench.seed)
    picked = {profile.layer: profile.options[level] for profile, level in zip(planner.profiles, levels, strict=True)}
    plan = replace(first, choices=picked)
    return Compressed(chosen(levels), plan.removed_ratio, plan.bytes_removed_ratio, "sparse")


METHODS: dict[str, Callable[[Bench, float], Compressed]] = {
    "svd-llm": svd_llm,
    "paper": lambda bench, size: of_plan(bench, paper_planner(bench).at(removed_ratio=size)),
    "paper-uniform": lambda bench, size: of_plan(bench, paper_planner(bench, "uniform").at(removed_ratio=size)),
    "rocket": lambda bench, size: of_plan(bench, rocket_planner(bench).at(removed_ratio=size)),
    "rocket-uniform": lambda bench, size: of_plan(
        bench, rocket_planner(bench, method="uniform").at(removed_ratio=size)
    ),
    "rocket-dictionary": lambda bench, size: of_plan(
        bench, rocket_planner(bench, ["dictionary"]).at(removed_ratio=size)
    ),
    "rocket-sparse": lambda bench, size: of_plan(bench, rocket_planner(bench, ["sparse"]).at(removed_ratio=size)),
    "wanda": lambda bench, size: by_pruning(bench, size, wanda.prune),
    "sparsegpt": lambda bench, size: by_pruning(bench, size, sparsegpt.prune),
    "3basil": sparse_plus_low_rank,
    "evopress-uniform": lambda bench, size: evopress_from(bench, size, "uniform"),
    "evopress-plan": lambda bench, size: evopress_from(bench, size, "knapsack"),
}


def measure_texts(bench: Bench, args: argparse.Namespace) -> dict[str, float]:
    """Mean loss (nats a token) on each evaluation text."""
    losses = {}
    for source in args.texts:
        documents = load_documents(source, "held_out")
        result = perplexity(bench.model, bench.tokenizer, documents.texts, seq_len=1024, max_tokens=args.max_tokens)
        losses[source] = result.loss
    return losses


def text_rows(
    common: Mapping[str, Any], dense: Mapping[str, float], losses: Mapping[str, float]
) -> list[dict[str, Any]]:
    return [
        {
            **common,
            "text": text,
            "perplexity": math.exp(loss),
            "dense_perplexity": math.exp(dense[text]),
            "excess_loss": loss - dense[text],
        }
        for text, loss in losses.items()
    ]


def task_rows(common: Mapping[str, Any], dense: Mapping[str, Any], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {
            **common,
            "task": task,
            "metric": result.metric,
            "accuracy": result.accuracy,
            "dense_accuracy": dense[task].accuracy,
            "items": result.items,
        }
        for task, result in results.items()
    ]
    retained = paired_bootstrap(list(dense.values()), list(results.values()))
    rows.append(
        {
            **common,
            "task": "chance-corrected mean",
            "accuracy": chance_corrected_mean(results.values()),
            "dense_accuracy": chance_corrected_mean(dense.values()),
            "items": sum(result.items for result in results.values()),
            "retained": retained.ratio,
            "retained_low": retained.low,
            "retained_high": retained.high,
        }
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--methods", nargs="+", default=["svd-llm", "paper", "rocket"], help=f"all, or: {list(METHODS)}"
    )
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="calibration seeds")
    parser.add_argument("--calibration", default="embedded")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sensitivity-samples", type=int, default=16)
    parser.add_argument("--search-samples", type=int, default=16, help="further windows, for methods that search")
    parser.add_argument("--evaluations", type=int, default=100, help="candidate evaluations of a search")
    parser.add_argument("--texts", nargs="+", default=["embedded", "embedded:boolq"])
    parser.add_argument("--max-tokens", type=int, default=65536, help="of each text")
    parser.add_argument("--tasks", nargs="*", default=[], help="zero-shot tasks, for the methods in --task-methods")
    parser.add_argument("--task-methods", nargs="*", default=["rocket"])
    parser.add_argument("--limit", type=int, default=500, help="items a task")
    parser.add_argument("--output", default="quality", help="name of the results file")
    args = parser.parse_args()
    methods = list(METHODS) if args.methods == ["all"] else args.methods
    model, tokenizer = load_model(ModelConfig(path=args.model, dtype=args.dtype))
    rows: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    dense_tasks: dict[str, Any] = {}
    for seed in args.seeds:
        bench = Bench(args, model, tokenizer, seed)
        if not dense:
            dense = measure_texts(bench, args)
            if args.tasks:
                dense_tasks = zero_shot(model, tokenizer, args.tasks, limit=args.limit, batch_size=32)
        for method in methods:
            for size in args.sizes:
                result = METHODS[method](bench, size)
                common = {
                    "method": method,
                    "forms": result.forms,
                    "target_removed_ratio": size,
                    "removed_ratio": result.removed_ratio,
                    "bytes_removed_ratio": result.bytes_removed_ratio,
                    "predicted_excess_loss": result.predicted if method.startswith("rocket") else None,
                    "calibration_tokens": args.samples * args.seq_len,
                    "seed": seed,
                }
                with swapped(bench.layers, result.weights):
                    losses = measure_texts(bench, args)
                    rows += text_rows(common, dense, losses)
                    if dense_tasks and method in args.task_methods and seed == args.seeds[0]:
                        results = zero_shot(model, tokenizer, args.tasks, limit=args.limit, batch_size=32)
                        rows += task_rows(common, dense_tasks, results)
                excess = {text: round(loss - dense[text], 4) for text, loss in losses.items()}
                print(seed, method, size, excess, flush=True)
            write_results(args.output, rows)  # after each method: an interrupted run keeps what it measured


if __name__ == "__main__":
    main()
