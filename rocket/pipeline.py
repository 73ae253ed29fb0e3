"""The stages in order. Each reads and writes artifacts of the run directory and does only what is missing there.

    gather_activations -> profile_layers -> make_plan -> compress_model -> evaluate_models
                                                         compress_model -> heal_model -> evaluate_healed

A stage is ``stage(session) -> artifact`` and begins by asking for the artifact of the one before it. Its fingerprint
covers that artifact's fingerprint and its own part of the config, so a change upstream redoes what depends on it and
nothing else: profiles do not depend on the budget, and a second size costs a plan and the factorization.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rocket.allocation import ALLOCATORS, MAX_POINTS, Budget, MeasuredPoint, ModelSize, Plan, Planner, measure_size
from rocket.calib import (
    SENSITIVITY_BATCH,
    Calibration,
    collect_grams,
    measure_sensitivities,
    pack_triangle,
    unpack_triangle,
)
from rocket.compression import (
    build_tensors,
    compress,
    compressed_layers,
    linear_layer,
    merge,
    save_checkpoint,
    stored_values,
)
from rocket.config import RocketError
from rocket.config.records import Whole, read_record
from rocket.config.schema import AllocationConfig
from rocket.evaluation import Evaluation, evaluate, window_losses_of
from rocket.material import (
    calibrates_on_samples,
    calibration_batches,
    calibration_tokens,
    check_sources,
    healing_examples,
)
from rocket.models import LinearLayer, features_of, is_causal_lm, open_checkpoint, release_pages, remedy_of_nan
from rocket.profiling import LayerProfile, profile_layer
from rocket.ranks import ranks
from rocket.reporting.card import model_card
from rocket.reporting.html import render_report
from rocket.reporting.summary import MeasuredSize, Summary
from rocket.run import UNCHECKED, RunDirectory, fingerprint, track
from rocket.session import Session

MEASURING_WINDOWS = 32

logger = logging.getLogger(__name__)


class StoredGrams(MutableMapping[str, Tensor]):
    """Gram matrices in the run directory, read and written one at a time."""

    def __init__(self, run: RunDirectory, expected: str, names: Iterable[str] = ()) -> None:
        self._run, self._expected = run, expected
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensors = self._run.read_tensors(_gram_file(name), self._expected)
        if tensors is None:
            raise RocketError(f"{self._run.path / _gram_file(name)} is missing; delete calibration/ and run again")
        try:
            return unpack_triangle(tensors["gram"])
        except (KeyError, ValueError):
            raise RocketError(
                f"{self._run.path / _gram_file(name)} holds no Gram matrix; delete calibration/ and run again"
            ) from None

    def __setitem__(self, name: str, gram: Tensor) -> None:
        self._run.write_tensors(_gram_file(name), self._expected, {"gram": pack_triangle(gram)})
        self._names[name] = None

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        (self._run.path / _gram_file(name)).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _gram_file(name: str) -> str:
    return f"calibration/{name}.safetensors"


def gather_activations(session: Session) -> tuple[Calibration, ModelSize]:
    """Run the calibration set through the model: Gram matrices, and sensitivities if asked for.

    Writes calibration/. Costs one forward pass (and a backward pass over ``calib.sensitivity_samples``); for memory see
    `collect_grams` and `measure_sensitivities`.
    """
    stored = _stored_calibration(session)
    if session.agree(stored is not None):
        session.skip("gather activations")
        return stored or _found_calibration(session)
    if session.shard:
        raise RocketError(f"nothing is calibrated in {session.run.path} yet; run `rocket gather` on this config first")
    config, run, expected = session.config.calib, session.run, session.calibration_fingerprint
    model, layers = session.model, session.layers
    check_sources(session)
    batches = calibration_batches(session)
    with session.stage("gather activations"):
        material = batches(None, config.batch_size)
        if len(material) < ranks.count:
            raise RocketError(
                f"{len(material)} batches cannot be shared by {ranks.count} processes; lower calib.batch_size"
            )
        calibration = collect_grams(model, layers, material, StoredGrams(run, expected))
    if config.sensitivity_samples:
        with session.stage("measure sensitivities"):
            chosen = batches(config.sensitivity_samples, SENSITIVITY_BATCH)
            sensitivities = measure_sensitivities(model, calibration.known(layers), chosen, seen=calibration.seen())
        if session.leads:
            run.write_tensors("calibration/sensitivities.safetensors", expected, sensitivities)
        calibration = calibration.with_sensitivities(sensitivities)
    size = measure_size(model, calibration.known(layers).values())
    index = {"inputs": calibration.inputs, "tokens": calibration.tokens, "size": vars(size)}
    if session.leads:
        run.write_json("calibration/index.json", expected, index)
    session.wait()
    return _found_calibration(session)


def _found_calibration(session: Session) -> tuple[Calibration, ModelSize]:
    stored = _stored_calibration(session)
    if stored is None:
        raise RocketError(f"{session.run.path}/calibration is gone while it was in use; run again")
    return stored


def _stored_calibration(session: Session) -> tuple[Calibration, ModelSize] | None:
    run, expected = session.run, session.calibration_fingerprint
    content = run.read_json("calibration/index.json", expected)
    if content is None:
        return None
    index = read_record(_CalibrationIndex, content, run.path / "calibration/index.json")
    if any(not run.has_file(_gram_file(name)) for name in index.tokens):
        return None
    sensitivities: dict[str, Tensor] = {}
    if session.config.calib.sensitivity_samples:
        stored = run.read_tensors("calibration/sensitivities.safetensors", expected)
        if stored is None:
            return None
        sensitivities = stored
    grams = StoredGrams(run, expected, list(index.tokens))
    return Calibration(index.inputs, grams, index.tokens, sensitivities), index.size


@dataclass(frozen=True)
class _CalibrationIndex:
    """calibration/index.json: `Calibration` without its tensors, and the size of the model."""

    inputs: dict[str, str]
    tokens: dict[str, Whole]
    size: ModelSize

    def __post_init__(self) -> None:
        if not self.inputs or not set(self.inputs.values()) <= self.tokens.keys():
            raise RocketError("calibration/index.json names inputs that it does not count; delete it and run again")


def profile_layers(session: Session) -> Planner:
    """The options of every layer with size and cost. Writes one file a layer; a killed run loses the layer in work."""
    calibration, size = gather_activations(session)
    unknown = profile_share(session, calibration)
    if unknown:
        raise RocketError(
            f"{unknown[0]} and {len(unknown) - 1} other layers are not profiled yet; run all shards first"
        )
    contents = _stored_profiles(session, calibration)
    profiles = [LayerProfile.from_dict(content, name) for name, content in contents.items() if content is not None]
    planner = Planner(profiles, size, session.config.profiling, session.config.allocation, calibration)
    return replace(planner, measured=_stored_prices(session))


def profile_share(session: Session, calibration: Calibration) -> list[str]:
    """Profile this process's share of the layers; returns those that are not profiled then, as others have them."""
    stored = _stored_profiles(session, calibration)
    missing = session.agree([name for name, content in stored.items() if content is None])
    if not missing:
        session.skip("profile layers")
        return []
    layers, settings = session.layers, session.config.profiling
    strangers = [name for name in missing if name not in layers]
    if strangers:
        raise RocketError(
            f"calibration/index.json names {strangers[0]:.200}, which is no target layer of this model; delete "
            "calibration/ and run again"
        )
    with session.stage("profile layers"):
        # Shards are parts of the whole, whichever of them are done; processes that talk share what is left.
        mine = session.my_share({name: _work(layers[name]) for name in (stored if session.shard else missing)})
        for name in track([name for name in mine if name in missing], "profile layers"):
            problem = calibration.problem(name, session.weight(name), settings)
            profile = profile_layer(name, calibration.inputs[name], problem, session.forms, settings)
            session.run.write_json(_profile_file(name), session.profile_fingerprint, profile.to_dict())
        session.wait()
    return [name for name, content in _stored_profiles(session, calibration).items() if content is None]


