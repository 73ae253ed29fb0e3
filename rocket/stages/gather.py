"""Calibration: Gram matrices and sensitivities, in calibration/."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from rocket.allocation import ModelSize, measure_size
from rocket.calib import (
    SENSITIVITY_BATCH,
    WAYPOINTS,
    Calibration,
    Waypoints,
    collect_grams,
    measure_sensitivities,
    pack_triangle,
    sensitivity_samples,
    unpack_triangle,
)
from rocket.config import RocketError
from rocket.config.records import Whole, read_record
from rocket.models import Batch
from rocket.ranks import ranks
from rocket.run import RunDirectory
from rocket.session import Session
from rocket.stages.material import calibration_batches, check_sources


class StoredGrams(MutableMapping[str, Tensor]):
    """Gram matrices in the run directory, read and written one at a time."""

    def __init__(self, run: RunDirectory, expected: str, names: Iterable[str] = ()) -> None:
        self._run, self._expected = run, expected
        self._names = dict.fromkeys(names)

    def __contains__(self, name: object) -> bool:
        return self._run.has_tensors(_gram_file(str(name)), self._expected)

    def __getitem__(self, name: str) -> Tensor:
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


_INDEX = "calibration/index.json"
_SENSITIVE = "calibration/sensitivities.json"
_SENSITIVITIES = "calibration/sensitivities.safetensors"


def _gram_file(name: str) -> str:
    return f"calibration/{name}.safetensors"


def gather_activations(session: Session) -> tuple[Calibration, ModelSize]:
    """Run the calibration set through the model: Gram matrices, and sensitivities if the cost needs them.

    Writes calibration/. Costs one forward pass (and a backward pass over `sensitivity_samples`); for memory see
    `collect_grams` and `measure_sensitivities`.
    """
    stored = _stored_calibration(session)
    if session.agree(stored is not None and _has_sensitivities(session, stored[0])):
        session.skip("gather activations")
        if session.leads:
            session.run.remove(WAYPOINTS)  # of a process that was killed when all was written
        return stored or _found_calibration(session)
    if session.shard:
        raise RocketError(f"nothing is calibrated in {session.run.path} yet; run `rocket gather` on this config first")
    check_sources(session)
    batches = calibration_batches(session)
    if session.agree(stored is None):
        _collect(session, batches(None, session.config.calib.batch_size))
    if count := _wanted(session):
        _measure(session, batches(count, SENSITIVITY_BATCH))
    return _found_calibration(session)


def _collect(session: Session, batches: Sequence[Batch]) -> None:
    """Write the Gram matrices and the index."""
    if len(batches) < ranks.count:
        raise RocketError(f"{len(batches)} batches cannot be shared by {ranks.count} processes; lower calib.batch_size")
    grams, waypoints = StoredGrams(session.run, session.identity.calibration), _waypoints(session)
    with session.stage("gather activations"):
        calibration = collect_grams(session.model, session.layers, batches, grams, waypoints)
    _write_index(session, _INDEX, calibration)
    waypoints.clear()


def _measure(session: Session, batches: Sequence[Batch]) -> None:
    """Write the sensitivities, and an index of the layers that have one."""
    calibration, _ = _found_calibration(session)
    known, seen, waypoints = calibration.known(session.layers), calibration.seen(), _waypoints(session)
    with session.stage("measure sensitivities"):
        sensitivities = measure_sensitivities(session.model, known, batches, seen=seen, waypoints=waypoints)
    if session.leads:
        session.run.write_tensors(_SENSITIVITIES, session.identity.calibration, sensitivities)
    _write_index(session, _SENSITIVE, calibration.with_sensitivities(sensitivities))
    waypoints.clear()


def _waypoints(session: Session) -> Waypoints:
    return Waypoints(session.run, session.identity.hidden_states)


def _write_index(session: Session, name: str, calibration: Calibration) -> None:
    size = measure_size(session.model, calibration.known(session.layers))
    index = {"inputs": calibration.inputs, "tokens": calibration.tokens, "size": vars(size)}
    if session.leads:
        session.run.write_json(name, session.identity.calibration, index)
    session.wait()


def _found_calibration(session: Session) -> tuple[Calibration, ModelSize]:
    stored = _stored_calibration(session)
    if stored is None:
        raise RocketError(f"{session.run.path}/calibration is gone while it was in use; run again")
    return stored


def _stored_calibration(session: Session) -> tuple[Calibration, ModelSize] | None:
    """What the run directory holds; with sensitivities, of the layers that have one, where these are wanted."""
    run, expected = session.run, session.identity.calibration
    index = _read_index(session, _INDEX)
    if index is None or any(not run.has_file(_gram_file(name)) for name in index.tokens):
        return None
    grams = StoredGrams(run, expected, list(index.tokens))
    if _wanted(session):
        sensitive, sensitivities = _read_index(session, _SENSITIVE), run.read_tensors(_SENSITIVITIES, expected)
        if sensitive is not None and sensitivities is not None:
            return Calibration(sensitive.inputs, grams, index.tokens, sensitivities), sensitive.size
    return Calibration(index.inputs, grams, index.tokens), index.size


def _read_index(session: Session, name: str) -> _CalibrationIndex | None:
    content = session.run.read_json(name, session.identity.calibration)
    return None if content is None else read_record(_CalibrationIndex, content, session.run.path / name)


def _wanted(session: Session) -> int:
    return sensitivity_samples(session.config.calib, session.config.profiling)


def _has_sensitivities(session: Session, calibration: Calibration) -> bool:
    """Whether they are known, if they are wanted."""
    return not _wanted(session) or calibration.inputs.keys() <= calibration.sensitivities.keys()


@dataclass(frozen=True)
class _CalibrationIndex:
    """`Calibration` without its tensors, and the size of the model: of all layers, or of those with a sensitivity."""

    inputs: dict[str, str]
    tokens: dict[str, Whole]
    size: ModelSize

    def __post_init__(self) -> None:
        if not self.inputs or not set(self.inputs.values()) <= self.tokens.keys():
            raise RocketError("calibration/ has an index of inputs that it does not count; delete it and run again")
