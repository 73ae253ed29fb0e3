"""Fine-tuning of a compressed model with its sparsity kept."""

from rocket.healing.heal import Examples, Healing, fit, heal, read_summary
from rocket.healing.objective import distillation, language_modelling

__all__ = ["Examples", "Healing", "distillation", "fit", "heal", "language_modelling", "read_summary"]
