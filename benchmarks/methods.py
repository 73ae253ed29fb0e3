"""The methods that benchmarks.quality compares, each from the same calibration to weights for the layers it changes.

A method is a function of a `Bench` (the model and its calibration, one seed) and the share of the target layers'
parameters to remove, and its line in `METHODS`. Baselines as their papers have them are in `benchmarks.baselines`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines import cospadi, evopress, learned, sparsegpt, strs, threebasil, wanda
from rocket.allocation import MeasuredPoint, Plan, Planner, Prediction, measure_size
from rocket.calib import SENSITIVITY_BATCH, Calibration, calibrate
from rocket.compression import build_tensors, make_layer
from rocket.config import load_config
from rocket.config.schema import AllocationConfig, ProfilingConfig
from rocket.data import load_documents, pack_tokens
from rocket.evaluation import window_losses_of
from rocket.factorization.problem import LayerProblem
from rocket.forms import Option, select_forms
from rocket.forms.base import padded_bits
from rocket.forms.dictionary import sizes_for
from rocket.models import LinearLayer, target_layers, token_batches
from rocket.profiling import profile_layers
from rocket.usage import track

Weights = dict[str, Tensor]
PAPER = Path(__file__).parents[1] / "rocket" / "config" / "paper.yaml"
RANK_SUPPORT_RATIO = 2.0
UNTEMPERED = ProfilingConfig(cost="activation", correlation_shrinkage=0.0)
"""What the published baselines fit: the output error on the calibration data as measured."""


@dataclass(frozen=True)
class Compressed:
    """A method's answer: dense equivalents of the layers it changed, and what they take.

    ``predicted`` is the plan's cost, ``corrected`` that cost corrected by measured plans of other sizes.
    """

    weights: Weights
    removed_ratio: float
    bytes_removed_ratio: float
    forms: str
    predicted: float | None = None
    corrected: float | None = None


@dataclass
class Bench:
    """One model and what it is calibrated on, with what the methods share computed once."""

    args: argparse.Namespace
    model: Any
    tokenizer: Any
    seed: int
    source: str
    samples: int
    planners: dict[str, Planner] = field(default_factory=dict)
    sensitivities: list[np.ndarray] | None = None
    prediction: Prediction | None = None
    _levels: dict[str, Levels] = field(default_factory=dict)

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        return target_layers(self.model)

    @cached_property
    def tokens(self) -> Tensor:
        """Calibration windows, and behind them as many again that no method calibrates on (for searches)."""
        documents = load_documents(self.source, "calibration")
        samples = self.samples + self.args.search_samples
        return pack_tokens(documents, self.tokenizer, self.args.seq_len, samples, self.seed)

    @cached_property
    def calibration(self) -> Calibration:
        tokens = self.tokens[: self.samples]
        wanted = self.args.sensitivity_samples
        sensitivity = token_batches(self.model, tokens[:wanted], SENSITIVITY_BATCH) if wanted else ()
        return calibrate(self.model, self.layers, token_batches(self.model, tokens, 8), sensitivity)

    def planner(self, name: str, profiling: ProfilingConfig, allocation: AllocationConfig) -> Planner:
        """Profile under ``name`` once; other allocations of the same profiles are free."""
        if name not in self.planners:
            forms = select_forms(profiling.forms)
            profiles = profile_layers(self.layers, self.calibration, forms, profiling)
            size = measure_size(self.model, self.layers)
            self.planners[name] = Planner(profiles, size, profiling, allocation, self.calibration)
        return replace(self.planners[name], allocation=allocation)

    def levels(self, name: str, planner: Planner, step: int = 1) -> Levels:
        """Made once under ``name``, so that searches share the weights that they build."""
        return self._levels.setdefault(name, Levels(self, planner, step))

    def search_loss(self, samples: int | None = None) -> float:
        """Mean loss on windows of the calibration domain that no method calibrated on, or some of them."""
        windows = self.tokens[self.samples :][:samples]
        return float(window_losses_of(self.model, windows.split(8)).mean())


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
        if option.is_original:
            continue
        linear = bench.layers[name]
        problem = bench.calibration.problem(name, linear.weight, plan.profiling)
        weights[name] = built_weight(name, linear, problem, plan).to(linear.weight.dtype)
    return Compressed(weights, plan.removed_ratio, plan.bytes_removed_ratio, forms_of(plan), plan.cost)


def built_weight(name: str, linear: LinearLayer, problem: LayerProblem, plan: Plan) -> Tensor:
    """What a layer of a plan multiplies by, in float32."""
    option = plan.choices[name]
    layer = make_layer(linear, build_tensors(name, linear, problem, option, plan), option, plan.input_groups[name])
    return layer.float().dense_weight().detach()


def forms_of(plan: Plan) -> str:
    return "+".join(sorted(form for form in plan.forms() if form != "dense"))


def stored_as(bench: Bench, weights: Weights, values: int, mask_bits: int, forms: str) -> Compressed:
    """What a baseline's layers take: stored values, and the bits of their masks, as our own forms are counted."""
    size = measure_size(bench.model, bench.layers)
    total = values * size.itemsize + mask_bits // 8 + size.other_bytes
    return Compressed(weights, 1 - values / size.target_parameters, 1 - total / size.bytes, forms)


