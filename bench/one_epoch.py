"""The large networks, plain and over groups, trained for one epoch: that they learn, and what they commute with after.

python bench/one_epoch.py --output bench/results/one_epoch.json
"""

import time
from pathlib import Path

import torch
import typer
from _data import DATA, load_cifar
from _write import write_json
from torch import nn
from torch.utils.data import TensorDataset

from equifast import keep_freed_memory
from equifast.nn import P4, P4M, VGG16, ResNet18, equivariance_error
from equifast.train import Recipe, crop_and_flip, train

NETWORKS = {
    "VGG16": (lambda width: VGG16(width=width), P4, False),
    "VGG16 over P4": (lambda width: VGG16(group=P4, width=width), P4, False),
    "VGG16 over P4, invariant": (lambda width: VGG16(group=P4, width=width, invariant=True), P4, True),
    "ResNet18": (lambda width: ResNet18(group=None, width=width), P4M, False),
    "ResNet18 over P4M": (lambda width: ResNet18(width=width), P4M, True),
}


def main(data: Path = DATA, images: int = 1000, width: float = 1.0, output: Path | None = None) -> None:
    """One epoch of so many CIFAR-10 images each, batches of 50; accuracy on 500 test images."""
    keep_freed_memory()
    learned = TensorDataset(*load_cifar(data, "train", images))
    x, y = load_cifar(data, "test", 500)
    result: dict[str, object] = {"images": images, "width": width, "threads": torch.get_num_threads()}
    for name, (build, group, _) in NETWORKS.items():
        torch.manual_seed(0)
        model: nn.Module = build(width)
        start = time.perf_counter()
        (log,) = train(model, learned, Recipe(augment=crop_and_flip), epochs=1, batch=50, rate=0.02)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            right = torch.cat([model(part).argmax(1) for part in x.split(100)]) == y
        row = {
            "weights": sum(p.numel() for p in model.parameters()),
            "s": seconds,
            "loss": log["loss"],
            "accuracy, %": 100 * float(right.float().mean()),
            "change of logits by the group": float(equivariance_error(model, x[:8], group).max()),
        }
        result[name] = row
        print(name, {k: round(v, 9) for k, v in row.items()}, flush=True)
    if output is not None:
        write_json(output, result)


if __name__ == "__main__":
    typer.run(main)
