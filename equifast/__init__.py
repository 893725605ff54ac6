"""equifast: fast, honest test-time robustness for vision models, by equivariance."""

import importlib
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

if PathFinder.find_spec("equifast._C", __path__) is None:
    raise ImportError(
        f"equifast comes from {Path(__file__).parent}, its sources, where nothing is compiled; start Python in another "
        "folder (pytest without `python -m`), or compile there with `pip install -e .`"
    )

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
