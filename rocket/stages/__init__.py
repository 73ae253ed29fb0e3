"""The stages of a run, one file each; see `rocket.pipeline`."""
