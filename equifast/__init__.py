"""equifast: fast, honest test-time robustness for vision models, by equivariance."""

import importlib
from types import ModuleType

from equifast import attacks, defenses, detectors, nn, ops, reference, rng, spatial, train, views
from equifast._allocator import keep_freed_memory, keep_kernels
from equifast._version import __version__
from equifast.purifier import Defended, Purifier, purify

__all__ = [
    "Defended",
    "Purifier",
    "__version__",
    "attacks",
    "defenses",
    "detectors",
    "keep_freed_memory",
    "keep_kernels",
    "nn",
    "ops",
    "purify",
    "reference",
    "rng",
    "spatial",
    "train",
    "views",
]

_LATER = ("certify", "evaluate", "models")  # which take their time to import, and are when they are named


def __getattr__(name: str) -> ModuleType:
    if name in _LATER:
        return importlib.import_module(f"equifast.{name}")
    raise AttributeError(f"module 'equifast' has no attribute {name!r}")
