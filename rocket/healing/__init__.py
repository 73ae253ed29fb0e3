"""Fine-tuning of a compressed model with its sparsity kept."""

from rocket.healing.heal import Examples, Healing, heal
from rocket.healing.objective import distillation, language_modelling

__all__ = ["Examples", "Healing", "distillation", "heal", "language_modelling"]
