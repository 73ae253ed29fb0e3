"""The layers that replace ``nn.Linear``. Their tensors are the checkpoint's tensors (docs/format.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rocket.kernels import bitmap, int8, macko, ops
from rocket.nn.eligibility import has_autocast, kernels_apply

if TYPE_CHECKING:
    from rocket.nn.fuse import SharedInput


Precision = Literal["float", "int8"]
"""How values are stored: in the model's type, or as int8 with a scale for each row (`kernels.int8`)."""


@dataclass(frozen=True)
class LayerSpec:
    """What config.json says of a compressed layer.

    ``form`` names the class in `LAYERS`; ``in_features`` and ``out_features`` are the layer's. ``rank`` is the number
    of learned atoms, 0 where there is no dictionary. ``nnz`` is the number of stored values of the sparse matrix, 0
    where there is none. ``input_group`` is the first layer that reads the same input, itself if it is the first.
    """

    form: str
    in_features: int
    out_features: int
    rank: int
    nnz: int
    input_group: str
    precision: Precision = "float"

    @property
    def columns(self) -> int:
        """Of the matrix ``weight``: one an input, one a learned atom, or both."""
        if LAYERS[self.form].beside_input:
            return self.rank + self.in_features
        return self.rank or self.in_features

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerSpec:
        """Read an entry of config.json. Raises ValueError if a field is missing, unknown or of the wrong type."""
        kinds = {"form": str, "in_features": int, "out_features": int, "rank": int, "nnz": int, "input_group": str}
        given = {"precision": "float", **values}
        if set(given) != {*kinds, "precision"} or any(type(given[key]) is not kind for key, kind in kinds.items()):
            raise ValueError(f"expected {', '.join(kinds)} (and precision), got {dict(values)!r:.200}")
        if given["precision"] not in get_args(Precision):
            raise ValueError(f"precision {given['precision']!r:.80}: there are {', '.join(get_args(Precision))}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The entry; ``precision`` is left out where it is ``float``."""
        values = asdict(self)
        if self.precision == "float":
            del values["precision"]
        return values


class CompressedLinear(nn.Module):
    """y = W x + b with W [out, in] in a compressed form.

    ``dictionary`` [rank, in] and ``weight`` are the matrices that make up W, those of the form; ``mask`` is there where
    ``weight`` is sparse, with ``mask_columns`` columns that are not padding. With ``beside_input`` its last columns
    multiply the input itself. With the precision int8 their values are that, and ``weight_scale`` [out] and
    ``dictionary_scale`` [rank] lie beside them; none of these takes a gradient (`rocket heal` trains what they stand
    for). ``precisions`` are those that the form can have. ``uses_kernels`` tells whether products go through
    `kernels.ops`. ``replaces`` is the class of the layer whose place this one took. ``macko`` is the
    sparse matrix in MACKO's format too, where that backend was asked for (`use_macko`).
    """

    form: str
    precisions: tuple[Precision, ...] = ("float",)
    mask_columns: int = 0
    beside_input: bool = False
    uses_kernels: bool = False
    replaces: type[nn.Module] = nn.Linear
    macko: macko.Packed | None = None
    weight: Tensor
    dictionary: Tensor
    weight_scale: nn.Parameter | None
    dictionary_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, spec: LayerSpec, bias: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        _check(spec.in_features > 0, spec, "in_features")
        _check(spec.out_features > 0, spec, "out_features")
        _check(spec.precision in self.precisions, spec, "precision")
        self.register_parameter("bias", nn.Parameter(torch.zeros(spec.out_features)) if bias else None)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the layer computes in."""
        scale = self.weight_scale if self.spec.precision == "int8" else None
        return self.weight.dtype if scale is None else scale.dtype

    @property
    def is_sparse(self) -> bool:
        return self.mask_columns > 0

    @property
    def offsets(self) -> Tensor | None:
        """Where the rows of the sparse matrix begin, while the layer multiplies by kernels; never saved."""
        return self._buffers.get("row_offsets")

    def use_kernels(self, wanted: bool = True) -> None:
        """Multiply by the packed matrix from now on, or (False) expand it at every call again."""
        self.uses_kernels = wanted
        self.macko = None
        self._buffers.pop("row_offsets", None)
        if wanted and self.is_sparse:
            self.register_buffer("row_offsets", bitmap.row_offsets(self.get_buffer("mask")), persistent=False)

    def _by_kernels(self, inputs: Tensor) -> bool:
        """Whether these inputs go to the kernels: they have no gradient, and no part in autocast."""
        return self.uses_kernels and kernels_apply(self, inputs)

    def _cast(self, inputs: Tensor) -> Tensor:
        """Inputs in the layer's type where its values are int8: models that cast to a weight's type then leave them as
        they are (T5)."""
        scale = self.weight_scale if self.spec.precision == "int8" else None
        return inputs if scale is None or scale.dtype == inputs.dtype else inputs.to(scale.dtype)

    def use_macko(self) -> None:
        """Multiply single rows of input by MACKO's kernel, where `macko.fits` the layer's values."""
        if self.is_sparse and macko.fits(self.weight):
            with torch.no_grad():
                self.macko = macko.compress(self.matrix("weight"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        """Another device or type: what `use_macko` made of the tensors is left behind."""
        self.macko = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Other tensors: what was derived from the old ones is made anew."""
        super()._load_from_state_dict(*args)
        if self.uses_kernels:
            self.use_kernels()

    def _store(self, name: str, rows: int, *shape: int) -> None:
        """Make the tensors for the values of ``weight`` or ``dictionary``, a matrix of so many rows."""
        if self.spec.precision == "int8":
            values = nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)
            scale = nn.Parameter(torch.zeros(rows), requires_grad=False)
        else:
            values, scale = nn.Parameter(torch.zeros(shape)), None
        self.register_parameter(name, values)
        self.register_parameter(f"{name}_scale", scale)

    def _store_sparse(self, columns: int) -> None:
        """Make ``weight`` and ``mask`` for a sparse matrix [out, columns]."""
        _check(0 <= self.spec.nnz <= self.out_features * columns, self.spec, "nnz")
        self.mask_columns = columns
        self._store("weight", self.out_features, self.spec.nnz)
        mask = torch.zeros(self.out_features, bitmap.mask_bytes(columns), dtype=torch.uint8)
        self.register_buffer("mask", mask)

    def matrix(self, name: str) -> Tensor:
        """``weight`` or ``dictionary`` as a dense floating matrix, differentiable in its values where they float."""
        values, scale = getattr(self, name), getattr(self, f"{name}_scale")
        if name == "weight" and self.is_sparse:
            mask = self.get_buffer("mask")
            device = values.device.type
            if scale is None and has_autocast(device):
                values = values.to(torch.get_autocast_dtype(device))  # or the product rounds all, zeros too
            return ops.expand(values, mask, bitmap.row_offsets(mask), self.mask_columns, scale)
        if values.ndim == 1:
            values = values.view(self.out_features, self.in_features)
        return values if scale is None else int8.dequantize(values, scale)

    def take_gradients(self) -> None:
        """Let all parameters take a gradient that can: not values in int8, nor their scales."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.spec.precision == "float" or name == "bias")

    def dense_weight(self) -> Tensor:
        """W [out, in], multiplied out."""
        raise NotImplementedError

    def stored_values(self) -> int:
        """Stored numbers that make up W: dictionary entries and kept coefficients."""
        return sum(getattr(self, name).numel() for name in VALUES if hasattr(self, name))

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{self.in_features}, {self.out_features}, rank={spec.rank}, nnz={spec.nnz}, precision={spec.precision}, "
            f"bias={self.bias is not None}"
        )


VALUES = ("weight", "dictionary")
"""The tensors of a layer that hold the values which make up W."""


class Int8Linear(CompressedLinear):
    """W dense, its values int8: ``weight`` [out · in], row by row.

    Flat, as [out, in] is what transformers without rocket would take for the weight of an ``nn.Linear``.
    """

    form = "dense"
    precisions = ("int8",)

    def __init__(self, spec: LayerSpec, bias: bool = False) -> None:
        super().__init__(spec, bias)
        _check(spec.rank == 0, spec, "rank")
        _check(spec.nnz == 0, spec, "nnz")
        self._store("weight", spec.out_features, spec.out_features * spec.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self._cast(inputs)
        if self._by_kernels(inputs):
            weight = self.weight.view(self.out_features, self.in_features)
            return ops.dense_linear(inputs, weight, self.bias, self.weight_scale)
        return F.linear(inputs, self.dense_weight(), self.bias)

    def dense_weight(self) -> Tensor:
        return self.matrix("weight")


class LowRankLinear(CompressedLinear):
    """W = weight · dictionary, with ``dictionary`` [rank, in] and ``weight`` [out, rank], both dense."""

    form = "low_rank"
    precisions = ("float", "int8")

    def __init__(self, spec: LayerSpec, bias: bool = False) -> None:
        super().__init__(spec, bias)
        _check(0 < spec.rank <= min(spec.in_features, spec.out_features), spec, "rank")
        _check(spec.nnz == 0, spec, "nnz")
        self._store("dictionary", spec.rank, spec.rank, spec.in_features)
        self._store("weight", spec.out_features, spec.out_features, spec.rank)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self._cast(inputs)
        if self._by_kernels(inputs):
            hidden = ops.dense_linear(inputs, self.dictionary, None, self.dictionary_scale)
            return ops.dense_linear(hidden, self.weight, self.bias, self.weight_scale)
        return F.linear(F.linear(inputs, self.matrix("dictionary")), self.matrix("weight"), self.bias)

    def dense_weight(self) -> Tensor:
        return self.matrix("weight") @ self.matrix("dictionary")


class PackedLinear(CompressedLinear):
    """W by a sparse matrix S: ``weight`` [nnz] holds its values row by row, ``mask`` their places (`kernels.bitmap`).

    ``shared_input`` is set while the layer multiplies together with others (`nn.fuse`); ``place`` is its number there.
    """

    precisions = ("float", "int8")
    mask: Tensor
    shared_input: SharedInput | None = None
    place: int = 0

    def forward(self, inputs: Tensor) -> Tensor:
        given, inputs = inputs, self._cast(inputs)
        offsets = self.offsets
        if offsets is None or not self._by_kernels(inputs):
            return F.linear(self._coordinates(inputs), self.matrix("weight"), self.bias)
        if self.macko is not None and inputs.shape[:-1].numel() == 1:
            return macko.linear(self.macko, self._coordinates(inputs), self.bias)
        if self.shared_input is not None and inputs is given:
            output = self.shared_input.product(self, inputs)
            if output is not None:
                return output
        return self._product(inputs, offsets)

    def _coordinates(self, inputs: Tensor) -> Tensor:
        """What S multiplies."""
        return inputs

    def _product(self, inputs: Tensor, offsets: Tensor) -> Tensor:
        """By the kernels, alone."""
        raise NotImplementedError

    def slots(self) -> list[tuple[Mapping[str, Tensor | None], str]]:
        """Where the tensors of `kernels.cpu.Part` are kept, in its order: read without the detour of attributes."""
        parameters, buffers = self._parameters, self._buffers
        return [
            *((parameters, "weight"), (parameters, "weight_scale")),
            *((buffers, "mask"), (buffers, "row_offsets"), (parameters, "bias")),
            *((parameters, "dictionary"), (parameters, "dictionary_scale")),
        ]

    def use_kernels(self, wanted: bool = True) -> None:
        super().use_kernels(wanted)
        if not wanted and self.shared_input is not None:
            self.shared_input.dissolve()


class SparseLinear(PackedLinear):
    """W = S."""

    form = "sparse"

    def __init__(self, spec: LayerSpec, bias: bool = False) -> None:
        super().__init__(spec, bias)
        _check(spec.rank == 0, spec, "rank")
        self._store_sparse(spec.columns)

    def _product(self, inputs: Tensor, offsets: Tensor) -> Tensor:
        return ops.sparse_linear(
            inputs, self.weight, self.mask, offsets, self.in_features, self.bias, self.weight_scale
        )

    def dense_weight(self) -> Tensor:
        return self.matrix("weight")


class FactorizedLinear(PackedLinear):
    """W = S · dictionary, with ``dictionary`` [rank, in] dense and S [out, rank], the paper's coefficients C."""

    form = "dictionary"

    def __init__(self, spec: LayerSpec, bias: bool = False) -> None:
        super().__init__(spec, bias)
        _check(0 < spec.rank <= min(spec.in_features, spec.out_features), spec, "rank")
        self._store("dictionary", spec.rank, spec.rank, spec.in_features)
        self._store_sparse(spec.columns)

    def _coordinates(self, inputs: Tensor) -> Tensor:
        """dictionary · x, and x itself where the form has it."""
        hidden = F.linear(inputs, self.matrix("dictionary"))
        return torch.cat([hidden, inputs], dim=-1) if self.beside_input else hidden

    def _product(self, inputs: Tensor, offsets: Tensor) -> Tensor:
        matrices = self.dictionary, self.weight, self.mask, offsets
        scales = self.dictionary_scale, self.weight_scale
        return ops.factor_linear(inputs, *matrices, self.bias, *scales, self.beside_input)

    def dense_weight(self) -> Tensor:
        return self.matrix("weight") @ self.matrix("dictionary")


