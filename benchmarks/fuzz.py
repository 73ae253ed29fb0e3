"""Fuzzing: what strangers may send, changed at random, must be refused with a sentence or give a right result.

Valid configs, plans, profiles, run directories, checkpoints, their headers and indices are mutated: values replaced by
hostile ones, keys renamed, dropped and swapped, bits flipped, ends cut off. Each is then used as a user would. An
example is refused (RocketError), accepted (used to the end, with the right result where that can be told), a traceback
(any other exception), or a hang (longer than the limit). Memory is limited: one that asks for more than a gigabyte
counts as a traceback.

    python -m benchmarks.fuzz --examples 10000
    python -m benchmarks.fuzz --examples 100 --targets plan header --seed 3
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import math
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
import transformers
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

import rocket
from benchmarks import tiny
from benchmarks.harness import write_results
from rocket.allocation import Plan, Planner
from rocket.config import Config, RocketError, dump_config, load_config
from rocket.config.schema import CalibConfig, ModelConfig, ProfilingConfig
from rocket.forms import FORMS
from rocket.models import open_checkpoint
from rocket.pipeline import run_pipeline
from rocket.profiling import LayerProfile
from rocket.run import seal_json
from rocket.session import Session
from rocket.usage import measure

SECONDS = 20.0
MEMORY = 10**9

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 1.5, math.nan, math.inf, -math.inf, 1e308, -0.0),
    *("", "..", "../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "x" * 10_000, "a." * 3000, "re:(", "1e999", "nan"),
    *([], {}, [[]], {"a": {}}, [0] * 1000, {"": 0}, [None], {"a": [1, {"b": math.nan}]}),
    *("float16", "sparse", "dense", "dictionary", "low_rank", "sparse_low_rank", "F64", "I64", "BOOL"),
)

Mutable = dict[Any, Any] | list[Any]


def nodes(value: Any) -> Iterator[tuple[Mutable, Any]]:
    """Every (container, key) in nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from nodes(child)


def mutate(value: Any, random: Random) -> Any:
    """A copy of nested JSON with one to three changes, half of them to something of the same type."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(nodes(value))
        if not places:
            return random.choice(HOSTILE)
        container, key = places[random.randrange(len(places))]
        other, other_key = places[random.randrange(len(places))]
        kind = random.randrange(10)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[random.choice([*map(str, HOSTILE[-30:]), str(other_key)])] = container.pop(key)
        elif kind == 2:
            container[key] = copy.deepcopy(other[other_key])
        elif kind in (3, 4):
            alike = [child for child in (each[name] for each, name in places) if type(child) is type(container[key])]
            container[key] = copy.deepcopy(random.choice(alike))
        elif kind in (5, 6) and isinstance(container[key], int | float):
            number = container[key]
            container[key] = random.choice([number + 1, number - 1, -number, number * 2, number * 10**9, str(number)])
        else:
            container[key] = copy.deepcopy(random.choice(HOSTILE))
    return value


def flip(data: bytes, random: Random) -> bytes:
    """Bytes with some bits flipped, or a part cut out, doubled or moved."""
    changed = bytearray(data)
    kind = random.randrange(4)
    first, last = sorted(random.randrange(len(data) + 1) for _ in range(2))
    if kind == 0:
        del changed[first:last]
    elif kind == 1:
        changed[first:first] = changed[first : min(last, first + 1000)]
    else:
        for _ in range(random.randint(1, 8)):
            changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


class Specimens:
    """Valid things to be mutated, made once in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.make_model(layers=2)
        self.tokens = torch.randint(1, 257, (8, 16), generator=torch.Generator().manual_seed(0))
        self.profiling = ProfilingConfig(
            forms=list(FORMS),
            removed_ratios=[0.3, 0.5],
            rank_support_ratios=[1.5],
            precisions=["float", "int8"],
        )
        calib = CalibConfig(num_samples=8, seq_len=16, batch_size=8, sensitivity_samples=2)
        self.planner = rocket.plan(self.model, self.tokens, calib=calib, profiling=self.profiling)
        attention = ["low_rank", "dictionary", "sparse", "dense"]
        first, second = ["sparse int8", "dense int8"], ["sparse_low_rank", "sparse_low_rank int8"]
        turns = cycle([*attention, *first, "dictionary int8", *attention, *second, "dictionary int8"])
        choices = {
            profile.layer: next(option for option in profile.options[::-1] if option.label == form)
            for profile, form in zip(self.planner.profiles, turns, strict=False)
        }
        self.plan = replace(self.planner.at(removed_ratio=0.3), choices=choices)
        small = rocket.compress(self.model, self.plan)
        self.checkpoint, self.shards = folder / "checkpoint", folder / "shards"
        small.save_pretrained(self.checkpoint)
        small.save_pretrained(self.shards, max_shard_size="16KB")
        tiny.make_tokenizer().save_pretrained(self.checkpoint)
        tiny.make_tokenizer().save_pretrained(self.shards)
        self.logits = self.run(small)
        self.config = tiny.write_run(folder)
        with Session(load_config(self.config)) as session:
            self.summary = run_pipeline(session)
        self.run_files = {file: file.read_bytes() for file in (folder / "run").rglob("*") if file.is_file()}

    def run(self, model: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=self.tokens[:2]).logits
        return logits

    @contextmanager
    def changed(self, file: Path, content: bytes) -> Iterator[None]:
        """A file with other content, for a while."""
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            yield
        finally:
            file.write_bytes(before)

    def restore_run(self) -> None:
        for file in (self.folder / "run").rglob("*"):
            if file.is_file() and file not in self.run_files:
                file.unlink()
        for file, content in self.run_files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)


