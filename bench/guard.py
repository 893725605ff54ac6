"""By which views a detector should look at images: mirror images of several sizes, and how many views it takes.

    python bench/halves.py
    python bench/guard.py --output bench/results/guard.json

Of each the area under the characteristic of the output's variance, of `Deviation` and of the similarity of features,
for attacked images against clean ones, and what of clean ones lies above the threshold of 5%. On images that other
tables of attacks do not use: CamVid's val split, the first 40 for the thresholds and the others for the figures, and
the first half of CIFAR-10's test images (bench/halves.py). "Through averaging" follows the mean prediction over the
paper's eight views, "BPDA, margin" the preset `fast`, not the detector.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import camvid
import cifar
import torch
import typer
from _data import DATA, load_camvid
from _write import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from equifast import Defended, Purifier
from equifast.detectors import Detector, Deviation, OutputVariance, Similarity
from equifast.evaluate import Strength, known, open_data, separation
from equifast.views import Compose, Flip, Resize, View, fast, paper

SCALES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SETS: dict[str, tuple[View, ...]] = {
    **{f"mirror image of {scale:g}": (Compose(Flip(), Resize(scale)) if scale < 1 else Flip(),) for scale in SCALES},
    "five of fast": fast(),
    "six that do not enlarge": tuple(view for view in paper() if not view.enlarges),
    "the paper's eight": paper(),
}
HALVES = Path(__file__).parent / "cache" / "halves"


def stack(data: Any, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images and labels at some places of a data set."""
    images, labels = zip(*(data[place][:2] for place in places), strict=True)
    return torch.stack(images), torch.as_tensor(labels)


def attacked(purifier: Purifier, x: Tensor, y: Tensor, eps: float, batch: int) -> dict[str, Tensor]:
    """The images under each attack."""
    model: Any = purifier.model
    defended = Defended(model, purifier, dtype="auto")
    found, ids = {}, torch.arange(len(x))
    for name, strength in (("PGD", eps / 4), ("PGD", eps), ("through averaging", eps), ("BPDA, margin", eps)):
        attack = known(Strength(eps=strength))[name].make(model, defended)
        assert attack is not None
        parts = zip(x.split(batch), y.split(batch), ids.split(batch), strict=True)
        key = f"{name} {255 * strength:g}/255" if name == "PGD" else name
        found[key] = torch.cat([attack(*part) for part in parts])
    return found


def detectors(model: nn.Module, features: str | None, chosen: Sequence[View]) -> dict[str, Detector]:
    """By name."""
    return {
        "variance": OutputVariance(model, chosen),
        "deviation": Deviation(model, features, chosen),
        "similarity": Similarity(Purifier(model, features, views=chosen)),
    }


def measure(
    purifier: Purifier, features: str | None, fit: Tensor, x: Tensor, y: Tensor, eps: float, batch: int
) -> dict[str, dict[str, dict[str, float]]]:
    """``[detector][views]``: areas in % by attack, and what is flagged of clean images."""
    sets, model = attacked(purifier, x, y, eps, batch), purifier.model
    assert isinstance(model, nn.Module)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for views, chosen in SETS.items():
        for name, detector in detectors(model, features, chosen).items():
            detector.fit(fit.split(batch))
            clean = detector.score(x)
            row = {"clean flagged": 100 * float((clean.double() > detector.threshold).double().mean())}
            for kind, images in sets.items():
                row[kind] = separation(clean.numpy(), detector.score(images).numpy()).auroc.value
            rows.setdefault(name, {})[views] = row
    return rows


def main(
    data: Annotated[Path, typer.Option(help="Folder of camvid/ and cifar10/.")] = DATA,
    images: Annotated[int, typer.Option(help="Images of CIFAR-10 that are attacked.")] = 256,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Print a table for each network and write them."""
    half = open_data(HALVES / "cifar-first.npz")  # first: what is missing shows at once
    x, y = load_camvid(data, "val")
    document = {"CamVid": measure(Purifier(camvid.network()), None, x[:40], x[40:], y[40:], 4 / 255, 4)}
    places = [place for place in range(2000) if place % 4 < 3][:1000]
    few = [place for place in range(2000) if place % 4 == 3][:images]
    fit, (x, y) = stack(half, places)[0], stack(half, few)
    document["CIFAR-10"] = measure(Purifier(cifar.network(), "layer3", eps=4 / 255), "layer3", fit, x, y, 2 / 255, 64)
    for title, rows in document.items():
        kinds = list(next(iter(rows["variance"].values())))
        table = Table(title=f"{title}: area under the characteristic in %")
        for heading in ("", "views", *kinds):
            table.add_column(heading, justify="right" if heading else "left")
        for name, sets in rows.items():
            for views, row in sets.items():
                table.add_row(name, views, *(f"{row[kind]:.1f}" for kind in kinds))
        Console().print(table)
    if output is not None:
        write_json(output, {"areas": document, "settings": {"images": images}})


if __name__ == "__main__":
    typer.run(main)
