"""What was measured of the models, in evaluation/."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from rocket.allocation import ALLOCATORS, Budget, Plan
from rocket.config import RocketError
from rocket.config.records import read_record
from rocket.config.schema import AllocationConfig
from rocket.evaluation import Evaluation, evaluate
from rocket.models import open_checkpoint, remedy_of_nan
from rocket.reporting.card import model_card
from rocket.reporting.summary import MeasuredSize
from rocket.run import UNCHECKED
from rocket.session import Session
from rocket.stages.compress import compress_model
from rocket.stages.heal import heal_model
from rocket.stages.material import check_sources
from rocket.stages.profile import make_plan


def evaluate_models(session: Session) -> tuple[Evaluation, Evaluation]:
    """The original and the compressed model, measured by what fits them. Writes evaluation/*.json, and the model card.

    The original comes first, while it is in memory for the stages before.
    """
    original, kept = _evaluate_original(session)
    path, plan = compress_model(session), make_plan(session)
    compressed = _evaluate_smaller(session, "compressed", path, session.identity.plan, original, kept)
    if session.leads:
        card = model_card(path, session.config, plan, original, compressed)
        session.run.write_text(f"{session.checkpoint}/{UNCHECKED}", card)
    return original, compressed


def evaluate_healed(session: Session) -> Evaluation | None:
    """The healed model, measured as the others are; None if the config does not heal.

    Writes evaluation/*.json, and the healed checkpoint's model card.
    """
    if session.config.healing is None:
        return None
    original, kept = _evaluate_original(session)
    path = heal_model(session)
    healed = _evaluate_smaller(session, "healed", path, session.identity.healed, original, kept)
    card = model_card(path, session.config, make_plan(session), original, healed, healed=True)
    session.run.write_text(f"{session.healed_checkpoint}/{UNCHECKED}", card)
    return healed


def _evaluate_smaller(
    session: Session, name: str, path: Path, subject: str, original: Evaluation, kept: Mapping[str, Tensor]
) -> Evaluation:
    session.release_model()
    stored = _stored_evaluation(session, path.name, subject, original)
    if stored is not None:
        session.skip(f"evaluate {path.name}")
    elif session.leads:
        model, processor = open_checkpoint(path, session.config.model, session.streams, session.states)
        with session.stage(f"evaluate {name}"):
            stored, _ = evaluate(session.config.evaluation, model, processor, kept)
        expected = session.identity.evaluation(subject)
        session.run.write_json(f"evaluation/{path.name}.json", expected, asdict(stored))
    agreed = session.agree(stored)
    assert agreed is not None
    return agreed


_KEPT = "evaluation/original.safetensors"


def _evaluate_original(session: Session) -> tuple[Evaluation, dict[str, Tensor]]:
    """What is measured of it, and what metrics keep to compare the compressed model with."""
    expected = session.identity.evaluation(session.identity.original)
    stored = _stored_evaluation(session, "original", session.identity.original)
    kept = session.run.read_tensors(_KEPT, expected) or {}
    if stored is not None and set(stored.kept) <= kept.keys():
        session.skip("evaluate original")
    elif session.leads:
        model, processor = session.loaded
        check_sources(session)
        with session.stage("evaluate original"):
            stored, kept = evaluate(session.config.evaluation, model, processor)
        for what, value in _values(stored):
            if math.isnan(value):
                raise RocketError(f"the original's {what} is not a number; {remedy_of_nan(model)}")
        if kept:
            session.run.write_tensors(_KEPT, expected, kept)
        session.run.write_json("evaluation/original.json", expected, asdict(stored))
    agreed = session.agree(stored)
    assert agreed is not None
    return agreed, kept


def _stored_evaluation(
    session: Session, name: str, subject: str, original: Evaluation | None = None
) -> Evaluation | None:
    """What was measured of a subject, if it was. Raises RocketError if that is not what was of the ``original``."""
    content = session.run.read_json(f"evaluation/{name}.json", session.identity.evaluation(subject))
    if content is None:
        return None
    path = session.run.path / f"evaluation/{name}.json"
    stored = read_record(Evaluation, content, path)
    if original is not None and _measures(stored) != _measures(original):
        raise RocketError(f"{path} does not tell what original.json does; delete both and run again")
    return stored


def _values(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    for text, perplexity in evaluation.perplexities.items():
        yield f"perplexity on {text}", perplexity
    for source, scores in evaluation.scores.items():
        for score in scores:
            yield f"{score.name} on {source}", score.value


def _measures(evaluation: Evaluation) -> tuple[set[str], set[str]]:
    return set(evaluation.perplexities), set(evaluation.accuracies)


def measured_sizes(session: Session, original: Evaluation) -> list[MeasuredSize]:
    """Plans in the run directory that were evaluated as the config says, whichever allocator made them, by size."""
    allocations = [AllocationConfig(method=method, error_cap=cap) for method in ALLOCATORS for cap in (False, True)]
    found = []
    for file in (session.run.path / "plans").glob("*.json"):
        name = f"plans/{file.name}"
        content = session.run.read_json(name, None) or {}
        if "budget" not in content:
            continue
        budget = read_record(Budget, content["budget"], session.run.path / name)
        for allocation in allocations:
            expected = session.identity.plan_of(budget, allocation)
            evaluation = _stored_evaluation(session, budget.name, expected, original)
            if evaluation is not None and session.run.read_json(name, expected) is not None:
                found.append(MeasuredSize(Plan.from_dict(content), allocation, evaluation))
    return sorted(found, key=lambda size: size.plan.removed_ratio)
