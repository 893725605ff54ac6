"""Files of results, whole or not at all, with what they were made on."""

import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

import equifast


def machine() -> dict[str, object]:
    """CPU model, cores that may be used, threads; no names."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        model = found[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "threads": torch.get_num_threads(), "system": platform.system()}


def versions() -> dict[str, str]:
    return {
        "equifast": equifast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }


def write(path: Path, text: str) -> None:
    """Beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(text)
    beside.replace(path)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """A result, with versions and machine; what JSON has no form for goes in as text."""
    document = {**result, "versions": versions(), "machine": machine()}
    write(path, json.dumps(document, indent=2, default=str) + "\n")
