"""What was measured of the original and of a compressed model, side by side."""

from __future__ import annotations

import math

from rocket.evaluation import Evaluation


def measured_rows(original: Evaluation, compressed: Evaluation) -> list[tuple[str, str, str]]:
    """Rows of what was evaluated: name, original, compressed."""
    rows = [
        (f"perplexity, {text}", f"{value:.2f}", f"{compressed.perplexities[text]:.2f}")
        for text, value in original.perplexities.items()
    ]
    for source, compressed_scores in compressed.scores.items():
        before = {score.name: str(score) for score in original.scores.get(source, ())}
        after = {score.name: str(score) for score in compressed_scores}
        rows += [(f"{name}, {source}", before.get(name, ""), after.get(name, "")) for name in {**before, **after}]
    for task, result in original.accuracies.items():
        other = compressed.accuracies[task]
        rows.append(
            (
                f"{task} ({result['metric']}, {result['items']} items), %",
                f"{100 * result['accuracy']:.1f} ± {100 * result['stderr']:.1f}",
                f"{100 * other['accuracy']:.1f} ± {100 * other['stderr']:.1f}",
            )
        )
    return rows


def loss_increases(original: Evaluation, compressed: Evaluation) -> dict[str, float]:
    """By how much the loss rose on each text, in nats a token: the difference of the perplexities' logarithms.

    Perplexities that are not finite say nothing here and are left out.
    """
    before, after = _perplexities(original), _perplexities(compressed)
    return {text: math.log(after[text] / value) for text, value in before.items() if text in after}


def _perplexities(evaluation: Evaluation) -> dict[str, float]:
    scored = {
        source: score.value
        for source, scores in evaluation.scores.items()
        for score in scores
        if score.name == "perplexity"
    }
    return {text: value for text, value in {**evaluation.perplexities, **scored}.items() if math.isfinite(value)}
