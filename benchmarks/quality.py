"""Perplexity and zero-shot accuracy of every method at the same calibration data, tokens and stored values.

    python -m benchmarks.quality                                   # svd-llm, paper, rocket at 20 %, one seed
    python -m benchmarks.quality --sizes 0.2 0.3 0.4 0.5 --seeds 0 1 2 --methods all --tasks piqa arc_easy --limit 500
    python -m benchmarks.quality --methods rocket-sparse --calibration embedded embedded:mixed --samples 8 32 128

Every method gets the Gram matrices of the same calibration sequences. A method's layers are multiplied out and put in
the model's place for the measurement, so that all run through the same products. Text of the calibration domain is held
out by document; BoolQ's Wikipedia passages are a domain that no method saw. Choices in the product (importance
exponent, refits, ADMM's schedule) were made on layer errors of calibration data; the shrinkage of correlations and
the tempering of sensitivities on the loss at 40 and 50 % removed on calibration documents set apart and on the
descriptions of installed Python packages; none on these texts.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import write_results
from benchmarks.methods import METHODS, Bench, swapped
from rocket.config.schema import ModelConfig
from rocket.data import load_documents
from rocket.evaluation import chance_corrected_mean, paired_bootstrap, perplexity, zero_shot
from rocket.models import load_model


def measure_texts(bench: Bench, args: argparse.Namespace) -> dict[str, float]:
    """Mean loss (nats a token) on each evaluation text."""
    losses = {}
    for source in args.texts:
        documents = load_documents(source, "held_out")
        result = perplexity(bench.model, bench.tokenizer, documents, seq_len=1024, max_tokens=args.max_tokens)
        losses[source] = result.loss
    return losses


def text_rows(
    common: Mapping[str, Any], dense: Mapping[str, float], losses: Mapping[str, float]
) -> list[dict[str, Any]]:
    return [
        {
            **common,
            "text": text,
            "perplexity": math.exp(loss),
            "dense_perplexity": math.exp(dense[text]),
            "excess_loss": loss - dense[text],
        }
        for text, loss in losses.items()
    ]


def task_rows(common: Mapping[str, Any], dense: Mapping[str, Any], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {
            **common,
            "task": task,
            "metric": result.metric,
            "accuracy": result.accuracy,
            "dense_accuracy": dense[task].accuracy,
            "items": result.items,
        }
        for task, result in results.items()
    ]
    retained = paired_bootstrap(list(dense.values()), list(results.values()))
    rows.append(
        {
            **common,
            "task": "chance-corrected mean",
            "accuracy": chance_corrected_mean(results.values()),
            "dense_accuracy": chance_corrected_mean(dense.values()),
            "items": sum(result.items for result in results.values()),
            "retained": retained.ratio,
            "retained_low": retained.low,
            "retained_high": retained.high,
        }
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--methods", nargs="+", default=["svd-llm", "paper", "rocket"], help=f"all (but cospadi), or: {list(METHODS)}"
    )
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="calibration seeds")
    parser.add_argument("--calibration", nargs="+", default=["embedded"], help="sources of calibration text")
    parser.add_argument("--samples", nargs="+", type=int, default=[128], help="windows to calibrate on")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sensitivity-samples", type=int, default=16)
    parser.add_argument("--search-samples", type=int, default=64, help="further windows, which searches score by")
    parser.add_argument("--evopress-samples", type=int, default=4, help="of them, that each candidate is scored by")
    parser.add_argument("--search-sizes", nargs="*", type=float, default=[0.5], help="sizes for evopress")
    parser.add_argument("--evaluations", type=int, default=100, help="candidate evaluations of a search")
    parser.add_argument(
        "--measure", nargs="*", type=float, default=[], help="at most two sizes that correct rocket's prices"
    )
    parser.add_argument(
        "--level-step", type=int, default=3, help="paper-strs, paper-learned: every n-th size of a layer"
    )
    parser.add_argument("--strs-samples", type=int, default=2, help="windows of each of paper-strs's many evaluations")
    parser.add_argument("--learning-steps", type=int, default=60, help="gradient steps of paper-learned")
    parser.add_argument("--cospadi-iterations", type=int, default=60)
    parser.add_argument("--texts", nargs="+", default=["embedded", "embedded:boolq"])
    parser.add_argument("--max-tokens", type=int, default=65536, help="of each text")
    parser.add_argument("--tasks", nargs="*", default=[], help="zero-shot tasks, for the methods in --task-methods")
    parser.add_argument("--task-methods", nargs="*", default=["rocket"])
    parser.add_argument("--task-sizes", nargs="*", type=float, default=[0.3, 0.5])
    parser.add_argument("--limit", type=int, default=500, help="items a task")
    parser.add_argument("--output", default="quality", help="name of the results file")
    args = parser.parse_args()
    methods = [name for name in METHODS if name != "cospadi"] if args.methods == ["all"] else args.methods
    model, tokenizer = load_model(ModelConfig(path=args.model, dtype=args.dtype))
    rows: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    dense_tasks: dict[str, Any] = {}
    for seed, source, samples in itertools.product(args.seeds, args.calibration, args.samples):
        bench = Bench(args, model, tokenizer, seed, source, samples)
        if not dense:
            dense = measure_texts(bench, args)
            if args.tasks:
                dense_tasks = zero_shot(model, tokenizer, args.tasks, limit=args.limit, batch_size=32)
        for method in methods:
            for size in args.search_sizes if method.startswith("evopress") else args.sizes:
                result = METHODS[method](bench, size)
                common = {
                    "method": method,
                    "forms": result.forms,
                    "target_removed_ratio": size,
                    "removed_ratio": result.removed_ratio,
                    "bytes_removed_ratio": result.bytes_removed_ratio,
                    "predicted_excess_loss": result.predicted if method.startswith("rocket") else None,
                    "corrected_excess_loss": result.corrected,
                    "calibration": source,
                    "calibration_tokens": samples * args.seq_len,
                    "seed": seed,
                }
                with swapped(bench.layers, result.weights):
                    losses = measure_texts(bench, args)
                    rows += text_rows(common, dense, losses)
                    wanted = method in args.task_methods and size in args.task_sizes and seed == args.seeds[0]
                    if dense_tasks and wanted:
                        results = zero_shot(model, tokenizer, args.tasks, limit=args.limit, batch_size=32)
                        rows += task_rows(common, dense_tasks, results)
                excess = {text: round(loss - dense[text], 4) for text, loss in losses.items()}
                print(seed, source, samples, method, size, excess, flush=True)
            write_results(args.output, rows)  # after each method: an interrupted run keeps what it measured


if __name__ == "__main__":
    main()