def fuzz_config(it: Specimens, random: Random) -> None:
    """A YAML file: it is a config that reads back from what it is written as."""
    valid = Config().model_dump(mode="json")
    text = yaml.safe_dump(valid).encode()
    content = flip(text, random) if random.random() < 0.4 else as_json(mutate(valid, random))
    path = it.folder / "fuzz.yaml"
    path.write_bytes(content)
    config = load_config(path)
    path.write_text(dump_config(config))
    assert load_config(path) == config


def fuzz_override(it: Specimens, random: Random) -> None:
    """A ``--set KEY=VALUE``."""
    keys = [
        "calib.num_samples",
        "compression.bytes",
        "model.path",
        "model",
        "profiling.removed_ratios",
        "output_dir",
        "",
    ]
    value = random.choice(HOSTILE)
    text = flip(as_json(value), random).decode(errors="replace") if random.random() < 0.5 else str(value)
    load_config(None, [f"{random.choice(keys)}={text}"])


def fuzz_plan(it: Specimens, random: Random) -> None:
    """A plan's file, and the model that is compressed by it: it works and gives finite numbers."""
    values = it.plan.to_dict()
    values["choices"] = dict(random.sample(list(values["choices"].items()), k=2))
    plan = Plan.from_dict(mutate(values, random), it.plan.calibration)
    assert it.run(rocket.compress(it.model, plan)).isfinite().all()


def fuzz_profile(it: Specimens, random: Random) -> None:
    """A profile, and the plan made from it and others: it is within its budget."""
    profiles = list(it.planner.profiles)
    chosen = random.randrange(len(profiles))
    profiles[chosen] = LayerProfile.from_dict(mutate(profiles[chosen].to_dict(), random), profiles[chosen].layer)
    plan = Planner(profiles, it.planner.size, it.profiling).at(removed_ratio=random.choice([0.1, 0.3, 0.5]))
    assert plan.kept_target_parameters <= (1 - plan.budget.value) * plan.size.target_parameters + 1


def fuzz_run(it: Specimens, random: Random) -> None:
    """A file of a run directory, and the pipeline on it. Where checksums were left alone, the plan is the same."""
    file = random.choice([file for file, content in it.run_files.items() if content])
    before = it.run_files[file]
    sealed = file.suffix == ".json" and "content" in json.loads(before) and random.random() < 0.7
    if sealed:
        artifact = json.loads(before)
        name = str(file.relative_to(it.folder / "run"))
        content = mutate(artifact["content"], random)
        try:
            changed = as_json(seal_json(name, artifact["fingerprint"], content))
        except (TypeError, ValueError):  # mixed keys, lone surrogates: nothing that a file can hold
            return
    elif file.suffix == ".json" and random.random() < 0.5:
        changed = as_json(mutate(json.loads(before), random))
    else:
        changed = flip(before, random)
    file.write_bytes(changed)
    try:
        with Session(load_config(it.config)) as session:
            summary = run_pipeline(session)
        assert sealed or summary.plan == it.summary.plan
    finally:
        it.restore_run()


def fuzz_quantization(it: Specimens, random: Random) -> None:
    """``quantization_config`` of a checkpoint that plain transformers opens: the model computes what it did."""
    file = it.checkpoint / "config.json"
    values = json.loads(file.read_bytes())
    values["quantization_config"] = {**mutate(values["quantization_config"], random), "quant_method": "rocket"}
    with it.changed(file, as_json(values)):
        assert torch.equal(it.run(AutoModelForCausalLM.from_pretrained(it.checkpoint)), it.logits)


def changed_json(before: bytes, random: Random) -> bytes:
    """JSON with some of its values changed, or, three times in ten, some of its bytes."""
    return flip(before, random) if random.random() < 0.3 else as_json(mutate(json.loads(before), random))


