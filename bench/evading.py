"""Attackers who evade a detector, by a sum of both ends and by selective steps: that of invariance on CIFAR-10.

    python bench/halves.py
    python bench/evading.py

What PGD, attackers who climb the cross-entropy minus so many times what the score has above the threshold, and the one
of `--study evasion` leave of the model, and how much of it is flagged at 5%: images of the second half of CIFAR-10's
test images, the threshold by those of the first.
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
    """A table: a row for PGD, one for every weight of a sum, and one for every confidence of who takes turns."""
    equifast.keep_freed_memory()
    model, strength = networks.cifar().eval(), Strength(eps=2 / 255)
    clean, data = (open_data(HALVES / f"cifar-{half}.npz") for half in ("first", "second"))
    detector = Similarity(Invariance(model, "layer3", eps=4 / 255))
    fit = stack(clean, range(0, len(clean), max(1, len(clean) // 400)))[0]
    detector.fit(fit.split(100), false_positive_rate=0.05)
    x, y = stack(data, [i * len(data) // images for i in range(images)])
    pgd = attacks.PGD(model, eps=strength.eps, step_size=strength.step_size, steps=strength.steps)
    rows: dict[str, attacks.Attack] = {"PGD": pgd}
    patient = strength.patient(keep="best")
    for weight in (1.0, 10.0, 100.0, 1000.0):
        rows[f"sum, weight {weight:g}"] = attacks.Adaptive(model, detector, weight=weight, **patient)
    for confidence in (0.0, 1.0, 5.0):
        rows[f"selective, confidence {confidence:g}"] = attacks.Evading(
            model, detector, confidence=confidence, **patient
        )
    table = Table(title=f"{images} images")
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
