"""How much of the loss that compression costs comes back by healing, on text of a domain that healing does not see.

    python -m benchmarks.healing --minutes 20 --set healing.seq_len=256 healing.learning_rate=4e-4
    python -m benchmarks.healing --removed 0.5 --tokens 20480 --run output/default --set healing.train=lora

The default config's model is compressed at each size, calibrated on presidential addresses, and healed on prose of many
kinds (`embedded:mixed`); the loss is measured on held-out addresses and on BoolQ's Wikipedia passages, of which neither
calibration nor healing sees any. Beside it the original is healed in the same way, all weights of its target layers
trained, so that what comes back can be told from mere adaptation to the text: by language modelling only, as it has
nothing to learn from itself.

``share_back`` is (before - after) / (before - original) in nats a token: the share of the lost loss that came back.
``against_healed`` is the same where the original may adapt as well: 1 would be as good as the healed original.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import harness
from rocket.compression import stored_values
from rocket.config import load_config
from rocket.data import load_documents
from rocket.evaluation import perplexity
from rocket.healing import Healing, fit, read_summary
from rocket.models import open_checkpoint
from rocket.models.processor import tokenizer_of
from rocket.pipeline import compress_model, heal_model, make_plan
from rocket.session import Session
from rocket.stages.material import healing_examples

CONFIG = Path(__file__).parents[1] / "rocket" / "config" / "default.yaml"
Losses = dict[str, float]


def measure(model: Any, processor: Any, args: argparse.Namespace) -> Losses:
    """Nats a token on the held-out part of each text."""
    return {
        source: perplexity(
            model,
            tokenizer_of(processor),
            load_documents(source, "held_out"),
            seq_len=args.eval_seq_len,
            max_tokens=args.max_tokens,
        ).loss
        for source in args.texts
    }


def healed_original(session: Session, args: argparse.Namespace) -> tuple[Losses, Losses, Healing]:
    """The original's losses, and those after training all weights of its target layers on the same text."""
    config, healing = session.config, session.config.healing
    assert healing is not None
    examples = healing_examples(session, healing)
    model, processor = session.loaded
    before = measure(model, processor, args)
    model.requires_grad_(False)
    for layer in session.layers.values():
        layer.weight.data = layer.weight.data.float()
        layer.weight.requires_grad_()
    alone = healing.model_copy(update={"objective": "language_modelling"})
    with tempfile.TemporaryDirectory() as scratch:
        took = fit(model, processor, None, config.model, alone, examples, Path(scratch))
    after = measure(model.to(getattr(torch, config.model.dtype)), processor, args)
    session.release_model()
    return before, after, took


def masks_equal(before: Path, after: Path) -> bool:
    """Whether two checkpoints store values at the same places, bit by bit."""
    with safe_open(before / "model.safetensors", "pt") as old, safe_open(after / "model.safetensors", "pt") as new:
        masks = [name for name in old.keys() if name.endswith(".mask")]  # noqa: SIM118 (no mapping)
        return bool(masks) and all(torch.equal(old.get_tensor(name), new.get_tensor(name)) for name in masks)


def healed_size(
    session: Session, args: argparse.Namespace, original: Losses, original_healed: Losses
) -> list[dict[str, Any]]:
    plan, compressed = make_plan(session), compress_model(session)
    healed = heal_model(session)
    took, model = read_summary(healed), session.config.model
    before, after = (measure(*open_checkpoint(path, model), args) for path in (compressed, healed))
    values = [stored_values(path, plan.choices) for path in (compressed, healed)]
    healing = session.config.healing
    assert healing is not None
    return [
        {
            "method": f"{healing.objective}, {healing.train}",
            "removed_ratio": plan.removed_ratio,
            "text": text,
            "perplexity_before": math.exp(before[text]),
            "perplexity": math.exp(after[text]),
            "original_perplexity": math.exp(original[text]),
            "original_healed_perplexity": math.exp(original_healed[text]),
            "share_back": (before[text] - after[text]) / (before[text] - original[text]),
            "against_healed": (before[text] - after[text]) / (before[text] - original_healed[text]),
            "objective": healing.objective,
            "tokens": took.tokens,
            "seconds": took.seconds,
            "steps": took.steps,
            "stored_values_before": values[0],
            "stored_values": values[1],
            "masks_equal": masks_equal(compressed, healed),
        }
        for text in args.texts
    ]


def original_rows(original: Losses, healed: Losses, took: Healing) -> list[dict[str, Any]]:
    return [
        {
            "method": "original, healed",
            "removed_ratio": 0.0,
            "text": text,
            "perplexity_before": math.exp(original[text]),
            "perplexity": math.exp(healed[text]),
            "original_perplexity": math.exp(original[text]),
            "objective": "language_modelling",
            "tokens": took.tokens,
            "seconds": took.seconds,
            "steps": took.steps,
        }
        for text in original
    ]


def earlier_rows(name: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a results file, and the commands that made them."""
    earlier = json.loads((harness.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return earlier["rows"], earlier["command"]


def losses_of_original(rows: Sequence[dict[str, Any]]) -> tuple[Losses, Losses]:
    """The original's losses before and after its healing, from rows that tell them; empty if none does."""
    of_original = [row for row in rows if row["removed_ratio"] == 0.0]
    before, after = (
        {row["text"]: math.log(row[field]) for row in of_original} for field in ("perplexity_before", "perplexity")
    )
    return before, after


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.4, 0.5])
    parser.add_argument("--minutes", type=float, help="for each healing")
    parser.add_argument("--tokens", type=int, help="for each healing, beside or instead of --minutes")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--run", type=Path, help="the run directory to use again; a temporary one by default")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--texts", nargs="+", default=["embedded", "embedded:boolq"])
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=24576, help="of each text")
    parser.add_argument("--output", default="healing", help="name of the results file")
    parser.add_argument("--add", action="store_true", help="to that file, whose original is not healed again")
    args = parser.parse_args(arguments)
    limits = {"minutes": args.minutes, "tokens": args.tokens}
    given = [f"healing.{name}={value}" for name, value in limits.items() if value is not None]
    rows, commands = earlier_rows(args.output) if args.add else ([], "")
    original, original_healed = losses_of_original(rows)
    with tempfile.TemporaryDirectory() as temporary:
        overrides = [f"output_dir={args.run or temporary + '/run'}", *given, *args.set]
        for ratio in args.removed:
            with Session(load_config(args.config, [*overrides, f"compression.removed_ratio={ratio}"])) as session:
                if not original:
                    original, original_healed, took = healed_original(session, args)
                    rows += original_rows(original, original_healed, took)
                measured = healed_size(session, args, original, original_healed)
            rows = [row for row in rows if row["removed_ratio"] != measured[0]["removed_ratio"]] + measured
            # after each size: an interrupted run keeps what it measured
            harness.write_results(args.output, rows, commands)


if __name__ == "__main__":
    main()
