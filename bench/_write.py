"""Files of results, whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> None:
    """Beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(text)
    beside.replace(path)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Indented; what JSON has no form for goes in as text."""
    write(path, json.dumps(result, indent=2, default=str) + "\n")
