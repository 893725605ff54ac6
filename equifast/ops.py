"""The operators as the rest of the package uses them: the same names and signatures as :mod:`equifast.reference`.

One function, :func:`backend`, decides who computes. For now there is one backend, the reference.
"""

from equifast.reference import signed_step, similarity, warp

__all__ = ["backend", "signed_step", "similarity", "warp"]


def backend() -> str:
    """The name of the backend that computes: ``"reference"``."""
    return "reference"
