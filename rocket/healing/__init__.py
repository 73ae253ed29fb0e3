"""Fine-tuning of a compressed model with its sparsity kept."""

from rocket.healing.heal import heal, read_summary
from rocket.healing.objective import distillation, language_modelling
from rocket.healing.trainer import Examples, Healing, fit

__all__ = ["Examples", "Healing", "distillation", "fit", "heal", "language_modelling", "read_summary"]
