"""Why twenty steps of Algorithm 1 equal its last two from a random corner of the ball: CamVid's val split under PGD.

    python bench/corner.py --output bench/results/corner.json

The first table follows Algorithm 1 step by step: how often a value of the image moves as the noise of the step says,
and how often as the gradient says; where the two differ, one of them decides. The second compares robust mIoU. The
network is that of `bench/camvid.py`, which trains it where it is absent.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
import typer
from _data import DATA
from _study import Data, Images, Output, Steps
from _write import write_json
from camvid import attacked, judge
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import equifast
from equifast import rng
from equifast.balls import Linf
from equifast.evaluate import difference, mean_iou

ROWS: dict[str, dict[str, Any]] = {
    "paper: 20 steps of 2 eps, noise": {},
    "its last five steps, from a random corner": {"steps": 5, "start": "corner"},
    "its last two": {"steps": 2, "start": "corner"},
    "its last one": {"steps": 1, "start": "corner"},
    "a random corner": {"steps": 0, "start": "corner"},
    "its last step from the image": {"steps": 1, "start": "origin"},
}


class Late(Linf):
    """The noise of Algorithm 1's last steps, where a run has fewer than its 20."""

    def step(self, x: Tensor, gradient: Tensor, origin: Tensor, **rest: Any) -> Tensor:
        # an ascent of T steps has sigma = (T - 1 - t) / T; the last T of 20 have (T - 1 - t) / 20
        left = rest["sigma"] / (1 - rest["sigma"]) * (rest["t"] + 1)  # T - 1 - t
        return super().step(x, gradient, origin, **{**rest, "sigma": left / 20})


@dataclasses.dataclass(frozen=True)
class Watched(Linf):
    """Notes how often values move as the noise says, how often as the gradient does, and how many are at a corner."""

    seen: list[tuple[int, float, float, float]] = dataclasses.field(default_factory=list)

    def step(self, x: Tensor, gradient: Tensor, origin: Tensor, **rest: Any) -> Tensor:
        moved = super().step(x, gradient, origin, **rest)
        noise = rng.normal(rest["seed"], rng.Stream.NOISE, rest["ids"], rest["draw"], rest["t"], x[0].numel()).view(
            x.shape
        )
        free = (origin > self.eps) & (origin < 1 - self.eps)  # elsewhere the bounds of the image cut the ball off
        side = (moved - origin).sign()[free]
        corner = ((moved - origin).abs() > 0.999 * self.eps)[free].double().mean()
        agreement = ((side == sign.sign()[free]).double().mean() for sign in (noise, gradient))
        self.seen.append((rest["t"], *(float(share) for share in agreement), float(corner)))
        return moved


def follow(model: torch.nn.Module, x: Tensor) -> list[dict[str, float]]:
    """Algorithm 1 on a batch, watched."""
    purifier = equifast.Purifier(model, preset="paper", eps=6 / 255)
    ball = Watched(purifier.ascent.ball.eps)
    purifier.ascent = dataclasses.replace(purifier.ascent, ball=ball)
    purifier(x)
    steps = purifier.ascent.steps
    return [
        {"step": t, "sigma": (steps - 1 - t) / steps, "as noise": noise, "as gradient": gradient, "at a corner": corner}
        for t, noise, gradient, corner in ball.seen
    ]


def main(data: Data = DATA, images: Images = 24, steps: Steps = 30, output: Output = None) -> None:
    """Print the tables and write them."""
    model, adversarial, y = attacked(data, images, steps)
    batches = torch.arange(len(y)).split(4)
    watched = follow(model, adversarial[:4])
    table = Table(title="Algorithm 1: shares of the values of four images, in %")
    for heading in ("step", "sigma", "move as the noise says", "as the gradient says", "end at a corner"):
        table.add_column(heading, justify="right")
    for row in watched:
        shares = (f"{100 * row[key]:.1f}" for key in ("as noise", "as gradient", "at a corner"))
        table.add_row(f"{row['step']:.0f}", f"{row['sigma']:.2f}", *shares)
    Console().print(table)
    results = {}
    for name, settings in ROWS.items():
        purifier = equifast.Purifier(model, preset="paper", eps=6 / 255, **settings)
        purifier.ascent = dataclasses.replace(purifier.ascent, ball=Late(purifier.ascent.ball.eps))
        defended = equifast.Defended(model, purifier)
        with torch.no_grad():
            parts = [judge(defended(adversarial[ids], ids=ids, draw=0), y[ids]) for ids in track(batches, name)]
        results[name] = np.concatenate(parts)
    first = next(iter(ROWS))
    table = Table(title=f"robust mIoU in %, {len(y)} images, ± standard error; differences paired over images")
    for heading in ("", "robust mIoU", "minus paper"):
        table.add_column(heading)
    found: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        figure, apart = mean_iou(result), difference(result, results[first])
        table.add_row(name, *(f"{e.value:.1f} ± {e.standard_error:.1f}" for e in (figure, apart)))
        found[name] = {
            "value": figure.value,
            "error": figure.standard_error,
            "difference": apart.value,
            "difference_error": apart.standard_error,
        }
    Console().print(table)
    if output is not None:
        settings = {"images": len(y), "steps": steps}
        document = {"steps": watched, "results": found, "settings": settings}
        write_json(output, document)


if __name__ == "__main__":
    typer.run(main)
