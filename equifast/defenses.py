"""The defenses that purification is measured against."""

from collections.abc import Sequence

from torch import Tensor, nn

from equifast import _checks, rng
from equifast.features import evaluating
from equifast.purifier import DefendedModel, average
from equifast.views import View, as_set, paper

__all__ = ["Averaging", "RandomNoise"]


class RandomNoise:
    """Adds random noise to the image, which washes out small perturbations (Kumar et al. 2020).

    A purifier for :class:`equifast.Defended`: ``(x, ids=None, draw=0) -> x``.

    Args:
        eps: half width of uniform noise, or standard deviation of normal noise, in units of image values.
        distribution: ``"uniform"`` or ``"normal"``.
        seed: 0..2**32-1, or None for a fresh one per call.
    """

    def __init__(self, eps: float = 6 / 255, distribution: str = "uniform", seed: int | None = 0) -> None:
        self.eps = _checks.number("eps", eps, above=0)
        self.distribution = _checks.choice("distribution", distribution, ("uniform", "normal"))
        _checks.seed(seed)
        self.seed = seed

    def __call__(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, C, H, W) in [0, 1] -> the same, noisy and clamped to [0, 1]; detached from ``x``."""
        x = _checks.images("x", x).detach()
        numbers = _checks.ids(ids, len(x), x.device)
        _checks.integer("draw", draw, 0, rng.MAX_DRAW)
        if len(x) == 0:
            return x.clone()
        seed = rng.fresh_seed() if self.seed is None else self.seed
        source = rng.normal if self.distribution == "normal" else rng.uniform
        noise = source(seed, rng.Stream.DEFENSE, numbers, draw, 0, x[0].numel()).view(x.shape)
        if self.distribution == "uniform":
            noise = 2 * noise - 1
        return (x + self.eps * noise).clamp(0, 1).to(x.dtype)


class Averaging(DefendedModel):
    """Test-time augmentation: the mean of a model's predictions over the image and its views, warped back.

    Differentiable, so that an attacker follows its own gradient. No purification; the rival in every table.

    Args:
        model: images (N, 3, H, W) in [0, 1] -> logits (N, C) or (N, C, h, w); a dict with ``"out"`` is understood.
        views: the set of views, ``views.paper()`` where None.
        seed: 0..2**32-1, or None for a fresh one per call.
    """

    def __init__(self, model: nn.Module, views: Sequence[View] | None = None, seed: int | None = 0) -> None:
        super().__init__(model)
        _checks.seed(seed)
        self.views = paper() if views is None else as_set(views)
        self.seed = seed

    def forward(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, 3, H, W) -> mean logits, (N, C) or (N, C, h, w)."""
        x = _checks.images("x", x, channels=3)
        _checks.integer("draw", draw, 0, rng.MAX_DRAW)
        with evaluating(x, self.model):
            return average(self.predict, x, self.views, self.seed, ids, draw)
