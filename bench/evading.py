"""How much the weight of an attacker who evades a detector decides, by the detector of invariance on CIFAR-10.

    python bench/halves.py
    python bench/evading.py

What PGD, and attackers of `--study evasion` who weigh the score otherwise than its 1, leave of the model, and how much
of it is flagged at 5%: images of the second half of CIFAR-10's test images, the threshold by those of the first.
"""

from typing import Annotated

import networks
import torch
import typer
from guard import HALVES, stack
from rich.console import Console
from rich.table import Table

import equifast
from equifast import attacks
from equifast.defenses import Invariance
from equifast.detectors import Similarity
from equifast.evaluate import Strength, open_data


def main(images: Annotated[int, typer.Option(help="How many are attacked, evenly from the half.")] = 64) -> None:
    """A table: a row for PGD, and one for every weight."""
    equifast.keep_freed_memory()
    model, strength = networks.cifar().eval(), Strength(eps=2 / 255)
    clean, data = (open_data(HALVES / f"cifar-{half}.npz") for half in ("first", "second"))
    detector = Similarity(Invariance(model, "layer3", eps=4 / 255))
    fit = stack(clean, range(0, len(clean), max(1, len(clean) // 400)))[0]
    detector.fit(fit.split(100), false_positive_rate=0.05)
    x, y = stack(data, [i * len(data) // images for i in range(images)])
    pgd = attacks.PGD(model, eps=strength.eps, step_size=strength.step_size, steps=strength.steps)
    rows: dict[str, attacks.Attack] = {"PGD": pgd}
    for weight in (1.0, 10.0, 100.0, 1000.0):
        rows[f"weight {weight:g}"] = attacks.Adaptive(model, detector.at(0.05), weight=weight, **strength.patient())
    spread = detector.score(fit).std()
    table = Table(title=f"{images} images; clean scores vary by {spread:.3f}, threshold {detector.threshold:.3f}")
    for heading in ("", "flagged, %", "accuracy, %"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, attack in rows.items():
        found = attack(x, y)
        with torch.no_grad():
            right = (model(found).argmax(1) == y).float().mean()
        table.add_row(name, f"{100 * detector.predict(found).float().mean():.1f}", f"{100 * right:.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
