"""The command line: ``equifast demo``, ``purify``, ``detect``, ``bench``, ``evaluate`` and ``doctor``."""

# each adds its command, in the order in which they are shown
from equifast.cli import demo, purify, detect, bench, evaluate, doctor  # noqa: F401, I001
from equifast.cli._common import app

__all__ = ["app"]
