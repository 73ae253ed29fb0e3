"""ROCKET: training-free compression of large transformers (arXiv 2602.11008).

    planner = rocket.plan(model, calibration=texts, tokenizer=tokenizer)
    small = rocket.compress(model, planner.at(removed_ratio=0.3))
    small.save_pretrained(path)
    small.optimize()

Importing rocket registers its checkpoint format with transformers, so that ``from_pretrained`` opens compressed models.
"""

from typing import TYPE_CHECKING, Any

from rocket.config.errors import RocketError
from rocket.nn import RocketConfig, explain, optimize

if TYPE_CHECKING:
    from rocket.allocation import Plan, Planner
    from rocket.api import plan
    from rocket.compression.checkpoint import merge
    from rocket.compression.compress import compress

__version__ = "0.1.0"
__all__ = ["Plan", "Planner", "RocketConfig", "RocketError", "compress", "explain", "merge", "optimize", "plan"]

_LAZY = {
    "Plan": "rocket.allocation",
    "Planner": "rocket.allocation",
    "compress": "rocket.compression",
    "merge": "rocket.compression",
    "plan": "rocket.api",
}


def __getattr__(name: str) -> Any:
    """Import what is needed only when it is: opening a checkpoint needs neither calibration nor evaluation."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rocket' has no attribute {name!r}")