def _stored_profiles(session: Session, calibration: Calibration) -> dict[str, dict[str, Any] | None]:
    read, expected = session.run.read_json, session.profile_fingerprint
    return {name: read(_profile_file(name), expected) for name in calibration.inputs}


def _work(layer: LinearLayer) -> float:
    """About the time that a layer takes to profile or build, in units that all layers share."""
    out_features, in_features = features_of(layer)
    smaller = min(out_features, in_features)
    return float(in_features) * in_features * (in_features + out_features) + 10.0 * smaller**3


def _profile_file(name: str) -> str:
    return f"profiles/{name}.json"


def measure_prices(session: Session, removed_ratios: Sequence[float]) -> Planner:
    """Measure what plans of at most two sizes really cost, and let them correct the prediction of all others.

    Each plan is built in memory; its loss, less the original's, is taken on windows of the calibration split that
    calibration did not use, never on text that evaluation reads. Writes plans/measured.json.
    """
    planner = profile_layers(session)
    if planner.profiling.cost != "loss":
        raise RocketError(f"only predicted losses can be measured; profiling.cost is {planner.profiling.cost!r}")
    if len(removed_ratios) > MAX_POINTS:
        raise RocketError(f"at most {MAX_POINTS} sizes can be measured, got {len(removed_ratios)}")
    plans = [planner.at(removed_ratio=ratio) for ratio in removed_ratios]
    if {plan.removed_ratio for plan in plans} <= {point.removed_ratio for point in planner.measured}:
        session.skip("measure prices")
        return planner
    model = session.model
    if not is_causal_lm(model) or calibrates_on_samples(session):
        raise RocketError(f"only text decoders calibrated on text can be measured; {type(model).__name__} is not so")
    measured: list[MeasuredPoint] = []
    if session.leads:
        measured = _measure(session, plans)
        session.run.write_json("plans/measured.json", _prices_fingerprint(session), {"points": measured})
    return replace(planner, measured=session.agree(measured))


