"""What a compressed model still knows: perplexity, zero-shot accuracy, what fits other media; error bars."""

from rocket.evaluation.evaluate import TASK_BATCH, Evaluation, evaluate
from rocket.evaluation.features import FeatureAgreement, agreement, class_accuracy, features_of_model
from rocket.evaluation.harness import check_tasks, check_tokenizer
from rocket.evaluation.metrics import Score
from rocket.evaluation.packaged import packaged_tasks
from rocket.evaluation.perplexity import Perplexity, perplexity, window_losses_of
from rocket.evaluation.scores import Retained, TaskResult, chance_corrected_mean, paired_bootstrap
from rocket.evaluation.tasks import zero_shot

__all__ = [
    "TASK_BATCH",
    "Evaluation",
    "FeatureAgreement",
    "Perplexity",
    "Retained",
    "Score",
    "TaskResult",
    "agreement",
    "chance_corrected_mean",
    "check_tasks",
    "check_tokenizer",
    "class_accuracy",
    "evaluate",
    "features_of_model",
    "packaged_tasks",
    "paired_bootstrap",
    "perplexity",
    "window_losses_of",
    "zero_shot",
]
