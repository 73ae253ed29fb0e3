"""The stages in order. Each reads and writes artifacts of the run directory and does only what is missing there.

    gather_activations -> profile_layers -> make_plan -> compress_model -> evaluate_models
                                                         compress_model -> heal_model -> evaluate_healed

A stage is ``stage(session) -> artifact`` and begins by asking for the artifact of the one before it. Its fingerprint
covers that artifact's fingerprint and its own part of the config, so a change upstream redoes what depends on it and
nothing else: profiles do not depend on the budget, and a second size costs a plan and the factorization.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rocket.allocation import MAX_POINTS, MeasuredPoint, ModelSize, Plan, Planner, measure_size
from rocket.calib import (
    SENSITIVITY_BATCH,
    Calibration,
    collect_grams,
    measure_sensitivities,
    pack_triangle,
    unpack_triangle,
)
from rocket.compression import compress, merge, save_checkpoint, stored_values
from rocket.config import RocketError
from rocket.config.schema import HealingConfig
from rocket.data import Sample, holds_samples, load_documents, load_samples, pack_tokens
from rocket.evaluation import Evaluation, Score, evaluate, window_losses_of
from rocket.models import (
    Batch,
    is_causal_lm,
    open_checkpoint,
    sample_batches,
    takes_media,
    takes_text_alone,
    token_batches,
    weight_of,
)
from rocket.models.inputs import tokenizer_of
from rocket.profiling import LayerProfile, profile_layer
from rocket.run import RunDirectory, Usage, fingerprint, track
from rocket.session import Session

HUB_DOCUMENTS_A_SAMPLE = 16
MEASURING_WINDOWS = 32
FEWEST_TOKENS_A_DOCUMENT = 256

logger = logging.getLogger(__name__)


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
    _check_sources(session)
    with session.stage("gather activations"):
        batches = _calibration_batches(session)
        calibration = collect_grams(model, layers, track(batches(None, config.batch_size), "calibrate"))
        for name in list(calibration.grams):
            run.write_tensors(_gram_file(name), expected, {"gram": pack_triangle(calibration.grams[name])})
    if config.sensitivity_samples:
        with session.stage("measure sensitivities"):
            chosen = track(batches(config.sensitivity_samples, SENSITIVITY_BATCH), "sensitivities")
            sensitivities = measure_sensitivities(model, calibration.known(layers), chosen, seen=calibration.seen())
        run.write_tensors("calibration/sensitivities.safetensors", expected, sensitivities)
        calibration = calibration.with_sensitivities(sensitivities)
    size = measure_size(model, calibration.known(layers).values())
    index = {"inputs": calibration.inputs, "tokens": calibration.tokens, "size": vars(size)}
    run.write_json("calibration/index.json", expected, index)
    stored = _stored_calibration(session)
    assert stored is not None
    return stored


def _check_sources(session: Session) -> None:
    """Whether the model takes what the config gives it: said before any work, not after."""
    calib, evaluation = session.config.calib, session.config.evaluation
    model = session.model
    name = type(model).__name__
    if not _calibrates_on_samples(session) and not takes_text_alone(model):
        raise RocketError(f"calib.source={calib.source!r}: {name} reads no text alone; name images or speech")
    if evaluation.texts and not takes_text_alone(model):
        raise RocketError(f"evaluation.texts={evaluation.texts}: {name} reads no text alone; write [] and name samples")
    if evaluation.samples and not takes_media(model):
        raise RocketError(f"evaluation.samples={evaluation.samples}: {name} takes neither images nor speech; write []")
    lengths = {"evaluation.seq_len": evaluation.seq_len} if evaluation.texts else {}
    if not _calibrates_on_samples(session):
        lengths = {"calib.seq_len": calib.seq_len, **lengths}
    for key, length in lengths.items():
        _check_length(model, key, length)


def _check_length(model: PreTrainedModel, key: str, length: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise RocketError(f"{key}={length} exceeds the model's {positions} positions")


def _calibrates_on_samples(session: Session) -> bool:
    return takes_media(session.model) and holds_samples(session.config.calib.source)


def _calibration_batches(session: Session) -> Callable[[int | None, int], Sequence[Batch]]:
    """(the first so many samples, how many a batch) -> batches."""
    model, processor = session.loaded
    config = session.config.calib
    if not _calibrates_on_samples(session):
        tokens = _calibration_tokens(session)
        return lambda count, size: token_batches(model, tokens[:count], size)
    samples = load_samples(config.source, "calibration")
    if len(samples) < config.num_samples:
        logger.warning("%s has only %d samples, not %d: using all", config.source, len(samples), config.num_samples)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(config.seed))
    drawn = [samples[index] for index in order[: config.num_samples].tolist()]
    return lambda count, size: sample_batches(model, processor, drawn[:count], size)


def _calibration_tokens(session: Session, spare: int = 0) -> Tensor:
    config = session.config.calib
    documents = load_documents(
        config.source,
        "calibration",
        text_field=config.text_field,
        stream_limit=max(512, HUB_DOCUMENTS_A_SAMPLE * config.num_samples),
    )
    tokenizer = tokenizer_of(session.loaded[1])
    return pack_tokens(documents.texts, tokenizer, config.seq_len, config.num_samples, config.seed, spare=spare)


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
    if not is_causal_lm(model) or _calibrates_on_samples(session):
        raise RocketError(f"only text decoders calibrated on text can be measured; {type(model).__name__} is not so")
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
    model, processor = session.loaded
    with session.stage("compress"):
        compressed = compress(model, plan, inplace=True)
        session.release_model()
        with session.run.new_directory(session.checkpoint, session.plan_fingerprint) as directory:
            save_checkpoint(compressed, processor, directory)
            stored = stored_values(directory, plan.choices)
            if stored != plan.kept_target_parameters:
                raise RocketError(f"{directory} stores {stored} values, the plan says {plan.kept_target_parameters}")
    return path


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
    if run.has_directory(session.healed_checkpoint, session.healing_fingerprint):
        session.skip("heal")
        return healed
    examples = healing_examples(session, config.healing)
    session.release_model()
    scratch = run.path / "healing" / session.budget.name
    with session.stage("heal"), run.new_directory(session.healed_checkpoint, session.healing_fingerprint) as directory:
        heal(compressed, config.model, config.healing, examples, scratch / session.healing_fingerprint, directory)
    shutil.rmtree(scratch)
    return healed


def healing_examples(session: Session, config: HealingConfig) -> Tensor | Sequence[Sample]:
    """Windows of tokens [n, seq_len], or samples, of the calibration part of healing's source."""
    model, processor = session.loaded
    if takes_media(model) and holds_samples(config.source):
        return load_samples(config.source, "calibration")
    _check_length(model, "healing.seq_len", config.seq_len)
    limit = None if config.tokens is None else max(512, config.tokens // FEWEST_TOKENS_A_DOCUMENT)
    documents = load_documents(config.source, "calibration", text_field=config.text_field, stream_limit=limit)
    return pack_tokens(documents.texts, tokenizer_of(processor), config.seq_len, None, config.seed)


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
    """The original and the compressed model, measured by what fits them. Writes evaluation/*.json.

    The original comes first, while it is in memory for the stages before.
    """
    original, kept = _evaluate_original(session)
    path = compress_model(session)
    return original, _evaluate_smaller(session, "compressed", path, session.plan_fingerprint, kept)


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
        return stored
    model, processor = open_checkpoint(path, session.config.model)
    with session.stage(f"evaluate {name}"):
        evaluation, _ = evaluate(session.config.evaluation, model, processor, kept)
    session.run.write_json(f"evaluation/{path.name}.json", session.evaluation_fingerprint(subject), asdict(evaluation))
    return evaluation


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
        return stored, kept
    model, processor = session.loaded
    _check_sources(session)
    with session.stage("evaluate original"):
        evaluation, kept = evaluate(session.config.evaluation, model, processor)
    if kept:
        session.run.write_tensors(_KEPT, expected, kept)
    session.run.write_json("evaluation/original.json", expected, asdict(evaluation))
    return evaluation, kept


def _stored_evaluation(session: Session, name: str, subject: str) -> Evaluation | None:
    content = session.run.read_json(f"evaluation/{name}.json", session.evaluation_fingerprint(subject))
    if content is None:
        return None
    scores = {source: [Score(**score) for score in scores] for source, scores in content.pop("scores").items()}
    return Evaluation(**content, scores=scores)


@dataclass(frozen=True)
class Summary:
    """A finished run. ``path`` is the checkpoint that came out of it: the healed one, if the config heals."""

    path: Path
    plan: Plan
    original: Evaluation
    compressed: Evaluation
    healed: Evaluation | None
    usages: dict[str, Usage]


def run_pipeline(session: Session) -> Summary:
    """All stages. Running it again on the same directory redoes nothing."""
    plan = make_plan(session)
    original, compressed = evaluate_models(session)
    healed = evaluate_healed(session)
    path = session.run.path / (session.checkpoint if healed is None else session.healed_checkpoint)
    return Summary(path, plan, original, compressed, healed, session.usages())
