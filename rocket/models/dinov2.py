"""`embedded:dinov2-small`: a DINOv2 encoder of 22 million parameters, which a package ships inside an ONNX file.

The file is a saliency model: this encoder, fine-tuned, in float32, and a small decoder, which is left out. Images are
224x224 pixels, normalised as ImageNet's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from rocket.config.errors import RocketError

IMAGE_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, and of the 37x37 patches


def load(file: Path, dtype: torch.dtype) -> tuple[Dinov2Model, Any]:
    """The model, in evaluation mode and of this type, and its image processor.

    Raises RocketError when onnx is missing, or the file has other tensors than expected.
    """
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518, patch_size=14
    )
    try:
        state = _read_state(file)
    except KeyError as error:
        raise RocketError(f"{file} holds no DINOv2: it has no {error}") from None
    # The file's names are those of the checkpoints on the hub, which from_pretrained turns into the model's own.
    model, report = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    problems = {kind: sorted(names) for kind, names in report.items() if names}
    if problems:
        raise RocketError(f"{file} holds no DINOv2: {problems}")
    return model, _processor()


def _processor() -> Any:
    # Without torchvision whether or not it is installed, so that pixels are the same everywhere.
    kind = getattr(transformers, "BitImageProcessorPil", None) or transformers.BitImageProcessor
    return kind(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors by their names in a Dinov2 checkpoint."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise RocketError(f"{path} needs a package to be read: pip install onnx pillow scikit-learn") from None
    graph = onnx.load(str(path)).graph
    stored = {initializer.name: initializer for initializer in graph.initializer}

    def read(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(stored[name]).copy())

    state = {name.removeprefix("backbone."): read(name) for name in stored if name.startswith("backbone.")}
    # Weights of linear layers are transposed and have no name of their own: it is their product's that tells.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            layer = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
            state[f"{layer}.weight"] = read(node.input[1]).T.contiguous()
    positions = [read(name).reshape(1, -1, state["embeddings.cls_token"].shape[-1]) for name in _POSITIONS]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, positions[0].shape[-1])  # of pre-training; the file has none
    return state
