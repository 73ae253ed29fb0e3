"""Calibration: Gram matrices and sensitivities, in calibration/."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass

from torch import Tensor

from rocket.allocation import ModelSize, measure_size
from rocket.calib import (
    SENSITIVITY_BATCH,
    Calibration,
    collect_grams,
    measure_sensitivities,
    pack_triangle,
    unpack_triangle,
)
from rocket.config import RocketError
from rocket.config.records import Whole, read_record
from rocket.ranks import ranks
from rocket.run import RunDirectory
from rocket.session import Session
from rocket.stages.material import calibration_batches, check_sources


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
