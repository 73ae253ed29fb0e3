"""Energy of closed forms against K-SVD (CoSpaDi), on the same layers and the same Gram matrices.

    python -m benchmarks.energy                         # three layers of SmolLM2-135M
    python -m benchmarks.energy --iterations 10 --layers model.layers.15.self_attn.k_proj

`cospadi` fits one size of each layer by K-SVD. `paper` and `rocket` first profile every size and form that their
configs name, then build the same size as K-SVD has: `profile` and `build` are their two stages, `ratio` is K-SVD's
energy over both, `cpu_ratio` the same of `cpu_seconds`. `relative_error` is E‖Δx‖² / E‖Wx‖², the mean over the layers.

`energy_source` says how energy was taken. Where it is an estimate it is time x power (`rocket.reporting.energy`):
watts times `cpu_seconds` for the CPU, and times `seconds` for the memory, which counts the time that others took on a
shared machine. Ratios are then little else than ratios of time. A closed form's row is its median run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

from benchmarks.compression_speed import METHODS
from benchmarks.harness import write_results
from benchmarks.methods import UNTEMPERED, built_weight, cospadi_layer
from rocket.allocation import Plan, Planner, measure_size
from rocket.calib import calibrate
from rocket.config.schema import AllocationConfig, ModelConfig, ProfilingConfig, ReportingConfig
from rocket.data import load_documents, pack_tokens
from rocket.factorization.problem import LayerProblem
from rocket.forms import select_forms
from rocket.models import load_model, target_layers, token_batches
from rocket.profiling import LayerProfile, profile_layer
from rocket.reporting.energy import EnergyMeter
from rocket.usage import measure, track

LAYERS = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
BLOCK = "model.layers.15"
Result = TypeVar("Result")


class Rows(list[dict[str, Any]]):
    """Measured stages, printed as they end."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = EnergyMeter(ReportingConfig(energy=True))

    def run(self, method: str, stage: str, work: Callable[[], Result], repeats: int = 1, **fields: Any) -> Result:
        """Add the run of median energy out of ``repeats``, and the most less the least; return what the last gave."""
        taken = []
        for _ in range(repeats):
            start = time.process_time()
            with measure() as usage, self.meter.measure(usage):
                result = work()
            assert usage.energy_kwh is not None
            taken.append((1000 * usage.energy_kwh, usage.seconds, time.process_time() - start))
        energy, seconds, cpu_seconds = statistics.median_low(taken)
        figures = {
            "energy_source": usage.energy_source,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "energy_wh": energy,
            "repeats": repeats,
        }
        spread = max(taken)[0] - min(taken)[0]
        self.append({"method": method, "stage": stage, **fields, **figures, "energy_spread_wh": spread})
        print(self[-1], flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--layers", nargs="+", default=[f"{BLOCK}.{layer}" for layer in LAYERS])
    parser.add_argument("--methods", nargs="+", default=["paper", "rocket"], choices=list(METHODS))
    parser.add_argument("--removed", type=float, default=0.3, help="share of each layer that is removed")
    parser.add_argument("--iterations", type=int, default=60, help="of K-SVD; CoSpaDi takes 60")
    parser.add_argument("--repeats", type=int, default=5, help="of the closed forms; K-SVD runs once")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sensitivity-samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="energy", help="name of the results file")
    args = parser.parse_args()
    model, tokenizer = load_model(ModelConfig(path=args.model))
    found = target_layers(model)
    layers = {name: found[name] for name in args.layers}
    documents = load_documents("embedded", "calibration")
    tokens = pack_tokens(documents, tokenizer, args.seq_len, args.samples, args.seed)
    sensitivity = token_batches(model, tokens[: args.sensitivity_samples], 2)
    calibration = calibrate(model, layers, token_batches(model, tokens, 8), sensitivity)

    def problems(settings: ProfilingConfig) -> Iterator[tuple[str, LayerProblem]]:
        """With nothing computed yet: whitening and the like belong to a stage."""
        for name, layer in track(list(layers.items()), "layers"):
            yield name, calibration.problem(name, layer.weight, settings)

    def profile(settings: ProfilingConfig) -> list[LayerProfile]:
        forms = select_forms(settings.forms)
        return [profile_layer(name, name, problem, forms, settings) for name, problem in problems(settings)]

    def build(plan: Plan) -> dict[str, torch.Tensor]:
        return {name: built_weight(name, layers[name], problem, plan) for name, problem in problems(plan.profiling)}

    def errors(weights: dict[str, torch.Tensor]) -> float:
        return statistics.mean(problem.evaluate(weights[name]) for name, problem in problems(UNTEMPERED))

    rows = Rows()
    size = {"layers": len(layers), "removed_ratio": args.removed, "threads": torch.get_num_threads()}

    def learn() -> dict[str, torch.Tensor]:
        return {
            name: cospadi_layer(problem, args.removed, args.iterations)[0] for name, problem in problems(UNTEMPERED)
        }

    learned = rows.run("cospadi", "build", learn, **size, iterations=args.iterations, options=len(layers))
    rows[-1]["relative_error"] = errors(learned)
    for method in args.methods:
        profiles = rows.run(method, "profile", partial(profile, METHODS[method]), args.repeats, **size)
        rows[-1]["options"] = sum(len(profile.options) for profile in profiles)
        uniform = AllocationConfig(method="uniform")
        planner = Planner(profiles, measure_size(model, layers), METHODS[method], uniform, calibration)
        plan = planner.at(removed_ratio=args.removed)
        built = rows.run(method, "build", partial(build, plan), args.repeats, **size, options=len(layers))
        rows[-1]["relative_error"] = errors(built)
        for ratio, field in (("ratio", "energy_wh"), ("cpu_ratio", "cpu_seconds")):
            rows[-1][ratio] = rows[0][field] / (rows[-2][field] + rows[-1][field])
    write_results(args.output, rows)


if __name__ == "__main__":
    main()
