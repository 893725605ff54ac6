"""Fast adversarial training: the networks of the studies, made robust in minutes.

One signed step from a random start in the ball, at every step of training (Wong et al. 2020), from the weights of
ordinary training.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from equifast.train import crop_and_flip as cropped_and_flipped

Batch = tuple[Tensor, Tensor]


def crop_and_flip(images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
    """CIFAR's augmentation: shifts of up to 4 pixels and flips, of each image."""
    return cropped_and_flipped(images, generator), labels


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    augment: Callable[[Tensor, Tensor, torch.Generator], Batch],
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    path: Path,
    eps: float,
    epochs: int,
    batch: int,
    rate: float,
    seed: int = 0,
) -> None:
    """Train `model` against `eps` and keep its weights at `path`, written when training is done."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps, pct_start=0.2)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        return criterion(logits.float(), y)

    start = time.perf_counter()
    for epoch in track(range(epochs), description="adversarial training"):
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator)[: steps * batch].split(batch):
            x, y = augment(images[chosen], labels[chosen], generator)
            x = x.contiguous(memory_format=torch.channels_last)
            delta = (2 * torch.rand(x.shape, generator=generator) - 1) * eps
            near = (x + delta).clamp(0, 1).requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(near, y), near)
            delta = (near.detach() + 1.25 * eps * gradient.sign() - x).clamp(-eps, eps)
            loss = loss_of((x + delta).clamp(0, 1), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) / steps
        print(f"epoch {epoch + 1}: loss {total:.3f}", flush=True)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    model.eval().requires_grad_(False)
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".partial")
    notes = {"eps": f"{eps * 255:g}/255", "epochs": str(epochs), "batch": str(batch), "rate": str(rate)}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, beside, metadata=notes)
    beside.replace(path)
