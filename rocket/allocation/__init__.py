"""Profiles + budget -> plan."""

from rocket.allocation.budget import Budget, ModelSize, measure_size
from rocket.allocation.plan import ALLOCATORS, CurvePoint, Plan, Planner, select_allocator
from rocket.allocation.prediction import MAX_POINTS, MeasuredPoint, Prediction

__all__ = [
    "ALLOCATORS",
    "MAX_POINTS",
    "Budget",
    "CurvePoint",
    "MeasuredPoint",
    "ModelSize",
    "Plan",
    "Planner",
    "Prediction",
    "measure_size",
    "select_allocator",
]
