"""The version of equifast: the one place that states it (packaging and CMake read this file)."""

__all__ = ["__version__"]

__version__ = "0.1.0"
