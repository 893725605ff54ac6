"""Evaluation: attackers against defenses, anomalies against detectors, metrics with their errors, and costs."""

from equifast.evaluate.corruptions import CORRUPTIONS, corrupt
from equifast.evaluate.cost import Cost, cost
from equifast.evaluate.data import Arrays, ClassFolders, Images, LabelFolders, open_data, open_images
from equifast.evaluate.detection import Anomaly, Detection, DetectionReport
from equifast.evaluate.metrics import (
    Estimate,
    Interval,
    Separation,
    accuracy,
    confusion,
    difference,
    mean_iou,
    over_draws,
    separation,
)
from equifast.evaluate.profile import Rates, invariance, robustness
from equifast.evaluate.protocol import Strength, adaptive, known
from equifast.evaluate.records import Part
from equifast.evaluate.studies import nothing
from equifast.evaluate.study import Attacker, Evaluation, Report
from equifast.evaluate.timing import PARTS, Profile, profile_step
from equifast.evaluate.worst import worst_accuracy, worst_iou

__all__ = [
    "CORRUPTIONS",
    "PARTS",
    "Anomaly",
    "Arrays",
    "Attacker",
    "ClassFolders",
    "Cost",
    "Detection",
    "DetectionReport",
    "Estimate",
    "Evaluation",
    "Images",
    "Interval",
    "LabelFolders",
    "Part",
    "Profile",
    "Rates",
    "Report",
    "Separation",
    "Strength",
    "accuracy",
    "adaptive",
    "confusion",
    "corrupt",
    "cost",
    "difference",
    "invariance",
    "known",
    "mean_iou",
    "nothing",
    "open_data",
    "open_images",
    "over_draws",
    "profile_step",
    "robustness",
    "separation",
    "worst_accuracy",
    "worst_iou",
]
