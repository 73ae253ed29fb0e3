"""What a compressed model still knows: perplexity, zero-shot accuracy, what fits other media; error bars."""

from rocket.evaluation.features import FeatureAgreement, agreement, class_accuracy, features_of_model
from rocket.evaluation.metrics import Score, Subject, fitting_metrics
from rocket.evaluation.packaged import packaged_tasks
from rocket.evaluation.perplexity import Perplexity, perplexity, spread_windows, window_losses_of
from rocket.evaluation.scores import Retained, TaskResult, chance_corrected_mean, paired_bootstrap
from rocket.evaluation.tasks import zero_shot

__all__ = [
    "FeatureAgreement",
    "Perplexity",
    "Retained",
    "Score",
    "Subject",
    "TaskResult",
    "agreement",
    "chance_corrected_mean",
    "class_accuracy",
    "features_of_model",
    "fitting_metrics",
    "packaged_tasks",
    "paired_bootstrap",
    "perplexity",
    "spread_windows",
    "window_losses_of",
    "zero_shot",
]
