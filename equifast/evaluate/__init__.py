"""Evaluation: attackers against defenses, metrics with their standard errors, and what defenses cost."""

from equifast.evaluate.cost import Cost, cost
from equifast.evaluate.data import Arrays, ClassFolders, LabelFolders, open_data
from equifast.evaluate.metrics import Estimate, accuracy, confusion, difference, mean_iou
from equifast.evaluate.profile import PARTS, Profile, profile_step
from equifast.evaluate.protocol import Strength, adaptive, known
from equifast.evaluate.study import Attacker, Evaluation, Report
from equifast.evaluate.worst import worst_accuracy, worst_iou

__all__ = [
    "PARTS",
    "Arrays",
    "Attacker",
    "ClassFolders",
    "Cost",
    "Estimate",
    "Evaluation",
    "LabelFolders",
    "Profile",
    "Report",
    "Strength",
    "accuracy",
    "adaptive",
    "confusion",
    "cost",
    "difference",
    "known",
    "mean_iou",
    "open_data",
    "profile_step",
    "worst_accuracy",
    "worst_iou",
]
