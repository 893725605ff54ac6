"""What the studies of symmetry share: data, trainings and results that are kept, tables with paired differences."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _data import load_cifar
from _write import write
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from equifast.evaluate import difference, open_data
from equifast.evaluate.metrics import average
from equifast.train import Recipe, train

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of trainings, results, tables and plots.")]
Seeds = Annotated[int, typer.Option(help="Trainings of each network, with seeds 0, 1, ...")]
Kind = Annotated[
    str,
    typer.Option(
        help="digits (of scikit-learn, 28x28, no download), cifar10, or files: --data has train and test, folders of "
        "classes or .npz, of square images of one size."
    ),
]

# of the digits' 1797: a test set that never changes
_DIGITS_TEST = 500


@dataclass(frozen=True)
class Split:
    """Images to learn from, and others: (N, C, H, W) in [0, 1] and (N,)."""

    train: TensorDataset
    x: Tensor
    y: Tensor

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def classes(self) -> int:
        return int(torch.cat([self.train.tensors[1], self.y]).max()) + 1


def open_split(kind: str, data: Path, train_images: int | None = None, images: int | None = None) -> Split:
    """The digits enlarged to 20x20 and centered in 28x28, or CIFAR-10; the first so many test images."""
    if kind == "digits":
        found = load_digits()
        x = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
        x = functional.pad(functional.interpolate(x, (20, 20), mode="bicubic", antialias=True).clamp(0, 1), (4,) * 4)
        y = torch.tensor(found.target).long()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        test, rest = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
        learned, other = (x[rest], y[rest]), (x[test], y[test])
    elif kind == "cifar10":
        learned, other = load_cifar(data, "train", train_images), load_cifar(data, "test", images)
    elif kind == "files":
        learned, other = _from_files(data, "train", train_images), _from_files(data, "test", images)
        if learned[0].shape[1:] != other[0].shape[1:]:
            raise typer.BadParameter(
                f"{data} has training images {tuple(learned[0].shape)}, test ones {tuple(other[0].shape)}"
            )
    else:
        raise typer.BadParameter(f"kind is {kind!r}; it must be digits, cifar10 or files")
    count = slice(train_images)
    return Split(TensorDataset(learned[0][count], learned[1][count]), other[0][:images], other[1][:images])


def _from_files(data: Path, part: str, images: int | None) -> tuple[Tensor, Tensor]:
    arrays = data / f"{part}.npz"
    try:
        opened = open_data(arrays if arrays.exists() else data / part, images)
        found = [opened[i] for i in range(len(opened))]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    sizes = {tuple(image.shape[1:]) for image, _ in found}
    if len(sizes) > 1 or any(height != width for height, width in sizes) or found[0][1].dim():
        raise typer.BadParameter(
            f"{data / part} has sizes {sorted(sizes)[:3]}; images must be square, of one size and one class each"
        )
    return torch.stack([image for image, _ in found]), torch.stack([label for _, label in found])


class Kept:
    """A study's folder: what was trained and measured stays, and another study's is refused.

    Args:
        folder: where.
        settings: of the study; those of what is there already must be the same.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        path, given = folder / "study.json", json.loads(json.dumps(dict(settings), default=str))
        if path.exists():
            before = json.loads(path.read_text())
            changed = [
                f"{k} (was {before.get(k)!r}, is {given.get(k)!r})"
                for k in {**before, **given}
                if before.get(k) != given.get(k)
            ]
            if changed:
                raise typer.BadParameter(f"{folder} holds a study with other settings: {', '.join(changed)}")
        else:
            write(path, json.dumps(given, indent=2) + "\n")

    def trained(
        self, name: str, build: Callable[[], nn.Module], data: TensorDataset, recipe: Recipe, seed: int, **how: Any
    ) -> nn.Module:
        """A network, trained here or before; its first weights are of the seed too."""
        torch.manual_seed(seed)
        model = build()
        start = time.perf_counter()
        log = train(model, data, recipe, seed=seed, folder=self.folder / f"{name}-{seed}", **how)
        took = time.perf_counter() - start
        if took > 1:
            print(
                f"{name}, seed {seed}: {took:.0f} s, accuracy in training {100 * log[-1]['accuracy']:.1f}", flush=True
            )
        return model.eval().requires_grad_(False)

    def measured(self, name: str, seed: int, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What was measured of a network; arrays come back as lists."""
        path = self.folder / f"{name}-{seed}" / "measured.json"
        if not path.exists():
            write(path, json.dumps(dict(compute()), default=lambda array: np.asarray(array).tolist()))
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def over_seeds(rows: Sequence[Mapping[str, Any]], column: str) -> NDArray[np.float64]:
    """(N,) each image's figure, the mean over trainings."""
    return np.mean([np.asarray(row[column], dtype=np.float64) for row in rows], 0)


def table(
    title: str,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    columns: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Prints figures over trainings with standard errors over images, the spread of trainings, and paired differences.

    Returns:
        What is printed: ``table`` (name, column: value, standard error, of each training), ``differences``.
    """
    console, drawn = Console(width=160), Table("", *columns, title=title, title_style="")
    found: dict[str, Any] = {"table": {}, "differences": {}}
    for name, rows in results.items():
        cells = []
        found["table"][name] = {}
        for column in columns:
            estimate = average(over_seeds(rows, column))
            each = [100 * float(np.mean(row[column])) for row in rows]
            cells.append(f"{estimate} ({min(each):.1f}-{max(each):.1f})")
            found["table"][name][column] = {
                "value": estimate.value, "standard error": estimate.standard_error, "trainings": each
            }  # fmt: skip
        drawn.add_row(name, *cells)
    console.print(drawn)
    differences = Table("", *columns, title="paired over images", title_style="")
    for a, b in pairs:
        cells = []
        for column in columns:
            estimate = difference(over_seeds(results[a], column), over_seeds(results[b], column))
            each = [
                100 * float(np.mean(x[column]) - np.mean(y[column]))
                for x, y in zip(results[a], results[b], strict=True)
            ]
            span = f"{min(each):+.1f} to {max(each):+.1f}"
            cells.append(f"{estimate.value:+.1f} ± {estimate.standard_error:.1f} ({span})")
            found["differences"].setdefault(f"{a} - {b}", {})[column] = {
                "value": estimate.value, "standard error": estimate.standard_error, "trainings": each
            }  # fmt: skip
        differences.add_row(f"{a} - {b}", *cells)
    if pairs:
        console.print(differences)
    return found


def bars(results: Mapping[str, Mapping[str, Mapping[str, float]]], columns: Sequence[str], title: str) -> Any:
    """The table as a bar chart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * len(results) + 2, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    places = np.arange(len(results))
    for number, column in enumerate(columns):
        cells = [row[column] for row in results.values()]
        axis.bar(
            places + 0.8 * (number + 0.5) / len(columns) - 0.4,
            [cell["value"] for cell in cells],
            0.8 / len(columns),
            yerr=[cell["standard error"] for cell in cells],
            capsize=2,
            label=column,
        )
    axis.set_xticks(places, list(results), rotation=20, ha="right")
    axis.set_ylabel("accuracy, %")
    axis.set_title(title, fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    return figure
