"""The defenses that purification is measured against."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from equifast import _checks, objectives, rng
from equifast._files import replacing
from equifast._fingerprint import describe, weights
from equifast.ascent import Progress
from equifast.features import Features, evaluating
from equifast.objectives import Agreement, Contrast, TurnPrediction, pooled, rendered
from equifast.purifier import DefendedModel, Purifier, average
from equifast.views import Turn, View, as_set, paper, sample

__all__ = ["Averaging", "Contrastive", "Invariance", "RandomNoise", "Rotation"]


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
        dtype: of the predictions, as in :class:`equifast.purifier.DefendedModel`.
    """

    def __init__(
        self, model: nn.Module, views: Sequence[View] | None = None, seed: int | None = 0, *, dtype: str = "float32"
    ) -> None:
        super().__init__(model, dtype)
        _checks.seed(seed)
        self.views = paper() if views is None else as_set(views)
        self.seed = seed

    def forward(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, 3, H, W) -> mean logits, (N, C) or (N, C, h, w)."""
        x = _checks.images("x", x, channels=3)
        _checks.integer("draw", draw, 0, rng.MAX_DRAW)
        with evaluating(x, self.model, lean=self.dtype != "float32"):
            return average(self._predictor(x), x, self.views, self.seed, ids, draw)


class _Other(Purifier):
    """The base of purifiers that climb something else than equivariance."""

    _NOT_ITS = ("pairing", "view_gradient", "followed", "temperature", "reduction")
    _all_graphs = True

    def __init__(
        self, model: Callable[[Tensor], Any], features: str | Callable[[Tensor], Any] | None = None, **settings: Any
    ) -> None:
        for name in self._NOT_ITS:
            if name in settings:
                raise TypeError(f"{name} is given; {type(self).__name__} has no such setting")
        super().__init__(model, features, pairing="anchor", view_gradient=1.0, followed="all", **settings)


class Invariance(_Other):
    """Purifies towards pooled features that views leave as they are (Mao et al. 2023, its baseline "invariance").

    The same ascent over the same views as :class:`equifast.Purifier`, with the cosine of mean features in the place of
    that of maps: it sees what is in an image and not where.

    Args:
        model, features, settings: as for :class:`equifast.Purifier`, but for ``pairing``, ``view_gradient``,
            ``followed``, ``temperature`` and ``reduction``.
    """

    def _agreement(self, features: Features, **rest: Any) -> Agreement:
        return objectives.Invariance(features, self.views, **rest)


class _Head(nn.Module):
    """Pooled features (N, C) to (N, D): normalized, one hidden layer."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int, out: int, hidden: int = 128) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.first, self.second = nn.Linear(channels, hidden), nn.Linear(hidden, out)

    def forward(self, pooled: Tensor) -> Tensor:
        x = (pooled - self.mean.to(pooled.dtype)) / self.deviation.to(pooled.dtype)
        for layer in (self.first, self.second):
            # Products and sums: the rounding of a product of matrices depends on the number of rows.
            x = (x[:, None] * layer.weight.to(x.dtype)).sum(2) + layer.bias.to(x.dtype)
            x = x.relu() if layer is self.first else x
        return x


