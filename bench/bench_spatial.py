"""A grid of 775 rotations and translations on CIFAR-10: leaving at the first failure against trying every point.

And what S-PGD gains over the worst of k: from the same k transforms, and at equal time.

python bench/bench_spatial.py --output bench/results/spatial.json
"""

import json
import time
from pathlib import Path

import torch
import typer
from _data import DATA, load_cifar
from _write import write_json
from cifar import network
from torch import Tensor, nn

from equifast import attacks


def left(attack: attacks.Spatial, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent that an attack leaves, and its seconds."""
    start = time.perf_counter()
    moved = attack(x, y)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        return 100 * float((attack.model(moved).argmax(1) == y).float().mean()), seconds


def gain(model: nn.Module, x: Tensor, y: Tensor, k: int) -> dict[str, dict[str, float]]:
    """S-PGD of 5 steps, from as many starts as the worst of k has, and that of more in S-PGD's time."""
    found = {}
    settings = {"worst of k": ("worst-of-k", k), "S-PGD": ("spgd", k)}
    for name, (search, count) in settings.items():
        found[name] = dict(
            zip(("left, %", "s"), left(attacks.Spatial(model, search=search, k=count), x, y), strict=True)
        )
    more = round(k * found["S-PGD"]["s"] / found["worst of k"]["s"])
    took = left(attacks.Spatial(model, search="worst-of-k", k=more), x, y)
    found[f"worst of {more}"] = dict(zip(("left, %", "s"), took, strict=True))
    return found


def main(
    data: Path = DATA,
    images: int = 500,
    others: int = 100,
    k: int = 10,
    searched: int = 100,
    output: Path | None = None,
) -> None:
    """Accuracy, time of both, and whether they agree on every image; the order is learned on training images."""
    model = network(data)
    x, y = load_cifar(data, "test", images)
    learned_x, learned_y = load_cifar(data, "train", others)
    with torch.no_grad():
        clean = float((model(x).argmax(1) == y).float().mean())
    start = time.perf_counter()
    every = attacks.Spatial(model).failures(x, y)
    seconds = {"every point": time.perf_counter() - start}
    order = attacks.Spatial(model).learned_order(learned_x, learned_y)
    agree = True
    for name, attack in {
        "leaving, farthest first": attacks.Spatial(model),
        "leaving, learned order": attacks.Spatial(model, order=order),
    }.items():
        start = time.perf_counter()
        found = attack.find(x, y)
        seconds[name] = time.perf_counter() - start
        points = attack.grid.points()
        index = (found[:, None] == points).all(2).float().argmax(1)
        agree &= bool(torch.equal(every.gather(1, index[:, None])[:, 0], every.any(1)))
    result = {
        "images": images,
        "images of the learned order": others,
        "clean accuracy, %": 100 * clean,
        "grid accuracy, %": 100 * float((~every.any(1)).float().mean()),
        "seconds": seconds,
        "times faster": {name: seconds["every point"] / value for name, value in seconds.items()},
        "same verdict on every image": agree,
        f"random searches, k = {k}, {searched} images": gain(model, x[:searched], y[:searched], k),
    }
    print(json.dumps(result, indent=2))
    if output is not None:
        write_json(output, result)


if __name__ == "__main__":
    typer.run(main)
