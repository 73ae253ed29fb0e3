"""Several processes that share the work of one run, as torchrun starts them: ``torchrun ... -m rocket run``.

Each opens the model and the run directory, which must lie where all see it. In a process that did not `join`, and so in
the interface for Python, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from rocket.config.errors import RocketError, first_line

TIMEOUT = timedelta(hours=24)
Item = TypeVar("Item")


class Ranks:
    """The processes of a run: ``rank`` is the number of this one, ``count`` how many there are."""

    rank = 0
    count = 1

    def join(self) -> None:
        """Find the other processes, if torchrun started this one. Raises RocketError if they cannot be reached."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        with_gpus = torch.cuda.is_available()
        if with_gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if with_gpus else "gloo"
        with _contact():
            store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
            # torchrun keeps its store when it starts processes again: those of before must not be found in it.
            store = PrefixStore(f"rocket/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def leave(self) -> None:
        """Part from the other processes."""
        if self.count > 1:
            dist.destroy_process_group()
        self.rank, self.count = 0, 1

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.all_gather(None)

    def all_gather(self, item: Item) -> list[Item]:
        """What every process gives here, by rank. All must call it; so it also waits for all."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        with _contact():
            dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Item, source: int) -> Item:
        """What the process ``source`` gives here."""
        if self.count == 1:
            return item
        items = [item]
        with _contact():
            dist.broadcast_object_list(items, src=source)
        return items[0]

    def reduce(self, tensor: Tensor, to: int | None = None) -> None:
        """Add the tensors of all processes, in place, at all of them or at one (elsewhere it then holds anything)."""
        if self.count > 1:
            with _contact():
                if to is None:
                    dist.all_reduce(tensor)
                else:
                    dist.reduce(tensor, to)


ranks = Ranks()


def shares(costs: Mapping[str, float], parts: int) -> list[list[str]]:
    """The names dealt out to so many parts of about equal cost: the dearest first, each to the cheapest part so far.

    >>> shares({"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0}, 2)
    [['a', 'd'], ['b', 'c']]
    """
    dealt: list[list[str]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for name in sorted(costs, key=lambda name: -costs[name]):
        part = totals.index(min(totals))
        dealt[part].append(name)
        totals[part] += costs[name]
    return dealt


@contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RocketError(
            f"rank {os.environ.get('RANK', '?')} lost contact with the other processes ({first_line(error)}); see "
            "what they say. What was finished is kept: the same command goes on from there"
        ) from error
