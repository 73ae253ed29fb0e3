"""The compressed checkpoint, in models/BUDGET/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rocket.allocation import Plan
from rocket.compression import (
    build_tensors,
    compress,
    compressed_layers,
    linear_layer,
    save_checkpoint,
    stored_values,
)
from rocket.config import RocketError
from rocket.reporting.card import model_card
from rocket.run import UNCHECKED
from rocket.session import Session
from rocket.stages.profile import make_plan, work_of
from rocket.usage import track


def compress_model(session: Session) -> Path:
    """The compressed checkpoint, reopened and compared before it takes its name. Writes models/BUDGET/."""
    plan = make_plan(session)
    path = session.run.path / session.checkpoint
    if session.agree(session.run.has_directory(session.checkpoint, session.identity.plan)):
        session.skip("compress")
        if session.leads:
            session.run.remove(_built(session))  # of a process that was killed when the checkpoint was complete
        return path
    with session.stage("compress"):
        built = _build_layers(session, plan)
        if session.leads:
            model, processor = session.loaded
            compressed = compress(model, plan, inplace=True, built=built)
            session.release_model()
            with session.run.new_directory(session.checkpoint, session.identity.plan) as directory:
                save_checkpoint(compressed, processor, directory)
                stored = stored_values(directory, plan.choices)
                if stored != plan.kept_target_parameters:
                    raise RocketError(
                        f"{directory} stores {stored} values, the plan says {plan.kept_target_parameters}"
                    )
                (directory / UNCHECKED).write_text(model_card(directory, session.config, plan), encoding="utf-8")
            session.run.remove(_built(session))
    session.wait()
    return path


def _built(session: Session) -> str:
    return f"layers/{session.budget.name}"


def _build_layers(session: Session, plan: Plan) -> Mapping[str, Mapping[str, Tensor]]:
    """The tensors of every compressed layer. Writes layers/BUDGET/, which is kept until the checkpoint is complete.

    One file a layer, so that a killed run loses the layer in work, and several processes can share the work.
    """
    run, expected, calibration = session.run, session.identity.plan, plan.calibration
    assert calibration is not None
    chosen = compressed_layers(plan)
    layers = {name: linear_layer(session.model, name) for name in chosen}
    missing = session.agree([name for name in chosen if not run.has_tensors(_built_file(session, name), expected)])
    for name in track(session.my_share({name: work_of(layers[name]) for name in missing}), "build layers"):
        problem = calibration.problem(name, session.weight(layers[name]), plan.profiling)
        tensors = build_tensors(name, layers[name], problem, chosen[name], plan)
        run.write_tensors(_built_file(session, name), expected, tensors)
        del problem  # before the next one is made
        session.let_go(layers[name].weight)
    session.wait()
    return BuiltLayers(session, list(chosen))


def _built_file(session: Session, name: str) -> str:
    return f"{_built(session)}/{name}.safetensors"


class BuiltLayers(Mapping[str, Mapping[str, Tensor]]):
    """The tensors of layers in the run directory, mapped into memory when asked for."""

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        self._session, self._names = session, names

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        session, file = self._session, _built_file(self._session, name)
        tensors = session.run.read_tensors(file, session.identity.plan)
        if tensors is None:
            raise RocketError(f"{session.run.path / file} is missing; run again")
        session.let_go(*tensors.values())
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
