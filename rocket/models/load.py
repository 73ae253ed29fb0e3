"""From what a user calls a model to the model, its processor, and a fingerprint of both."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from rocket.config.errors import RocketError, first_line
from rocket.config.schema import ModelConfig
from rocket.models.auto import empty_model, open_model, open_processor
from rocket.models.embedded import EmbeddedModel, find_embedded
from rocket.models.residence import stream, unmapped
from rocket.models.stored import INDEX, check_config_file, indexed_files
from rocket.models.structure import find_blocks

READ_WHOLE = 1 << 26
SAMPLE_EVERY, SAMPLED_BYTES = 1 << 22, 1 << 14

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Location:
    """Where a model is: a hub id or directory; the one file in it that holds the model, if one does (GGUF); the package
    that ships it."""

    source: str
    file: str | None = None
    embedded: EmbeddedModel | None = None


def load_model(
    config: ModelConfig, streams: bool = False, states: Path | None = None, rewritten: Path | None = None
) -> tuple[PreTrainedModel, Any]:
    """The model in evaluation mode, on its device and in its type, and its processor.

    ``streams``: its blocks stay in the checkpoint's files until they are needed; ``states``: where hidden states wait
    then, if not in memory (`residence`); ``rewritten``: where the weights are then, if not as the path has them
    (`rewriting`).

    The processor is what the model's kind takes: a tokenizer, an image processor, a feature extractor, or one of
    several of them. Raises RocketError when the path is no model, the model is already quantized or compressed, or a
    package is missing.
    """
    location = locate(config.path)
    dtype = getattr(torch, config.dtype)
    if location.embedded is not None and location.embedded.load is not None:
        model, processor = location.embedded.load(Path(location.source, location.file or ""), dtype)
    else:
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
        if location.file is not None:
            options["gguf_file"] = location.file
        model = open_weights(config.path, str(rewritten or location.source), dtype=dtype, **options)
        processor = _open_processor(config.path, location.source, model, options)
    return _settle(config, model, streams, states), processor


def open_checkpoint(
    path: Path, config: ModelConfig, streams: bool = False, states: Path | None = None
) -> tuple[PreTrainedModel, Any]:
    """A compressed checkpoint as any user opens it, on the device and in the type of the config."""
    dtype, options = getattr(torch, config.dtype), {"trust_remote_code": config.trust_remote_code}
    model = open_weights(str(path), str(path), dtype=dtype, compressed=True, **options)
    processor = _open_processor(str(path), str(path), model, options)
    return _settle(config, model, streams, states), processor


def _settle(config: ModelConfig, model: PreTrainedModel, streams: bool, states: Path | None) -> PreTrainedModel:
    if not streams:
        return model.to(resolve_device(config.device)).eval()
    copied = unmapped(model)
    if copied is not None:
        raise RocketError(_cannot_stream(config, copied))
    stream(model, resolve_device(config.device), states)
    return model.eval()


def _cannot_stream(config: ModelConfig, tensor: str) -> str:
    return (
        f"{config.path!r} does not fit into memory, and cannot be read a block at a time: {tensor} lies in no file as "
        f"the model has it, in {config.dtype}"
    )


def open_empty(config: ModelConfig) -> Any:
    """The model that a config's path would give, without weights, on the device ``meta``."""
    source = locate(config.path).source
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    architecture = AutoConfig.from_pretrained(source, **options)  # first, as it says what is wrong where there is none
    check_config_file(cached_file(source, "config.json", revision=config.revision))
    return empty_model(architecture, getattr(torch, config.dtype), config.trust_remote_code)


def _open_processor(name: str, source: str, model: PreTrainedModel, options: dict[str, Any]) -> Any:
    try:
        return open_processor(source, model, **options)
    except Exception as error:
        reason = first_line(error).removesuffix(":")
        if find_spec("PIL") is None:
            reason += "; for images: pip install pillow"
        raise RocketError(
            f"model.path={name!r} brings no tokenizer or processor that {type(model).__name__} could be fed by; save "
            f"the one of its original beside it ({reason})"
        ) from error


