"""Where the time of a compression goes, stage by stage and by layer shape.

    python -m benchmarks.compression_speed                          # calibration, then one block of each method
    python -m benchmarks.compression_speed --blocks 30 --methods paper rocket       # the whole of SmolLM2-135M

Rows: `forward` is the model alone on the calibration batches, `forward+grams` the calibration stage, `sensitivities`
the backward pass; `profile` and `build` are seconds a layer of a shape (median and spread over the blocks measured), or
`all` for their sum; `exhaustive` is the paper's full search of every (removed ratio, rank/support) pair through
explicit dictionaries, with what our search loses against it in `cost_excess`; `factorize` is one layer of each shape
from its Gram matrix to its new weight, at the same stored values: by K-SVD (CoSpaDi), by the paper's one shot, by our
refitted dictionary and by our sparse form, with the relative output error E‖Δx‖² / E‖Wx‖² that each leaves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import write_results
from benchmarks.methods import UNTEMPERED, cospadi_layer
from rocket.allocation import Planner, measure_size
from rocket.calib import Calibration, collect_grams, measure_sensitivities
from rocket.compression import build_tensors
from rocket.config import load_config
from rocket.config.schema import AllocationConfig, ModelConfig, ProfilingConfig
from rocket.data import load_documents, pack_tokens
from rocket.factorization.dictionary import factorize
from rocket.factorization.problem import LayerProblem
from rocket.factorization.sparse import scale_problem
from rocket.forms import Option, select_forms
from rocket.forms.dictionary import factors, sizes_for
from rocket.models import load_model, target_layers
from rocket.profiling import profile_layer
from rocket.usage import Usage, measure, track

CONFIGS = Path(__file__).parents[1] / "rocket" / "config"
METHODS = {"rocket": ProfilingConfig(), "paper": load_config(CONFIGS / "paper.yaml").profiling}


class Rows(list[dict[str, Any]]):
    @contextmanager
    def stage(self, stage: str, **fields: Any) -> Iterator[Usage]:
        with measure() as usage:
            yield usage
        self.append({"stage": stage, **fields, "seconds": usage.seconds, "peak_mb": usage.peak_mb})
        print(self[-1], flush=True)


def exhaustive_costs(problem: LayerProblem, settings: ProfilingConfig) -> list[float]:
    """The least cost at each removed ratio over all rank/support ratios, each dictionary built and evaluated."""
    best = []
    for removed_ratio in settings.removed_ratios:
        costs = []
        for ratio in settings.rank_support_ratios:
            rank, support = sizes_for(problem.out_features, problem.in_features, removed_ratio, ratio)
            if 0 < support <= rank <= problem.max_rank:
                dictionary, coefficients, _ = factorize(problem, rank, support, exponent=settings.importance_exponent)
                costs.append(problem.evaluate(coefficients @ dictionary))
        best.append(min(costs))
    return best


def profile_and_build(
    rows: Rows, method: str, settings: ProfilingConfig, layers: dict[str, Any], calibration: Calibration, model: Any
) -> None:
    """Profile the layers, plan 20 % for them, build them; a row for each shape and one for the sum."""
    forms = select_forms(settings.forms)
    seconds: dict[tuple[str, str], list[float]] = {}
    profiles = []

    def note(stage: str, layer: Any, start: float) -> None:
        shape = f"{layer.out_features}x{layer.in_features}"
        seconds.setdefault((stage, shape), []).append(time.perf_counter() - start)

    with rows.stage("profile", method=method, layer_shape="all", layers=len(layers)):
        for name, layer in track(list(layers.items()), f"profile {method}"):
            start = time.perf_counter()
            problem = calibration.problem(name, layer.weight, settings)
            profiles.append(profile_layer(name, calibration.inputs[name], problem, forms, settings))
            note("profile", layer, start)
    allocation = AllocationConfig(error_cap=method == "paper")
    planner = Planner(profiles, measure_size(model, layers), settings, allocation, calibration)
    with rows.stage("plan", method=method, layer_shape="all", layers=len(layers)):
        plan = planner.at(removed_ratio=0.2)
    with rows.stage("build", method=method, layer_shape="all", layers=len(layers), removed_ratio=plan.removed_ratio):
        for name, option in track(plan.choices.items(), f"build {method}"):
            if option.form != "dense":
                start = time.perf_counter()
                layer = layers[name]
                problem = calibration.problem(name, layer.weight, settings)
                build_tensors(name, layer, problem, option, plan)
                note("build", layer, start)
    for (stage, shape), values in sorted(seconds.items()):
        rows.append(
            {
                "stage": stage,
                "method": method,
                "layer_shape": shape,
                "layers": len(values),
                "seconds": statistics.median(values),
                "spread": max(values) - min(values),
            }
        )


def compare_exhaustive(rows: Rows, layers: dict[str, Any], calibration: Calibration) -> None:
    """Our search against the full one, on one layer of each shape."""
    settings = METHODS["paper"]
    for (out_features, in_features), name in by_shape(layers).items():
        problem = calibration.problem(name, layers[name].weight, settings)
        shape = f"{out_features}x{in_features}"
        with rows.stage("exhaustive", method="paper", layer_shape=shape):
            exhaustive = exhaustive_costs(problem, settings)
        options: list[Option] = []
        problem = calibration.problem(name, layers[name].weight, settings)  # with nothing computed yet
        with rows.stage("search", method="paper", layer_shape=shape):
            options += select_forms(["dictionary"])[1].options(problem, settings)
        worst = max(option.cost / best - 1 for option, best in zip(options, exhaustive, strict=True))
        rows[-1]["cost_excess"] = worst


def compare_ksvd(
    rows: Rows, layers: dict[str, Any], calibration: Calibration, removed_ratio: float, iterations: int
) -> None:
    """K-SVD against closed forms on the last layer of each shape; ``speedup`` is K-SVD's time over the method's."""

    def paper(problem: LayerProblem, rank: int, support: int) -> Tensor:
        dictionary, coefficients, _ = factorize(problem, rank, support)
        return coefficients @ dictionary

    def refitted(problem: LayerProblem, rank: int, support: int) -> Tensor:
        settings = METHODS["rocket"]
        dictionary, coefficients, _ = factors(problem, rank, support, settings, settings.refits)
        return coefficients @ dictionary

    def sparse(problem: LayerProblem, rank: int, support: int) -> Tensor:
        scaled = scale_problem(problem)
        count = rank * problem.in_features + support * problem.out_features
        return scaled.unscale(scaled.sparsify(count)[0])

    ours: dict[str, Callable[[LayerProblem, int, int], Tensor]] = {
        "paper": paper,
        "rocket-dictionary": refitted,
        "rocket-sparse": sparse,
    }
    for (out_features, in_features), name in by_shape(layers).items():
        common = {"layer_shape": f"{out_features}x{in_features}", "removed_ratio": removed_ratio}
        problem = calibration.problem(name, layers[name].weight, UNTEMPERED)
        with rows.stage("factorize", method="cospadi", iterations=iterations, **common) as usage:
            weight, rank, support = cospadi_layer(problem, removed_ratio, iterations)
        rows[-1]["relative_error"] = problem.evaluate(weight)
        for method, compute in ours.items():
            problem = calibration.problem(name, layers[name].weight, UNTEMPERED)  # with nothing computed yet
            with rows.stage("factorize", method=method, **common) as own:
                weight = compute(problem, rank, support)
            rows[-1].update(relative_error=problem.evaluate(weight), speedup=usage.seconds / own.seconds)


def by_shape(layers: dict[str, Any]) -> dict[tuple[int, int], str]:
    """The last layer of each shape."""
    return {(layer.out_features, layer.in_features): name for name, layer in layers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["paper", "rocket"], choices=list(METHODS))
    parser.add_argument("--blocks", type=int, default=1, help="transformer blocks to profile and build, from the first")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sensitivity-samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exhaustive", action="store_true", help="also time the paper's full search (minutes)")
    parser.add_argument("--ksvd", type=int, default=0, help="also compare with K-SVD of this many iterations (60)")
    parser.add_argument("--ksvd-removed", type=float, default=0.3, help="share removed in that comparison")
    parser.add_argument("--output", default="compression_speed", help="name of the results file")
    args = parser.parse_args()
    model, tokenizer = load_model(ModelConfig(path=args.model))
    layers = target_layers(model)
    documents = load_documents("embedded", "calibration")
    tokens = pack_tokens(documents, tokenizer, args.seq_len, args.samples, args.seed)
    batches = [{"input_ids": ids.to(model.device)} for ids in tokens.split(8)]
    rows = Rows()
    size = {"tokens": tokens.numel(), "layer_shape": "all", "threads": torch.get_num_threads()}
    with torch.inference_mode():
        model(**batches[0], use_cache=False)
        with rows.stage("forward", **size):
            for batch in batches:
                model(**batch, use_cache=False)
    with rows.stage("forward+grams", **size):
        calibration = collect_grams(model, layers, batches)
    samples = [{"input_ids": ids} for ids in tokens[: args.sensitivity_samples].split(2)]
    with rows.stage("sensitivities", **{**size, "tokens": args.sensitivity_samples * args.seq_len}):
        sensitivities = measure_sensitivities(model, layers, samples)
    calibration = Calibration(calibration.inputs, calibration.grams, calibration.tokens, sensitivities)
    chosen = dict(list(layers.items())[: len(layers) * args.blocks // model.config.num_hidden_layers])
    for method in args.methods:
        profile_and_build(rows, method, METHODS[method], chosen, calibration, model)
    if args.exhaustive:
        compare_exhaustive(rows, chosen, calibration)
    if args.ksvd:
        compare_ksvd(rows, chosen, calibration, args.ksvd_removed, args.ksvd)
    write_results(args.output, rows)


if __name__ == "__main__":
    main()
