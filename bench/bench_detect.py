"""What a detector's score costs, beside scoring the published way.

    python bench/bench_detect.py --output bench/results/detect.json

The published way: one image at a time, a forward pass for each of the paper's eight views, all pairs of the maps,
float32, with a graph that nobody differentiates. Ours: the same views in one call on all images, and the detectors with
their own. In turns in one process, medians; beside them a forward pass of the model, and predictions from images that
`fast` purifies: all, or only those that the variance with a smaller mirror image suspects (`views.guard()`), four at a
time, where a suspect is mostly alone, and all in one call, where it is not; its threshold is set so that it suspects
one in twenty. The network is that of the CamVid study; its weights are random, which time does not tell.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _models import SegmentationNet
from _published import published_similarity, published_warp
from _write import write_json
from bench_step import seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import equifast
from equifast import views
from equifast.detectors import Deviation, OutputVariance, Similarity


class Chosen(OutputVariance):
    """With a threshold that is given: noise is not what thresholds are of."""

    level = 0.0

    @property
    def threshold(self) -> float:
        return self.level


def published(model: nn.Module, x: Tensor) -> Tensor:
    """The scores of images, one after the other."""
    scores = []
    for number, image in enumerate(x.split(1)):
        ids, size = torch.tensor([number]), (x.shape[2], x.shape[3])
        sampled = views.sample(views.paper(), size, seed=0, ids=ids)
        leaf = image.detach().requires_grad_()
        rendered = [published_warp(view.color(leaf), view.theta[None], [view.size])[0] for view in sampled]
        maps = [model(each) for each in (leaf, *rendered)]
        scores.append(published_similarity(maps[0], maps[1:], torch.stack([view.theta for view in sampled])))
    return torch.cat(scores)


def main(
    images: Annotated[int, typer.Option(help="Images that are scored in one call.")] = 100,
    slow_images: Annotated[int, typer.Option(help="Images that are scored the published way, or purified.")] = 8,
    height: Annotated[int, typer.Option(help="Height of the images.")] = 176,
    width: Annotated[int, typer.Option(help="Width of the images.")] = 240,
    rounds: Annotated[int, typer.Option(help="How often, after one to warm up.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Print the table and write it."""
    torch.manual_seed(0)
    equifast.keep_freed_memory()
    equifast.keep_kernels()
    model = SegmentationNet(11).eval().to(memory_format=torch.channels_last)
    x, ids = torch.rand(images, 3, height, width), torch.arange(images)
    some, eight = x[:slow_images], views.paper()
    small = [*views.fast(), views.Resize(0.7), views.Shift(), views.Rotation(15)]  # the paper's enlarge one in four
    assert len(eight) == len(small) == 8
    always = {dtype: equifast.Defended(model, equifast.Purifier(model), dtype=dtype) for dtype in ("float32", "auto")}
    detectors = {
        "similarity, the paper's eight views": Similarity(equifast.Purifier(model, views=eight, pairing="anchor")),
        "similarity, eight that do not enlarge": Similarity(equifast.Purifier(model, views=small)),
        "similarity, mirror image": Similarity(equifast.Purifier(model, views=[views.Flip()])),
        "variance, eight that do not enlarge": OutputVariance(model, small),
        "variance, mirror image": OutputVariance(model),
        "deviation, mirror image": Deviation(model).fit(x.split(4)),
        "variance, mirror image of 0.7 of the size": OutputVariance(model, views.guard()),
    }
    guard = Chosen(model, views.guard()).fit(x.split(4))
    guard.level = float(guard.score(x, ids).sort(descending=True).values[images // 20])
    guarded = equifast.Defended(model, always["auto"].purifier, detector=guard, dtype="auto")

    def predict(defended: nn.Module, given: Tensor) -> None:
        for part, numbers in zip(given.split(4), ids.split(4), strict=False):
            defended(part, ids=numbers)

    tasks: dict[str, tuple[int, Callable[[], Any]]] = {
        "published": (slow_images, lambda: published(model, some)),
        **{name: (images, lambda d=d: d.score(x, ids)) for name, d in detectors.items()},  # type: ignore[misc]
        "a forward pass of the model": (images, lambda: [model(part) for part in x.split(4)]),
        "`fast`": (slow_images, lambda: predict(always["float32"], some)),
        "`fast`, dtype='auto'": (slow_images, lambda: predict(always["auto"], some)),
        "detect, then `fast`, dtype='auto'": (images, lambda: predict(guarded, x)),
        "`fast`, dtype='auto', in one call": (images, lambda: always["auto"](x, ids=ids)),
        "detect, then `fast`, dtype='auto', in one call": (images, lambda: guarded(x, ids=ids)),
    }

    def once() -> list[float]:
        found = []
        for name, (count, task) in tasks.items():
            with torch.set_grad_enabled(name == "published"):
                found.append(seconds(task) / count)
        return found

    once()
    rows = dict(zip(tasks, map(statistics.median, zip(*(once() for _ in range(rounds)), strict=True)), strict=True))
    table = Table(title=f"one image of {width}x{height}")
    for heading in ("", "ms", "times published"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, spent in rows.items():
        table.add_row(name, f"{1e3 * spent:.1f}", f"{rows['published'] / spent:.1f}")
    Console().print(table)
    print(f"{guarded.purified} of {guarded.seen} images were suspected")
    if output is not None:
        settings = {"images": images, "slow_images": slow_images, "height": height, "width": width, "rounds": rounds}
        write_json(output, {"seconds": rows, "settings": settings})


if __name__ == "__main__":
    typer.run(main)
