"""The stages in order. Each reads and writes artifacts of the run directory and does only what is missing there.

    gather_activations -> profile_layers -> make_plan -> compress_model -> evaluate_models
                                                         compress_model -> heal_model -> evaluate_healed
                                                         compress_model, heal_model -> export_dense

A stage is ``stage(session) -> artifact`` and begins by asking for the artifact of the one before it. Its fingerprint
covers that artifact's fingerprint and its own part of the config, so a change upstream redoes what depends on it and
nothing else: profiles do not depend on the budget, and a second size costs a plan and the factorization.
"""

from __future__ import annotations

from rocket.reporting.html import render_report
from rocket.reporting.summary import Summary
from rocket.session import Session
from rocket.stages.compress import compress_model
from rocket.stages.evaluate import evaluate_healed, evaluate_models, measured_sizes
from rocket.stages.export import export_dense
from rocket.stages.gather import gather_activations
from rocket.stages.heal import heal_model
from rocket.stages.profile import make_plan, measure_prices, profile_layers, profile_share

__all__ = [
    "compress_model",
    "evaluate_healed",
    "evaluate_models",
    "export_dense",
    "gather_activations",
    "heal_model",
    "make_plan",
    "measure_prices",
    "profile_layers",
    "profile_share",
    "run_pipeline",
]


def run_pipeline(session: Session) -> Summary:
    """All stages, and report.html about them. Running it again on the same directory redoes nothing but the report."""
    planner, plan = profile_layers(session), make_plan(session)
    original, compressed = evaluate_models(session)
    healed = evaluate_healed(session)
    path = session.run.path / session.finished_checkpoint
    sizes, usages = measured_sizes(session, original), session.usages()
    summary = Summary(path, session.config, planner, plan, original, compressed, healed, sizes, usages)
    if session.leads:
        session.run.write_text(summary.report.name, render_report(summary))
    return summary
