"""What was measured of the original and of a compressed model, side by side."""

from __future__ import annotations

import math

from rocket.evaluation import Evaluation


def measured_rows(original: Evaluation, *smaller: Evaluation) -> list[tuple[str, ...]]:
    """Rows of what was evaluated: its name, the original's value, those of the smaller models."""
    all_of_them = (original, *smaller)
    rows = [
        (f"perplexity, {text}", *(f"{evaluation.perplexities[text]:.2f}" for evaluation in all_of_them))
        for text in original.perplexities
    ]
    for source in dict.fromkeys(source for evaluation in smaller for source in evaluation.scores):
        scores = [{score.name: str(score) for score in evaluation.scores.get(source, ())} for evaluation in all_of_them]
        names = dict.fromkeys(name for values in scores for name in values)
        rows += [(f"{name}, {source}", *(values.get(name, "") for values in scores)) for name in names]
    for task, result in original.accuracies.items():
        results = [evaluation.accuracies[task] for evaluation in all_of_them]
        accuracies = (f"{100 * result.accuracy:.1f} ± {100 * result.stderr:.1f}" for result in results)
        rows.append((f"{task} ({result.metric}, {result.items} items), %", *accuracies))
    return rows


def loss_increases(original: Evaluation, compressed: Evaluation) -> dict[str, float]:
    """By how much the loss rose on each text, in nats a token: the difference of the perplexities' logarithms.

    Perplexities that are not finite, or not positive, say nothing here and are left out.
    """
    before, after = _perplexities(original), _perplexities(compressed)
    return {text: math.log(after[text]) - math.log(value) for text, value in before.items() if text in after}


def _perplexities(evaluation: Evaluation) -> dict[str, float]:
    scored = {
        source: score.value
        for source, scores in evaluation.scores.items()
        for score in scores
        if score.name == "perplexity"
    }
    return {text: value for text, value in {**evaluation.perplexities, **scored}.items() if 0.0 < value < math.inf}
