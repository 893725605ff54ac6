"""How strong every attack is on models without a defense, beside torchattacks where that has it.

    python bench/attack_strength.py --output bench/results/attacks.json

All iterated attacks take the same number of steps, restarts apart, from float32 gradients of the model itself;
`Square` as many queries as `--queries`. Differences to PGD are paired over images. The last table is of CIFAR-10,
where torchattacks runs unmodified: the part of the images that the model had right and each attack turned, and the
time of PGD in turns in one process.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torchattacks
import typer
from _data import DATA
from _study import ATTACK_SEED, Data, Output, Quick, Study
from _write import write_json
from front import study_of
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import equifast
from equifast import attacks
from equifast.evaluate import difference

Made = Callable[[Study, int, int], attacks.Attack]


def _plain(kind: type[attacks.Attack], **settings: Any) -> Made:
    def make(study: Study, steps: int, queries: int) -> attacks.Attack:
        own = {"eps": study.eps, "steps": steps, "seed": ATTACK_SEED}
        if not issubclass(kind, (attacks.APGD, attacks.MIM)):
            own["step_size"] = study.step_size
        return kind(study.model, **{**own, **settings})

    return make


ATTACKS: dict[str, Made] = {
    "FGSM": lambda study, steps, queries: attacks.FGSM(study.model, eps=study.eps, seed=ATTACK_SEED),
    "IFGSM": _plain(attacks.IFGSM),
    "PGD": _plain(attacks.PGD),
    "MIM": _plain(attacks.MIM),
    "CW": _plain(attacks.CW),
    "CW, confidence 5": _plain(attacks.CW, confidence=5.0),
    "Houdini": _plain(attacks.Houdini),
    "SegPGD": _plain(attacks.SegPGD),
    "CosPGD": _plain(attacks.CosPGD),
    "APGD": _plain(attacks.APGD),
    "APGD, DLR": _plain(attacks.APGD, objective="dlr"),
    "APGD, targeted DLR, 3 classes": _plain(attacks.APGD, objective="targeted-dlr", restarts=3),
    "Square": lambda study, steps, queries: attacks.Square(study.model, eps=study.eps, steps=queries, seed=ATTACK_SEED),
}


def _attacked(attack: Callable[..., Tensor], study: Study, name: str) -> Tensor:
    parts = []
    for first in track(range(0, len(study.images), study.batch), name, console=Console(stderr=True), transient=True):
        rows = slice(first, first + study.batch)
        ids = torch.arange(len(study.images))[rows]
        parts.append(attack(study.images[rows], study.labels[rows], ids))
    return torch.cat(parts)


def _results(study: Study, x: Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found = [study.judge(study.model(a), b) for a, b in zip(x.split(16), study.labels.split(16), strict=True)]
    return np.concatenate(found)


def strengths(study: Study, steps: int, queries: int) -> dict[str, Any]:
    """What is left of the model's figure under each attack."""
    study.model.eval().requires_grad_(False)
    results, entries = {"none": _results(study, study.images)}, {}
    for name, make in ATTACKS.items():
        start = time.perf_counter()
        x = _attacked(make(study, steps, queries), study, name)
        seconds = (time.perf_counter() - start) / len(x)
        assert (x - study.images).abs().max() <= study.eps + 1e-6, name
        results[name] = _results(study, x)
        entries[name] = {"seconds": seconds}
    for name, found in results.items():
        estimate, apart = study.estimate(found), difference(found, results["PGD"])
        entries.setdefault(name, {}).update(
            value=estimate.value,
            error=estimate.standard_error,
            minus_pgd={"value": apart.value, "error": apart.standard_error},
        )
    return entries


