"""Train the network of `equifast demo` on synthetic scenes, measure it, write the package's assets.

    python bench/train_demo.py --output equifast/demo/assets

Needs scikit-learn for the digits. About five minutes on one free core; the same seed, number of threads
and release of torch give the same weights.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import track
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from equifast.attacks import PGD
from equifast.demo import PALETTE
from equifast.demo.network import SceneNet
from equifast.demo.scenes import VOID, make_scenes

BUNDLED = 16
SIZES = ((68, 92), (80, 108), (96, 128), (96, 128), (112, 152))  # of training batches, in pixels
TILT = 15  # degrees, on top of the digits' own


def tensors(scenes: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """uint8 images and labels to float32 (N,3,H,W) in [0,1] and int64 (N,H,W)."""
    images, labels = scenes
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels).long()


def miou(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Mean IoU in percent over all images, void left out."""
    total = torch.zeros(121, dtype=torch.int64)
    with torch.no_grad():
        for x, y in zip(images.split(16), labels.split(16), strict=True):
            cell = 11 * y + model(x).argmax(1)
            total += torch.bincount(cell[y != VOID], minlength=121)
    matrix = total.view(11, 11).double()
    hit = matrix.diagonal()
    return float(100 * (hit / (matrix.sum(0) + matrix.sum(1) - hit)).mean())


def augment(images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One size per batch; rotation, shift, flip, light, noise per image. Outside the frame is void."""
    n, _, source_height, source_width = images.shape
    height, width = SIZES[rng.integers(len(SIZES))]
    angle = np.deg2rad(rng.uniform(-TILT, TILT, n)) * (rng.random(n) < 0.7)
    flip = np.where(rng.random(n) < 0.5, -1.0, 1.0)
    aspect = source_width / source_height
    theta = np.zeros((n, 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = flip * np.cos(angle), -flip * np.sin(angle) / aspect
    theta[:, 1, 0], theta[:, 1, 1] = np.sin(angle) * aspect, np.cos(angle)
    theta[:, :, 2] = rng.uniform(-0.15, 0.15, (n, 2))
    grid = F.affine_grid(torch.from_numpy(theta), [n, 3, height, width], align_corners=False)
    x = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    y = F.grid_sample(labels[:, None].float() - VOID, grid, mode="nearest", align_corners=False)[:, 0] + VOID

    def factor(spread: float) -> Tensor:
        return torch.from_numpy(rng.uniform(-spread, spread, (n, 1, 1, 1)).astype(np.float32))

    gray = torch.from_numpy(rng.random((n, 1, 1, 1)) < 0.15)
    x = torch.where(gray, x.mean(1, keepdim=True), x)
    x = (x - 0.5) * (1 + factor(0.3)) + 0.5 + factor(0.15)
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    return (x + factor(0.05) * noise).clamp(0, 1), y.long()


def train(images: Tensor, labels: Tensor, epochs: int, batch: int, seed: int) -> nn.Module:
    """AdamW under one cycle; returns the network in eval mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = SceneNet().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.25)
    weights = torch.tensor([1.0] * 10 + [0.2])  # four fifths of a scene are background, and easily told
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(len(images)))[: steps // epochs * batch]
        losses = []
        for chosen in track(order.split(batch), description=f"epoch {epoch + 1}/{epochs}", transient=True):
            x, y = augment(images[chosen], labels[chosen], rng)
            logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, y, weights, ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        print(f"epoch {epoch + 1}/{epochs}  loss {np.mean(losses):.3f}", flush=True)
    return model.eval().requires_grad_(False)


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Through a neighbor, so that a reader never sees half a file."""
    partial = path.with_name(f".partial-{path.name}")
    save(partial)
    partial.replace(path)


def write_assets(folder: Path, model: nn.Module, images: np.ndarray, labels: np.ndarray) -> None:
    """demo.safetensors, scene_XX.png and scene_XX_label.png (indices into PALETTE; 255, void, is white)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    write(folder / "demo.safetensors", lambda path: path.write_bytes(save(state)))
    palette = [channel for color in PALETTE for channel in color]
    palette += [0] * (3 * VOID - len(palette)) + [255] * 3
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture, mask = Image.fromarray(image), Image.fromarray(label)
        mask.putpalette(palette)
        write(folder / f"scene_{index:02}.png", lambda path, i=picture: i.save(path, optimize=True))
        write(folder / f"scene_{index:02}_label.png", lambda path, i=mask: i.save(path, optimize=True))


def main(
    output: Annotated[Path, typer.Option(help="Folder for the weights and the bundle.")],
    scenes: Annotated[int, typer.Option(min=16, help="Scenes to train on.")] = 1200,
    epochs: Annotated[int, typer.Option(min=1)] = 16,
    batch: Annotated[int, typer.Option(min=2)] = 8,
    test: Annotated[int, typer.Option(min=48, help="Held-out scenes, the first 16 of them the bundle.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make scenes, train, write, measure."""
    start = time.perf_counter()
    images, labels = tensors(make_scenes(scenes, seed))
    held_out = make_scenes(test, seed, held_out=True)
    print(f"{scenes + test} scenes in {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    model = train(images, labels, epochs, batch, seed)
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    write_assets(output, model, held_out[0][:BUNDLED], held_out[1][:BUNDLED])

    x, y = tensors(held_out)
    print(f"mIoU, clean: {test} held-out {miou(model, x, y):.1f}, the bundle {miou(model, x[:16], y[:16]):.1f}")
    x, y = x[:48], y[:48]
    for eps in (4, 8):
        attack = PGD(model, eps=eps / 255, step_size=eps / 255 / 8, steps=20, seed=seed)
        bad = torch.cat([attack(*part) for part in zip(x.split(16), y.split(16), strict=True)])
        print(f"PGD-20 at {eps}/255: 48 held-out {miou(model, bad, y):.1f}, ", end="")
        print(f"the bundle {miou(model, bad[:16], y[:16]):.1f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