def open_weights(name: str, source: str, *, compressed: bool = False, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint, with ``options`` of ``from_pretrained``; ``name`` is what the user calls it.

    Raises RocketError for what cannot be opened, or not be trusted, and for quantized and, unless ``compressed``,
    compressed models.
    """
    try:
        if "gguf_file" in options:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, **options, **_gguf_dequantize())
            _forget_gguf(model)
            return model
        asked = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
        if Path(source).is_dir() and not Path(source, "config.json").is_file():
            raise RocketError(f"model.path={name!r} has no config.json; give the folder that a model was saved in")
        check_config_file(cached_file(source, "config.json", revision=options.get("revision")))
        config = AutoConfig.from_pretrained(source, **asked)
        if not compressed:
            refuse_quantized(name, config)
        return _open_whole(source, config, use_safetensors=True, **options)
    except RocketError:
        raise
    except Exception as error:  # whatever strangers write into a config, transformers raises about it
        reason = first_line(error)
        if isinstance(error, OSError) and "safetensors" in reason:
            reason += " (only safetensors are read, which hold no code: open it with transformers and save it again)"
        raise RocketError(f"model.path={name!r} is no model that can be opened: {reason}") from error


def _open_whole(source: str, config: Any, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint. Raises RocketError if it lacks tensors of blocks, which transformers would make up."""
    index = Path(source, INDEX)
    if index.is_file():
        indexed_files(index)
    model, found = open_model(source, config, output_loading_info=True, **options)
    blocks = tuple(f"{name}." for name in find_blocks(model))
    lacking = sorted(name for name in found["missing_keys"] if name.startswith(blocks))
    if lacking:
        raise RocketError(
            f"the checkpoint {source} lacks {lacking[0]} and {len(lacking) - 1} other tensors that config.json asks for"
        )
    opened: PreTrainedModel = model
    return opened


def resolve_device(device: str) -> torch.device:
    """The device a config names; ``auto`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise RocketError(f"model.device={device!r} is no device; write auto, cpu, cuda or cuda:1") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise RocketError(f"model.device={device!r}: this machine has no CUDA device; write cpu or auto")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise RocketError(f"model.device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if resolved.type not in ("cpu", "cuda"):
        raise RocketError(f"model.device={device!r}: calibration needs float64, on cpu or cuda")
    return resolved


def locate(path: str) -> Location:
    """Resolve embedded names and GGUF files; hub ids and directories stay as they are."""
    if path.startswith("embedded:"):
        entry, file = find_embedded(path)
        return Location(str(file.parent), file.name, entry)
    local = Path(path).expanduser() if path.startswith("~") else Path(path)
    if local.suffix == ".gguf":
        if not local.is_file():
            raise RocketError(f"model.path={path!r}: no such file")
        return Location(str(local.parent), local.name)
    if (local.is_absolute() or path.startswith(".")) and not local.exists():
        raise RocketError(f"model.path={path!r}: no such directory")
    return Location(str(local) if path.startswith("~") else path)


def identify_model(config: ModelConfig) -> str:
    """A fingerprint of the model's files, without loading them.

    Directories and GGUF files: names and sizes of the files and what they hold, of those beyond 64 MB some of every 4
    MB and the end. Hub ids: the commit that the revision resolves to.
    """
    location = locate(config.path)
    directory = Path(location.source)
    digest = hashlib.sha256()
    if not directory.is_dir():
        try:
            remote = AutoConfig.from_pretrained(
                location.source, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except Exception as error:
            raise RocketError(f"model.path={config.path!r} is no model: {first_line(error)}") from error
        digest.update(f"{location.source}@{getattr(remote, '_commit_hash', None) or config.revision}".encode())
        return digest.hexdigest()
    files = [directory / location.file] if location.file else sorted(directory.glob("*"))
    for file in files:
        if file.is_file() and file.suffix != ".md":
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            every, length = (READ_WHOLE, READ_WHOLE) if size <= READ_WHOLE else (SAMPLE_EVERY, SAMPLED_BYTES)
            with file.open("rb") as handle:
                for position in sorted({*range(0, size, every), max(0, size - length)}):
                    handle.seek(position)
                    digest.update(handle.read(length))
    return digest.hexdigest()


def refuse_quantized(name: str, config: Any) -> None:
    """Raise RocketError if a model's config says that it is quantized or compressed already."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    details = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = getattr(details.get("quant_method"), "value", details.get("quant_method"))
    what = "already compressed by rocket" if method == "rocket" else f"already quantized ({method})"
    raise RocketError(f"the model {name!r} is {what}; give the original model in 16 or 32 bit")


def refuse_offloaded(model: nn.Module) -> None:
    """Raise RocketError if a part of a model is not in memory, as ``device_map`` leaves what does not fit."""
    absent = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if absent is not None:
        raise RocketError(
            f"{absent} is on disk or offloaded, not in memory; load the model whole, or let `rocket run` stream it "
            "from its files (memory_budget)"
        )


def _gguf_dequantize() -> dict[str, Any]:
    """Recent transformers keep GGUF weights packed unless asked otherwise; older ones always unpack them."""
    config_class = getattr(transformers, "GgufConfig", None)
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


def _forget_gguf(model: PreTrainedModel) -> None:
    """A de-quantized GGUF model is an ordinary one, but cannot be saved while it says otherwise."""
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    for attribute in ("hf_quantizer", "quantization_method"):
        if getattr(model, attribute, None) is not None:
            delattr(model, attribute)
    model.is_quantized = False
