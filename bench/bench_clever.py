"""CLEVER beside that of the Adversarial Robustness Toolbox: untargeted, the same number of gradients.

python bench/bench_clever.py --output bench/results/clever.json
"""

import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from _data import DATA, load_cifar
from _write import write_json
from cifar import network

from equifast.certify import clever
from equifast.nn import StdCNN

RADII = {"l2": 2.0, "linf": 0.1}


def timed(function: Any, *arguments: Any, **settings: Any) -> tuple[float, float]:
    """What it gives, and seconds."""
    start = time.perf_counter()
    found = function(*arguments, **settings)
    return float(found if isinstance(found, float | np.floating) else found.scores[0]), time.perf_counter() - start


def main(data: Path = DATA, images: int = 3, blocks: int = 10, samples: int = 64, output: Path | None = None) -> None:
    """Medians over images; the toolbox has a pool of `blocks * samples` for each class, ours one for all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.classification import PyTorchClassifier
        from art.metrics import clever_u
    x, _ = load_cifar(data, "test", images)
    torch.manual_seed(0)
    networks = {
        "ResNet-20, CIFAR-10": (network(data), x),
        "StdCNN, untrained, 28x28 gray": (StdCNN().eval(), torch.rand(images, 1, 28, 28)),
    }
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "gradients per class": blocks * samples}
    for name, (model, inputs) in networks.items():
        wrapped = PyTorchClassifier(
            model, torch.nn.CrossEntropyLoss(), tuple(inputs.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
        )
        for norm, radius in RADII.items():
            ratios: dict[str, list[float]] = {"float32": [], "auto": []}
            rows = []
            for image in inputs:
                order = 2 if norm == "l2" else np.inf
                rest = {"norm": order, "pool_factor": blocks, "verbose": False}
                theirs, took = timed(clever_u, wrapped, image.numpy(), blocks, samples, radius, **rest)
                row = {"toolbox": theirs, "toolbox, s": took}
                for dtype, found in ratios.items():
                    settings = {"norm": norm, "radius": radius, "blocks": blocks, "samples": samples, "dtype": dtype}
                    row[dtype], seconds = timed(clever, model, image[None], **settings)
                    row[f"{dtype}, s"] = seconds
                    found.append(took / seconds)
                rows.append(row)
            result[f"{name}, {norm}"] = {
                "times faster": {dtype: statistics.median(found) for dtype, found in ratios.items()},
                "images": rows,
            }
            print(name, norm, result[f"{name}, {norm}"]["times faster"], flush=True)
    if output is not None:
        write_json(output, result)


if __name__ == "__main__":
    typer.run(main)