def fuzz_model_config(it: Specimens, random: Random) -> None:
    """All of config.json, opened as the commands open it."""
    file = it.checkpoint / "config.json"
    with it.changed(file, changed_json(file.read_bytes(), random)):
        model, _ = open_checkpoint(it.checkpoint, ModelConfig(dtype="float32", device="cpu"))
    it.run(model)


def fuzz_original(it: Specimens, random: Random) -> None:
    """config.json of a model that is to be compressed, opened as the commands open it."""
    file = it.folder / "model" / "config.json"
    with it.changed(file, changed_json(file.read_bytes(), random)):
        model, _ = rocket.models.load_model(ModelConfig(path=str(file.parent), dtype="float32", device="cpu"))
    assert model.num_parameters() > 0


def fuzz_header(it: Specimens, random: Random) -> None:
    """The header of a checkpoint's tensors: the model runs."""
    file = it.checkpoint / "model.safetensors"
    before = file.read_bytes()
    length = int.from_bytes(before[:8], "little")
    if random.random() < 0.4:
        content = flip(before[: 8 + length], random) + before[8 + length :]
    else:
        header = as_json(mutate(json.loads(before[8 : 8 + length]), random))
        content = len(header).to_bytes(8, "little") + header + before[8 + length :]
    with it.changed(file, content):
        it.run(AutoModelForCausalLM.from_pretrained(it.checkpoint))


def fuzz_tensors(it: Specimens, random: Random) -> None:
    """Any byte of a checkpoint's tensors: the model runs, by the kernels too."""
    file = it.checkpoint / "model.safetensors"
    with it.changed(file, flip(file.read_bytes(), random)):
        model = AutoModelForCausalLM.from_pretrained(it.checkpoint)
    it.run(rocket.optimize(model))


def fuzz_index(it: Specimens, random: Random) -> None:
    """The index of a checkpoint in several files: the model computes what it did."""
    file = it.shards / "model.safetensors.index.json"
    with it.changed(file, changed_json(file.read_bytes(), random)):
        model, _ = open_checkpoint(it.shards, ModelConfig(dtype="float32", device="cpu"))
    assert torch.equal(it.run(model), it.logits)


TARGETS: dict[str, Callable[[Specimens, Random], None]] = {
    name.removeprefix("fuzz_"): target for name, target in list(globals().items()) if name.startswith("fuzz_")
}


class Hang(BaseException):
    """An example took too long. No `except Exception` stops it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    others, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, others)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Allocations fail that would make the process larger by this many bytes, whether they are touched or not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory")


def try_one(target: Callable[[Specimens, Random], None], it: Specimens, random: Random) -> str:
    """``refused`` or ``accepted``; anything else that happens is raised."""
    try:
        with time_limit(SECONDS), memory_limit(MEMORY):
            target(it, random)
    except RocketError as error:
        message = str(error)
        if any(words in message for words in OUT_OF_MEMORY) or isinstance(error.__cause__, MemoryError):
            raise MemoryError(message) from error
        assert len(message) < 2000, f"a message of {len(message)} letters: {message[:200]}"
        assert "\n" not in message, message
        return "refused"
    return "accepted"


@dataclass
class Row:
    """What came of the examples of one target."""

    target: str
    examples: int = 0
    refused: int = 0
    accepted: int = 0
    tracebacks: int = 0
    hangs: int = 0
    peak_mb: float = 0.0


def fuzz(name: str, it: Specimens, examples: int, seed: int) -> Row:
    """Try some examples of a target; what goes wrong is printed with the number that repeats it."""
    row = Row(name)
    for number in range(seed, seed + examples):
        gc.collect(0)
        before = psutil.Process().memory_info().rss / 1e6
        row.examples += 1
        try:
            with measure() as usage:
                outcome = try_one(TARGETS[name], it, Random(f"{name}{number}"))
            setattr(row, outcome, getattr(row, outcome) + 1)
        except Hang as error:
            row.hangs += 1
            print(f"{name} --seed {number}: hang: {error}", flush=True)
        except Exception as error:
            row.tracebacks += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f"{name} --seed {number}: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"[:600],
                flush=True,
            )
        row.peak_mb = max(row.peak_mb, round(usage.peak_mb - before, 1))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="in total, over all targets alike")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0, help="number of the first example of each target")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        it = Specimens(Path(folder))
        rows = []
        for number, name in enumerate(arguments.targets):
            share = arguments.examples // len(arguments.targets)
            share += number < arguments.examples % len(arguments.targets)
            start = time.perf_counter()
            rows.append(vars(fuzz(name, it, share, arguments.seed)))
            print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    write_results("fuzz", rows)
    if any(row["tracebacks"] or row["hangs"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
