"""Run a model on many batches in step: every batch reaches a block before any passes it.

So the weights of a block are needed once for all batches, and what was collected in it is complete when it is left. The
model's own code runs, whatever its architecture: each batch is a greenlet that waits where a block is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from rocket.models.inputs import with_padding_token, without_cache
from rocket.models.residence import Spilled, hold, in_step, spill
from rocket.models.structure import find_blocks

Result = TypeVar("Result")

PLAIN = bool | int | float | str | torch.dtype | None
"""What may be handed to a block beside tensors without carrying what another block tells it."""


@dataclass(frozen=True, eq=False)
class Call:
    """A block that a task wants called: ``task`` is its number, ``forward`` the block's forward.

    ``hidden`` is where its hidden state waits on disk, if it does.
    """

    task: int
    block: str
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden: Spilled | None = None

    @property
    def state(self) -> Tensor | None:
        """The hidden state that enters the block; None if it is not told."""
        candidates = (*self.args[:1], self.kwargs.get("hidden_states"))
        return next((value for value in candidates if isinstance(value, Tensor) and value.is_floating_point()), None)

    def notes(self) -> list[object]:
        """What it is handed beside tensors and plain values, as it is now: what changes as it runs may be read later.

        Caches and dictionaries of keys and values, by which blocks tell each other more than their outputs.
        """
        return [_note(value, []) for value in (*self.args, *self.kwargs.values()) if not _is_plain(value)]

    def entered_by(self, state: Tensor) -> Call:
        """The same call with another hidden state."""
        own = self.state
        args = tuple(state if value is own else value for value in self.args)
        kwargs = {name: state if value is own else value for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs, hidden=None)

    def run(self) -> Any:
        self.load()
        return self.forward(*self.args, **self.kwargs)

    def load(self) -> None:
        """Bring the hidden state back."""
        if self.hidden is not None:
            self.hidden.load()


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, Tensor | PLAIN)


def _note(value: object, above: list[int]) -> object:
    """A value to be compared: which tensors it holds and how often each was written to, and all else in it."""
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if id(value) in above or isinstance(value, nn.Module | type) or callable(value):
        return id(value)
    inside = [*above, id(value)]
    if isinstance(value, Mapping):
        return [(key, _note(entry, inside)) for key, entry in value.items()]
    if isinstance(value, list | tuple | set):
        return [_note(entry, inside) for entry in value]
    held = getattr(value, "__dict__", None)
    return value if held is None else [(name, _note(entry, inside)) for name, entry in held.items()]


def run_calls(block: str, calls: list[Call]) -> Iterator[Any]:
    """The visit of a block that does nothing but run it."""
    while calls:
        yield calls.pop(0).run()


def skip_none(call: Call) -> None:
    """What lets every block be visited."""


def sweep(
    model: nn.Module,
    tasks: Sequence[Callable[[], Result]],
    visit: Callable[[str, list[Call]], Iterable[Any]] = run_calls,
    skip: Callable[[Call], Any] = skip_none,
) -> list[Result]:
    """Results of the tasks, each of which runs the model once.

    ``visit(block, calls)`` yields what each of the calls returns, in their order, and takes each off its list, so that
    its hidden state goes when it was used; all tasks that have come to a block are in one visit of it. Where
    ``skip(call)`` is not None the call returns that, and its block is not visited.
    Memory: the hidden states of all batches, if they do not wait on disk, beside the weights of one block where a
    model's do not stay in memory (`residence`). What a task raises ends all of them.
    """
    results: dict[int, Result] = {}
    waiting: dict[int, tuple[greenlet, Call]] = {}

    def advance(number: int, task: greenlet, *values: Any) -> None:
        mode = torch.is_grad_enabled()
        call = task.switch(*values)
        while not task.dead and (output := skip(call)) is not None:
            call = task.switch(output)
        torch.set_grad_enabled(mode)
        if task.dead:
            results[number] = call
        else:
            waiting[number] = (task, replace(call, hidden=spill(model, call.state)))

    # What changes a model for a while must do so once for all: tasks end in another order than they begin.
    with _calls_wait(find_blocks(model)) as start, without_cache(model), with_padding_token(model), in_step(model):
        for number, task in enumerate(tasks):
            advance(number, start(number, task))
        while waiting:
            block = next(iter(waiting.values()))[1].block
            group = [waiting.pop(number) for number in list(waiting) if waiting[number][1].block == block]
            with hold(model, block):
                outputs = iter(visit(block, [call for _, call in group]))
                while group:
                    output = next(outputs)
                    task, call = group.pop(0)
                    advance(call.task, task, output)
                    del output, task, call
                for _ in outputs:  # what a visit does after its last call
                    pass
    return [results[number] for number in range(len(tasks))]


@contextmanager
def _calls_wait(blocks: Mapping[str, nn.Module]) -> Iterator[Callable[[int, Callable[[], Any]], greenlet]]:
    """While it lasts, blocks called within a greenlet hand a `Call` to the one that started it and wait for its output.

    Gives what makes such a greenlet of a task and its number.
    """
    hub = getcurrent()
    numbers: dict[greenlet, int] = {}
    replaced: list[tuple[nn.Module, Any]] = []

    def start(number: int, task: Callable[[], Any]) -> greenlet:
        made = greenlet(task, parent=hub)
        numbers[made] = number
        return made

    def wait(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = numbers.get(cast(greenlet, getcurrent()))
        if number is None:
            return forward(*args, **kwargs)
        mode = torch.is_grad_enabled()
        # What listens to a block (recorders of router scores) knows its listeners by the context.
        output = hub.switch(Call(number, name, partial(copy_context().run, forward), args, kwargs))
        torch.set_grad_enabled(mode)
        return output

    try:
        for name, block in blocks.items():
            replaced.append((block, vars(block).get("forward")))
            block.forward = partial(wait, name, block.forward)
        yield start
    finally:
        for block, forward in replaced:
            del block.forward
            if forward is not None:  # accelerate and others put theirs on the instance
                block.forward = forward
        numbers.clear()