def _measure(session: Session, plans: Sequence[Plan]) -> list[MeasuredPoint]:
    with session.stage("measure prices"):
        windows = calibration_tokens(session, spare=MEASURING_WINDOWS)[session.config.calib.num_samples :]
        if not len(windows):
            raise RocketError("calibration used all its text; add text or lower calib.num_samples to measure prices")
        batches = windows.split(session.config.calib.batch_size)
        original = float(window_losses_of(session.model, batches).mean())
        measured = []
        for plan in plans:
            loss = float(window_losses_of(compress(session.model, plan), batches).mean())
            measured.append(MeasuredPoint(plan.removed_ratio, plan.cost, loss - original))
    return measured


def _stored_prices(session: Session) -> list[MeasuredPoint]:
    content = session.run.read_json("plans/measured.json", _prices_fingerprint(session))
    if content is None:
        return []
    points = read_record(dict[str, list[tuple[float, float, float]]], content, session.run.path / "plans/measured.json")
    return [MeasuredPoint(*values) for values in points.get("points", [])]


def _prices_fingerprint(session: Session) -> str:
    return fingerprint(profiles=session.profile_fingerprint, allocation=session.config.allocation.model_dump())


def make_plan(session: Session) -> Plan:
    """The best option for every layer within the budget. Writes plans/BUDGET.json. Seconds."""
    planner = profile_layers(session)
    name = f"plans/{session.budget.name}.json"
    stored = session.run.read_json(name, session.plan_fingerprint)
    if stored is not None:
        session.skip("plan")
        return Plan.from_dict(stored, planner.calibration)
    with session.stage("plan"):
        plan = planner.within(session.budget)
    if session.leads:
        session.run.write_json(name, session.plan_fingerprint, plan.to_dict())
    return plan


def compress_model(session: Session) -> Path:
    """The compressed checkpoint, reopened and compared before it takes its name. Writes models/BUDGET/."""
    plan = make_plan(session)
    path = session.run.path / session.checkpoint
    if session.agree(session.run.has_directory(session.checkpoint, session.plan_fingerprint)):
        session.skip("compress")
        return path
    with session.stage("compress"):
        built = _build_layers(session, plan)
        if session.leads:
            model, processor = session.loaded
            compressed = compress(model, plan, inplace=True, built=built)
            session.release_model()
            with session.run.new_directory(session.checkpoint, session.plan_fingerprint) as directory:
                save_checkpoint(compressed, processor, directory)
                stored = stored_values(directory, plan.choices)
                if stored != plan.kept_target_parameters:
                    raise RocketError(
                        f"{directory} stores {stored} values, the plan says {plan.kept_target_parameters}"
                    )
                (directory / UNCHECKED).write_text(model_card(directory, session.config, plan), encoding="utf-8")
            session.run.remove(_BUILT)
    session.wait()
    return path