class _WithHead(_Other):
    """A purifier whose objective needs a small head, trained on frozen features of images without labels."""

    _OUT: int

    def __init__(
        self, model: Callable[[Tensor], Any], features: str | Callable[[Tensor], Any] | None = None, **settings: Any
    ) -> None:
        super().__init__(model, features, **settings)
        self.head: _Head | None = None

    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int = 200,
        rate: float = 1e-2,
        batch: int = 256,
        progress: Progress | None = None,
    ) -> Self:
        """Train the head on images, whose features are computed once.

        Args:
            loader: batches of images (N, 3, H, W) in [0, 1], or tuples that begin with one; labels are not looked at.
            epochs: how often the features are gone through.
            rate: the first learning rate of Adam; it falls to 0 along a cosine.
            batch: images per step.
            progress: called as ``progress(done, total)`` after every epoch.

        Returns:
            This purifier.

        Raises:
            ValueError: if the loader has no images, or they are not as for a call.
        """
        _checks.integer("epochs", epochs, 1, 10**6)
        _checks.number("rate", rate, above=0)
        _checks.integer("batch", batch, 2, 2**31)
        parts = []
        for number, item in enumerate(loader):
            images = item[0] if isinstance(item, list | tuple) else item
            images = _checks.images("loader's images", images, channels=3)
            if len(images):
                parts.append(self._seen(images, number))
        if not parts:
            raise ValueError("loader has no images; there must be at least one")
        found = torch.cat(parts)  # (images, views, C)
        seed = rng.fresh_seed() if self.seed is None else self.seed
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.default_generator.manual_seed(seed)  # of the CPU alone: torch.manual_seed is of all devices
            head = _Head(found.shape[2], self._OUT).to(found.device)
            head.mean.copy_(found.mean((0, 1)))
            head.deviation.copy_(found.std((0, 1), correction=0).clamp(min=1e-6))
            optimizer = torch.optim.Adam(head.parameters(), rate, weight_decay=1e-4)
            for epoch in range(epochs):
                optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
                for rows in torch.randperm(len(found)).split(batch):
                    optimizer.zero_grad()
                    self._training_loss(head, found[rows.to(found.device)]).backward()  # type: ignore[no-untyped-call, unused-ignore]
                    optimizer.step()
                if progress is not None:
                    progress(epoch + 1, epochs)
            self.head = head.eval().requires_grad_(False)
            self._fitted(found)
        return self

    def _seen(self, images: Tensor, number: int) -> Tensor:
        """(N, V, C): the pooled features of images under views, on which the head is trained."""

        def plain(features: Features, **rest: Any) -> Agreement:
            return Agreement(features, self.views, **rest)

        with torch.no_grad(), self._objective(images, None, 0, None, plain) as (x, objective, _, _):
            parts = []
            for rows in self._chunks(x, graph=False):
                sampled = self._training_views(x[rows], number, rows.start)
                views = [x[rows], *rendered(x[rows], sampled)]
                parts.append(torch.stack([pooled(objective.features(view.clone())) for view in views], 1))
            return torch.cat(parts)

    def _training_views(self, x: Tensor, number: int, first: int) -> Sequence[Any]:
        """Of images of the batch ``number``, beginning with its image ``first``."""
        raise NotImplementedError

    def _training_loss(self, head: nn.Module, found: Tensor) -> Tensor:
        raise NotImplementedError

    def _fitted(self, found: Tensor) -> None:
        """What else is kept of the images that the head was trained on."""

    def _state(self) -> dict[str, Tensor]:
        return dict(self._ready().state_dict())

    def _ready(self) -> _Head:
        if self.head is None:
            raise RuntimeError(f"{type(self).__name__} has no head yet; call fit(loader) or load(path)")
        return self.head

    def _origin(self) -> dict[str, str]:
        """Whose head it is: of which defense, on which features of which model."""
        where = self._features.where
        named = "the model's output" if where is None else where if isinstance(where, str) else repr(describe(where))
        model = weights(self.model) if isinstance(self.model, nn.Module) else repr(describe(self.model))
        return {"defense": type(self).__name__, "features": named, "model": model}

    def save(self, path: str | Path) -> None:
        """Write the head, and what it needs, to a safetensors file; RuntimeError where there is none yet."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._state().items()}
        with replacing(Path(path)) as beside:
            save_file(tensors, beside, self._origin())

    def load(self, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is none of such, or of another defense, of other features or weights.
        """
        try:
            with safe_open(str(path), "pt") as file:
                made = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from None
        for key, own in self._origin().items():
            if made.get(key) != own:
                raise ValueError(f"{path} has {key} {made.get(key)!r}; it must have {own!r}")
        self._restore(tensors)
        return self

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        hidden, channels = tensors["first.weight"].shape
        with torch.random.fork_rng(devices=[]):  # which its first weights, soon to be replaced, would advance
            head = _Head(channels, self._OUT, hidden)
        head.load_state_dict(tensors)
        self.head = head.eval().requires_grad_(False)

    def _on(self, device: torch.device) -> _Head:
        head = self._ready()
        return head.to(device)


