"""The stages in order. Each reads and writes artifacts of the run directory and does only what is missing there.

    gather_activations -> profile_layers -> make_plan -> compress_model -> evaluate_models

A stage is ``stage(session) -> artifact`` and begins by asking for the artifact of the one before it. Its fingerprint
covers that artifact's fingerprint and its own part of the config, so a change upstream redoes what depends on it and
nothing else: profiles do not depend on the budget, and a second size costs a plan and the factorization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rocket.allocation import MAX_POINTS, MeasuredPoint, ModelSize, Plan, Planner, measure_size
from rocket.calib import (
    SENSITIVITY_BATCH,
    Calibration,
    batches_of,
    collect_grams,
    measure_sensitivities,
    pack_triangle,
    unpack_triangle,
)
from rocket.compression import compress, merge, save_checkpoint, stored_values
from rocket.config import RocketError
from rocket.data import load_documents, pack_tokens
from rocket.evaluation import perplexity, window_losses_of, zero_shot
from rocket.models import resolve_device, weight_of
from rocket.profiling import LayerProfile, profile_layer
from rocket.run import RunDirectory, Usage, fingerprint, track
from rocket.session import Session

HUB_DOCUMENTS_A_SAMPLE = 16
MEASURING_WINDOWS = 32


class StoredGrams(Mapping[str, Tensor]):
    """Gram matrices in the run directory, read one at a time."""

    def __init__(self, run: RunDirectory, expected: str, names: Sequence[str]) -> None:
        self._run, self._expected, self._names = run, expected, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensors = self._run.read_tensors(_gram_file(name), self._expected)
        if tensors is None:
            raise RocketError(f"{self._run.path / _gram_file(name)} is missing; delete calibration/ and run again")
        return unpack_triangle(tensors["gram"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _gram_file(name: str) -> str:
    return f"calibration/{name}.safetensors"


def gather_activations(session: Session) -> tuple[Calibration, ModelSize]:
    """Run the calibration set through the model: Gram matrices, and sensitivities if asked for.

    Writes calibration/. Costs one forward pass (and a backward pass over ``calib.sensitivity_samples``); memory: the
    model, and in² float64 and float32 values for each distinct layer input.
    """
    stored = _stored_calibration(session)
    if stored is not None:
        session.skip("gather activations")
        return stored
    config, run, expected = session.config.calib, session.run, session.calibration_fingerprint
    model, layers = session.model, session.layers
    _check_positions(session)
    with session.stage("gather activations"):
        tokens = _calibration_tokens(session)
        calibration = collect_grams(model, layers, batches_of(tokens, config.batch_size, "calibrate"))
        layers = calibration.known(layers)
        for name in list(calibration.grams):
            run.write_tensors(_gram_file(name), expected, {"gram": pack_triangle(calibration.grams[name])})
    if config.sensitivity_samples:
        with session.stage("measure sensitivities"):
            batches = batches_of(tokens[: config.sensitivity_samples], SENSITIVITY_BATCH, "sensitivities")
            sensitivities = measure_sensitivities(model, layers, batches)
        run.write_tensors("calibration/sensitivities.safetensors", expected, sensitivities)
    size = measure_size(model, layers.values())
    index = {"inputs": calibration.inputs, "tokens": calibration.tokens, "size": vars(size)}
    run.write_json("calibration/index.json", expected, index)
    stored = _stored_calibration(session)
    assert stored is not None
    return stored


def _check_positions(session: Session) -> None:
    positions = getattr(session.model.config, "max_position_embeddings", None)
    lengths = {"calib.seq_len": session.config.calib.seq_len, "evaluation.seq_len": session.config.evaluation.seq_len}
    for key, length in lengths.items():
        if positions is not None and length > positions:
            raise RocketError(f"{key}={length} exceeds the model's {positions} positions")


def _calibration_tokens(session: Session, spare: int = 0) -> Tensor:
    config = session.config.calib
    documents = load_documents(
        config.source,
        "calibration",
        text_field=config.text_field,
        stream_limit=max(512, HUB_DOCUMENTS_A_SAMPLE * config.num_samples),
    )
    return pack_tokens(documents.texts, session.tokenizer, config.seq_len, config.num_samples, config.seed, spare=spare)


def _stored_calibration(session: Session) -> tuple[Calibration, ModelSize] | None:
    run, expected = session.run, session.calibration_fingerprint
    index = run.read_json("calibration/index.json", expected)
    if index is None or any(not (run.path / _gram_file(name)).exists() for name in index["tokens"]):
        return None
    sensitivities: dict[str, Tensor] = {}
    if session.config.calib.sensitivity_samples:
        stored = run.read_tensors("calibration/sensitivities.safetensors", expected)
        if stored is None:
            return None
        sensitivities = stored
    grams = StoredGrams(run, expected, list(index["tokens"]))
    return Calibration(index["inputs"], grams, index["tokens"], sensitivities), ModelSize(**index["size"])


def profile_layers(session: Session) -> Planner:
    """The options of every layer with size and cost. Writes one file a layer; a killed run loses the layer in work."""
    calibration, size = gather_activations(session)
    run, expected, settings = session.run, session.profile_fingerprint, session.config.profiling
    stored = {name: run.read_json(_profile_file(name), expected) for name in calibration.inputs}
    profiles = {name: LayerProfile.from_dict(content) for name, content in stored.items() if content is not None}
    missing = [name for name in stored if name not in profiles]
    if missing:
        layers = session.layers
        with session.stage("profile layers"):
            for name in track(missing, "profile layers"):
                problem = calibration.problem(name, weight_of(layers[name]), settings)
                profiles[name] = profile_layer(name, calibration.inputs[name], problem, session.forms, settings)
                run.write_json(_profile_file(name), expected, profiles[name].to_dict())
    else:
        session.skip("profile layers")
    planner = Planner([profiles[name] for name in stored], size, settings, session.config.allocation, calibration)
    return replace(planner, measured=_stored_prices(session))


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
    with session.stage("measure prices"):
        windows = _calibration_tokens(session, spare=MEASURING_WINDOWS)[session.config.calib.num_samples :]
        if not len(windows):
            raise RocketError("calibration used all its text; add text or lower calib.num_samples to measure prices")
        batches = windows.split(session.config.calib.batch_size)
        original = float(window_losses_of(model, batches).mean())
        measured = []
        for plan in plans:
            loss = float(window_losses_of(compress(model, plan), batches).mean())
            measured.append(MeasuredPoint(plan.removed_ratio, plan.cost, loss - original))
    session.run.write_json("plans/measured.json", _prices_fingerprint(session), {"points": measured})
    return replace(planner, measured=measured)


def _stored_prices(session: Session) -> list[MeasuredPoint]:
    content = session.run.read_json("plans/measured.json", _prices_fingerprint(session)) or {"points": []}
    return [MeasuredPoint(*values) for values in content["points"]]


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
    session.run.write_json(name, session.plan_fingerprint, plan.to_dict())
    return plan


def compress_model(session: Session) -> Path:
    """The compressed checkpoint, reopened and compared before it takes its name. Writes models/BUDGET/."""
    plan = make_plan(session)
    path = session.run.path / session.checkpoint
    if session.run.has_directory(session.checkpoint, session.plan_fingerprint):
        session.skip("compress")
        return path
    model, tokenizer = session.loaded
    with session.stage("compress"):
        compressed = compress(model, plan, inplace=True)
        session.release_model()
        with session.run.new_directory(session.checkpoint, session.plan_fingerprint) as directory:
            save_checkpoint(compressed, tokenizer, directory)
            stored = stored_values(directory, plan.choices)
            if stored != plan.kept_target_parameters:
                raise RocketError(f"{directory} stores {stored} values, the plan says {plan.kept_target_parameters}")
    return path


def export_dense(session: Session) -> Path:
    """The compressed model multiplied out into plain weights, for engines that know nothing of rocket."""
    path = compress_model(session)
    name = f"{session.checkpoint}-dense"
    expected = fingerprint(dense=session.plan_fingerprint)
    if session.run.has_directory(name, expected):
        session.skip("export dense")
        return session.run.path / name
    with session.stage("export dense"), session.run.new_directory(name, expected) as directory:
        model, tokenizer = open_compressed(session, path)
        merge(model, inplace=True).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return session.run.path / name


def open_compressed(session: Session, path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint as any user opens it."""
    config = session.config.model
    options = {"trust_remote_code": config.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), **options)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    return model.to(resolve_device(config.device)).eval(), tokenizer


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model. ``perplexities`` by text source, ``accuracies`` by task."""

    perplexities: dict[str, float]
    accuracies: dict[str, dict[str, Any]]


def evaluate_models(session: Session) -> tuple[Evaluation, Evaluation]:
    """Perplexity and zero-shot accuracy of the original and of the compressed model. Writes evaluation/*.json.

    The original comes first, while it is in memory for the stages before.
    """
    original = _evaluate_original(session)
    path = compress_model(session)
    session.release_model()
    compressed = _stored_evaluation(session, session.budget.name, session.plan_fingerprint)
    if compressed is None:
        model, tokenizer = open_compressed(session, path)
        with session.stage("evaluate compressed"):
            compressed = _evaluate(session, session.budget.name, session.plan_fingerprint, model, tokenizer)
    return original, compressed


def _evaluate_original(session: Session) -> Evaluation:
    subject = fingerprint(model=session.model_identity, dtype=session.config.model.dtype)
    stored = _stored_evaluation(session, "original", subject)
    if stored is not None:
        return stored
    model, tokenizer = session.loaded
    with session.stage("evaluate original"):
        return _evaluate(session, "original", subject, model, tokenizer)


def _stored_evaluation(session: Session, name: str, subject: str) -> Evaluation | None:
    content = session.run.read_json(f"evaluation/{name}.json", session.evaluation_fingerprint(subject))
    if content is None:
        return None
    session.skip(f"evaluate {name}")
    return Evaluation(**content)


def _evaluate(
    session: Session, name: str, subject: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Evaluation:
    settings = session.config.evaluation
    perplexities = {}
    for source in settings.texts:
        documents = load_documents(source, "held_out", text_field=settings.text_field)
        result = perplexity(
            model,
            tokenizer,
            documents.texts,
            seq_len=settings.seq_len,
            batch_size=settings.batch_size,
            max_tokens=settings.max_tokens,
        )
        perplexities[source] = result.value
    tasks = {}
    if settings.tasks:
        results = zero_shot(model, tokenizer, settings.tasks, limit=settings.limit, batch_size=4 * settings.batch_size)
        tasks = {task: asdict(result) for task, result in results.items()}
    evaluation = Evaluation(perplexities, tasks)
    session.run.write_json(f"evaluation/{name}.json", session.evaluation_fingerprint(subject), asdict(evaluation))
    return evaluation


@dataclass(frozen=True)
class Summary:
    """A finished run."""

    path: Path
    plan: Plan
    original: Evaluation
    compressed: Evaluation
    usages: dict[str, Usage]


def run_pipeline(session: Session) -> Summary:
    """All stages. Running it again on the same directory redoes nothing."""
    plan = make_plan(session)
    original, compressed = evaluate_models(session)
    return Summary(session.run.path / session.checkpoint, plan, original, compressed, session.usages())
