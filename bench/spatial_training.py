"""Spatial robustness by augmentation, by the worst of k, by regularizers and by architecture (Yang et al. 2019).

python bench/spatial_training.py -o digits-spatial

One row per recipe: accuracy as images are, and under the grid of 775 rotations and translations. Trainings and results
are kept in the folder; stopped and started again it goes on.
"""

import functools
from pathlib import Path

import torch
import typer
from _data import DATA
from _models import CifarResNet
from _symmetry import Kept, Kind, Output, Seeds, Split, bars, open_split, table
from _write import write_json
from torch import nn

from equifast import attacks, keep_freed_memory
from equifast.evaluate import plots
from equifast.nn import GCNN, ResNet18, StdCNN
from equifast.spatial import Grid
from equifast.train import Recipe, crop_and_flip, rotate_and_shift

COLUMNS = ("clean", "grid")
PAIRS = (
    ("augmentation", "std"),
    ("augmentation + KL", "augmentation"),
    ("A.T. + KL", "A.T."),
    ("A.T. + L2", "A.T."),
    ("A.T.", "augmentation"),
    ("group network", "std"),
    ("group network, augmentation", "augmentation"),
)


def recipes(kind: str, k: int) -> dict[str, Recipe]:
    """By row; but on digits all with crops and mirror images."""
    augment = None if kind == "digits" else crop_and_flip
    worst = functools.partial(attacks.Spatial, search="worst-of-k", k=k)
    make = functools.partial(Recipe, augment=augment)
    return {
        "std": make(),
        "augmentation": make(transform=rotate_and_shift),
        "augmentation + KL": make(transform=rotate_and_shift, regularizer="kl"),
        "A.T.": make(adversary=worst),
        "A.T. + KL": make(adversary=worst, regularizer="kl"),
        "A.T. + L2": make(adversary=worst, regularizer="l2"),
        "group network": make(),
        "group network, augmentation": make(transform=rotate_and_shift),
    }


def network(kind: str, classes: int, name: str) -> nn.Module:
    """The plain network of a data set, or its group network."""
    group = name.startswith("group")
    if kind == "digits":
        return GCNN() if group else StdCNN()
    return ResNet18(classes=classes, width=0.25) if group else CifarResNet(20, classes)


def measure(model: nn.Module, split: Split, order: list[int] | None) -> dict[str, list[bool]]:
    with torch.no_grad():
        clean = torch.cat([model(part).argmax(1) for part in split.x.split(256)]) == split.y
        moved = attacks.Spatial(model, order=order)(split.x, split.y)
        under = torch.cat([model(part).argmax(1) for part in moved.split(256)]) == split.y
    return {"clean": clean.tolist(), "grid": (clean & under).tolist()}


def main(
    output: Output,
    kind: Kind = "digits",
    data: Path = DATA,
    seeds: Seeds = 3,
    epochs: int = 60,
    batch: int = 64,
    rate: float = 0.05,
    k: int = 10,
    train_images: int | None = None,
    images: int | None = None,
) -> None:
    """Train, attack, and write table.json and table.png."""
    keep_freed_memory()
    settings = {k: v for k, v in locals().items() if k not in ("output", "data")}
    split = open_split(kind, data, train_images, images)
    kept = Kept(output, {**settings, "grid": Grid()})
    results = {}
    # a seed after the other, so that what is there early is of all rows
    for seed in range(seeds):
        for name, recipe in recipes(kind, k).items():
            build = functools.partial(network, kind, split.classes, name)
            model = kept.trained(name, build, split.train, recipe, seed, epochs=epochs, batch=batch, rate=rate)
            found = kept.measured(name, seed, functools.partial(measure, model, split, None))
            results.setdefault(name, []).append(found)
    title = f"{kind}: {len(split.y)} test images, {seeds} trainings, accuracy in % ± standard error (of each training)"
    written = table(title, results, COLUMNS, PAIRS)
    write_json(output / "table.json", {"settings": settings, **written})
    plots.save(bars(written["table"], COLUMNS, title.split(",")[0]), output / "table")


if __name__ == "__main__":
    typer.run(main)