class Rotation(_WithHead):
    """Purifies towards images of which a head can tell which side is up (Shi et al. 2020).

    A head on the model's pooled features is trained to tell by how many quarters an image is turned; the ascent raises
    the log-probabilities that it gives to the truth.

    Args:
        model, features, settings: as for :class:`equifast.Purifier`, but for ``views``, ``pairing``, ``view_gradient``,
            ``followed``, ``temperature`` and ``reduction``.
    """

    _OUT = 4

    def __init__(
        self, model: Callable[[Tensor], Any], features: str | Callable[[Tensor], Any] | None = None, **settings: Any
    ) -> None:
        if "views" in settings:
            raise TypeError("views is given; Rotation has no such setting")
        super().__init__(model, features, views=[Turn(quarters) for quarters in range(4)], **settings)

    def _agreement(self, features: Features, **rest: Any) -> Agreement:
        return TurnPrediction(features, self.views, head=self._on(rest["ids"].device), **rest)

    def _training_views(self, x: Tensor, number: int, first: int) -> Sequence[Any]:
        ids = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return sample(self.views[1:], (x.shape[2], x.shape[3]), seed=0, ids=ids)

    def _training_loss(self, head: nn.Module, found: Tensor) -> Tensor:
        logits = head(found.flatten(0, 1))
        truth = torch.arange(4, device=found.device).repeat(len(found))
        return functional.cross_entropy(logits, truth)


class Contrastive(_WithHead):
    """Purifies towards images whose views a head tells from other images (Mao et al. 2021).

    A head embeds the model's pooled features, trained as SimCLR's is (Chen et al. 2020); the ascent raises the
    log-probability that the views of an image belong to it and not to one of a bank of other images, which were seen in
    training. No image of the batch under test is another's negative.

    Args:
        model, features, settings: as for :class:`equifast.Purifier`, but for ``pairing``, ``view_gradient``,
            ``followed``, ``temperature`` (here that of the head, 0.2) and ``reduction``.
    """

    _OUT = 64
    _TEMPERATURE = 0.2
    _BANK = 256
    _DRAWS = 4

    bank: Tensor | None = None

    def _agreement(self, features: Features, **rest: Any) -> Agreement:
        head = self._on(rest["ids"].device)
        assert self.bank is not None
        bank = self.bank.to(rest["ids"].device)
        return Contrast(features, self.views, head=head, bank=bank, temperature=self._TEMPERATURE, **rest)

    def _training_views(self, x: Tensor, number: int, first: int) -> Sequence[Any]:
        ids = torch.arange(first, first + len(x), device=x.device)
        size = (x.shape[2], x.shape[3])
        return [
            view
            for draw in range(self._DRAWS)
            for view in sample(self.views, size, seed=1, ids=ids, draw=draw, step=number % rng.MAX_STEP)
        ]

    def _training_loss(self, head: nn.Module, found: Tensor) -> Tensor:
        pick = torch.rand(found.shape[:2]).argsort(1)[:, :2].to(found.device)  # two views of each image
        embedded = [
            functional.normalize(head(found[torch.arange(len(found), device=found.device), pick[:, i]])) for i in (0, 1)
        ]
        both = torch.cat(embedded)
        logits = both @ both.T / self._TEMPERATURE
        logits = logits.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf)
        return functional.cross_entropy(logits, torch.arange(len(both), device=both.device).roll(len(found)))

    def _fitted(self, found: Tensor) -> None:
        some = torch.linspace(0, len(found) - 1, min(self._BANK, len(found))).round().long()
        with torch.no_grad():
            self.bank = functional.normalize(self._ready()(found[some.to(found.device), 0]))

    def _state(self) -> dict[str, Tensor]:
        state = super()._state()
        assert self.bank is not None
        return state | {"bank": self.bank}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self.bank = tensors.pop("bank")
        super()._restore(tensors)