def by_pruning(bench: Bench, removed_ratio: float, prune: Callable[[Tensor, Tensor, float], Tensor]) -> Compressed:
    """The same share of every layer pruned, stored like our sparse layers."""
    weights = {}
    for name, linear in track(list(bench.layers.items()), "prune"):
        gram = bench.calibration.gram(name).to(linear.weight.device)
        weights[name] = prune(linear.weight.detach().float(), gram, removed_ratio).to(linear.weight.dtype)
    kept = sum(int((weight != 0).sum()) for weight in weights.values())
    mask_bits = sum(padded_bits(*weight.shape) for weight in weights.values())
    return stored_as(bench, weights, kept, mask_bits, "sparse")


def sparse_plus_low_rank(bench: Bench, removed_ratio: float) -> Compressed:
    """3BASiL at the same stored values a layer; the sparse part's mask takes its bits too."""
    weights, stored = {}, 0
    for name, linear in track(list(bench.layers.items()), "3basil"):
        gram = bench.calibration.gram(name).to(linear.weight.device)
        weight, values = threebasil.decompose(linear.weight.detach().float(), gram, removed_ratio)
        weights[name] = weight.to(linear.weight.dtype)
        stored += values
    mask_bits = sum(padded_bits(*weight.shape) for weight in weights.values())
    return stored_as(bench, weights, stored, mask_bits, "sparse+low_rank")


def rocket_planner(bench: Bench, forms: list[str] | None = None, method: str = "knapsack") -> Planner:
    profiling = ProfilingConfig() if forms is None else ProfilingConfig(forms=forms)
    name = "rocket " + "+".join(profiling.forms)
    return bench.planner(name, profiling, AllocationConfig(method=method))


def paper_planner(bench: Bench, method: str = "knapsack") -> Planner:
    config = load_config(PAPER)
    return bench.planner("paper", config.profiling, AllocationConfig(method=method, error_cap=method == "knapsack"))


def svd_llm(bench: Bench, removed_ratio: float) -> Compressed:
    profiling = UNTEMPERED.model_copy(update={"forms": ["low_rank"]})
    planner = bench.planner("svd-llm", profiling, AllocationConfig(method="uniform"))
    return of_plan(bench, planner.at(removed_ratio=removed_ratio))


class Levels:
    """A few sizes of every layer for a search to choose among, dense first; the weights of each are built once."""

    def __init__(self, bench: Bench, planner: Planner, step: int = 1) -> None:
        self.bench = bench
        self.plan = planner.at(removed_ratio=bench.args.sizes[0])
        self.layers = [profile.layer for profile in planner.profiles]
        self.options = [[profile.options[0], *profile.options[1::step]] for profile in planner.profiles]
        self.sizes = [np.array([option.parameters for option in options]) for options in self.options]
        self._built: dict[tuple[str, int], Tensor] = {}

    def budget(self, removed_ratio: float) -> int:
        return int((1 - removed_ratio) * self.plan.size.target_parameters)

    def of(self, plan: Plan) -> list[int]:
        """The levels that a plan over all of these options chose."""
        return [options.index(plan.choices[name]) for name, options in zip(self.layers, self.options, strict=True)]

    def weight(self, layer: str, level: int) -> Tensor:
        """The dense equivalent [out, in] of a layer at a level."""
        key = (layer, level)
        if key not in self._built:
            option = self.options[self.layers.index(layer)][level]
            only = replace(self.plan, choices={layer: option})
            self._built[key] = of_plan(self.bench, only).weights.get(layer, self.bench.layers[layer].weight.data)
        return self._built[key]

    def weights(self, levels: Sequence[int]) -> Weights:
        return {name: self.weight(name, level) for name, level in zip(self.layers, levels, strict=True) if level}

    def compressed(self, levels: Sequence[int]) -> Compressed:
        chosen: dict[str, Option] = {
            name: options[level] for name, options, level in zip(self.layers, self.options, levels, strict=True)
        }
        plan = replace(self.plan, choices=chosen)
        return Compressed(self.weights(levels), plan.removed_ratio, plan.bytes_removed_ratio, forms_of(plan))