class SparseLowRankLinear(FactorizedLinear):
    """W = S · [dictionary; I], with ``dictionary`` [rank, in] dense and S [out, rank + in].

    The first columns of S multiply the atoms, and are full as a rule; the others multiply the input itself.
    """

    form = "sparse_low_rank"
    beside_input = True

    def dense_weight(self) -> Tensor:
        coefficients, rest = self.matrix("weight").split([self.spec.rank, self.in_features], dim=1)
        return torch.addmm(rest, coefficients, self.matrix("dictionary"))


LAYERS: dict[str, type[CompressedLinear]] = {
    layer.form: layer for layer in (Int8Linear, LowRankLinear, SparseLinear, FactorizedLinear, SparseLowRankLinear)
}


def empty_layer(spec: LayerSpec, bias: bool) -> CompressedLinear:
    """A layer of the form that ``spec`` names, its tensors zero. Raises ValueError if the spec cannot be.

    There is none for ``dense`` in the model's own type: that layer stays what it is.
    """
    if spec.form not in LAYERS:
        raise ValueError(f"unknown layer form {spec.form!r:.80}; this version knows {', '.join(LAYERS)}")
    return LAYERS[spec.form](spec, bias)


def _check(valid: bool, spec: LayerSpec, field: str) -> None:
    if not valid:
        raise ValueError(f"{field}={getattr(spec, field)} is impossible for this layer's shape and form {spec.form!r}")
