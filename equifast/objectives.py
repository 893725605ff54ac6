"""What an ascent climbs: equivariance of a model on an image, and the task losses of the attacks."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from equifast import _checks, ops
from equifast._fingerprint import hooks
from equifast.reference import invert, probabilities, row_sum
from equifast.views import Sampled, Turn, View, sample

__all__ = [
    "PAIRINGS",
    "Agreement",
    "Contrast",
    "Equivariance",
    "Invariance",
    "Objective",
    "Scaled",
    "Selective",
    "Sum",
    "TaskLoss",
    "TurnPrediction",
    "average_predictions",
    "batched",
    "column_sum",
    "confusions",
    "cross_entropies",
    "cross_entropy",
    "differentiate",
    "disagreement",
    "distances",
    "in_batches",
    "label_index",
    "label_mean",
    "margins",
    "number_of_pairs",
    "outside",
    "pairwise",
    "pooled",
    "rendered",
    "warped_back",
]

PAIRINGS = ("anchor", "all")


def rendered(x: Tensor, sampled: Sequence[Sampled]) -> list[Tensor]:
    """Images (N, C, H, W) under views, each (N, C, h, w); those that keep the colors in one call."""
    images = [view.color(x) for view in sampled]
    kept = [k for k, image in enumerate(images) if image is x]
    if kept:
        theta, sizes = torch.stack([sampled[k].theta for k in kept]), [sampled[k].size for k in kept]
        for k, image in zip(kept, ops.warp_sampled(x, theta, sizes), strict=True):
            images[k] = image
    for k in set(range(len(images))).difference(kept):
        images[k] = ops.warp_sampled(images[k], sampled[k].theta[None], [sampled[k].size])[0]
    return images


def column_sum(columns: Tensor) -> Tensor:
    """(N, K) -> (N,), where the sum of a row does not depend on N: one column after the other."""
    total = columns[:, 0].clone()
    for column in columns.unbind(1)[1:]:
        total += column
    return total


MOST_ROWS = 1024
"""So many images at once have on the CPU the bits of each alone. More rows of a linear layer are hardly images but
positions of them, and a product for each would take its time."""


def batched(n: int, sizes: Sequence[tuple[int, ...]], together: int) -> list[list[int]]:
    """Which of several (n, C, h, w), given by (h, w), run at once: those of one size, up to so many positions."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, size in enumerate(sizes):
        alike.setdefault(tuple(size), []).append(i)
    found: list[list[int]] = []
    for size, members in alike.items():
        most = max(1, min(together // max(1, n * math.prod(size)), MOST_ROWS // max(1, n)))
        found += [members[i : i + most] for i in range(0, len(members), most)]
    return found


def in_batches(run: Callable[[Tensor], Tensor], images: Sequence[Tensor], together: int) -> list[Tensor]:
    """What a model, which may work in place, gives for several images (N, C, h, w), those of one size :func:`batched`.

    In the order of the images, which does not depend on N: sums over them round alike.
    """
    found: dict[int, Tensor] = {}
    for batch in batched(len(images[0]), [image.shape[2:] for image in images], together):
        joined = images[batch[0]].clone() if len(batch) == 1 else torch.cat([images[i] for i in batch])
        result = run(joined)
        _checks.logits(result, len(joined))
        # one alone is not cut out of itself, which would copy its gradient
        found.update(zip(batch, result.chunk(len(batch)) if len(batch) > 1 else (result,), strict=True))
    return [found[i] for i in range(len(images))]


def number_of_pairs(pairing: str, views: int) -> int:
    """Of how many similarities the value of a step with so many views is the sum."""
    return views * (views + 1) // 2 if pairing == "all" else views


class Objective(Protocol):
    """A value per image, and its gradient at step ``t`` of an ascent."""

    @property
    def fixed(self) -> bool:
        """Whether every step has the same objective; where not, values at different steps do not compare."""
        ...

    def value(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N,), no graph: by which iterates are compared, whatever step they are of."""
        ...

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) -> the values (N,) and their gradient (N, C, H, W), no graph.

        The gradient of an image may be that of a positive multiple of its value: steps do not depend on its length.
        """
        ...

    def only(self, rows: Tensor | slice) -> "Objective":
        """The same for some of the images, ``rows`` a mask (N,) or a slice."""
        ...


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def differentiate(value: Tensor, inputs: Sequence[Tensor], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """The gradients of ``value`` (weighted by ``upstream`` where it is no scalar) with respect to ``inputs``."""
    gradients: Sequence[Tensor | None] = [None]
    if value.requires_grad:
        gradients = torch.autograd.grad(value, inputs, upstream, allow_unused=True)
    if all(g is None for g in gradients):
        raise ValueError("model gives an output that does not depend on the image; there is no gradient to follow")
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True))


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _slopes(
    features: Tensor, leaves: Sequence[Tensor], upstream: Sequence[Tensor], keys: Sequence[int]
) -> dict[int, Tensor]:
    """The gradients of a batch's features with respect to what it is of, where these have one."""
    found = torch.autograd.grad(features, leaves, _cat(upstream), allow_unused=True)
    return {key: slope for key, slope in zip(keys, found, strict=True) if slope is not None}


def _scale(features: Tensor) -> Tensor | None:
    """(N,): what gradients by features in float16 are multiplied by, powers of two; None for those of other dtypes.

    Elements of the gradient of a cosine are about ``1 / (|f| sqrt(n))``, of which float16 would keep nothing. Scaled
    they stay below the square root of their number, over 16.
    """
    if features.dtype != torch.float16:
        return None
    flat = features.detach().flatten(1).to(torch.float32)
    length = row_sum(flat.square()).sqrt() * (max(1, flat.shape[1]) ** 0.5 / 16)
    return torch.where(length > 0, length, 1.0).log2().floor().clamp(0, 30).exp2()


def pairwise(anchor: Tensor, views: Sequence[Tensor], theta: Tensor) -> Tensor:
    """The sum of the similarities of every pair among the anchor and its views, as the published code computes it.

    With ``a_i = M_i f_i / |M_i f_i|``, each map warped back and normalized over its own overlap, this is
    ``(|sum_i a_i|^2 - sum_i |a_i|^2) / 2``: linear in K.

    Args:
        anchor: (N, C, H, W).
        views: K tensors (N, C, h, w).
        theta: (K, N, 2, 3).

    Returns:
        (N,)
    """
    size = (anchor.shape[2], anchor.shape[3])
    maps = [anchor]
    for view, inverse in zip(views, invert(theta), strict=True):
        maps += ops.warp(view.to(anchor.dtype), inverse[None], [size])
    return ops.pair_similarity(maps)


class Agreement:
    """The base of what purification climbs: what a model says of an image and of views of it, per view.

    A subclass gives :meth:`columns`; more where it can do with less time or memory than autograd on all views at once.

    Args:
        extract: the features F, images (N, 3, H, W) -> (N, C, h, w).
        views: the set of views.
        count: how many of them a step uses, drawn without replacement.
        seed, ids, draw: the realization, as in :mod:`equifast.rng`.
        autocast: the dtype in which the model runs where autocast lowers it, or None.
        palette, followed: as in :func:`equifast.views.sample`.
        together: images and views of one size run in one batch while it has at most so many positions (their number
            times their area).
    """

    def __init__(
        self,
        extract: Callable[[Tensor], Tensor],
        views: Sequence[View],
        *,
        count: int | None,
        seed: int,
        ids: Tensor,
        draw: int,
        autocast: torch.dtype | None,
        palette: int | None = None,
        together: int = 0,
        followed: int | None = None,
    ) -> None:
        self._extract = extract
        self._views = views
        self._count = count
        # ids on the host, where views are drawn: a step must not wait for the device
        self._seed, self._ids, self._draw = seed, ids.cpu(), draw
        self._autocast = autocast
        self._palette, self._followed = palette, followed
        self.together = together
        self._given: list[Sampled] | None = None

    def columns(self, x: Tensor, sampled: Sequence[Sampled]) -> Tensor:
        """(N, K), differentiable: what is climbed, view by view."""
        raise NotImplementedError

    def anchor(self, x: Tensor) -> Tensor:
        """F(x) of the image itself, which a model whose first operation is in place must not reach."""
        return self.features(x.clone())

    def features(self, x: Tensor) -> Tensor:
        """F(x), under autocast where that is asked for; a model that works in place may change ``x``."""
        # disabled where it is None: the result must not depend on an autocast that the caller is in
        enabled = self._autocast is not None
        with torch.autocast(x.device.type, dtype=self._autocast, enabled=enabled, cache_enabled=False):
            return self._extract(x)

    def joined(self, images: Sequence[Tensor]) -> Tensor:
        """F of images (N, 3, h, w), or views, of one size, in one batch: (their number times N, C, ...)."""
        return self.anchor(images[0]) if len(images) == 1 else self.features(torch.cat(list(images)))

    def batches(self, n: int, sizes: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """Which of several (n, C, h, w), given by (h, w), run at once: those of one size, while they are few.

        Their order is the same whatever ``n``, so that sums over them round alike.
        """
        return batched(n, sizes, self.together)

    def features_of(self, images: Sequence[Tensor]) -> list[Tensor]:
        """F of several images (N, 3, h, w), or views, one after the other but for :meth:`batches`."""
        return in_batches(self.features, images, self.together)

    def sample(self, x: Tensor, t: int, count: int | None) -> list[Sampled]:
        """The views of step ``t``."""
        if self._given is not None:
            return self._given
        return sample(
            self._views,
            (x.shape[2], x.shape[3]),
            seed=self._seed,
            ids=self._ids,
            draw=self._draw,
            step=t,
            count=count,
            palette=self._palette,
            followed=self._followed,
            device=x.device,
        )

    @property
    def lowered(self) -> torch.dtype | None:
        """The dtype that autocast lowers to, or None."""
        return self._autocast

    def owner(self) -> tuple[object, ...]:
        """Of what a recording of this runs and reads: the modules, their hooks, and where their tensors lie."""
        features = getattr(self._extract, "features", self._extract)
        model = getattr(features, "model", features)
        known = [model, *(features.modules() if hasattr(features, "modules") else ())]
        modules = [part for each in known if isinstance(each, nn.Module) for part in each.modules()]
        tensors = [t for part in modules for t in (*part.parameters(recurse=False), *part.buffers(recurse=False))]
        parts = [(id(part), type(part), hooks(part)) for part in modules]
        return (model, *parts, *(tensor.data_ptr() for tensor in tensors))

    def step_views(self, x: Tensor, t: int) -> list[Sampled]:
        """The views that step ``t`` uses."""
        return self.sample(x, t, self._count)

    def given(self, sampled: list[Sampled]) -> Self:
        """The same with these views whatever the step."""
        part = copy.copy(self)
        part._given = sampled
        return part

    def render(self, x: Tensor, sampled: Sequence[Sampled]) -> list[Tensor]:
        """The image under views."""
        return rendered(x, sampled)

    @property
    def fixed(self) -> bool:
        """Every step draws its views."""
        return False

    def only(self, rows: Tensor | slice) -> Self:
        """The same for some of the images, ``rows`` a mask (N,) or a slice."""
        part = copy.copy(self)
        part._ids = self._ids[rows.cpu() if isinstance(rows, Tensor) else rows]
        return part

    def whole(self, factor: float, value_factor: float) -> Objective:
        """``factor`` times a step's, with its own gradient: the whole one, and not a multiple of it.

        The value, which is of all views, is multiplied by ``value_factor``.
        """
        return Scaled(self._unscaled(), factor, value_factor)

    def _unscaled(self) -> Self:
        """The same, not in float16, which needs a scale of its own for every derivative."""
        part = copy.copy(self)
        part._autocast = None if self._autocast == torch.float16 else self._autocast
        return part

    def to_anchor(self) -> Self:
        """The same, views compared with the image alone."""
        return self

    def similarities(self, x: Tensor, t: int = 0, count: int | None = None) -> Tensor:
        """(N, K): the columns, with no graph; of all views where ``count`` is None."""
        with torch.no_grad():
            return self.columns(x, self.sample(x, t, count))

    def value(self, x: Tensor) -> Tensor:
        """(N,): the sum over all views of the set, as the first step would draw them."""
        return column_sum(self.similarities(x))

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = _leaf(x)
            columns = self.columns(leaf, self.step_views(x, t))
            (gradient,) = differentiate(columns.sum(), [leaf])
        return column_sum(columns.detach()), gradient

    def slope(self, x: Tensor, t: int) -> Tensor:
        """(N, C, H, W) -> the gradient at step ``t``, with a graph of its own derivative by ``x``; not in float16."""
        image = x.view_as(x)
        columns = self._unscaled().columns(image, self.step_views(x, t))
        return torch.autograd.grad(columns.sum(), image, create_graph=True)[0]


class Equivariance(Agreement):
    """How much a model agrees with itself under views: the objective that purification climbs (paper: Eq. 2).

    Args:
        extract, views, count, seed, ids, draw, autocast: as in :class:`Agreement`.
        pairing: ``"anchor"``, each view with the image; ``"all"``, every pair (``reduction="image"`` only).
        view_gradient: the weight of the gradient that reaches the image through its views. With 1 it is that of the
            value; with 0 the features of views are targets, constants to it: the image moves to what its views say, and
            not they to what it says. Where ``followed`` is fewer than the views, it goes through those alone, so much
            the heavier that the mean over all choices stays.
        reduction: as in :func:`equifast.ops.similarity`.
    """

    def __init__(
        self,
        extract: Callable[[Tensor], Tensor],
        views: Sequence[View],
        *,
        pairing: str,
        view_gradient: float,
        reduction: str,
        **rest: Any,
    ) -> None:
        super().__init__(extract, views, **rest)
        self._pairing = pairing
        self._view_gradient = view_gradient
        self._reduction = reduction
        self._scales = True

    def similarities(self, x: Tensor, t: int = 0, count: int | None = None) -> Tensor:
        """(N, K): similarity of each view to the image, with no graph, those of one size at a time."""
        with torch.no_grad():
            anchor, sampled, columns = self.anchor(x), self.sample(x, t, count), {}
            for batch in self.batches(len(x), [view.size for view in sampled]):
                views = self.render(x, [sampled[k] for k in batch])
                for k, features in zip(batch, self.joined(views).chunk(len(batch)), strict=True):
                    columns[k] = ops.similarity(anchor, [features], sampled[k].theta[None], self._reduction)
        return torch.cat([columns[k] for k in range(len(sampled))], 1)

    def to_anchor(self) -> Self:
        part = copy.copy(self)
        part._pairing = "anchor"
        return part

    def distances(self, x: Tensor) -> Tensor:
        """(N, h, w), no graph: one minus the cosine of features at a position, the mean over the views that see it."""
        sampled = self.sample(x, 0, None)
        with torch.no_grad():
            return distances(self.anchor(x), map(self.features, self.render(x, sampled)), sampled)

    def whole(self, factor: float, value_factor: float) -> Objective:
        part = copy.copy(self)
        part._view_gradient, part._followed, part._scales = 1.0, None, False
        return Agreement.whole(part, factor, value_factor)

    def value(self, x: Tensor) -> Tensor:
        """(N,): the sum over all views of the set, as the first step would draw them."""
        if self._pairing != "all":
            return super().value(x)
        with torch.no_grad():
            return self._all_pairs(x, x, self.sample(x, 0, None))[0]

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        sampled = self.step_views(x, t)
        with torch.enable_grad():
            image, source = _leaf(x), _leaf(x)  # what views are compared with, and what they are of
            if self._pairing == "all":
                value, scale = self._all_pairs(image, source, sampled)
                own, through = differentiate(value, [image, source], scale)
                return value.detach(), own.add_(through, alpha=self._view_gradient)
            gradient = self._toward if self._view_gradient == 0 else self._both
            values, total = gradient(image, source, sampled)
        return column_sum(values), total

    def _toward(self, image: Tensor, source: Tensor, sampled: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
        """Similarities (N, K), and the gradient of their sum where views are targets: they go forward alone."""
        features = self.anchor(image)
        values, upstream = self._target(sampled, source, features.detach())
        return values, differentiate(features, [image], upstream)[0]

    def _both(self, image: Tensor, source: Tensor, sampled: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
        """The same with a gradient through views too, those that are followed.

        One batch of these at a time, its graph freed before the next: memory is that of the image and one batch.
        """
        chosen = [k for k, view in enumerate(sampled) if view.followed]
        views = self.render(source, [sampled[k] for k in chosen])  # all at once, while the image is in cache
        leaves = [image, *map(_leaf, views)]
        first, *rest = self.batches(len(image), [leaf.shape[2:] for leaf in leaves])
        features = self.joined([leaves[i] for i in first])  # of the image, and of views that are in its batch
        anchor, *beside = features.detach().chunk(len(first))
        # Summed in the dtype of the features, as each view's part is rounded to it; a wider sum would take as much
        # memory again, and the network's own rounding in that dtype is larger.
        upstream, scale = torch.zeros_like(anchor), self._scale(anchor)
        values: dict[int, Tensor] = {}
        slopes: dict[int, Tensor] = {}

        def compare(batch: Sequence[int], maps: Sequence[Tensor]) -> list[Tensor]:
            """The gradients by features of views; that by those of the image is added to ``upstream``."""
            found = []
            for i, one in zip(batch, maps, strict=True):
                k = chosen[i - 1]
                theta = sampled[k].theta[None]
                values[k], g = ops.similarity_gradient(anchor, one, theta, upstream, self._reduction, scale)
                found.append(g)
            return found

        if targets := [k for k in range(len(sampled)) if k not in chosen]:
            similar, upstream = self._target([sampled[k] for k in targets], source, anchor)
            values.update(zip(targets, similar.split(1, 1), strict=True))
        held = compare(first[1:], beside)
        for batch in rest:
            part = self.joined([leaves[i] for i in batch])
            g = compare(batch, part.detach().chunk(len(batch)))
            if part.requires_grad:  # a view's features may not depend on the image
                slopes.update(_slopes(part, [leaves[i] for i in batch], g, batch))
            del part, g
        total, *more = differentiate(features, [leaves[i] for i in first], _cat([upstream, *held]))
        slopes.update(zip(first[1:], more, strict=True))
        moved = [(view, slopes[i]) for i, view in enumerate(views, 1) if i in slopes and view.requires_grad]
        if moved:
            (through,) = torch.autograd.grad([view for view, _ in moved], [source], [slope for _, slope in moved])
            total = total.add_(through, alpha=self._weight(sampled))
        return torch.cat([values[k] for k in range(len(sampled))], 1), total

    def _target(self, sampled: Sequence[Sampled], source: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities (N, K) of views that are targets, and the gradient of their sum by the image's features."""
        with torch.no_grad():
            targets = self.features_of(self.render(source, sampled))
        theta = torch.stack([view.theta for view in sampled])
        return ops.similarity_target(anchor, targets, theta, self._reduction, self._scale(anchor))

    def _weight(self, sampled: Sequence[Sampled]) -> float:
        """That of the gradient through each view that is followed."""
        return self._view_gradient * len(sampled) / max(1, sum(view.followed for view in sampled))

    def _scale(self, features: Tensor) -> Tensor | None:
        return _scale(features) if self._scales else None

    def slope(self, x: Tensor, t: int) -> Tensor:
        sampled, own = self.step_views(x, t), self._unscaled()
        image, source, target = x.view_as(x), x.view_as(x), x.view_as(x)
        if self._pairing == "all":
            value, _ = own._all_pairs(image, source, sampled)
        else:
            anchor = own.anchor(image)
            values = [
                ops.similarity(anchor, [own.features(view)], drawn.theta[None], self._reduction)
                for drawn in sampled
                for view in self.render(source if drawn.followed else target, [drawn])
            ]
            value = torch.cat(values, 1)
        wanted = [image, source] if self._view_gradient else [image]
        gradient, *through = torch.autograd.grad(value.sum(), wanted, create_graph=True)
        return gradient + self._weight(sampled) * through[0] if through else gradient

    def _all_pairs(self, image: Tensor, source: Tensor, sampled: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
        """The values (N,), and what to multiply their gradients by."""
        anchor = self.anchor(image)
        scale = self._scale(anchor)
        anchor = anchor.to(torch.promote_types(anchor.dtype, torch.float32))
        views = self.features_of(self.render(source, sampled))
        value = pairwise(anchor, views, torch.stack([view.theta for view in sampled]))
        return value, torch.ones_like(value) if scale is None else scale.to(value.dtype)


def pooled(features: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C): means over positions, in float32 or wider."""
    n, c, h, w = features.shape
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return row_sum(wide.reshape(n * c, h * w)).view(n, c) / (h * w)


class Invariance(Agreement):
    """Cosine similarity of pooled features of an image and of each view: what is there, and not where."""

    def columns(self, x: Tensor, sampled: Sequence[Sampled]) -> Tensor:
        anchor = functional.normalize(pooled(self.anchor(x)), eps=1e-6)
        others = [functional.normalize(pooled(self.features(v)), eps=1e-6) for v in self.render(x, sampled)]
        return torch.stack([row_sum(anchor * other) for other in others], 1)


class TurnPrediction(Agreement):
    """How well a head tells by how many quarters an image was turned: log-probabilities (Shi et al. 2020).

    Args:
        head: pooled features (N, C) -> logits (N, 4). The views are of the class :class:`equifast.views.Turn`.
    """

    def __init__(
        self, extract: Callable[[Tensor], Tensor], views: Sequence[View], *, head: nn.Module, **rest: Any
    ) -> None:
        super().__init__(extract, views, **rest)
        self._head = head

    def columns(self, x: Tensor, sampled: Sequence[Sampled]) -> Tensor:
        found = []
        for drawn, view in zip(sampled, self.render(x, sampled), strict=True):
            assert isinstance(drawn.view, Turn)
            found.append(self._head(pooled(self.features(view))).log_softmax(1)[:, drawn.view.quarters])
        return torch.stack(found, 1)


class Contrast(Agreement):
    """Whether a head tells views of an image from a bank of other images: log-probabilities (Mao et al. 2021).

    Of each view, that its embedding belongs to the image's rather than to one of the bank (Chen et al. 2020, Eq. 1).

    Args:
        head: pooled features (N, C) -> embeddings (N, D).
        bank: (B, D) embeddings of other images, at unit length.
        temperature: what cosines are divided by.
    """

    def __init__(
        self,
        extract: Callable[[Tensor], Tensor],
        views: Sequence[View],
        *,
        head: nn.Module,
        bank: Tensor,
        temperature: float,
        **rest: Any,
    ) -> None:
        super().__init__(extract, views, **rest)
        self._head, self._bank, self._temperature = head, bank, temperature

    def columns(self, x: Tensor, sampled: Sequence[Sampled]) -> Tensor:
        anchor = functional.normalize(self._head(pooled(self.anchor(x))))
        found = []
        for view in self.render(x, sampled):
            other = functional.normalize(self._head(pooled(self.features(view))))
            same = row_sum(anchor * other)[:, None]
            different = (other[:, None] * self._bank.to(other.dtype)).sum(2)  # no product of matrices: N has no say
            logits = torch.cat((same, different), 1) / self._temperature
            found.append(logits.log_softmax(1)[:, 0])
        return torch.stack(found, 1)


def warped_back(
    predict: Callable[[Tensor], Tensor], x: Tensor, sampled: Sequence[Sampled], size: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """Predictions on views, in the frame of the image: pairs of (N, C, h, w) and the overlap (N, 1, h, w)."""
    views = zip(sampled, rendered(x, sampled), strict=True)
    return [ops.in_frame(predict(image), view.theta, size) for view, image in views]


def average_predictions(
    predict: Callable[[Tensor], Tensor], x: Tensor, sampled: Sequence[Sampled], together: int = 0
) -> Tensor:
    """The mean of a model's predictions over the image and its views, those of views warped back (differentiable).

    Args:
        predict: images (N, 3, H, W) -> logits (N, C), or dense ones (N, C, h, w).
        x: (N, 3, H, W).
        sampled: the views.
        together: as in :class:`Agreement`.

    Returns:
        Mean logits in the shape of ``predict(x)``; at each position over the image and the views that see it.
    """
    first, *others = in_batches(predict, [x, *rendered(x, sampled)], together)
    if first.dim() != 4:
        return (first + sum(others)) / (1 + len(others))
    total, count = first, torch.ones_like(first[:, :1])
    for logits, view in zip(others, sampled, strict=True):
        prediction, overlap = ops.in_frame(logits, view.theta, (first.shape[2], first.shape[3]))
        total, count = total + prediction, count + overlap
    return total / count


def disagreement(predict: Callable[[Tensor], Tensor], x: Tensor, sampled: Sequence[Sampled]) -> Tensor:
    """Where a dense model's predictions on views differ from that on the image.

    Returns:
        (N, h, w) in [0, 1]: the mean, over the views that see a position, of the total variation distance between the
        predicted distributions.
    """
    with torch.no_grad():
        first = predict(x.clone())
        chances = probabilities(first)
        total, count = torch.zeros_like(first[:, 0]), torch.zeros_like(first[:, 0])
        for prediction, overlap in warped_back(predict, x, sampled, (first.shape[2], first.shape[3])):
            distance = (probabilities(prediction) - chances).abs().sum(1) / 2
            total, count = total + distance * overlap[:, 0], count + overlap[:, 0]
        return total / count.clamp(min=1)


def distances(anchor: Tensor, views: Iterable[Tensor], sampled: Sequence[Sampled]) -> Tensor:
    """(N, h, w) in [0, 2]: one minus the cosine of features at a position, the mean over the views that see it."""
    anchor, size = anchor.float(), (anchor.shape[2], anchor.shape[3])
    total, count = torch.zeros_like(anchor[:, 0]), torch.zeros_like(anchor[:, 0])
    for view, features in zip(sampled, views, strict=True):
        back, overlap = ops.in_frame(features.float(), view.theta, size)
        cosine = functional.cosine_similarity(anchor, back, dim=1, eps=1e-6)
        total, count = total + (1 - cosine) * overlap[:, 0], count + overlap[:, 0]
    return total / count.clamp(min=1)


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Kullback-Leibler, of the probabilities of ``others`` from those of ``logits``: (N, C, ...) twice -> (N, ...)."""
    p, q = logits.log_softmax(1), others.log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def label_mean(values: Tensor, y: Tensor, ignore_index: int = 255) -> Tensor:
    """The mean of a value per label over those of an image that count.

    Args:
        values: (N,), or (N, H, W), one per label.
        y: labels of the same shape, where dense with ``ignore_index`` where a pixel does not count.

    Returns:
        (N,); 0 for an image without a label that counts.
    """
    if y.dim() == 1:  # 255 is a class like any other
        return values
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    counted = y != ignore_index
    total = row_sum(torch.where(counted, values, 0.0).flatten(1))
    return total / row_sum(counted.flatten(1).to(values.dtype)).clamp(min=1)


def cross_entropies(logits: Tensor, y: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of each label, (N,) or (N, H, W); 0 where a pixel does not count."""
    ignored = -100 if y.dim() == 1 else ignore_index
    return functional.cross_entropy(logits, y, ignore_index=ignored, reduction="none")


def cross_entropy(logits: Tensor, y: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of each image, for dense labels the mean over its labeled pixels.

    Args:
        logits: (N, C) or (N, C, H, W).
        y: (N,), or (N, H, W) int64 with ``ignore_index`` where a pixel does not count.

    Returns:
        (N,); 0 for an image without a labeled pixel.
    """
    return label_mean(cross_entropies(logits, y, ignore_index), y, ignore_index)


def label_index(y: Tensor, ignore_index: int = 255) -> Tensor:
    """Labels (N,) or (N, H, W) as an index of the classes of logits, (N, 1) or (N, 1, H, W); 0 where none counts."""
    return (y if y.dim() == 1 else torch.where(y == ignore_index, 0, y))[:, None]


def margins(logits: Tensor, y: Tensor, ignore_index: int = 255) -> Tensor:
    """The largest logit of another class minus that of the label: above 0 where the model is wrong.

    Args:
        logits: (N, C) or (N, C, H, W), at least two classes.
        y: (N,) or (N, H, W) int64.

    Returns:
        A value per label, in the shape of ``y``; arbitrary where a pixel does not count.
    """
    index = label_index(y, ignore_index)
    own = logits.gather(1, index)
    others = logits.scatter(1, index, -torch.inf)
    return (others.amax(1, keepdim=True) - own)[:, 0]


def confusions(predictions: Tensor, y: Tensor, classes: int, ignore_index: int = 255) -> Tensor:
    """Confusion matrices of each image: (N, H, W) classes and labels -> (N, classes, classes) int64.

    Rows are true classes, columns predicted ones; pixels labeled ``ignore_index`` do not count.
    """
    n = len(y)
    image = torch.arange(n, device=y.device).view(-1, 1, 1).expand_as(y)
    counted = y != ignore_index
    cell = (image[counted] * classes + y[counted]) * classes + predictions[counted]
    return torch.bincount(cell, minlength=n * classes * classes).view(n, classes, classes)


class TaskLoss:
    """The expectation of a loss per image over the randomness of what is attacked.

    Args:
        predict: ``(x, ids, draw) -> logits``; several of them where the gradient is to be the mean of theirs, of which
            the last counts for the value.
        loss: ``(logits, *labels) -> (N,)``, what the attack increases.
        labels: tensors with a first dimension of N that the losses take.
        ids: (N,) ids of the images.
        draws: ``t -> `` the draws that step ``t`` averages over.
        climbed: ``(logits, t, *labels) -> (N,)``, what step ``t`` climbs instead, where that is not the loss.
        tells_climbed: whether the value of a step is that of what it climbs, for steps that depend on whether it rises.
        rank: ``(logits, *labels) -> (N,)``, by which points are compared; the loss where None. It is that of the pass
            for the gradient, where draws do not change.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, int], Iterable[Tensor]],
        loss: Callable[..., Tensor],
        labels: tuple[Tensor, ...],
        ids: Tensor,
        draws: Callable[[int], Sequence[int]],
        climbed: Callable[..., Tensor] | None = None,
        tells_climbed: bool = False,
        rank: Callable[..., Tensor] | None = None,
    ) -> None:
        self._predict, self._loss, self._labels, self._ids, self._draws = predict, loss, labels, ids, draws
        self._climbed, self._tells_climbed, self._rank = climbed, tells_climbed, rank or loss
        self._latest: tuple[Tensor, Tensor] | None = None  # the point that a gradient was asked for, and its rank

    def only(self, rows: Tensor | slice) -> "TaskLoss":
        """The same for some of the images, ``rows`` a mask (N,) or a slice."""
        part = copy.copy(self)
        part._labels, part._ids, part._latest = tuple(y[rows] for y in self._labels), self._ids[rows], None
        return part

    @property
    def fixed(self) -> bool:
        """Whether points compare by the values of steps: no randomness in what is attacked, the loss for both."""
        return not self._tells_climbed and self._rank is self._loss and self._steady

    @property
    def _steady(self) -> bool:
        return self._draws(0) == self._draws(1)

    def value(self, x: Tensor) -> Tensor:
        """(N,): the rank at the draws of the first step."""
        if self._latest is not None and self._latest[0] is x:
            return self._latest[1]
        with torch.no_grad():
            return torch.stack([self._last(x, draw) for draw in self._draws(0)]).mean(0)

    def _last(self, x: Tensor, draw: int) -> Tensor:
        *_, logits = self._predict(x.clone(), self._ids, draw)  # models may work in place
        return self._rank(logits, *self._labels)

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        draws = self._draws(t)
        values, total = torch.zeros(x.shape[0], device=x.device), torch.zeros_like(x)
        ranks = values
        for draw in draws:
            with torch.enable_grad():
                leaf = _leaf(x)
                found, count = torch.zeros_like(x), 0
                for logits in self._predict(leaf.clone(), self._ids, draw):
                    value = self._loss(logits, *self._labels)
                    climbed = value if self._climbed is None else self._climbed(logits, t, *self._labels)
                    # of each of many labels the gradient is too small for float16, unless it is of their sum
                    large = logits[0, 0].numel() if x.dtype == torch.float16 else 1
                    found = found + differentiate(climbed.sum() * large, [leaf])[0]
                    count += 1
                total = total + found / (count * len(draws))
            told = climbed if self._tells_climbed else value
            values = values + told.detach() / len(draws)
            rank = value if self._rank is self._loss else self._rank(logits.detach(), *self._labels)
            ranks = ranks + rank.detach() / len(draws)
        self._latest = (x, ranks) if self._steady else None
        return values, total


class Scaled:
    """``offset`` plus ``factor`` times an objective; the value, which may be of more than a step, by another."""

    def __init__(
        self, objective: Objective, factor: float, value_factor: float | None = None, offset: float = 0.0
    ) -> None:
        self._objective, self._factor, self._offset = objective, factor, offset
        self._value_factor = factor if value_factor is None else value_factor

    @property
    def fixed(self) -> bool:
        """As that of the objective."""
        return self._objective.fixed

    def value(self, x: Tensor) -> Tensor:
        """(N,)."""
        return self._offset + self._value_factor * self._objective.value(x)

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        value, gradient = self._objective.gradient(x, t)
        return self._offset + self._factor * value, self._factor * gradient

    def only(self, rows: Tensor | slice) -> "Scaled":
        """The same for some of the images."""
        return Scaled(self._objective.only(rows), self._factor, self._value_factor, self._offset)


class Sum:
    """The sum of two objectives whose gradients are those of their values."""

    def __init__(self, first: Objective, second: Objective) -> None:
        self._first, self._second = first, second

    @property
    def fixed(self) -> bool:
        """Whether both are."""
        return self._first.fixed and self._second.fixed

    def value(self, x: Tensor) -> Tensor:
        """(N,)."""
        return self._first.value(x) + self._second.value(x)

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        (value, gradient), (more, along) = self._first.gradient(x, t), self._second.gradient(x, t)
        return value + more, gradient + along

    def only(self, rows: Tensor | slice) -> "Sum":
        """The same for some of the images."""
        return Sum(self._first.only(rows), self._second.only(rows))


class Selective:
    """A task where a constraint holds, and the constraint where it does not (Bryniarski et al. 2022).

    Where it holds the constraint's value is 0, elsewhere less. Of two points one where it holds is the better; of such
    the task decides, of others the constraint.

    Args:
        task: what is wanted.
        constraint: what must hold.
        free: ``t -> `` whether step ``t`` follows the task alone.
    """

    fixed = False  # points do not compare by the values of steps

    def __init__(self, task: Objective, constraint: Objective, free: Callable[[int], bool] = lambda t: False) -> None:
        self._task, self._constraint, self._free = task, constraint, free

    def value(self, x: Tensor) -> Tensor:
        """(N,), by which points compare: above 0 where the constraint holds."""
        task, constraint = self._task.value(x), self._constraint.value(x)
        return torch.where(constraint >= 0, 0.5 + task.atan() / math.pi, constraint.to(task))

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """The task's value, and the gradient of what an image is to follow."""
        value, gradient = self._task.gradient(x, t)
        if self._free(t):
            return value, gradient
        held, along = self._constraint.gradient(x, t)
        return value, torch.where((held >= 0).view(-1, *[1] * (x.dim() - 1)), gradient, along)

    def only(self, rows: Tensor | slice) -> "Selective":
        """The same for some of the images."""
        return Selective(self._task.only(rows), self._constraint.only(rows), self._free)


def check_labels(logits: Tensor, y: Tensor, ignore_index: int) -> None:
    """Labels that fit the logits, in shape and range."""
    expected = (logits.shape[0], *logits.shape[2:])
    if y.shape != expected:
        raise ValueError(
            f"y has shape {_checks.shape(y)}; for logits {_checks.shape(logits)} it must be {tuple(expected)}"
        )
    if beyond := outside(y, logits.shape[1], ignore_index):
        raise ValueError(f"y has values {beyond}; they must be 0 to {logits.shape[1] - 1}")


def outside(labels: Tensor, classes: int, ignore_index: int) -> str:
    """From where to where labels go that are no classes, or an empty string; of dense ones those that count."""
    counted = labels[labels != ignore_index] if labels.dim() > 1 else labels
    if counted.numel() == 0:
        return ""
    low, high = (int(end) for end in torch.aminmax(counted))
    return "" if low >= 0 and high < classes else f"from {low} to {high}"
