"""Files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file beside ``path``, to be written: it takes that place in the end, and after an error is gone."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")  # others may write to the folder too
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
