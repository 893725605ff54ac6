"""``equifast bench``."""

from typing import Annotated

import torch
import typer
from rich.table import Table

from equifast import ops
from equifast.cli._common import (
    FAILURES,
    Device,
    Model,
    WhereFeatures,
    WhichPreset,
    app,
    fail,
    find_features,
    parse_device,
    parse_size,
    stdout,
)
from equifast.evaluate import PARTS, profile_step
from equifast.models import first_line, load_model
from equifast.purifier import Purifier

__all__ = ["bench"]


@app.command()
def bench(
    model: Model,
    size: Annotated[str, typer.Option(help="Height and width of the images, as 176x240.")],
    images: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 1,
    features: WhereFeatures = None,
    preset: WhichPreset = "fast",
    rounds: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 5,
    device: Device = "cpu",
) -> None:
    """Show where a step of purification goes, on random images."""
    height, width = parse_size(size)
    try:
        network = load_model(model).to(parse_device(device))
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(images, 3, height, width, generator=generator).to(parse_device(device))
        where = features if features is not None else find_features(network, x)
        purifier = Purifier(network, where, preset)
        profile = profile_step(purifier, x, rounds)
    except FAILURES as error:
        raise fail(first_line(error)) from error
    table = Table(title=f"one step of {preset} on {images} x {size}, median of {rounds}")
    for heading in ("", "ms", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for part in PARTS:
        seconds = profile.seconds[part]
        table.add_row(part, f"{1e3 * seconds:.1f}", f"{100 * seconds / profile.total:.0f}%")
    table.add_row("together", f"{1e3 * profile.total:.1f}", "100%")
    stdout.print(table)
    steps = purifier.ascent.steps
    stdout.print(
        f"A step makes {profile.passes:.1f} forward and backward passes of an image (a forward pass alone is half of "
        f"one); {steps} steps make {steps * profile.passes:.0f}.\n"
        f"{100 * profile.overhead:.0f}% of a step is not the network, which runs "
        f"{'as a folded copy' if profile.folded else 'as it is'}, on the {ops.choose(x.device)} backend.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
