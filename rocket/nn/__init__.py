"""The layers that replace nn.Linear, and the plug-in by which transformers loads them."""

from rocket.nn.layers import (
    LAYERS,
    CompressedLinear,
    FactorizedLinear,
    Int8Linear,
    LayerSpec,
    LowRankLinear,
    Precision,
    SparseLinear,
    SparseLowRankLinear,
)
from rocket.nn.optimize import explain, optimize
from rocket.nn.quantizer import RocketConfig, RocketQuantizer, attach_quantizer, detach_quantizer, replace_module

__all__ = [
    "LAYERS",
    "CompressedLinear",
    "FactorizedLinear",
    "Int8Linear",
    "LayerSpec",
    "LowRankLinear",
    "Precision",
    "RocketConfig",
    "RocketQuantizer",
    "SparseLinear",
    "SparseLowRankLinear",
    "attach_quantizer",
    "detach_quantizer",
    "explain",
    "optimize",
    "replace_module",
]
