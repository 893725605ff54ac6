"""Invariance against robustness as training rotations widen, and as training attacks strengthen (Kamath et al. 2020).

python bench/profiles.py -o digits-profiles

StdCNN and GCNN trained on rotations by up to 0, 60, 120 and 180 degrees; StdCNN trained on against attacks of growing
radius, from the weights of ordinary training, without which it may learn nothing; of each the rate of invariance over
random rotations and the rate of robustness over the radius of PGD.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from _data import DATA
from _symmetry import Kept, Kind, Output, Seeds, Split, open_split
from _write import write_json
from rich.console import Console
from rich.table import Table
from torch import nn

from equifast import attacks, keep_freed_memory
from equifast.evaluate import Rates, difference, invariance, plots, robustness
from equifast.evaluate.metrics import average
from equifast.nn import GCNN, StdCNN
from equifast.spatial import Grid
from equifast.train import Recipe, rotate_and_shift

DEGREES = tuple(range(0, 181, 15))
RADII = {"digits": (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3), "cifar10": (0, 1 / 255, 2 / 255, 4 / 255, 8 / 255)}
TRAINED_AGAINST = {"digits": (0.05, 0.1, 0.15), "cifar10": (2 / 255, 4 / 255, 8 / 255)}
RADII["files"], TRAINED_AGAINST["files"] = RADII["cifar10"], TRAINED_AGAINST["cifar10"]
ROTATIONS = (0, 60, 120, 180)
FIRST = "StdCNN, rotations to 0"


def recipes(kind: str) -> dict[str, tuple[str, Recipe]]:
    """The network and what it learns from, by name."""
    found: dict[str, tuple[str, Recipe]] = {}
    for network in ("StdCNN", "GCNN"):
        for most in ROTATIONS:
            turned = functools.partial(rotate_and_shift, grid=Grid(most, 0, (3, 1, 1)))
            found[f"{network}, rotations to {most}"] = (network, Recipe(transform=turned) if most else Recipe())
    for eps in TRAINED_AGAINST[kind]:
        pgd = functools.partial(attacks.PGD, eps=eps, step_size=eps / 4, steps=7)
        found[f"StdCNN, PGD {eps:.3g}"] = ("StdCNN", Recipe(adversary=pgd))
    return found


def copied(model: nn.Module | None) -> nn.Module:
    """One to train on."""
    return copy.deepcopy(model).requires_grad_(True)


def measure(model: nn.Module, split: Split, kind: str) -> dict[str, Any]:
    with torch.no_grad():
        clean = torch.cat([model(part).argmax(1) for part in split.x.split(256)]) == split.y
    return {
        "clean": clean.tolist(),
        "invariance": invariance(model, split.x, degrees=DEGREES).kept,
        "robustness": robustness(model, split.x, eps=RADII[kind]).kept,
    }


def rates(rows: list[dict[str, Any]], what: str, kind: str) -> Rates:
    """Of several trainings, each image's mean."""
    kept = np.mean([np.asarray(row[what]) for row in rows], 0)
    if what == "invariance":
        return Rates(what, "random rotations up to, degrees", DEGREES, kept)
    return Rates(what, "radius of PGD, in units of image values", RADII[kind], kept)


def main(
    output: Output,
    kind: Kind = "digits",
    data: Path = DATA,
    seeds: Seeds = 3,
    epochs: int = 60,
    batch: int = 64,
    rate: float = 0.05,
    train_images: int | None = None,
    images: int | None = None,
) -> None:
    """Train, measure, and write table.json and four plots."""
    keep_freed_memory()
    settings = {k: v for k, v in locals().items() if k not in ("output", "data")}
    split = open_split(kind, data, train_images, images)
    kept = Kept(output, {**settings, "degrees": DEGREES, "eps": RADII[kind], "trained against": TRAINED_AGAINST[kind]})
    channels, size, classes = split.channels, split.x.shape[-1], split.classes
    results: dict[str, list[dict[str, Any]]] = {}
    ordinary: nn.Module | None = None
    for seed in range(seeds):
        for name, (network, recipe) in recipes(kind).items():
            build = functools.partial({"StdCNN": StdCNN, "GCNN": GCNN}[network], channels, classes, size=size)
            if recipe.adversary is not None:
                build = functools.partial(copied, ordinary)
            model = kept.trained(name, build, split.train, recipe, seed, epochs=epochs, batch=batch, rate=rate)
            ordinary = model if name == FIRST else ordinary
            found = kept.measured(name, seed, functools.partial(measure, model, split, kind))
            results.setdefault(name, []).append(found)

    # the middle of both axes stands for a curve in the table
    wide, hard = len(DEGREES) - 1, len(RADII[kind]) // 2
    places = {"invariance": wide, "robustness": hard}
    columns = (f"invariance to {DEGREES[wide]} degrees", f"robustness at {RADII[kind][hard]:.3g}")
    title = f"{kind}: {len(split.y)} test images, {seeds} trainings, in % ± standard error over images"
    console, drawn = Console(width=160), Table("", "clean", *columns, title=title, title_style="")
    written: dict[str, Any] = {"settings": settings, "table": {}, "differences": {}, "curves": {}}
    curves = {name: {what: rates(rows, what, kind) for what in places} for name, rows in results.items()}
    for name, rows in results.items():
        clean = average(np.mean([np.asarray(row["clean"], dtype=float) for row in rows], 0))
        cells = [curves[name][what].estimates[place] for what, place in places.items()]
        drawn.add_row(name, str(clean), *map(str, cells))
        written["table"][name] = {
            column: {"value": cell.value, "standard error": cell.standard_error}
            for column, cell in zip(("clean", *columns), (clean, *cells), strict=True)
        }
        written["curves"][name] = {
            what: {"at": curve.places, "rate": [e.value for e in curve.estimates]}
            for what, curve in curves[name].items()
        }
    console.print(drawn)
    paired = Table("", *columns, title="paired over images", title_style="")
    pairs = [(f"{n}, rotations to {m}", f"{n}, rotations to 0") for n in ("StdCNN", "GCNN") for m in ROTATIONS[1:]]
    pairs += [(name, FIRST) for name in results if "PGD" in name] + [("GCNN, rotations to 0", FIRST)]
    for a, b in pairs:
        cells = [difference(curves[a][what].kept[at], curves[b][what].kept[at]) for what, at in places.items()]
        paired.add_row(f"{a} - {b}", *(f"{c.value:+.1f} ± {c.standard_error:.1f}" for c in cells))
        written["differences"][f"{a} - {b}"] = {
            column: {"value": cell.value, "standard error": cell.standard_error}
            for column, cell in zip(columns, cells, strict=True)
        }
    console.print(paired)
    write_json(output / "table.json", written)
    groups = {"rotations": "rotations", "attacks": "PGD"}
    for group, word in groups.items():
        for what in places:
            shown = {name: curve[what] for name, curve in curves.items() if word in name or name == FIRST}
            plots.save(plots.rates(shown, f"{kind}; "), output / f"{what}-{group}")


if __name__ == "__main__":
    typer.run(main)
