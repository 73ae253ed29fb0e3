"""All that knows lm-evaluation-harness's machinery: find tasks, wrap a model, keep it quiet.

`lm_eval` is imported inside the functions: it takes seconds, and `import rocket` must not.
"""

import contextlib
import copy
import difflib
import io
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from rocket.config.errors import RocketError
from rocket.evaluation.packaged import INSTALL, harness_folder, harness_group, packaged_tasks

# The harness sorts the requests it gets by length to pad little; this many batches at a time still do.
_BATCHES_A_STEP = 32


def load_tasks(names: Sequence[str], offline: bool | None) -> dict[str, dict[str, Any]]:
    """The harness's task objects by asked name and own name: {"piqa": {"piqa": task}, "mmlu": {"mmlu_anatomy": ...}}.

    offline as in `zero_shot`. Raises RocketError for unknown names and unreachable data.
    """
    remote, manager = _not_packaged(names, offline)
    return {name: _load_from_hub(manager, name) if name in remote else _load_packaged(name) for name in names}


def check_tasks(names: Sequence[str]) -> None:
    """Raise RocketError for names that are no tasks; quick where all are packaged."""
    _not_packaged(names, offline=None)


def _not_packaged(names: Sequence[str], offline: bool | None) -> tuple[list[str], Any]:
    """The names to be loaded from the hub, and the manager that does. Raises RocketError for what is no task."""
    packaged = [] if offline is False else packaged_tasks()
    remote = [name for name in names if name not in packaged]
    manager = _task_manager() if remote and not offline else None
    for name in remote:
        _check_known(name, manager.all_tasks if manager else [])
    return remote, manager


def language_model(model: Any, tokenizer: Any, batch_size: int, terminal: Console) -> Any:
    """The harness's wrapper of an in-memory model, with our progress bar in place of its own.

    Its attribute ``cut`` counts the requests by task of which the model could not read the beginning.
    """
    from lm_eval.models.huggingface import HFLM

    # A copy, because HFLM sets the padding token. fp32, because bfloat16 log-likelihoods tie, and the first wins.
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32")
    lm.cut = Counter()
    lm.loglikelihood = _with_progress(lm, _BATCHES_A_STEP * batch_size, terminal)
    return lm


@contextlib.contextmanager
def quiet() -> Iterator[Console]:
    """Hide what the harness and `datasets` log and draw; yields the terminal that they no longer reach."""
    import datasets

    terminal = Console(file=sys.stderr)
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield terminal
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def check_tokenizer(tokenizer: Any) -> None:
    """Raise RocketError for a tokenizer that the harness cannot use."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RocketError(
            "evaluation.tasks: the tokenizer has no token for the beginning or the end of a text, and "
            "lm-evaluation-harness needs one before each question; set its eos_token, or write []"
        )


def _is_cut(lm: Any, text: str) -> bool:
    """Whether the model cannot read all of a request; few are long enough in bytes to be tokenised for that."""
    longest: int = lm.max_length
    return len(text.encode()) > longest and len(lm.tok_encode(text)) > longest + 1


def _with_progress(lm: Any, step: int, terminal: Console) -> Callable[..., list[Any]]:
    run = lm.loglikelihood

    def loglikelihood(requests: list[Any], **_: Any) -> list[Any]:
        answers: list[Any] = []
        lm.cut.update(request.task_name for request in requests if _is_cut(lm, "".join(request.args)))
        with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
            bar = progress.add_task(f"zero-shot {requests[0].task_name}", total=len(requests))
            for start in range(0, len(requests), step):
                answers += run(requests[start : start + step], disable_tqdm=True)
                progress.update(bar, completed=len(answers))
        return answers

    return loglikelihood


def _check_known(name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    packaged = packaged_tasks()
    guesses = difflib.get_close_matches(name, [*packaged, *known], n=3)
    did_you_mean = f"did you mean {', '.join(dict.fromkeys(guesses))}? " if guesses else ""
    where = "in lm-evaluation-harness" if known else "with packaged data"
    raise RocketError(f"{name}: no such task {where}; {did_you_mean}{_packaged_hint(packaged)}")


def _load_from_hub(manager: Any, name: str) -> dict[str, Any]:
    try:
        return _load(manager, name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise RocketError(f"{name}: no data from the hub ({reason}); {_packaged_hint(packaged_tasks())}") from error


def _packaged_hint(packaged: Sequence[str]) -> str:
    return f"without network: {', '.join(packaged)}" if packaged else f"for tasks without network: {INSTALL}"


def _load_packaged(name: str) -> dict[str, Any]:
    return _load(_task_manager(harness_folder(name)), harness_group(name))


def _load(manager: Any, spec: str | dict[str, Any]) -> dict[str, Any]:
    if hasattr(manager, "load"):
        return dict(manager.load([spec])["tasks"])
    return _leaves(manager.load_task_or_group([spec]))  # lm_eval < 0.4.12


def _leaves(nested: dict[Any, Any]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        leaves.update(_leaves(value) if isinstance(value, dict) else {key: value})
    return leaves


def _task_manager(folder: str | None = None) -> Any:
    from lm_eval import tasks

    if folder is None:
        return tasks.TaskManager()
    return tasks.TaskManager(include_path=[str(Path(tasks.__file__).parent / folder)], include_defaults=False)