def beside_torchattacks(study: Study, steps: int) -> dict[str, Any]:
    """Success rates on the images that the model has right, ours and theirs, and the time of PGD."""
    model, eps, size = study.model.eval(), study.eps, study.step_size
    right = torch.from_numpy(_results(study, study.images))
    pairs: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "PGD": (
            attacks.PGD(model, eps=eps, step_size=size, steps=steps, seed=ATTACK_SEED),
            torchattacks.PGD(model, eps=eps, alpha=size, steps=steps),
        ),
        "MIM": (
            attacks.MIM(model, eps=eps, steps=steps),
            torchattacks.MIFGSM(model, eps=eps, alpha=size, steps=steps),
        ),
        "APGD": (
            attacks.APGD(model, eps=eps, steps=steps, seed=ATTACK_SEED),
            torchattacks.APGD(model, eps=eps, steps=steps, loss="ce"),
        ),
        "APGD, DLR": (
            attacks.APGD(model, eps=eps, steps=steps, objective="dlr", seed=ATTACK_SEED),
            torchattacks.APGD(model, eps=eps, steps=steps, loss="dlr"),
        ),
        "CW-L2": (
            attacks.CWL2(model, steps=steps, searches=5, constant=1.0),
            torchattacks.CW(model, c=1, kappa=0, steps=5 * steps, lr=0.01),
        ),
        "Square, 200 queries": (
            attacks.Square(model, eps=eps, steps=200, seed=ATTACK_SEED),
            torchattacks.Square(model, eps=eps, n_queries=200),
        ),
    }
    entries: dict[str, Any] = {}
    for name, (ours, theirs) in pairs.items():
        rates, distances = [], []
        for attack, label in ((ours, "ours"), (lambda x, y, ids, theirs=theirs: theirs(x, y), "theirs")):
            torch.manual_seed(ATTACK_SEED)
            x = _attacked(attack, study, f"{name}, {label}")
            turned = torch.from_numpy(~_results(study, x)) & right
            rates.append(100 * float(turned.sum() / right.sum()))
            moved = (x.detach() - study.images).flatten(1).norm(dim=1)[turned]
            distances.append(float(moved.median()) if len(moved) else float("nan"))
        entries[name] = {"ours": rates[0], "theirs": rates[1], "median L2, ours": distances[0]}
        entries[name]["median L2, theirs"] = distances[1]
    x, y = study.images[: study.batch], study.labels[: study.batch]
    ours, theirs = pairs["PGD"]
    cheaper = attacks.PGD(model, eps=eps, step_size=size, steps=steps, seed=ATTACK_SEED, dtype="auto")
    runs = {"ours": ours, 'ours, dtype="auto"': cheaper, "theirs": theirs}
    timed: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(5):
        for label, attack in runs.items():
            start = time.perf_counter()
            attack(x, y)
            timed[label].append(time.perf_counter() - start)
    entries["PGD"]["seconds"] = {label: statistics.median(times) for label, times in timed.items()}
    return entries


def main(
    data: Data = DATA,
    camvid_images: Annotated[int, typer.Option(help="Images of CamVid's test split.")] = 24,
    cifar_images: Annotated[int, typer.Option(help="Images of CIFAR-10's test set.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of iterated attacks.")] = 20,
    queries: Annotated[int, typer.Option(help="Queries of Square.")] = 200,
    quick: Quick = False,
    output: Output = None,
) -> None:
    """Four tables: CamVid, CIFAR-10, and CIFAR-10 beside torchattacks, on two networks."""
    equifast.keep_freed_memory()
    if quick:
        camvid_images, cifar_images, steps, queries = 4, 64, 5, 20
    document: dict[str, Any] = {"settings": {"steps": steps, "queries": queries}}
    for data_set, images in (("camvid", camvid_images), ("cifar", cifar_images)):
        study = study_of(data_set, data, "standard", "test", images)
        entries = strengths(study, steps, queries)
        document[data_set] = {"images": len(study.images), "eps": study.eps, "attacks": entries}
        table = Table(title=f"{data_set}, {len(study.images)} test images, {study.figure}")
        for heading in ("", "left", "minus PGD", "s/image"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, entry in entries.items():
            apart, seconds = entry["minus_pgd"], entry.get("seconds")
            table.add_row(
                name,
                f"{entry['value']:.1f} ± {entry['error']:.1f}",
                f"{apart['value']:+.1f} ± {apart['error']:.1f}",
                "" if seconds is None else f"{seconds:.2f}",
            )
        Console().print(table)
    # on the standard network nearly all are turned by anyone; one that was trained against attacks tells more
    for training in ("standard", "robust"):
        study = study_of("cifar", data, training, "test", cifar_images)
        beside = beside_torchattacks(study, steps)
        document["cifar, beside torchattacks" + (", robust" if training == "robust" else "")] = beside
        table = Table(
            title=f"CIFAR-10, {training}: turned, in % of the images that were right; median distance of those"
        )
        for heading in ("", "ours", "theirs", "L2, ours", "L2, theirs"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, entry in beside.items():
            figures = (entry["ours"], entry["theirs"], entry["median L2, ours"], entry["median L2, theirs"])
            table.add_row(name, *(f"{figure:.1f}" if i < 2 else f"{figure:.3f}" for i, figure in enumerate(figures)))
        Console().print(table)
        Console().print({label: f"{seconds:.2f} s" for label, seconds in beside["PGD"]["seconds"].items()})
    if output is not None:
        write_json(Path(output), document)


if __name__ == "__main__":
    typer.run(main)
