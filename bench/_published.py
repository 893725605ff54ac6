"""The published algorithm, written eagerly as its code does the work: the yardstick of every table.

All pairs of the K+1 maps, masks materialized, quadratic in K; float32; one forward pass per view; the model's
parameters take gradients, which are thrown away. Realizations are those of equifast's own `paper`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from equifast import reference, rng, views


def published_similarity(anchor: Tensor, maps: Sequence[Tensor], theta: Tensor) -> Tensor:
    """(N,): the sum over all pairs, each over the overlap of the two."""
    size = list(anchor.shape)
    back, masks = [anchor], [torch.ones_like(anchor[:, :1])]
    for view, inverse in zip(maps, reference.invert(theta), strict=True):
        grid = F.affine_grid(inverse.to(view.dtype), size, align_corners=False)
        back.append(F.grid_sample(view, grid, align_corners=False))
        masks.append((F.grid_sample(torch.ones_like(view[:, :1]), grid, align_corners=False) > 0.5).to(view.dtype))
    total = torch.zeros_like(anchor[:, 0, 0, 0])
    for i in range(len(back)):
        for j in range(i + 1, len(back)):
            mask = masks[i] * masks[j]
            total = total + F.cosine_similarity((back[i] * mask).flatten(1), (back[j] * mask).flatten(1))
    return total


def published_warp(images: Tensor, theta: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    warped = []
    for t, size in zip(theta, sizes, strict=True):
        grid = F.affine_grid(t.to(images.dtype), [*images.shape[:2], *size], align_corners=False)
        warped.append(F.grid_sample(images, grid, padding_mode="border", align_corners=False))
    return warped


def published_step(
    x: Tensor,
    gradient: Tensor,
    origin: Tensor,
    eps: float,
    step: float,
    sigma: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """With PyTorch's own random numbers; the norm per image."""
    direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    if sigma:
        direction = direction + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    moved = x + step * direction.sign()
    return torch.min(torch.max(moved, origin - eps), origin + eps).clamp(0, 1)


class Published:
    """A purifier, `(x, ids, draw) -> x`: Algorithm 1 of Mao et al. 2023. One image at a time, as it was published.

    Args:
        features: images (N, 3, H, W) in [0, 1] -> dense features, of a model whose parameters take gradients.
        steps: 20, or fewer of the last ones, from a random corner.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], eps: float, seed: int, steps: int = 20) -> None:
        self.features, self.eps, self.seed, self.steps = features, eps, seed, steps

    def __call__(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        ids = torch.zeros(len(x), dtype=torch.int64, device=x.device) if ids is None else ids
        pairs = zip(x.detach().split(1), ids.split(1), strict=True)
        return torch.cat([self._one(image, number, draw) for image, number in pairs])

    def _one(self, x: Tensor, number: Tensor, draw: int) -> Tensor:
        origin, size = x, (x.shape[2], x.shape[3])
        noise = rng.uniform(self.seed, int(rng.Stream.START), number, draw, 0, x.numel()).view(x.shape)
        start = 2 * noise - 1 if self.steps == 20 else (noise - 0.5).sign()
        x = (origin + self.eps * start.to(x.dtype)).clamp(0, 1)
        generator = torch.Generator(x.device).manual_seed((self.seed * 2**16 + draw) * 2**16 + int(number))
        for t in range(20 - self.steps, 20):
            sampled = views.sample(views.paper(), size, seed=self.seed, ids=number, draw=draw, step=t)
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                rendered = [published_warp(view.color(leaf), view.theta[None], [view.size])[0] for view in sampled]
                maps = [self.features(image) for image in (leaf, *rendered)]
                theta = torch.stack([view.theta for view in sampled])
                published_similarity(maps[0], maps[1:], theta).sum().backward()
            assert leaf.grad is not None
            x = published_step(x, leaf.grad, origin, self.eps, 2 * self.eps, (19 - t) / 20, generator)
        return x
