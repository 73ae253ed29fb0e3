"""From a plan to a compressed model and its checkpoint."""

from rocket.compression.checkpoint import merge, save_checkpoint, stored_values
from rocket.compression.compress import build_tensors, compress, compressed_layers, linear_layer, make_layer

__all__ = [
    "build_tensors",
    "compress",
    "compressed_layers",
    "linear_layer",
    "make_layer",
    "merge",
    "save_checkpoint",
    "stored_values",
]
