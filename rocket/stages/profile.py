"""Profiles, prices and plans, in profiles/ and plans/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rocket.allocation import MAX_POINTS, Budget, MeasuredPoint, Plan, Planner
from rocket.calib import Calibration
from rocket.compression import compress
from rocket.config import RocketError
from rocket.config.records import read_record
from rocket.evaluation import window_losses_of
from rocket.models import LinearLayer, features_of, is_causal_lm
from rocket.profiling import LayerProfile, profile_layer
from rocket.session import Session
from rocket.stages.gather import gather_activations
from rocket.stages.material import calibration_tokens, reads_samples
from rocket.usage import track

MEASURING_WINDOWS = 64


def work_of(layer: LinearLayer) -> float:
    """About the time that a layer takes to profile or build, in units that all layers share."""
    out_features, in_features = features_of(layer)
    smaller = min(out_features, in_features)
    return float(in_features) * in_features * (in_features + out_features) + 10.0 * smaller**3


def profile_layers(session: Session) -> Planner:
    """The options of every layer with size and cost. Writes one file a layer; a killed run loses the layer in work."""
    calibration, size = gather_activations(session)
    contents = profile_share(session, calibration)
    unknown = [name for name, content in contents.items() if content is None]
    if unknown:
        raise RocketError(
            f"{unknown[0]} and {len(unknown) - 1} other layers are not profiled yet; run all shards first"
        )
    profiles = [LayerProfile.from_dict(content, name) for name, content in contents.items() if content is not None]
    planner = Planner(profiles, size, session.config.profiling, session.config.allocation, calibration)
    return replace(planner, measured=_stored_prices(session))


def profile_share(session: Session, calibration: Calibration) -> dict[str, dict[str, Any] | None]:
    """Profile this process's share of the layers; what is stored of all then, None where another shard has them."""
    stored = _stored_profiles(session, calibration.inputs)
    missing = session.agree([name for name, content in stored.items() if content is None])
    if not missing:
        session.skip("profile layers")
        return stored
    layers, settings = session.layers, session.config.profiling
    strangers = [name for name in missing if name not in layers]
    if strangers:
        raise RocketError(
            f"calibration/index.json names {strangers[0]:.200}, which is no target layer of this model; delete "
            "calibration/ and run again"
        )
    with session.stage("profile layers"):
        # Shards are parts of the whole, whichever of them are done; processes that talk share what is left.
        mine = session.my_share({name: work_of(layers[name]) for name in (stored if session.shard else missing)})
        for name in track([name for name in mine if name in missing], "profile layers"):
            problem = calibration.problem(name, session.weight(layers[name]), settings)
            profile = profile_layer(name, calibration.inputs[name], problem, session.forms, settings)
            session.run.write_json(_profile_file(name), session.identity.profiles, profile.to_dict())
            del problem  # before the next one is made
            session.let_go(layers[name].weight)
        session.wait()
    return {**stored, **_stored_profiles(session, missing)}


def _stored_profiles(session: Session, names: Iterable[str]) -> dict[str, dict[str, Any] | None]:
    read, expected = session.run.read_json, session.identity.profiles
    return {name: read(_profile_file(name), expected) for name in names}


def _profile_file(name: str) -> str:
    return f"profiles/{name}.json"


def measure_prices(session: Session, removed_ratios: Sequence[float]) -> Planner:
    """Measure what plans of at most two sizes really cost, and let them correct the prediction of all others.

    Each plan is built in memory; its loss, less the original's, is taken on windows of the calibration split that
    calibration did not use, never on text that evaluation reads. Sizes that were measured before count where there is
    room for them. Writes plans/measured.json.
    """
    settings = session.config.profiling
    if settings.cost != "loss":
        raise RocketError(f"only predicted losses can be measured; profiling.cost is {settings.cost!r}")
    if len(removed_ratios) > MAX_POINTS:
        raise RocketError(f"at most {MAX_POINTS} sizes can be measured, got {len(removed_ratios)}")
    budgets = [Budget.of(removed_ratio=ratio) for ratio in removed_ratios]
    if session.streams:
        raise RocketError("measuring a size builds it in memory, where this model does not fit; plan without --measure")
    planner = profile_layers(session)
    asked = {plan.removed_ratio: plan for plan in map(planner.within, budgets)}
    known = sorted(planner.measured, key=lambda point: point.removed_ratio in asked)
    missing = [plan for ratio, plan in asked.items() if ratio not in {point.removed_ratio for point in known}]
    if not missing:
        session.skip("measure prices")
        return planner
    model = session.model
    if not is_causal_lm(model) or reads_samples(session, session.config.calib.source):
        raise RocketError(f"only text decoders calibrated on text can be measured; {type(model).__name__} is not so")
    measured: list[MeasuredPoint] = []
    if session.leads:
        measured = [*known, *_measure(session, missing)][-MAX_POINTS:]
        session.run.write_json("plans/measured.json", session.identity.prices, {"points": measured})
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
    content = session.run.read_json("plans/measured.json", session.identity.prices)
    if content is None:
        return []
    points = read_record(dict[str, list[tuple[float, float, float]]], content, session.run.path / "plans/measured.json")
    return [MeasuredPoint(*values) for values in points.get("points", [])]


def make_plan(session: Session) -> Plan:
    """The best option for every layer within the budget. Writes plans/BUDGET.json. Seconds."""
    planner = profile_layers(session)
    name = f"plans/{session.budget.name}.json"
    stored = session.run.read_json(name, session.identity.plan)
    if stored is not None:
        session.skip("plan")
        plan = Plan.from_dict(stored, planner.calibration)
        if plan.choices.keys() != {profile.layer for profile in planner.profiles}:
            raise RocketError(f"{session.run.path / name} is not of the profiled layers; delete it and run again")
        return plan
    with session.stage("plan"):
        plan = planner.within(session.budget)
    if session.leads:
        session.run.write_json(name, session.identity.plan, plan.to_dict())
    return plan
