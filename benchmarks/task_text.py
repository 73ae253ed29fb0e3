"""Text like that of the zero-shot tasks, to calibrate on: what a matched domain keeps of the accuracy.

    python -m benchmarks.task_text tasks.jsonl
    python -m benchmarks.quality --calibration tasks.jsonl --methods rocket --sizes 0.5 --tasks piqa ... --limit 500

Writes items of each task, question and right answer, one document an item; none that `benchmarks.quality` measures with
the same ``--limit``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rocket.evaluation.harness import load_tasks, quiet
from rocket.evaluation.tasks import evenly_spaced


def item_text(task: Any, document: Any) -> str:
    """An item as the task asks it, with the right answer."""
    question, target = task.doc_to_text(document), task.doc_to_target(document)
    if task.config.doc_to_choice is None:
        return f"{question}{task.config.target_delimiter}{target}".replace("  ", " ")
    return f"{question}{task.config.target_delimiter}{task.doc_to_choice(document)[target]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a .jsonl file")
    parser.add_argument("--tasks", nargs="+", default=["piqa", "arc_easy", "lambada_openai"])
    parser.add_argument("--limit", type=int, default=500, help="items of each task that are measured: left out")
    parser.add_argument("--items", type=int, default=1300, help="items of each task")
    args = parser.parse_args()
    with quiet():
        tasks = [task for group in load_tasks(args.tasks, None).values() for task in group.values()]
    with args.output.open("w", encoding="utf-8") as file:
        for task in tasks:
            measured = set(evenly_spaced({"": len(task.eval_docs)}, args.limit)[""])
            others = [document for number, document in enumerate(task.eval_docs) if number not in measured]
            for document in others[: args.items]:
                file.write(json.dumps({"text": item_text(task, document)}) + "\n")


if __name__ == "__main__":
    main()
