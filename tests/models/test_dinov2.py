"""The embedded vision encoder: every tensor finds its place, and features tell photographs apart."""

import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel

from rocket.config.errors import RocketError
from rocket.models import dinov2, find_blocks, target_layers
from rocket.models.embedded import find_embedded

# The final norm's outputs for sklearn's two photographs in onnxruntime 1.31.1, which runs the package's file as it is:
# the first four features of the class token, then of the last patch.
EXPECTED = [
    [-2.4961, 0.2574, -0.8978, -1.6348, 0.7438, 0.6304, 0.1795, -1.3358],
    [0.9065, -1.1797, 1.0450, -1.6363, -0.1252, 1.8074, 0.5253, -1.8754],
]


@pytest.fixture(scope="module")
def file():
    """The package's ONNX file."""
    pytest.importorskip("onnx")
    try:
        return find_embedded("embedded:dinov2-small")[1]
    except RocketError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def embedded(file):
    """(model, processor) in float32. Do not change the model."""
    return dinov2.load(file, torch.float32)


@pytest.fixture(scope="module")
def pixels(embedded):
    """Photographs [2, 3, 224, 224]."""
    images = pytest.importorskip("PIL.Image")
    folder = pytest.importorskip("sklearn.datasets").__path__[0]
    photographs = [images.open(f"{folder}/images/{name}.jpg") for name in ("china", "flower")]
    return embedded[1](images=photographs, return_tensors="pt")["pixel_values"]


def test_features_are_those_of_the_file(embedded, pixels):
    assert pixels.shape == (2, 3, 224, 224)
    with torch.inference_mode():
        hidden = embedded[0](pixel_values=pixels).last_hidden_state
    assert hidden.shape == (2, 257, 384)
    assert hidden.isfinite().all()
    expected = torch.tensor(EXPECTED)
    assert torch.allclose(hidden[:, 0, :4], expected[:, :4], atol=5e-3)
    assert torch.allclose(hidden[:, -1, :4], expected[:, 4:], atol=5e-3)
    assert F.cosine_similarity(*hidden[:, 0], dim=0) < 0.5


def test_layers_and_parameters(embedded):
    model, _ = embedded
    assert not model.training
    assert len(find_blocks(model)) == 12
    assert len(target_layers(model)) == 72
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_576


def test_is_saved_and_opened_again(file, tmp_path):
    model, processor = dinov2.load(file, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reopened = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, reopened[name]) for name, tensor in model.state_dict().items())
    again = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    image = torch.randint(256, (3, 300, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    before, after = (make(images=image, return_tensors="pt")["pixel_values"] for make in (processor, again))
    assert torch.equal(before, after)


def test_onnx_is_not_installed(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RocketError, match=r"pip install onnx"):
        dinov2.load(file, torch.float32)


def test_another_version_of_the_file(file, monkeypatch):
    read = dinov2._read_state
    monkeypatch.setattr(dinov2, "_read_state", lambda path: {**read(path), "odd": torch.zeros(1)})
    with pytest.raises(RocketError, match=r"vit_s_focus\.onnx holds no DINOv2: .*odd"):
        dinov2.load(file, torch.float32)
    monkeypatch.setattr(dinov2, "_POSITIONS", ("onnx::Concat_1",))
    monkeypatch.setattr(dinov2, "_read_state", read)
    with pytest.raises(RocketError, match="it has no 'onnx::Concat_1'"):
        dinov2.load(file, torch.float32)
