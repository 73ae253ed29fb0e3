"""What the layers of a model see: Gram matrices of their inputs (forward) and loss sensitivities (one backward)."""

from rocket.calib.calibrate import SENSITIVITY_BATCH, calibrate, sensitivity_samples
from rocket.calib.collect import Calibration, collect_grams
from rocket.calib.gram import pack_triangle, unpack_triangle
from rocket.calib.sensitivity import measure_sensitivities
from rocket.calib.waypoints import WAYPOINTS, Waypoints

__all__ = [
    "SENSITIVITY_BATCH",
    "WAYPOINTS",
    "Calibration",
    "Waypoints",
    "calibrate",
    "collect_grams",
    "measure_sensitivities",
    "pack_triangle",
    "sensitivity_samples",
    "unpack_triangle",
]
