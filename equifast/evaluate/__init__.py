"""Evaluation: metrics with their standard errors, and where the time of a step goes."""

from equifast.evaluate.metrics import Estimate, accuracy, confusion, difference, mean_iou
from equifast.evaluate.profile import PARTS, Profile, profile_step

__all__ = ["PARTS", "Estimate", "Profile", "accuracy", "confusion", "difference", "mean_iou", "profile_step"]
