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
from transformers.utils import cached_file

from rocket.config.errors import RocketError, first_line
from rocket.config.schema import ModelConfig
from rocket.models.load import locate, open_empty, open_weights
from rocket.models.residence import SMALL, releasing_files
from rocket.models.stored import INDEX, indexed_files, read_headers
from rocket.models.structure import find_blocks

STORED_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SINGLE = "model.safetensors"
SHARD_BYTES = 500_000_000


def unlike_model(config: ModelConfig) -> str | None:
    """The name of a large tensor of a block that its checkpoint does not hold as the model has it; None if none is.

    By the headers of the files alone; those of a model on the hub are downloaded.
    """
    wanted = STORED_TYPES[config.dtype]
    stored = read_headers(_weight_files(config)).items()
    mappable = {(_below_list(key), tensor.shape) for key, tensor in stored if tensor.dtype == wanted}
    for block, module in find_blocks(open_empty(config)).items():
        for name, tensor in module.named_parameters(prefix=block):
            if tensor.numel() >= SMALL and (_below_list(name), tuple(tensor.shape)) not in mappable:
                return name
    return None


def rewrite(config: ModelConfig, directory: Path) -> None:
    """Write config.json and the weights of a model into ``directory``, in its own type and under its own names.

    Memory: what is outside of the blocks, a shard, and the largest tensor that is converted (all experts of a block)
    twice. Disk, until it is done: the converted tensors once more, beside ``directory``.
    """
    source = locate(config.path).source
    places = dict(_places(open_empty(config)))
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
            try:
                model.save_pretrained(directory, max_shard_size=SHARD_BYTES, **as_loaded)
            except KeyError as error:  # transformers 4 with a buffer of the model itself, as BART has
                raise RocketError(
                    f"transformers {transformers.__version__} cannot write {error} of a model whose blocks are on "
                    "disk; use transformers 5"
                ) from error


def _places(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Where each part of a model goes, by name: blocks to disk, what is beside them to memory."""
    blocks = find_blocks(model)
    around = {""}
    for name in blocks:
        while name := name.rpartition(".")[0]:
            around.add(name)
    for name in around:
        module = model.get_submodule(name)
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for part, _ in (*module.named_children(), *own):
            whole = f"{name}.{part}".lstrip(".")
            if whole not in around:
                yield whole, "disk" if whole in blocks else "cpu"


def _weight_files(config: ModelConfig) -> list[Path]:
    """The files that hold the model, there on disk; none where it comes in other files than safetensors."""
    source = locate(config.path).source

    def find(name: str) -> Path | None:
        missing = {"_raise_exceptions_for_missing_entries": False}
        found = cached_file(source, name, revision=config.revision, **missing)
        return None if found is None else Path(found)

    try:
        index = find(INDEX)
        if index is None:
            return [file for file in [find(SINGLE)] if file is not None]
        files = indexed_files(index)
        if Path(source).is_dir():
            return files
        names = [str(file.relative_to(index.parent)) for file in files]
        directory = Path(snapshot_download(source, revision=config.revision, allow_patterns=names))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RocketError(f"the weights of model.path={config.path!r} cannot be found: {first_line(error)}") from error
    return [directory / name for name in names]


def _below_list(name: str) -> str:
    """A tensor's name from the first number on, as what is before it may differ between a checkpoint and its model."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[max(number - 1, 0) :])
