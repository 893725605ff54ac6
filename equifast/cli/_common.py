"""What the commands share: the application, consoles, options, and what they make of texts."""

import io
import math
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from equifast import __version__
from equifast._allocator import keep_freed_memory, keep_kernels
from equifast._files import replacing
from equifast.features import Features, evaluating, suggest
from equifast.purifier import PRESETS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# What a command says in one sentence: those of its own, and those of users' files and models.
FAILURES = (ValueError, TypeError, RuntimeError, OSError, AssertionError, LookupError, AttributeError)
stdout = Console()
stderr = Console(stderr=True)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Model = Annotated[
    str, typer.Option(help="demo, torchvision:NAME[:WEIGHTS] (none: random ones), timm:NAME or file.py:function.")
]
WhereFeatures = Annotated[
    str | None, typer.Option("--features", help="Submodule whose output is used; found where not given.")
]
WhichPreset = Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layer", help="Another submodule whose features deviation, or combined, compares; any number."),
]
Device = Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")]


def _version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"equifast {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Test-time purification by equivariance, and what it is worth."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    keep_freed_memory()
    keep_kernels()


def fail(message: str) -> typer.Exit:
    stderr.print(f"equifast: {message}", highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(2)


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    )


def parse_radius(option: str, text: str) -> float:
    try:
        radius = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        radius = math.nan
    if not radius > 0:
        raise typer.BadParameter(f"{text!r} is no number above 0, such as 6/255 or 0.02", param_hint=repr(option))
    return radius


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size such as 176x240", param_hint="'--size'")
    return int(match[1]), int(match[2])


def parse_device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but no CUDA device can be used here")
    return device


def list_targets(found: list[tuple[Path, Path]], output: Path) -> list[tuple[Path, Path]]:
    targets: dict[Path, Path] = {}
    for source, name in found:
        target = name.with_suffix(".png")
        if targets.setdefault(target, source) != source:
            raise ValueError(f"{str(targets[target])!r} and {str(source)!r} would both be written to {str(target)!r}")
        if (output / target).resolve() == source.resolve():
            raise ValueError(f"{str(source)!r} would be overwritten; choose another output folder")
    return [(source, target) for target, source in targets.items()]


def check_layers(network: nn.Module, layers: Sequence[str]) -> None:
    for name in layers:
        try:
            Features(network, name)
        except ValueError as error:
            raise ValueError(str(error).replace("features", "layer", 1)) from None


def find_features(network: nn.Module, x: Tensor) -> str | None:
    """The model's own output where it is dense, else its last dense submodule."""
    try:
        with evaluating(x, network), torch.no_grad():
            Features(network)(x.clone())  # models may work in place
    except ValueError:
        name = suggest(network, x)
        if name is None:
            raise ValueError(
                "the model has no submodule with features (N, C, h, w); name one with --features"
            ) from None
        stderr.print(f"equifast: features of {name!r}, the model's last dense submodule", highlight=False, markup=False)
        return name
    return None


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text)
