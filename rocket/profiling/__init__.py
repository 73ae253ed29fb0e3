"""Error curves of each layer over its options."""

from rocket.profiling.profile import LayerProfile, profile_layer, profile_layers

__all__ = ["LayerProfile", "profile_layer", "profile_layers"]
