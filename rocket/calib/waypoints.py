"""Where a killed calibration goes on: at a block that all batches had come to, with the hidden states that they had.

What is known of the blocks before it is kept, and they are not run again: numbers without meaning take the place of
what they would return. That is right where nothing else behind them depends on it, which is tried out beforehand
(`can_go_on`). So it is where blocks form a chain, and not where a decoder's blocks read what an encoder's returned, or
where blocks leave something for later ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rocket.config.errors import RocketError
from rocket.config.records import Whole, read_record
from rocket.models import Call, sweep
from rocket.models.sweep import PLAIN
from rocket.ranks import ranks
from rocket.run import RunDirectory

SECONDS = 60.0
"""From one waypoint to the next, at least: shorter passes leave none."""
WAYPOINTS = "calibration/waypoints"

MOST_RETURNED = 16
Returned = Annotated[int, Field(ge=0, le=MOST_RETURNED)]
"""What a block returns: its hidden state alone (0), or in a tuple of so many entries, of which the others are None."""


@dataclass(frozen=True)
class Waypoint:
    """calibration/waypoints/RANK/NUMBER.json: what is known when all batches have passed so many blocks.

    ``passed`` are those blocks, in order; ``batches`` is how many there are, whose hidden states lie in the folder
    NUMBER. The others are as in `Calibration`, and ``short`` as in `fill_experts`.
    """

    passed: dict[str, Returned]
    batches: Whole
    inputs: dict[str, str]
    tokens: dict[str, Whole]
    short: dict[str, Whole]

    def __post_init__(self) -> None:
        if not self.passed or not set(self.inputs.values()) <= self.tokens.keys():
            raise RocketError(f"{WAYPOINTS} names inputs that it does not count; delete it and run again")


class Waypoints:
    """The waypoints of a pass in a run directory: the last one, each process (`ranks`) having that of its batches.

    ``expected`` is the fingerprint of what the bits of hidden states depend on, which take their room on disk: twice,
    while one waypoint takes the place of another.
    """

    def __init__(self, run: RunDirectory, expected: str) -> None:
        self._run, self._expected = run, expected
        self._home = f"{WAYPOINTS}/{ranks.rank}"
        self._since = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether so much would be lost that another one is worth its time."""
        return time.monotonic() - self._since >= SECONDS

    def save(self, waypoint: Waypoint, states: Iterator[Tensor]) -> None:
        """Write a waypoint, and remove those before it when all processes have written theirs."""
        number = len(waypoint.passed)
        for task, state in enumerate(states):
            self._run.write_tensors(self._file(number, task), self._expected, {"state": state})
        self._run.write_json(f"{self._home}/{number}.json", self._expected, asdict(waypoint))
        ranks.barrier()
        for other in self._numbers():
            if other != number:
                self._remove(other)
        self._since = time.monotonic()

    def last(self) -> Waypoint | None:
        """The last one that all processes have."""
        own = {number: waypoint for number in self._numbers() if (waypoint := self._read(number)) is not None}
        common = set(own).intersection(*ranks.all_gather(set(own)))
        return own[max(common)] if common else None

    def state(self, waypoint: Waypoint, call: Call) -> Tensor:
        """The hidden state that a call's batch had there."""
        file = self._file(len(waypoint.passed), call.task)
        state = (self._run.read_tensors(file, self._expected) or {}).get("state")
        if state is None or call.state is None or state.shape != call.state.shape or state.dtype != call.state.dtype:
            raise RocketError(f"{self._run.path / file} is not of this batch; delete {WAYPOINTS} and run again")
        return state.to(call.state.device, copy=True)  # to where torch puts its own: bits may depend on alignment

    def save_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Write what this process has added up so far, in a pass whose batches come one by one."""
        self._run.write_tensors(f"{self._home}/sums.safetensors", self._expected, sums)
        self._since = time.monotonic()

    def sums(self) -> dict[str, Tensor]:
        """What was added up; nothing if there is none."""
        return self._run.read_tensors(f"{self._home}/sums.safetensors", self._expected) or {}

    def clear(self) -> None:
        """Remove all, of all processes."""
        ranks.barrier()
        if ranks.rank == 0:
            self._run.remove(WAYPOINTS)
        ranks.barrier()

    def _numbers(self) -> list[int]:
        found = (self._run.path / self._home).glob("*.json")
        return [int(file.stem) for file in found if file.stem.isdecimal()]

    def _read(self, number: int) -> Waypoint | None:
        name = f"{self._home}/{number}.json"
        content = self._run.read_json(name, self._expected)
        if content is None:
            return None
        waypoint = read_record(Waypoint, content, self._run.path / name)
        files = (self._file(number, task) for task in range(waypoint.batches))
        is_whole = len(waypoint.passed) == number and all(self._run.has_tensors(file, self._expected) for file in files)
        return waypoint if is_whole else None

    def _file(self, number: int, task: int) -> str:
        return f"{self._home}/{number}/{task}.safetensors"

    def _remove(self, number: int) -> None:
        self._run.remove(f"{self._home}/{number}.json")
        self._run.remove(f"{self._home}/{number}")


def returned(call: Call, output: Any) -> int | None:
    """What a call of a block returned (`Returned`); None where `stand_in` could not take its place."""
    first, *others = output if isinstance(output, tuple) and output else (output,)
    if len(others) >= MOST_RETURNED or any(other is not None for other in others) or not _alike(first, call.state):
        return None
    return len(output) if isinstance(output, tuple) else 0


def _alike(one: object, other: object) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def stand_in(call: Call, returned: int, seed: int) -> Any:
    """Numbers without meaning, as what a call of a block returns."""
    state = call.state
    assert state is not None
    generator = torch.Generator(state.device).manual_seed(seed)
    numbers = torch.empty_like(state).uniform_(-1.0, 1.0, generator=generator)
    return (numbers, *[None] * (returned - 1)) if returned else numbers


class _DependsError(Exception):
    """What enters a block depends on what cannot be restored."""


def can_go_on(model: nn.Module, run: Callable[[], object], passed: Mapping[str, int]) -> bool:
    """Whether the blocks still to come need of those passed nothing but the hidden state that enters the first of them.

    ``run`` runs the model on a batch. It does so twice, with no block called, while those passed return one time these
    numbers and one time others: what enters the rest must be the same. These must be of the list of blocks that the
    last one passed is of, as it is not known what others return, and be called once, with tensors and plain values:
    something else may carry what one block tells another.
    """
    last = list(passed)[-1]
    names: list[str] = []

    def skip(call: Call) -> Any:
        if call.block not in passed:
            return None
        if call.task == 0:
            names.append(call.block)
        return stand_in(call, passed[call.block], seed=call.task)

    def visit(block: str, calls: list[Call]) -> Iterator[Any]:
        is_known = block.rpartition(".")[0] == last.rpartition(".")[0] and block not in names
        if not is_known or len(calls) != 2 or any(call.state is None for call in calls):
            raise _DependsError
        for call in calls:
            call.load()
        if len(names) == len(passed):
            calls = [call.entered_by(stand_in(call, 0, seed=2)) for call in calls]
        names.append(block)
        one, other = calls
        if not _same((one.args, *one.kwargs.items()), (other.args, *other.kwargs.items())):
            raise _DependsError
        yield from (stand_in(call, passed[last], seed=2) for call in calls)

    try:
        sweep(model, [run, run], visit, skip)
    except _DependsError:
        return False
    return names[: len(passed)] == list(passed) and len(set(names)) == len(names)


def _same(one: object, other: object) -> bool:
    """Whether two are the same tensors and plain values; never if there is anything else in them."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _alike(one, other) and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return isinstance(one, PLAIN) and one == other
