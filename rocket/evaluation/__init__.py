"""What a compressed model still knows: perplexity on held-out text, zero-shot accuracy, error bars between models."""

from rocket.evaluation.packaged import packaged_tasks
from rocket.evaluation.perplexity import Perplexity, perplexity, window_losses_of
from rocket.evaluation.scores import Retained, TaskResult, chance_corrected_mean, paired_bootstrap
from rocket.evaluation.tasks import zero_shot

__all__ = [
    "Perplexity",
    "Retained",
    "TaskResult",
    "chance_corrected_mean",
    "packaged_tasks",
    "paired_bootstrap",
    "perplexity",
    "window_losses_of",
    "zero_shot",
]