_BUILT = "layers"


def _build_layers(session: Session, plan: Plan) -> Mapping[str, Mapping[str, Tensor]]:
    """The tensors of every compressed layer. Writes layers/, which is kept until the checkpoint is complete.

    One file a layer, so that a killed run loses the layer in work, and several processes can share the work.
    """
    run, expected, calibration = session.run, session.plan_fingerprint, plan.calibration
    assert calibration is not None
    chosen = compressed_layers(plan)
    layers = {name: linear_layer(session.model, name) for name in chosen}
    missing = session.agree([name for name in chosen if not run.has_tensors(_built_file(name), expected)])
    for name in track(session.my_share({name: _work(layers[name]) for name in missing}), "build layers"):
        problem = calibration.problem(name, session.weight(name), plan.profiling)
        run.write_tensors(_built_file(name), expected, build_tensors(name, layers[name], problem, chosen[name], plan))
    session.wait()
    return BuiltLayers(run, expected, list(chosen))


def _built_file(name: str) -> str:
    return f"{_BUILT}/{name}.safetensors"


class BuiltLayers(Mapping[str, Mapping[str, Tensor]]):
    """The tensors of layers in the run directory, mapped into memory when asked for."""

    def __init__(self, run: RunDirectory, expected: str, names: Sequence[str]) -> None:
        self._run, self._expected, self._names = run, expected, names

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        tensors = self._run.read_tensors(_built_file(name), self._expected)
        if tensors is None:
            raise RocketError(f"{self._run.path / _built_file(name)} is missing; run again")
        release_pages(tensors.values())
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def heal_model(session: Session) -> Path:
    """The compressed model, fine-tuned with its sparsity kept, as the config's healing section says.

    Writes models/BUDGET-healed/, and healing/BUDGET/ while it is at work: a killed run goes on from there. Costs what
    ``healing.tokens`` or ``healing.minutes`` allow; memory: `rocket.healing.heal`.
    """
    from rocket.healing import heal  # here, as the Trainer takes seconds to import

    config, run = session.config, session.run
    if config.healing is None:
        raise RocketError("the config has no healing section; add one, or say for example --set healing.minutes=20")
    compressed, healed = compress_model(session), run.path / session.healed_checkpoint
    if session.agree(run.has_directory(session.healed_checkpoint, session.healing_fingerprint)):
        session.skip("heal")
        return healed
    examples = healing_examples(session, config.healing)
    session.release_model()
    if session.leads:
        scratch = run.path / "healing" / session.budget.name
        expected = session.healing_fingerprint
        with session.stage("heal"), run.new_directory(session.healed_checkpoint, expected) as directory:
            heal(compressed, config.model, config.healing, examples, scratch / expected, directory)
        shutil.rmtree(scratch)
    session.wait()
    return healed


def export_dense(session: Session) -> Path:
    """The compressed model multiplied out into plain weights, for engines that know nothing of rocket."""
    path = compress_model(session)
    name = f"{session.checkpoint}-dense"
    expected = fingerprint(dense=session.plan_fingerprint)
    if session.run.has_directory(name, expected):
        session.skip("export dense")
        return session.run.path / name
    with session.stage("export dense"), session.run.new_directory(name, expected) as directory:
        model, processor = open_checkpoint(path, session.config.model)
        merge(model, inplace=True).save_pretrained(directory)
        processor.save_pretrained(directory)
    return session.run.path / name


def evaluate_models(session: Session) -> tuple[Evaluation, Evaluation]:
    """The original and the compressed model, measured by what fits them. Writes evaluation/*.json, and the model card.

    The original comes first, while it is in memory for the stages before.
    """
    original, kept = _evaluate_original(session)
    path, plan = compress_model(session), make_plan(session)
    compressed = _evaluate_smaller(session, "compressed", path, session.plan_fingerprint, kept)
    if session.leads:
        card = model_card(path, session.config, plan, original, compressed)
        session.run.write_text(f"{session.checkpoint}/{UNCHECKED}", card)
    return original, compressed


