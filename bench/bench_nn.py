"""Layers over groups beside plain convolutions of the same shape, and how far layers are from commuting.

python bench/bench_nn.py --output bench/results/nn.json
"""

import json
import statistics
import time
from pathlib import Path

import torch
import typer
from _data import DATA, load_cifar
from _write import write_json
from torch import Tensor, nn
from torch.nn import functional

from equifast.nn import (
    C8,
    P4,
    P4M,
    Group,
    GroupConv2d,
    ScaleConv2d,
    SteerableConv2d,
    as_convolutions,
    equivariance_error,
)

# channels without the group, and size: of the networks of equifast.nn, at 64 images
SHAPES = ((10, 26), (20, 10), (32, 32), (64, 16), (128, 8), (256, 4), (256, 2))
BATCH = 64


def seconds(layer: nn.Module, x: Tensor, weights: bool) -> float:
    """Of forward and backward, to the images alone or to the weights too."""
    start = time.perf_counter()
    y = layer(x)
    torch.autograd.grad(y, [x, *layer.parameters()] if weights else [x], torch.ones_like(y))
    return time.perf_counter() - start


def times(layer: nn.Module, plain: nn.Module, x: Tensor, weights: bool, rounds: int) -> float:
    """Of the layer over that of the plain one, the median of alternated rounds."""
    ratios = []
    for number in range(rounds + 2):
        order = (layer, plain) if number % 2 else (plain, layer)
        took = {each: seconds(each, x, weights) for each in order}
        ratios.append(took[layer] / took[plain])
    return statistics.median(ratios[2:])


def speed(group: Group, channels: int, size: int, rounds: int) -> dict[str, float]:
    layer = GroupConv2d(channels, channels, 3, group=group, padding=1)
    plain = as_convolutions(layer)
    x = torch.rand(BATCH, channels * group.order, size, size, requires_grad=True)
    training = times(layer, plain, x, True, rounds)
    for each in (layer, plain):
        each.eval().requires_grad_(False)
    return {
        "forward and backward, times plain": training,
        "input gradients in eval, times plain": times(layer, plain, x, False, rounds),
    }


def scale_error(layer: ScaleConv2d, x: Tensor, factor: float) -> float:
    """Of the maps of an image resized by a factor, against the maps resized and moved by one scale; the inner ones."""
    count = len(layer.scales)
    size = [round(side * factor) for side in x.shape[2:]]

    def resized(maps: Tensor) -> Tensor:
        return functional.interpolate(maps, size, mode="bilinear", antialias=factor < 1)

    with torch.no_grad():
        moved = layer(resized(x)).unflatten(1, (-1, count))
        stayed = layer(x).unflatten(1, (-1, count))
        # scales multiply by 2: an image at half its size is at the next scale what it was
        shift = round(torch.log2(torch.tensor(1 / factor)).item())
        a = moved[:, :, shift:] if shift > 0 else moved[:, :, :shift]
        b = stayed[:, :, :-shift] if shift > 0 else stayed[:, :, -shift:]
        b = resized(b.flatten(1, 2)).unflatten(1, (-1, a.shape[2]))
        return float((a - b).norm() / b.norm())


def main(data: Path = DATA, rounds: int = 15, images: int = 64, output: Path | None = None) -> None:
    """Ratios of times at 64 images, and relative errors on CIFAR-10 test images."""
    torch.manual_seed(0)
    x, _ = load_cifar(data, "test", images)
    result: dict[str, object] = {"threads": torch.get_num_threads(), "rounds": rounds}
    for name, group in (("P4", P4), ("P4M", P4M)):
        for channels, size in SHAPES:
            wide = channels if group is P4 else max(1, round(channels / 2**0.5))
            row = speed(group, wide, size, rounds)
            result[f"{name}, {wide} channels, {size}x{size}"] = row
            print(name, wide, size, {k: round(v, 3) for k, v in row.items()}, flush=True)
    errors = {}
    for name, layer, group in (
        ("P4", GroupConv2d(3, 16, 3, group=P4, lifting=True, padding=1), P4),
        ("P4M", GroupConv2d(3, 16, 3, group=P4M, lifting=True, padding=1), P4M),
        ("C4, steerable 5x5", SteerableConv2d(3, 16, 5, group=P4, lifting=True, padding=2), P4),
        ("C8, steerable 5x5", SteerableConv2d(3, 16, 5, group=C8, lifting=True, padding=2), C8),
        ("C8, steerable 7x7", SteerableConv2d(3, 16, 7, group=C8, lifting=True, padding=3), C8),
    ):
        every = equivariance_error(layer, x, group)
        errors[name] = {"quarter turns": float(every[:: group.rotations // 4].max())}
        if group is C8:
            errors[name]["45 degrees"] = float(every[1])
    plain = nn.Conv2d(3, 16, 3, padding=1)
    errors["plain"] = {"quarter turns": float(equivariance_error(plain, x, P4, regular_out=False).max())}
    for shared in (True, False):
        layer = ScaleConv2d(3, 16, 3, scales=(0.5, 1.0, 2.0), shared=shared, padding=1)
        errors[f"scales, {'shared' if shared else 'separate'} weights"] = {"half the size": scale_error(layer, x, 0.5)}
    result["errors"] = errors
    print(json.dumps(errors, indent=2))
    if output is not None:
        write_json(output, result)


if __name__ == "__main__":
    typer.run(main)
