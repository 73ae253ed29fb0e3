"""The reader of CTranslate2 files, on files written here by the format's definition."""

import struct
from pathlib import Path

import pytest
import torch

from rocket.config.errors import RocketError
from rocket.models.ctranslate2 import read_tensors


def name(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def tensor(text: str, shape: tuple[int, ...], kind: int, values: bytes) -> bytes:
    sizes = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return name(text) + sizes + struct.pack("<BI", kind, len(values)) + values


HALVES = tensor("layer/weight", (2, 3), 4, struct.pack("<6e", 0.5, 1, -2, 3, 4, 65504))
HEADS = tensor("num_heads", (), 2, struct.pack("<h", 6))


def file(*tensors: bytes, version: int = 6, aliases: tuple[tuple[str, str], ...] = ()) -> bytes:
    names = b"".join(name(alias) + name(target) for alias, target in aliases)
    head = struct.pack("<I", version) + name("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    return head + b"".join(tensors) + struct.pack("<I", len(aliases)) + names


def read(folder: Path, content: bytes) -> dict[str, torch.Tensor]:
    path = folder / "model.bin"
    path.write_bytes(content)
    return read_tensors(path)


def test_values_shapes_and_types(tmp_path):
    tensors = read(tmp_path, file(HALVES, HEADS, aliases=(("tied", "layer/weight"),)))
    assert list(tensors) == ["layer/weight", "num_heads", "tied"]
    assert torch.equal(tensors["layer/weight"], torch.tensor([[0.5, 1, -2], [3, 4, 65504]], dtype=torch.float16))
    assert tensors["tied"] is tensors["layer/weight"]
    assert tensors["num_heads"].shape == ()
    assert tensors["num_heads"].dtype == torch.int16
    assert int(tensors["num_heads"]) == 6


@pytest.mark.parametrize(
    ("kind", "code", "dtype"), [(0, "f", torch.float32), (1, "b", torch.int8), (3, "i", torch.int32)]
)
def test_other_types(tmp_path, kind, code, dtype):
    values = read(tmp_path, file(tensor("x", (2,), kind, struct.pack(f"<2{code}", -3, 7))))["x"]
    assert values.dtype == dtype
    assert values.tolist() == [-3, 7]


def test_truncated_anywhere(tmp_path):
    """Every proper beginning of a file is refused, none read as a smaller model."""
    content = file(HALVES, HEADS, aliases=(("tied", "layer/weight"),))
    for length in range(len(content)):
        with pytest.raises(
            RocketError, match=r"model\.bin: damaged, .*it ends at byte \d+, \d+ too early; get the file"
        ):
            read(tmp_path, content[:length])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file(HALVES) + b"more", "4 bytes follow its end"),
        (file(tensor("x", (2, 2), 4, b"\0" * 6)), r"x has 6 bytes, which are not \[2, 2\] values of float16"),
        (file(tensor("x", (2,), 9, b"\0" * 2)), "x has the unknown type 9"),
        (file(HALVES, aliases=(("tied", "nowhere"),)), "tied stands for nowhere, which is not there"),
        (struct.pack("<IH2s", 6, 2, b"\xff\0"), "a name is not UTF-8"),
        (file(HALVES, version=3), "files of version 3 are not read; convert the model again"),
    ],
)
def test_damaged(tmp_path, content, message):
    with pytest.raises(RocketError, match=message):
        read(tmp_path, content)


def test_no_file(tmp_path):
    with pytest.raises(RocketError, match="cannot be read"):
        read_tensors(tmp_path / "model.bin")
