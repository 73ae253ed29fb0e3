"""A checkpoint written again as transformers has it once it is loaded, so that its blocks can be read one at a time.

Weights are mapped from files only where the files hold what the model has: not where they are of another type, nor
where transformers stacks experts while loading. transformers itself converts, a tensor at a time, and keeps on disk.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig

from rocket.config.errors import RocketError, first_line
from rocket.config.schema import ModelConfig
from rocket.models.auto import empty_model
from rocket.models.load import locate, open_weights
from rocket.models.residence import SMALL, releasing_files
from rocket.models.stored import read_headers
from rocket.models.structure import find_blocks

STORED_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
WEIGHTS = "model*.safetensors"  # other files beside them may hold the same in other formats
SHARD_BYTES = 500_000_000


def unlike_model(config: ModelConfig) -> str | None:
    """The name of a large tensor of a block that its checkpoint does not hold as the model has it; None if none is.

    By the headers of the files alone; those of a model on the hub are downloaded.
    """
    source = locate(config.path).source
    files = sorted(_directory(config, source).glob(WEIGHTS))
    stored = read_headers(files)
    wanted = STORED_TYPES[config.dtype]
    mappable = {_below_list(key) for key, tensor in stored.items() if tensor.dtype == wanted}
    for block, module in find_blocks(_empty(config, source)).items():
        for name, tensor in module.named_parameters(prefix=block):
            if tensor.numel() >= SMALL and _below_list(name) not in mappable:
                return name
    return None


def rewrite(config: ModelConfig, directory: Path) -> None:
    """Write config.json and the weights of a model into ``directory``, in its own type and under its own names.

    Memory: a converted tensor (all experts of a block) and a shard. Disk, until it is done: the converted tensors once
    more, beside ``directory``.
    """
    source = locate(config.path).source
    places = dict(_places(_empty(config, source)))
    folder = tempfile.TemporaryDirectory(dir=directory.parent, prefix=f"{directory.name}.", suffix=".tmp")
    with releasing_files(), folder as converted:
        model = open_weights(
            config.path,
            source,
            dtype=getattr(torch, config.dtype),
            device_map=places,
            offload_folder=converted,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
        as_loaded = {"save_original_format": False} if int(transformers.__version__.partition(".")[0]) >= 5 else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(directory, max_shard_size=SHARD_BYTES, **as_loaded)


def _places(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Where each part of a model goes, by name: blocks to disk, what is beside them to memory."""
    blocks = find_blocks(model)
    around = {""}
    for name in blocks:
        while name := name.rpartition(".")[0]:
            around.add(name)
    for name in around:
        module = model.get_submodule(name)
        for part, _ in (*module.named_children(), *module.named_parameters(recurse=False)):
            whole = f"{name}.{part}".lstrip(".")
            if whole not in around:
                yield whole, "disk" if whole in blocks else "cpu"


def _directory(config: ModelConfig, source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=config.revision, allow_patterns=[WEIGHTS, "*.json"]))
    except (OSError, ValueError) as error:
        raise RocketError(f"model.path={config.path!r} cannot be downloaded: {first_line(error)}") from error


def _empty(config: ModelConfig, source: str) -> nn.Module:
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    architecture = AutoConfig.from_pretrained(source, **options)
    model: nn.Module = empty_model(architecture, getattr(torch, config.dtype), config.trust_remote_code)
    return model


def _below_list(name: str) -> str:
    """A tensor's name from the first number on, as what is before it may differ between a checkpoint and its model."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[max(number - 1, 0) :])
