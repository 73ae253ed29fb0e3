"""What models of images and of speech keep: their configs run at several sizes, original beside compressed.

    python -m benchmarks.media                                  # dinov2 and whisper at 20, 30 and 40 %
    python -m benchmarks.media --configs dinov2 --sizes 0.3 --set profiling.cost=activation

A row is a score of `rocket.evaluation.metrics` on a source, of the original (``removed_ratio`` 0) or of a size, with
its 95 % interval over the images or clips where it has one. Calibration and evaluation samples are of different
recordings and photographs (`rocket.data.sources.images`, `.backgrounds`, `.speech`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import write_results
from rocket.config import load_config
from rocket.evaluation import Evaluation
from rocket.pipeline import run_pipeline
from rocket.session import Session

CONFIGS = Path(__file__).parents[1] / "rocket" / "config"


def rows_of(config: str, removed_ratio: float, forms: str, evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "config": config,
            "removed_ratio": removed_ratio,
            "forms": forms,
            "source": source,
            "score": score.name,
            "value": score.value,
            "low": score.low,
            "high": score.high,
        }
        for source, scores in evaluation.scores.items()
        for score in scores
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["dinov2", "whisper"], help="files of rocket/config")
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.2, 0.3, 0.4])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the configs")
    parser.add_argument("--output", default="media", help="name of the results file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.configs:
        with tempfile.TemporaryDirectory() as directory:
            for size in args.sizes:
                overrides = [f"output_dir={directory}/run", f"compression.removed_ratio={size}", *args.set]
                with Session(load_config(CONFIGS / f"{name}.yaml", overrides)) as session:
                    summary = run_pipeline(session)
                if size == args.sizes[0]:
                    rows += rows_of(name, 0.0, "dense", summary.original)
                forms = "+".join(sorted(form for form in summary.plan.forms() if form != "dense"))
                rows += rows_of(name, summary.plan.removed_ratio, forms, summary.compressed)
        write_results(args.output, rows)


if __name__ == "__main__":
    main()
