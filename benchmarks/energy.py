"""Energy of closed forms against K-SVD (CoSpaDi), on the same layers and the same Gram matrices.

    python -m benchmarks.energy                         # three layers of SmolLM2-135M
    python -m benchmarks.energy --iterations 10 --layers model.layers.15.self_attn.k_proj

`cospadi` fits one size of each layer by K-SVD. `paper` and `rocket` first profile every size and form that their
configs name, then build the same size as K-SVD has: `profile` and `build` are their two stages, `ratio` is K-SVD's
energy over both. `relative_error` is E‖Δx‖² / E‖Wx‖², the mean over the layers.

`energy_source` says how energy was taken. Where it is an estimate it is time x power (`rocket.reporting.energy`), so
ratios of energies are little else than ratios of processor time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.compression_speed import METHODS
from benchmarks.harness import write_results
from benchmarks.methods import UNTEMPERED, cospadi_layer
from rocket.allocation import Planner, measure_size
from rocket.calib import calibrate
from rocket.compression.compress import build_layer
from rocket.config.schema import AllocationConfig, ModelConfig, ReportingConfig
from rocket.data import load_documents, pack_tokens
from rocket.factorization.problem import LayerProblem
from rocket.forms import select_forms
from rocket.models import load_model, target_layers, token_batches
from rocket.profiling import profile_layer
from rocket.reporting.energy import EnergyMeter
from rocket.run import measure, track

LAYERS = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
BLOCK = "model.layers.15"


class Rows(list[dict[str, Any]]):
    """Measured stages, printed as they end."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = EnergyMeter(ReportingConfig(energy=True))

    @contextmanager
    def stage(self, method: str, stage: str, **fields: Any) -> Iterator[None]:
        with measure() as usage, self.meter.measure(usage):
            yield
        assert usage.energy_kwh is not None
        energy = {"energy_wh": 1000 * usage.energy_kwh, "energy_source": usage.energy_source}
        self.append({"method": method, "stage": stage, **fields, "seconds": usage.seconds, **energy})
        print(self[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--layers", nargs="+", default=[f"{BLOCK}.{layer}" for layer in LAYERS])
    parser.add_argument("--methods", nargs="+", default=["paper", "rocket"], choices=list(METHODS))
    parser.add_argument("--removed", type=float, default=0.3, help="share of each layer that is removed")
    parser.add_argument("--iterations", type=int, default=60, help="of K-SVD; CoSpaDi takes 60")
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
    tokens = pack_tokens(documents.texts, tokenizer, args.seq_len, args.samples, args.seed)
    sensitivity = token_batches(model, tokens[: args.sensitivity_samples], 2)
    calibration = calibrate(model, layers, token_batches(model, tokens, 8), sensitivity)

    def problems(settings: Any) -> Iterator[tuple[str, LayerProblem]]:
        """With nothing computed yet: whitening and the like belong to a stage."""
        for name, layer in track(list(layers.items()), "layers"):
            yield name, calibration.problem(name, layer.weight, settings)

    def errors(weights: dict[str, torch.Tensor]) -> float:
        return statistics.mean(problem.evaluate(weights[name]) for name, problem in problems(UNTEMPERED))

    rows = Rows()
    size = {"layers": len(layers), "removed_ratio": args.removed, "threads": torch.get_num_threads()}
    with rows.stage("cospadi", "build", **size, iterations=args.iterations, options=len(layers)):
        learned = {
            name: cospadi_layer(problem, args.removed, args.iterations)[0] for name, problem in problems(UNTEMPERED)
        }
    rows[-1]["relative_error"] = errors(learned)
    for method in args.methods:
        settings = METHODS[method]
        forms = select_forms(settings.forms)
        with rows.stage(method, "profile", **size):
            profiles = [profile_layer(name, name, problem, forms, settings) for name, problem in problems(settings)]
        rows[-1]["options"] = sum(len(profile.options) for profile in profiles)
        uniform = AllocationConfig(method="uniform")
        planner = Planner(profiles, measure_size(model, layers.values()), settings, uniform, calibration)
        plan = planner.at(removed_ratio=args.removed)
        with rows.stage(method, "build", **size, options=len(layers)):
            built = {
                name: build_layer(layers[name], problem, plan.choices[name], name, plan)
                for name, problem in problems(settings)
            }
        rows[-1]["relative_error"] = errors({name: layer.float().dense_weight() for name, layer in built.items()})
        rows[-1]["ratio"] = rows[0]["energy_wh"] / (rows[-2]["energy_wh"] + rows[-1]["energy_wh"])
    write_results(args.output, rows)


if __name__ == "__main__":
    main()
