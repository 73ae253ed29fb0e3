"""Which of transformers' classes opens a checkpoint, and which processor its model takes: told by the config alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto

from rocket.models.inputs import takes_media


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class whose ``from_pretrained`` gives the model that a config's ``architectures`` names.

    It is looked up in the mappings of all Auto classes; a class of transformers that is in none of them is the result
    itself. Where no architecture that transformers has is named, it is the model that writes text, if there is one of
    the config's kind, else the bare `AutoModel`.
    """
    wanted = (getattr(config, "architectures", None) or [""])[0]
    remote = getattr(config, "auto_map", None) or {}
    classes = _auto_classes()
    for name, target in remote.items():
        if name in classes and target.rpartition(".")[2] == wanted:
            return classes[name]
    for candidate in classes.values():
        if wanted in _architectures(candidate, config.model_type):
            return candidate
    if hasattr(transformers, wanted):
        return getattr(transformers, wanted)
    writers = (AutoModelForSeq2SeqLM, AutoModelForCausalLM)
    return next((writer for writer in writers if _architectures(writer, config.model_type)), AutoModel)


def _auto_classes() -> dict[str, Any]:
    """Every Auto class by name, those last whose mappings are mixtures; that for masked tokens has BART, for one."""
    names = [name for name in vars(modeling_auto) if name.startswith("AutoModelFor") and hasattr(transformers, name)]
    mixtures = ("AutoModelForPreTraining", "AutoModelForMultimodalLM", "AutoModelForTextEncoding")
    order = sorted(names, key=lambda name: (name in mixtures, "Seq2Seq" not in name))
    return {name: getattr(transformers, name) for name in ["AutoModel", *order]}


def _architectures(auto: Any, model_type: str) -> tuple[str, ...]:
    """The names of the classes that an Auto class has for a model type."""
    found = auto._model_mapping._model_mapping.get(model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def open_model(source: str, config: PretrainedConfig, **options: Any) -> Any:
    """The model of a checkpoint, by the Auto class that its config asks for."""
    return auto_class(config).from_pretrained(source, **options)


def empty_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The model that `open_model` would open, without weights: its tensors are on the device ``meta``."""
    kind = auto_class(config)
    with torch.device("meta"):
        if not hasattr(kind, "from_config"):
            return kind(config).to(dtype)
        trust = {"trust_remote_code": True} if trust_remote_code else {}
        return kind.from_config(config, dtype=dtype, **trust)


def open_processor(source: str, model: Any, **options: Any) -> Any:
    """What makes a model's inputs: its tokenizer if it reads text alone, else its (image, audio, joint) processor."""
    return (AutoProcessor if takes_media(model) else AutoTokenizer).from_pretrained(source, **options)
