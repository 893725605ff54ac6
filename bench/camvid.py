"""Train a small dilated ResNet on CamVid at 240x176, attack it, defend it, print the table.

    python bench/camvid.py --output bench/results/camvid.json

The network is trained once (under 15 minutes on two cores) and kept in bench/cache/. With `--adversarial` it is trained
on against attacks within 4/255 (some 200 s), and the same table is of that network.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from _data import CAMVID_CLASSES, DATA, VOID, load_camvid
from _models import SegmentationNet, load_weights
from _robust import train as train_against
from _study import (
    ATTACK_SEED,
    CACHE,
    Adversarial,
    BpdaSteps,
    Data,
    Eot,
    Images,
    Output,
    Quick,
    StandIn,
    Steps,
    Study,
    WhereFeatures,
    run,
)
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from equifast.attacks import PGD
from equifast.evaluate import confusion, mean_iou

CROP = (144, 208)
NOISE = 0.015  # the largest standard deviation of the noise that training adds, in image values


def clean_iou(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Overall mIoU of the model on clean images, in percent."""
    with torch.inference_mode():
        parts = [judge(model(x), y) for x, y in zip(images.split(8), labels.split(8), strict=True)]
    return mean_iou(np.concatenate(parts), resamples=2).value


def judge(logits: Tensor, labels: Tensor) -> NDArray[np.int64]:
    """Confusion matrices of each image, (N,C,H,W), (N,H,W) -> (N,C,C)."""
    return confusion(logits.argmax(1), labels, CAMVID_CLASSES, VOID)


def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random scale per batch; a random crop, flip, brightness, contrast and amount of Gaussian noise per image."""
    scale = float(torch.empty(()).uniform_(0.85, 1.7, generator=generator))
    size = [max(round(side * scale), crop) for side, crop in zip(images.shape[-2:], CROP, strict=True)]
    images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    labels = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()
    crops, targets = [], []
    for image, label in zip(images, labels, strict=True):
        top, left = (
            int(torch.randint(side - crop + 1, (), generator=generator)) for side, crop in zip(size, CROP, strict=True)
        )
        window = (..., slice(top, top + CROP[0]), slice(left, left + CROP[1]))
        flip = [-1] if torch.rand((), generator=generator) < 0.5 else []
        brightness, contrast = torch.empty(2).uniform_(0.6, 1.5, generator=generator)
        crop = image[window].flip(flip) * brightness
        crops.append((crop.mean() + (crop - crop.mean()) * contrast).clamp(0, 1))
        targets.append(label[window].flip(flip))
    noisy = torch.stack(crops)
    sigma = NOISE * torch.rand(len(noisy), 1, 1, 1, generator=generator)
    noisy = (noisy + sigma * torch.randn(noisy.shape, generator=generator)).clamp(0, 1)
    return noisy, torch.stack(targets)


def class_weights(labels: Tensor) -> Tensor:
    """Inverse square root of the class frequencies, mean 1 over the pixels."""
    counts = torch.bincount(labels[labels != VOID], minlength=CAMVID_CLASSES).double()
    weights = counts.clamp(min=1).rsqrt()
    return (weights * counts.sum() / (weights * counts).sum()).float()


def train(
    data: Path, path: Path, split: str = "train", epochs: int = 50, batch: int = 8, rate: float = 0.05, seed: int = 0
) -> None:
    """Ordinary training, SGD with one cycle of the rate; the best epoch on the val split is kept.

    Interrupted, it goes on after the last whole epoch; done, it leaves `path` and nothing else.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_camvid(data, split)
    val_images, val_labels = load_camvid(data, "val")
    model = SegmentationNet(CAMVID_CLASSES).to(memory_format=torch.channels_last)
    criterion = torch.nn.CrossEntropyLoss(class_weights(labels), ignore_index=VOID)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps, pct_start=0.15)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    settings = {"epochs": epochs, "batch": batch, "rate": rate, "seed": seed}
    first, best, seconds, resume = 0, 0.0, 0.0, path.with_suffix(".resume")
    candidate = path.with_suffix(".best")
    path.parent.mkdir(exist_ok=True)
    if resume.exists() and (state := torch.load(resume))["settings"] == settings:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        first, best, seconds = state["epoch"], state["best"], state["seconds"]
    for epoch in track(range(first, epochs), description="training"):
        start = time.perf_counter()
        model.train()
        for chosen in torch.randperm(len(images), generator=generator)[: steps * batch].split(batch):
            crops, targets = augment(images[chosen], labels[chosen], generator)
            loss = criterion(model(crops.contiguous(memory_format=torch.channels_last)), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        if epoch % 5 == 4 or epoch >= epochs - 3:
            score = clean_iou(model.eval(), val_images, val_labels)
            print(f"epoch {epoch + 1}: loss {loss:.3f}, val mIoU {score:.1f}", flush=True)
            if score > best:
                best = score
                notes = {
                    "val": f"{score:.2f}",
                    "epoch": str(epoch + 1),
                    **{k: str(v) for k, v in settings.items()},
                }
                weights = {name: value.contiguous() for name, value in model.state_dict().items()}
                save_file(weights, candidate, metadata=notes)
        seconds += time.perf_counter() - start
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"generator": generator.get_state(), "settings": settings, "epoch": epoch + 1}
        torch.save(state | {"best": best, "seconds": seconds}, resume.with_suffix(".partial"))
        resume.with_suffix(".partial").replace(resume)
    print(f"trained in {seconds:.0f} s")
    candidate.replace(path)
    resume.unlink()


