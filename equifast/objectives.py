"""What an ascent climbs: equivariance of a model on an image, and the task losses of the attacks."""

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from equifast import _checks, ops
from equifast.reference import invert, row_sum
from equifast.views import Sampled, View, sample

__all__ = [
    "PAIRINGS",
    "Equivariance",
    "Objective",
    "TaskLoss",
    "average_predictions",
    "cross_entropy",
    "disagreement",
    "number_of_pairs",
    "pairwise",
]

PAIRINGS = ("anchor", "target", "all")


def rendered(x: Tensor, view: Sampled) -> Tensor:
    """Images (N, C, H, W) under a view, (N, C, h, w)."""
    return ops.warp_sampled(view.color(x), view.theta[None], [view.size])[0]


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
        """(N, C, H, W) -> the values (N,) and their gradient (N, C, H, W), no graph."""
        ...

    def only(self, rows: Tensor | slice) -> "Objective":
        """The same for some of the images, ``rows`` a mask (N,) or a slice."""
        ...


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _differentiate(value: Tensor, inputs: Sequence[Tensor], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """The gradients of ``value`` (weighted by ``upstream`` where it is no scalar) with respect to ``inputs``."""
    gradients: Sequence[Tensor | None] = [None]
    if value.requires_grad:
        gradients = torch.autograd.grad(value, inputs, upstream, allow_unused=True)
    if all(g is None for g in gradients):
        raise ValueError("model gives an output that does not depend on the image; there is no gradient to follow")
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True))


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
    total, squares = torch.zeros_like(anchor), torch.zeros_like(anchor[:, 0, 0, 0])
    for f in maps:
        square = row_sum(f.flatten(1).square())
        valid = square >= 1e-12
        scale = torch.where(valid, torch.where(valid, square, 1.0).rsqrt(), 0.0)
        total = total + f * scale.view(-1, 1, 1, 1)
        squares = squares + valid.to(squares.dtype)
    return (row_sum(total.flatten(1).square()) - squares) / 2