def evaluate_healed(session: Session) -> Evaluation | None:
    """The healed model, measured as the others are; None if the config does not heal. Writes evaluation/*.json."""
    if session.config.healing is None:
        return None
    _, kept = _evaluate_original(session)
    path = heal_model(session)
    return _evaluate_smaller(session, "healed", path, session.healing_fingerprint, kept)


def _evaluate_smaller(session: Session, name: str, path: Path, subject: str, kept: Mapping[str, Tensor]) -> Evaluation:
    session.release_model()
    stored = _stored_evaluation(session, path.name, subject)
    if stored is not None:
        session.skip(f"evaluate {path.name}")
    elif session.leads:
        model, processor = open_checkpoint(path, session.config.model, session.streams, session.states)
        with session.stage(f"evaluate {name}"):
            stored, _ = evaluate(session.config.evaluation, model, processor, kept)
        expected = session.evaluation_fingerprint(subject)
        session.run.write_json(f"evaluation/{path.name}.json", expected, asdict(stored))
    agreed = session.agree(stored)
    assert agreed is not None
    return agreed


_KEPT = "evaluation/original.safetensors"


def _original(session: Session) -> str:
    return fingerprint(model=session.model_identity, dtype=session.config.model.dtype)


def _evaluate_original(session: Session) -> tuple[Evaluation, dict[str, Tensor]]:
    """What is measured of it, and what metrics keep to compare the compressed model with."""
    expected = session.evaluation_fingerprint(_original(session))
    stored = _stored_evaluation(session, "original", _original(session))
    kept = session.run.read_tensors(_KEPT, expected) or {}
    if stored is not None and set(stored.kept) <= kept.keys():
        session.skip("evaluate original")
    elif session.leads:
        model, processor = session.loaded
        check_sources(session)
        with session.stage("evaluate original"):
            stored, kept = evaluate(session.config.evaluation, model, processor)
        for text, perplexity in stored.perplexities.items():
            if math.isnan(perplexity):
                raise RocketError(f"the original's perplexity on {text} is not a number; {remedy_of_nan(model)}")
        if kept:
            session.run.write_tensors(_KEPT, expected, kept)
        session.run.write_json("evaluation/original.json", expected, asdict(stored))
    agreed = session.agree(stored)
    assert agreed is not None
    return agreed, kept


def _stored_evaluation(session: Session, name: str, subject: str) -> Evaluation | None:
    content = session.run.read_json(f"evaluation/{name}.json", session.evaluation_fingerprint(subject))
    if content is None:
        return None
    return read_record(Evaluation, content, session.run.path / f"evaluation/{name}.json")


def run_pipeline(session: Session) -> Summary:
    """All stages, and report.html about them. Running it again on the same directory redoes nothing but the report."""
    planner, plan = profile_layers(session), make_plan(session)
    original, compressed = evaluate_models(session)
    healed = evaluate_healed(session)
    path = session.run.path / (session.checkpoint if healed is None else session.healed_checkpoint)
    sizes, usages = _measured_sizes(session), session.usages()
    summary = Summary(path, session.config, planner, plan, original, compressed, healed, sizes, usages)
    if session.leads:
        session.run.write_text(summary.report.name, render_report(summary))
    return summary


def _measured_sizes(session: Session) -> list[MeasuredSize]:
    """Plans in the run directory that were evaluated as the config says, whichever allocator made them, by size."""
    allocations = [AllocationConfig(method=method, error_cap=cap) for method in ALLOCATORS for cap in (False, True)]
    found = []
    for file in (session.run.path / "plans").glob("*.json"):
        name = f"plans/{file.name}"
        content = session.run.read_json(name, None) or {}
        if "budget" not in content:
            continue
        budget = Budget(**content["budget"])
        for allocation in allocations:
            expected = session.plan_fingerprint_of(budget, allocation)
            evaluation = _stored_evaluation(session, budget.name, expected)
            if evaluation is not None and session.run.read_json(name, expected) is not None:
                found.append(MeasuredSize(Plan.from_dict(content), allocation, evaluation))
    return sorted(found, key=lambda size: size.plan.removed_ratio)
