"""How large the result may be, and what the rest of the model takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from torch import Tensor, nn

from rocket.config.errors import RocketError
from rocket.config.load import explain_invalid
from rocket.config.schema import CompressionConfig
from rocket.models import LinearLayer


@dataclass(frozen=True)
class Budget:
    """One limit: the removed share of the target layers, parameters of the whole model, or bytes of the checkpoint."""

    kind: Literal["removed_ratio", "kept_parameters", "bytes"]
    value: Annotated[float, Field(ge=0.0, lt=2**63)]

    def __post_init__(self) -> None:
        if self.kind == "removed_ratio" and not 0.0 < self.value < 1.0:
            raise RocketError(f"removed_ratio={self.value} must lie between 0 and 1")

    @classmethod
    def of(
        cls,
        removed_ratio: float | None = None,
        kept_parameters: float | str | None = None,
        bytes: float | str | None = None,
    ) -> Budget:
        """The one that is given, written as in a config file: 0.3, 8e9 or "8B", 6e9 or "6GB"."""
        given = {"removed_ratio": removed_ratio, "kept_parameters": kept_parameters, "bytes": bytes}
        for kind in ("kept_parameters", "bytes"):
            value = given[kind]
            given[kind] = int(value) if isinstance(value, float) and math.isfinite(value) else value
        try:
            return cls.from_config(CompressionConfig.model_validate(given))
        except ValidationError as error:
            raise RocketError(explain_invalid(error, "budget")) from None

    @classmethod
    def from_config(cls, config: CompressionConfig) -> Budget:
        kinds: dict[Literal["removed_ratio", "kept_parameters", "bytes"], float | None] = {
            "removed_ratio": config.removed_ratio,
            "kept_parameters": config.kept_parameters,
            "bytes": config.bytes,
        }
        return next(cls(kind, value) for kind, value in kinds.items() if value is not None)

    @property
    def name(self) -> str:
        """A readable name for files.

        >>> Budget("removed_ratio", 0.3).name, Budget("kept_parameters", 8.2e9).name, Budget("bytes", 6e9).name
        ('removed-0.30', 'parameters-8.2B', 'bytes-6GB')
        """
        if self.kind == "removed_ratio":
            return f"removed-{self.value:.2f}" if round(self.value, 2) == self.value else f"removed-{self.value}"
        if self.kind == "kept_parameters":
            return f"parameters-{_short(self.value, 'KMBT')}"
        return f"bytes-{_short(self.value, 'KMGT')}B"

    @property
    def healed_name(self) -> str:
        """The same of what was healed."""
        return f"{self.name}-healed"


def _short(value: float, units: str) -> str:
    """The value in the largest unit in which six digits are all that it has.

    >>> _short(6_000_000_000, "KMGT"), _short(1234567, "KMGT"), _short(12, "KMGT")
    ('6G', '1234567', '12')
    """
    for power, unit in reversed(list(enumerate(units, start=1))):
        short = f"{value / 1000**power:.6g}"
        if value >= 1000**power and round(float(short) * 1000**power) == round(value):
            return f"{short}{unit}"
    return f"{value:.0f}"


Itemsize = Annotated[int, Field(ge=1, le=16)]


@dataclass(frozen=True)
class ModelSize:
    """What the model stores: the target layers' weights, everything else, and bytes a value of a target layer takes.

    ``itemsizes`` are those of target layers whose values take other than ``itemsize`` bytes, as T5 has in float16;
    ``extra_bytes`` is what they take more by that, or less.
    """

    target_parameters: Annotated[int, Field(ge=1, le=2**60)]
    other_parameters: Annotated[int, Field(ge=0, le=2**60)]
    other_bytes: Annotated[int, Field(ge=0, le=2**60)]
    itemsize: Itemsize
    itemsizes: dict[str, Itemsize] = field(default_factory=dict)
    extra_bytes: Annotated[int, Field(ge=-(2**60), le=2**60)] = 0

    @property
    def parameters(self) -> int:
        return self.target_parameters + self.other_parameters

    @property
    def bytes(self) -> int:
        return self.target_parameters * self.itemsize + self.extra_bytes + self.other_bytes

    def itemsize_of(self, layer: str) -> int:
        """Bytes that a value of a target layer takes."""
        return self.itemsizes.get(layer, self.itemsize)


def measure_size(model: nn.Module, targets: Mapping[str, LinearLayer]) -> ModelSize:
    """Count a model's tensors, tied ones once. Biases of target layers belong to the rest, as they stay."""
    weights = {layer.weight for layer in targets.values()}
    itemsize = Counter(weight.element_size() for weight in weights).most_common(1)[0][0]
    others = [tensor for tensor in [*model.parameters(), *_persistent_buffers(model)] if tensor not in weights]
    return ModelSize(
        target_parameters=sum(weight.numel() for weight in weights),
        other_parameters=sum(tensor.numel() for tensor in others if isinstance(tensor, nn.Parameter)),
        other_bytes=sum(tensor.numel() * tensor.element_size() for tensor in others),
        itemsize=itemsize,
        itemsizes={
            name: layer.weight.element_size()
            for name, layer in targets.items()
            if layer.weight.element_size() != itemsize
        },
        extra_bytes=sum(weight.numel() * (weight.element_size() - itemsize) for weight in weights),
    )


def _persistent_buffers(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
