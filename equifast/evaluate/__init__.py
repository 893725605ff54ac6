"""Evaluation: metrics with their standard errors."""

from equifast.evaluate.metrics import Estimate, accuracy, confusion, difference, mean_iou

__all__ = ["Estimate", "accuracy", "confusion", "difference", "mean_iou"]
