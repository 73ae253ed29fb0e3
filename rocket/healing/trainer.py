"""transformers' Trainer with healing's objectives and pace."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from rocket.config.errors import RocketError
from rocket.config.schema import HealingConfig, ModelConfig
from rocket.data import Sample
from rocket.healing.objective import distillation, language_modelling
from rocket.models import Batch, resolve_device, run_forward, sample_batches, token_batches

Examples: TypeAlias = "Tensor | Sequence[Sample]"
"""What is healed on: windows of tokens [n, seq_len], or samples of images or speech."""

UNLIMITED_STEPS = 10**9

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Healing:
    """What healing took. ``tokens`` counts those of windows, None for samples; ``loss`` is the mean of all steps."""

    steps: int
    tokens: int | None
    seconds: float
    parameters: int
    loss: float


def fit(
    model: PreTrainedModel,
    processor: Any,
    original: PreTrainedModel | None,
    loading: ModelConfig,
    healing: HealingConfig,
    examples: Examples,
    scratch: Path,
    processes: int = 1,
) -> Healing:
    """Train what requires a gradient in ``model``, in place; this process is one of ``processes``.

    Products are computed in ``loading.dtype``, whatever type the trained parameters have. ``original`` is what
    distillation follows, None for language modelling. Leaves the Trainer's checkpoints in ``scratch``, and goes on from
    one that is there. Raises RocketError if the loss is no number any more.
    """
    torch.manual_seed(healing.seed)
    cpu = resolve_device(loading.device).type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=healing.batch_size,
        gradient_accumulation_steps=healing.gradient_accumulation,
        learning_rate=healing.learning_rate,
        max_steps=UNLIMITED_STEPS,
        bf16=loading.dtype == "bfloat16",
        fp16=loading.dtype == "float16",
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and processes > 1 else None,
        ddp_find_unused_parameters=True,  # experts may get no token, under gradient checkpointing as well
        adam_beta2=0.95,
        logging_steps=10,
        save_steps=healing.save_steps,
        save_total_limit=1,
        seed=healing.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    a_step = healing.batch_size * healing.gradient_accumulation * processes
    tokens_a_step = a_step * examples.shape[1] if isinstance(examples, Tensor) else None
    if healing.tokens is not None and tokens_a_step is not None:
        arguments.max_steps = math.ceil(healing.tokens / tokens_a_step)
    if healing.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if original is not None:
        original.to(arguments.device)
    pace = Pace(None if healing.minutes is None else 60 * healing.minutes, arguments.max_steps)
    use_cache = vars(model.config).get("use_cache")
    trainer = HealingTrainer(model, processor, original, healing, arguments, examples, pace)
    trainer.train(resume_from_checkpoint=last_checkpoint(scratch))
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes autocast off its forward again
    _set_use_cache(model.config, use_cache)
    steps = trainer.state.global_step
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tokens = tokens_a_step and steps * tokens_a_step
    return Healing(steps, tokens, pace.seconds, parameters, pace.loss_sum / steps)


def _set_use_cache(config: Any, value: bool | None) -> None:
    """As it was before the Trainer turned it off for good, also in configs that know of none: it is saved with them."""
    vars(config).pop("use_cache", None)
    if value is not None:
        config.use_cache = value


def last_checkpoint(scratch: Path) -> str | None:
    """The newest of the Trainer's checkpoints that is complete: its state is written last."""
    complete = [path.parent for path in scratch.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def share_of_rate(done: float, warmup: float) -> float:
    """What of the learning rate is used when a share of the training is done: up during the warmup, then down to 0.

    >>> [share_of_rate(done, warmup=0.2) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if done < warmup:
        return done / warmup
    return max(0.0, 1.0 - done) / (1.0 - warmup)


class Pace(TrainerCallback, ExportableState):  # type: ignore[misc]
    """How far healing has come, by steps and by time, whichever is nearer to its end; stops it there.

    ``loss_sum`` is the sum of the losses of all steps, those of earlier attempts included.
    """

    def __init__(self, limit: float | None, max_steps: int) -> None:
        self.limit = limit
        self.max_steps = max_steps
        self.share_of_time = 0.0
        self.loss_sum = 0.0
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Time spent, that of earlier attempts included."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def share(self, step: float) -> float:
        """0 at the beginning, 1 at the end."""
        return max(step / self.max_steps, self.share_of_time)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds, "loss_sum": self.loss_sum}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks["Pace"]["attributes"]
        self._before, self.loss_sum = saved["seconds"], saved["loss_sum"]
        self._started = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All processes go by the first one's clock: they must agree on the learning rate and on when to stop."""
        if self.limit is not None:
            self.share_of_time = broadcast_object_list([self.seconds / self.limit])[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.share_of_time >= 1.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            done = 100 * min(1.0, self.share(state.global_step))
            logger.info("healing: %.0f %%, step %d, loss %.4f", done, state.global_step, logs["loss"])


class HealingTrainer(Trainer):  # type: ignore[misc]
    """The Trainer with healing's objective, and a learning rate that follows its pace."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        original: PreTrainedModel | None,
        settings: HealingConfig,
        arguments: Any,
        examples: Examples,
        pace: Pace,
    ) -> None:
        self.original, self.settings, self.pace = original, settings, pace

        def collate(items: Sequence[Any]) -> Batch:
            if isinstance(examples, Tensor):
                return token_batches(model, torch.stack(list(items)), len(items))[0]
            return sample_batches(model, processor, items, len(items))[0]

        super().__init__(model, arguments, collate, list(examples), callbacks=[pace])
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the objectives are means: let the Trainer divide by the accumulation

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate of each step is that of its middle, so that neither the first nor the last is zero."""

        def share(step: int) -> float:
            return share_of_rate(self.pace.share(step + 0.5), self.settings.warmup)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = run_forward(self.model, inputs, through=model)
        if self.original is None:
            return language_modelling(self.model, output, inputs)
        with torch.no_grad():
            wanted = run_forward(self.original, inputs)
        return distillation(self.model, output, wanted, inputs, self.settings.temperature)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise RocketError("healing diverged: the loss is no number any more; lower healing.learning_rate")
        self.pace.loss_sum += float(self.accelerator.reduce(loss, "mean"))
        return loss