class Equivariance:
    """How much a model agrees with itself under views: the objective that purification climbs (paper: Eq. 2).

    Args:
        extract: the features F, images (N, 3, H, W) -> (N, C, h, w).
        views: the set of views.
        count: how many of them a step uses, drawn without replacement.
        pairing: ``"anchor"``, each view with the image; ``"target"``, the same value, but to its gradient the features
            of views are constants, so that the image moves to what its views say and not they to what it says;
            ``"all"``, every pair (``reduction="image"`` only).
        reduction: as in :func:`equifast.ops.similarity`.
        seed, ids, draw: the realization, as in :mod:`equifast.rng`.
        autocast: the dtype in which the model runs where autocast lowers it, or None.
    """

    def __init__(
        self,
        extract: Callable[[Tensor], Tensor],
        views: Sequence[View],
        *,
        count: int | None,
        pairing: str,
        reduction: str,
        seed: int,
        ids: Tensor,
        draw: int,
        autocast: torch.dtype | None,
    ) -> None:
        self._extract = extract
        self._views = views
        self._count = count
        self._pairing = pairing
        self._reduction = reduction
        self._seed, self._ids, self._draw = seed, ids, draw
        self._autocast = autocast

    def anchor(self, x: Tensor) -> Tensor:
        """F(x) of the image itself, which a model whose first operation is in place must not reach."""
        return self.features(x.clone())

    def features(self, x: Tensor) -> Tensor:
        """F(x), under autocast where that is asked for; a model that works in place may change ``x``."""
        # disabled where it is None: the result must not depend on an autocast that the caller is in
        enabled = self._autocast is not None
        with torch.autocast(x.device.type, dtype=self._autocast, enabled=enabled, cache_enabled=False):
            return self._extract(x)

    def sample(self, x: Tensor, t: int, count: int | None) -> list[Sampled]:
        """The views of step ``t``."""
        size = (x.shape[2], x.shape[3])
        return sample(self._views, size, seed=self._seed, ids=self._ids, draw=self._draw, step=t, count=count)

    def render(self, x: Tensor, view: Sampled) -> Tensor:
        """The image under a view."""
        return rendered(x, view)

    def similarities(self, x: Tensor, t: int = 0, count: int | None = None) -> Tensor:
        """(N, K): similarity of each view to the image, with no graph; all views where ``count`` is None."""
        with torch.no_grad():
            anchor = self.anchor(x)
            columns = [
                ops.similarity(anchor, [self.features(self.render(x, view))], view.theta[None], self._reduction)
                for view in self.sample(x, t, count)
            ]
        return torch.cat(columns, 1)

    @property
    def fixed(self) -> bool:
        """Every step draws its views."""
        return False

    def only(self, rows: Tensor | slice) -> "Equivariance":
        """The same for some of the images, ``rows`` a mask (N,) or a slice."""
        part = copy.copy(self)
        part._ids = self._ids[rows]
        return part

    def value(self, x: Tensor) -> Tensor:
        """(N,): the sum over all views of the set, as the first step would draw them."""
        if self._pairing != "all":
            return torch.stack(self.similarities(x).unbind(1)).sum(0)
        with torch.no_grad():
            return self._all_pairs(x, self.sample(x, 0, None))

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        sampled = self.sample(x, t, self._count)
        with torch.enable_grad():
            if self._pairing == "all":
                leaf = _leaf(x)
                value = self._all_pairs(leaf, sampled)
                return value.detach(), _differentiate(value.sum(), [leaf])[0]
            # One view at a time, its graph freed before the next: memory is that of the image and the largest view.
            leaf = _leaf(x)
            features = self.anchor(leaf)
            anchor = features.detach()
            # Summed in the dtype of the features, as each view's part is rounded to it; a wider sum would take as much
            # memory again, and the network's own rounding in that dtype is larger.
            upstream, total = torch.zeros_like(anchor), torch.zeros_like(x)
            values: list[Tensor] = []
            for view in sampled:
                if self._pairing == "target":
                    with torch.no_grad():
                        target = self.features(self.render(x, view))
                    values.append(ops.similarity_target(anchor, target, view.theta[None], upstream, self._reduction))
                    continue
                image = _leaf(x)
                features_of_view = self.features(self.render(image, view))
                s, g_view = ops.similarity_gradient(
                    anchor, features_of_view, view.theta[None], upstream, self._reduction
                )
                g_image: Tensor | None = None
                if features_of_view.requires_grad:
                    (g_image,) = torch.autograd.grad(features_of_view, [image], g_view, allow_unused=True)
                if g_image is not None:  # a view's features may not depend on the image
                    total += g_image
                values.append(s)
                del image, features_of_view, g_view, g_image
            total += _differentiate(features, [leaf], upstream)[0]
        return torch.stack(torch.cat(values, 1).unbind(1)).sum(0), total

    def slope(self, x: Tensor, t: int) -> Tensor:
        """(N, C, H, W) -> the gradient at step ``t``, with a graph of its own derivative by ``x``; no autocast."""
        sampled = self.sample(x, t, self._count)
        full = copy.copy(self)
        full._autocast = None
        # where views are constants to the gradient they still are none to its derivative
        leaf = x.view_as(x) if self._pairing == "target" else x
        with ops.use("reference"):  # the native operators are differentiable once
            if self._pairing == "all":
                value = full._all_pairs(x, sampled)
            else:
                anchor = full.anchor(leaf)
                values = [
                    ops.similarity(anchor, [full.features(self.render(x, view))], view.theta[None], self._reduction)
                    for view in sampled
                ]
                value = torch.cat(values, 1)
            (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        return gradient

    def _all_pairs(self, x: Tensor, sampled: Sequence[Sampled]) -> Tensor:
        anchor = self.anchor(x)
        anchor = anchor.to(torch.promote_types(anchor.dtype, torch.float32))
        views = [self.features(self.render(x, view)) for view in sampled]
        return pairwise(anchor, views, torch.stack([view.theta for view in sampled]))


def _warped_back(
    predict: Callable[[Tensor], Tensor], x: Tensor, sampled: Sequence[Sampled], size: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """Predictions on views, in the frame of the image: pairs of (N, C, h, w) and the overlap (N, 1, h, w)."""
    pairs = []
    for view in sampled:
        prediction = predict(rendered(x, view))
        inverse = invert(view.theta)[None]
        ones = torch.ones_like(prediction[:, :1].detach())
        pairs.append((ops.warp(prediction, inverse, [size])[0], (ops.warp(ones, inverse, [size])[0] > 0.5)))
    return pairs


def average_predictions(predict: Callable[[Tensor], Tensor], x: Tensor, sampled: Sequence[Sampled]) -> Tensor:
    """The mean of a model's predictions over the image and its views, those of views warped back (differentiable).

    Args:
        predict: images (N, 3, H, W) -> logits (N, C), or dense ones (N, C, h, w).
        x: (N, 3, H, W).
        sampled: the views.

    Returns:
        Mean logits in the shape of ``predict(x)``; at each position over the image and the views that see it.
    """
    first = predict(x.clone())  # models may work in place, and the views are of the image
    if first.dim() != 4:
        return (first + sum(predict(rendered(x, view)) for view in sampled)) / (1 + len(sampled))
    total, count = first, torch.ones_like(first[:, :1])
    for prediction, overlap in _warped_back(predict, x, sampled, (first.shape[2], first.shape[3])):
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
        probabilities = first.softmax(1)
        total, count = torch.zeros_like(first[:, 0]), torch.zeros_like(first[:, 0])
        for prediction, overlap in _warped_back(predict, x, sampled, (first.shape[2], first.shape[3])):
            distance = (prediction.softmax(1) - probabilities).abs().sum(1) / 2
            total, count = total + distance * overlap[:, 0], count + overlap[:, 0]
        return total / count.clamp(min=1)


def cross_entropy(logits: Tensor, y: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of each image, for dense labels the mean over its labeled pixels.

    Args:
        logits: (N, C) or (N, C, H, W).
        y: (N,), or (N, H, W) int64 with ``ignore_index`` where a pixel does not count.

    Returns:
        (N,); 0 for an image without a labeled pixel.
    """
    if y.dim() == 1:  # 255 is a class like any other
        return functional.cross_entropy(logits, y, reduction="none")
    losses = functional.cross_entropy(logits, y, ignore_index=ignore_index, reduction="none")
    counted = (y != ignore_index).flatten(1).to(losses.dtype)
    return row_sum(losses.flatten(1)) / row_sum(counted).clamp(min=1)


class TaskLoss:
    """The expectation of a loss per image over the randomness of what is attacked.

    Args:
        predict: ``(x, ids, draw) -> logits``.
        loss: ``(logits, y) -> (N,)``, what the attack increases.
        y: labels of the images.
        ids: (N,) ids of the images.
        draws: ``t -> `` the draws that step ``t`` averages over.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, int], Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        y: Tensor,
        ids: Tensor,
        draws: Callable[[int], Sequence[int]],
    ) -> None:
        self._predict, self._loss, self._y, self._ids, self._draws = predict, loss, y, ids, draws

    def _of(self, x: Tensor, draw: int) -> Tensor:
        return self._loss(self._predict(x.clone(), self._ids, draw), self._y)  # models may work in place

    def only(self, rows: Tensor | slice) -> "TaskLoss":
        """The same for some of the images, ``rows`` a mask (N,) or a slice."""
        return TaskLoss(self._predict, self._loss, self._y[rows], self._ids[rows], self._draws)

    @property
    def fixed(self) -> bool:
        """Whether what is attacked has no randomness: every step has the same draws."""
        return self._draws(0) == self._draws(1)

    def value(self, x: Tensor) -> Tensor:
        """(N,): the loss at the draws of the first step."""
        draws = self._draws(0)
        with torch.no_grad():
            return torch.stack([self._of(x, draw) for draw in draws]).mean(0)

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        draws = self._draws(t)
        values, total = torch.zeros(x.shape[0], device=x.device), torch.zeros_like(x)
        for draw in draws:
            with torch.enable_grad():
                leaf = _leaf(x)
                value = self._of(leaf, draw)
                total = total + _differentiate(value.sum(), [leaf])[0] / len(draws)
            values = values + value.detach() / len(draws)
        return values, total


def check_labels(logits: Tensor, y: Tensor, ignore_index: int) -> None:
    """Labels that fit the logits, in shape and range."""
    expected = (logits.shape[0], *logits.shape[2:])
    if y.shape != expected:
        raise ValueError(
            f"y has shape {_checks.shape(y)}; for logits {_checks.shape(logits)} it must be {tuple(expected)}"
        )
    counted = y[y != ignore_index] if y.dim() > 1 else y
    if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < logits.shape[1]):
        raise ValueError(
            f"y has values from {int(counted.min())} to {int(counted.max())}; they must be 0 to {logits.shape[1] - 1}"
        )