def network(data: Path = DATA, adversarial: bool = False, split: str = "train") -> SegmentationNet:
    """The network with its weights, trained on a split ("train" or "rest") where these are not there."""
    suffix = "" if split == "train" else f"-{split}"
    plain, robust = (CACHE / f"camvid{kind}{suffix}.safetensors" for kind in ("", "-robust"))
    if not plain.exists():
        train(data, plain, split)
    model = load_weights(SegmentationNet(CAMVID_CLASSES), plain).to(memory_format=torch.channels_last)
    if adversarial:
        if not robust.exists():
            x, y = load_camvid(data, split)
            criterion = torch.nn.CrossEntropyLoss(class_weights(y), ignore_index=VOID)
            train_against(model, x, y, augment, criterion, path=robust, eps=4 / 255, epochs=20, batch=8, rate=0.02)
        load_weights(model, robust)
    return model


def attacked(data: Path, images: int, steps: int) -> tuple[SegmentationNet, Tensor, Tensor]:
    """The network, and images of the val split under PGD, with their labels: what is compared before a table."""
    model = network(data)
    x, y = load_camvid(data, "val", images)
    attack = PGD(model, eps=4 / 255, step_size=1 / 255, steps=steps, seed=ATTACK_SEED)
    batches = torch.arange(len(x)).split(4)
    return model, torch.cat([attack(x[ids], y[ids], ids) for ids in track(batches, "attacking")]), y


def main(
    data: Data = DATA,
    images: Images = 24,
    steps: Steps = 30,
    bpda_steps: BpdaSteps = 20,
    eot: Eot = 1,
    features: WhereFeatures = None,
    stand_in: StandIn = False,
    quick: Quick = False,
    adversarial: Adversarial = False,
    train_only: Annotated[bool, typer.Option("--train-only", help="Stop after training.")] = False,
    output: Output = None,
) -> None:
    """Rows none, random, averaging, paper, fast; columns clean, PGD 4/255 and BPDA; s/image."""
    if quick:
        images, steps, bpda_steps, stand_in = min(images, 2), min(steps, 3), min(bpda_steps, 2), True
    model = network(data, adversarial)
    for split in ("val", "test"):
        print(f"clean mIoU on {split}: {clean_iou(model, *load_camvid(data, split)):.1f}")
    if train_only:
        return
    pixels, labels = load_camvid(data, "test", images)
    study = Study(
        name="camvid-adversarial" if adversarial else "camvid",
        figure="mIoU in %",
        model=model,
        images=pixels,
        labels=labels,
        judge=judge,
        estimate=mean_iou,
        batch=4,
        slow_images=12,
        eps=4 / 255,
        step_size=1 / 255,
        eps_purify=6 / 255,
        steps=steps,
        bpda_steps=bpda_steps,
        eot=eot,
        features=features,
        stand_in=stand_in,
    )
    run(study, output)


if __name__ == "__main__":
    typer.run(main)
