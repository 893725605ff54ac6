"""How much of a purification step is not the network.

    python bench/bench_step.py --output bench/results/step.json

One step of a preset on images of the CamVid study's size (240x176) with its network, beside the passes of the network
alone: forward and backward of the same rendered views, with gradients of the same shape; of views that are targets
forward alone. What the step takes longer is views, similarity, momentum and the sign step. Where features are the
logits before they are enlarged to the image (`head`), the network alone does not enlarge them either. Steps and passes
take turns in one process, figures are medians; the weights do not matter to the time and are random.
Freed memory is kept (`equifast.keep_freed_memory`), for all alike.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from _models import SegmentationNet
from _write import write_json
from rich.console import Console
from rich.table import Table

import equifast
from equifast import ops
from equifast.balls import Step


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def measure(preset: str, features: str | None, images: int, height: int, width: int, rounds: int) -> dict[str, float]:
    """Medians in seconds: the step on each backend, and the network alone."""
    torch.manual_seed(0)
    equifast.keep_freed_memory()
    model = SegmentationNet(11).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    purifier = equifast.Purifier(model, features, preset)
    given = torch.rand(images, 3, height, width)
    with purifier._objective(given, None, 0, purifier.views_per_step) as (x, objective, seed, ids):
        sampled = objective.sample(x, 0, purifier.views_per_step)
        followed = [True, *(view.followed and purifier.view_gradient > 0 for view in sampled)]
        with torch.no_grad():
            rendered = [x, *objective.render(x, sampled)]
            upstream = [torch.rand_like(objective.features(image)) for image in rendered]

        def network() -> None:
            for image, gradient, both in zip(rendered, upstream, followed, strict=True):
                leaf = image.detach()
                if both:
                    torch.autograd.grad(objective.features(leaf.requires_grad_()), leaf, gradient)
                else:
                    with torch.no_grad():
                        objective.features(leaf)

        momentum, size = torch.zeros_like(x), purifier.ascent.step_size

        def step() -> None:
            place: Step = {"size": size, "sigma": 0.0, "seed": seed, "ids": ids, "draw": 0, "t": 0}
            purifier.ascent.move(objective, x, momentum, x, 0, place)

        def on(backend: str) -> float:
            with ops.use(backend):
                return seconds(step)

        turns = [
            (seconds(network), on("native"), on("reference"))
            for _ in range(rounds + 1)  # the first warms up
        ]
    names = ("network", "native", "reference")
    return dict(zip(names, (statistics.median(column[1:]) for column in zip(*turns, strict=True)), strict=True))


def main(
    images: Annotated[int, typer.Option(help="Images in a batch.")] = 4,
    height: Annotated[int, typer.Option(help="Height of the images.")] = 176,
    width: Annotated[int, typer.Option(help="Width of the images.")] = 240,
    rounds: Annotated[int, typer.Option(help="Steps of each kind.")] = 15,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Print the table and write it."""
    rows = {
        f"{preset}, {features or 'output'}": measure(preset, features, images, height, width, rounds)
        for preset in ("fast", "paper")
        for features in (None, "head")
    }
    table = Table(title=f"one step on {images} images of {width}x{height}: milliseconds, and what is not the network")
    for heading in ("preset, features", "network alone", "step, native", "step, reference"):
        table.add_column(heading, justify="left" if heading.startswith("preset") else "right")
    for name, row in rows.items():
        steps = (f"{1e3 * row[b]:.1f} ({100 * (1 - row['network'] / row[b]):.0f}%)" for b in ("native", "reference"))
        table.add_row(name, f"{1e3 * row['network']:.1f}", *steps)
    Console().print(table)
    if output is not None:
        settings = {"images": images, "height": height, "width": width, "rounds": rounds}
        write_json(output, {"seconds": rows, "settings": settings})


if __name__ == "__main__":
    typer.run(main)