def evopress_from(bench: Bench, removed_ratio: float, start: str) -> Compressed:
    """EvoPress over the sparse options of every layer, scored by the loss on windows set apart for the search."""
    planner = rocket_planner(bench, ["sparse"], start)
    levels = bench.levels("sparse", planner)

    def evaluate(candidate: Sequence[int]) -> float:
        with swapped(bench.layers, levels.weights(candidate)):
            return bench.search_loss(bench.args.evopress_samples)

    found, history = evopress.search(
        evaluate,
        levels.sizes,
        levels.of(planner.at(removed_ratio=removed_ratio)),
        levels.budget(removed_ratio),
        bench.args.evaluations,
        bench.seed,
    )
    print(f"evopress from {start}: loss on the search's windows {history[0]:.4f} -> {history[-1]:.4f}", flush=True)
    return levels.compressed(found)


def sensitivity_search(bench: Bench, removed_ratio: float) -> Compressed:
    """The paper's factorization, sizes by ASVD's STRS: the loss with only that layer compressed, one threshold."""
    levels = bench.levels("paper", paper_planner(bench), bench.args.level_step)
    if bench.sensitivities is None:

        def evaluate(layer: int, level: int) -> float:
            name = levels.layers[layer]
            with swapped(bench.layers, {name: levels.weight(name, level)}):
                return bench.search_loss(bench.args.strs_samples)

        bench.sensitivities = strs.measure(evaluate, levels.sizes)
    return levels.compressed(strs.allocate(bench.sensitivities, levels.sizes, levels.budget(removed_ratio)))


def learned_allocation(bench: Bench, removed_ratio: float) -> Compressed:
    """The paper's factorization, sizes learned by gradients of the loss (in the manner of ARS, Dobi-SVD and ARA)."""
    levels = bench.levels("paper", paper_planner(bench), bench.args.level_step)
    batches = [{"input_ids": ids, "labels": ids} for ids in bench.tokens[: bench.samples].split(2)]
    budget = levels.budget(removed_ratio)
    found = learned.allocate(
        bench.model, levels.layers, levels.weight, levels.sizes, budget, batches, bench.args.learning_steps
    )
    return levels.compressed(found)


def learned_dictionary(bench: Bench, removed_ratio: float) -> Compressed:
    """CoSpaDi: K-SVD in whitened space, the same share of every layer, at k/s = 2. Hours on a CPU."""
    weights, stored, mask_bits = {}, 0, 0
    for name, linear in track(list(bench.layers.items()), "cospadi"):
        problem = bench.calibration.problem(name, linear.weight, UNTEMPERED)
        weight, rank, support = cospadi_layer(problem, removed_ratio, bench.args.cospadi_iterations)
        weights[name] = weight.to(linear.weight.dtype)
        stored += rank * problem.in_features + support * problem.out_features
        mask_bits += padded_bits(problem.out_features, rank)
    return stored_as(bench, weights, stored, mask_bits, "dictionary")


def cospadi_layer(problem: LayerProblem, removed_ratio: float, iterations: int) -> tuple[Tensor, int, int]:
    """A layer's weight [out, in] by CoSpaDi, the number of its atoms and of its coefficients an output."""
    rank, support = sizes_for(problem.out_features, problem.in_features, removed_ratio, RANK_SUPPORT_RATIO)
    rank = min(rank, problem.max_rank)
    support = min(support, rank)
    root = problem.whitening.root
    atoms, coefficients = cospadi.factorize(root @ problem.weighted.T, rank, support, iterations)
    return (torch.linalg.solve(root, atoms.double()) @ coefficients.double()).T, rank, support


def rocket(bench: Bench, removed_ratio: float) -> Compressed:
    """The product's default; with ``--measure``, plans of those sizes correct the predicted price of the others."""
    planner = rocket_planner(bench)
    plan = planner.at(removed_ratio=removed_ratio)
    result = of_plan(bench, plan)
    if not bench.args.measure:
        return result
    if bench.prediction is None:
        before = bench.search_loss()
        points = []
        for ratio in bench.args.measure:
            measured = planner.at(removed_ratio=ratio)
            with swapped(bench.layers, of_plan(bench, measured).weights):
                points.append(MeasuredPoint(measured.removed_ratio, measured.cost, bench.search_loss() - before))
        bench.prediction = Prediction.fit(points)
    unseen = removed_ratio not in bench.args.measure
    return replace(result, corrected=bench.prediction(plan.cost) if unseen else None)


METHODS: dict[str, Callable[[Bench, float], Compressed]] = {
    "svd-llm": svd_llm,
    "paper": lambda bench, size: of_plan(bench, paper_planner(bench).at(removed_ratio=size)),
    "paper-uniform": lambda bench, size: of_plan(bench, paper_planner(bench, "uniform").at(removed_ratio=size)),
    "rocket": rocket,
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
    "paper-strs": sensitivity_search,
    "paper-learned": learned_allocation,
    "cospadi": learned_dictionary,
    "evopress-uniform": lambda bench, size: evopress_from(bench, size, "uniform"),
    "evopress-plan": lambda bench, size: evopress_from(bench, size, "knapsack"),
}
