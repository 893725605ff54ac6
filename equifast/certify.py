"""Estimates of how far an image is from what a model calls something else."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from equifast import _checks, rng
from equifast._cheap import DTYPES, Cheap
from equifast.ascent import Progress
from equifast.features import evaluating, output
from equifast.objectives import check_labels

__all__ = ["Clever", "clever"]

NORMS = ("l1", "l2", "linf")
# radii inside which gradients are sampled, in units of image values: what published evaluations of small images take
_RADII = {"l1": 40.0, "l2": 2.0, "linf": 0.1}
# shapes from which a reverse Weibull distribution is fitted; the likeliest of the fits counts
_SHAPES = (5.0, 2.0, 20.0)
# the likelihood of smaller ones has no bound: their density has a pole where they end, at the largest value
_SMALLEST_SHAPE = 1.0
# fits of larger shapes are all but Gumbel distributions, which have no end
_LARGEST_SHAPE = 100.0
_REJECTED = 0.05
ESTIMATE = (
    "CLEVER is an estimate and no certificate: where gradients are masked, or the samples miss the steepest place, "
    "it is larger than the distance to an adversarial image"
)


@dataclass(frozen=True)
class Clever:
    """CLEVER scores of N images for C classes, in units of image values in the norm of the ball.

    Args:
        norm: of the ball.
        radius: the largest score that can be had.
        scores: (N,) of each image, the smallest over the classes asked for; 0 where the model is wrong already.
        targets: (N, C) of each class; infinite for that of the image and those not asked for.
        lipschitz: (N, C) the estimated largest dual norm of the margin's gradient.
        largest: (N, C) the largest one seen.
        p_values: (N, C) of the Kolmogorov-Smirnov test of the fit; NaN where there is none.
        fitted: (N, C) whether the estimate is where the fit ends. Else it is the largest norm seen: where that was all
            but the same in every block; where the fit is rejected, at a p-value of 0.05; or where it has no end, since
            the maxima are distributed as those of something unbounded.
        violations: (N,) whether an adversarial image nearer than the score is known.
    """

    norm: str
    radius: float
    scores: Tensor
    targets: Tensor
    lipschitz: Tensor
    largest: Tensor
    p_values: Tensor
    fitted: Tensor
    violations: Tensor

    @property
    def warnings(self) -> list[str]:
        """What to know before these numbers are believed, one sentence each."""
        found = [ESTIMATE]
        asked = self.targets.isfinite()
        tried = asked & ~self.p_values.isnan()
        failed = int((tried & ~self.fitted).sum())
        if failed:
            found.append(
                f"{failed} of {int(tried.sum())} fits are rejected or have no end: the largest norm seen stands for "
                "them, a lower bound of what they estimate"
            )
        flat = int((asked & (self.largest == 0)).any(1).sum())
        if flat:
            found.append(f"{flat} images have margins whose gradients are 0 everywhere: a sign of gradient masking")
        if bool(self.violations.any()):
            found.append(
                f"{int(self.violations.sum())} images have an adversarial image nearer than their score: "
                "the estimate is wrong there"
            )
        return found


@torch.inference_mode(False)
def clever(
    model: Callable[..., Any],
    x: Tensor,
    y: Tensor | None = None,
    *,
    norm: str = "l2",
    radius: float | None = None,
    targets: Tensor | None = None,
    blocks: int = 50,
    samples: int = 128,
    clamp: bool = True,
    distances: Tensor | None = None,
    seed: int = 0,
    dtype: str = "float32",
    ids: Tensor | None = None,
    progress: Progress | None = None,
) -> Clever:
    """Cross-Lipschitz extreme value for network robustness (Weng et al. 2018, Algorithms 1 and 2).

    The margin of a class over another, divided by the largest norm of the margin's gradient nearby, bounds the distance
    to where it is lost (their Theorem 3.2). That norm is estimated: of each block of samples the largest is kept, and a
    reverse Weibull distribution fitted to these ends at the estimate. The samples of an image are the same for all
    classes, and gradients of all margins come from one pass forward and one back for each class.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, classes).
        x: (N, C, H, W) in [0, 1].
        y: (N,) int64, the labels; None for what the model says.
        norm: of the ball, ``"l1"``, ``"l2"`` or ``"linf"``; of gradients the dual.
        radius: of the ball in units of image values; None: 40, 2 or 0.1 by the norm.
        targets: (N,) int64, the class to which an image shall not be lost; None for every other (untargeted).
        blocks: maxima that the distribution is fitted to.
        samples: in each block, uniform in the ball.
        clamp: whether samples that left [0, 1] are put back to its border: then the score is about images.
        distances: (N,) in the norm, of the nearest adversarial images that attacks found; infinite where none was.
        seed: of the samples, 0..2**32-1.
        dtype: of gradients, as of attacks: ``"float32"``: the model runs as it is. ``"auto"`` and ``"bfloat16"``: a
            copy with batch norm folded, under bfloat16 autocast, whose rounding is in the estimate.
        ids: (N,) int64, of the images, by which their samples differ; by their place in ``x`` where None.
        progress: told how many blocks are done, and of how many.

    Raises:
        TypeError, ValueError: for arguments that cannot be, in one sentence that names them.
    """
    x = _checks.images("x", x).detach()
    x = x.clone() if x.is_inference() else x
    y, targets = (_labels(name, value, x) for name, value in (("y", y), ("targets", targets)))
    _checks.choice("norm", norm, NORMS)
    radius = _RADII[norm] if radius is None else _checks.number("radius", radius, above=0)
    _checks.integer("blocks", blocks, 2, 2**15)
    _checks.integer("samples", samples, 1, 2**15)
    _checks.boolean("clamp", clamp)
    _checks.integer("seed", seed, 0, 2**32 - 1)
    _checks.choice("dtype", dtype, DTYPES)
    ids = torch.arange(len(x), device=x.device) if ids is None else _checks.ids(ids, len(x), x.device)
    if distances is not None:
        given = _checks.tensor("distances", distances, 1, "(N,)")
        if given.shape != (len(x),) or bool((given < 0).any()) or bool(given.isnan().any()):
            raise ValueError(f"distances has shape {_checks.shape(given)}; it must be ({len(x)},), none negative")
    with evaluating(x, model):
        with torch.no_grad():
            # one by one, since a linear layer's last bits depend on the batch
            logits = torch.cat([output(model(image.clone())) for image in x.split(1)]) if len(x) else x.new_zeros(0, 2)
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(f"model gave {_checks.shape(logits)}; it must give logits (N, classes), 2 classes or more")
        labels = logits.argmax(1) if y is None else y
        check_labels(logits, labels, -1)
        asked = torch.ones_like(logits, dtype=torch.bool)
        if targets is not None:
            check_labels(logits, targets, -1)
            if bool((targets == labels).any()):
                raise ValueError("targets has an image's own label; it must be another class")
            asked = nn.functional.one_hot(targets, logits.shape[1]).bool()
        asked.scatter_(1, labels[:, None], False)
        gradients_of = model
        if dtype != "float32" and isinstance(model, nn.Module) and len(x):
            gradients_of = Cheap(model, dtype).on(x)
        maxima = torch.zeros((len(x), blocks, logits.shape[1]), dtype=torch.float64)
        for row in range(len(x)):
            for block in range(blocks):
                numbers = ids[row] * 2**15 + torch.arange(samples, device=x.device)
                points = x[row] + _uniform(norm, radius, x[row], seed, numbers, block)
                points = points.clamp(0, 1) if clamp else points
                norms = _norms(gradients_of, points, int(labels[row]), asked[row].nonzero()[:, 0].tolist(), norm)
                maxima[row, block, asked[row].cpu()] = norms.amax(0).double().cpu()
                if progress is not None:
                    progress(row * blocks + block + 1, len(x) * blocks)
    margins = (logits.gather(1, labels[:, None]) - logits).double().cpu()
    lipschitz, p_values = torch.zeros_like(margins), torch.full_like(margins, torch.nan)
    fitted = torch.zeros_like(margins, dtype=torch.bool)
    for row, target in asked.cpu().nonzero().tolist():
        end, p_values[row, target] = _endpoint(maxima[row, :, target].numpy())
        fitted[row, target] = end is not None
        lipschitz[row, target] = maxima[row, :, target].max() if end is None else end
    bounds = torch.where(lipschitz > 0, margins / lipschitz, torch.inf).clamp(0, radius)
    bounds = torch.where(margins > 0, bounds, 0.0)
    each = torch.where(asked.cpu(), bounds, torch.inf)
    scores = each.amin(1) if len(x) else each.new_zeros(0)
    # what the model calls something else already is no image of the label
    scores = torch.where((logits.argmax(1) == labels).cpu(), scores, 0.0)
    known = torch.full_like(scores, torch.inf) if distances is None else distances.double().cpu()
    return Clever(norm, radius, scores, each, lipschitz, maxima.amax(1), p_values, fitted, scores > known)


def _labels(name: str, value: object, x: Tensor) -> Tensor | None:
    """Labels as they are asked for, outside of inference mode; None stays None."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {got}; it must be an int64 tensor (N,)")
    _checks.same_device(name, value, "x", x)
    return value.clone() if value.is_inference() else value


def _uniform(norm: str, radius: float, image: Tensor, seed: int, numbers: Tensor, block: int) -> Tensor:
    """Points of a ball around 0, one for each number, (S, *image.shape): uniform (Barthe et al. 2005 for l1, l2)."""
    size, stream = image.numel(), rng.Stream.START.of(2)
    if norm == "linf":
        found = 2 * rng.uniform(seed, stream, numbers, 0, block, size) - 1
    elif norm == "l2":
        found = rng.normal(seed, stream, numbers, 0, block, size + 2)
        found = found[:, :size] / found.norm(dim=1, keepdim=True)
    else:
        u = rng.uniform(seed, stream, numbers, 0, block, size + 1)
        # Laplace numbers, and the exponential one that makes a point of the ball of one of its surface
        laplace = (2 * u[:, :size] - 1).sign() * -torch.log1p(-(2 * u[:, :size] - 1).abs())
        found = laplace / (laplace.abs().sum(1, keepdim=True) - u[:, size:].log())
    return (radius * found).to(image.dtype).view(-1, *image.shape)


def _norms(model: Callable[..., Any], points: Tensor, label: int, asked: list[int], norm: str) -> Tensor:
    """(S, len(asked)): the dual norms of the gradients of a label's margins over others."""
    with torch.enable_grad():
        leaf = points.requires_grad_()
        logits = output(model(leaf.clone()))  # models may work in place
        if not logits.requires_grad:
            raise ValueError("model has an output that does not depend on the image by gradients")
        margins = (logits[:, label, None] - logits[:, asked]).sum(0)
        found = []
        for number in range(len(asked)):
            (gradient,) = torch.autograd.grad(margins[number], leaf, retain_graph=number + 1 < len(asked))
            flat = gradient.flatten(1)
            found.append(
                flat.abs().amax(1) if norm == "l1" else flat.abs().sum(1) if norm == "linf" else flat.norm(dim=1)
            )
    return torch.stack(found, 1)


def _endpoint(maxima: NDArray[np.float64]) -> tuple[float | None, float]:
    """Where the distribution of block maxima ends, None if that is not known, and the p-value of its fit."""
    largest = float(maxima.max())
    if not math.isfinite(largest):
        raise ValueError("model has gradients that are NaN or infinite; they must be finite")
    # of one value, up to rounding, there is no distribution
    if largest == 0 or maxima.min() > (1 - 1e-6) * largest:
        return None, math.nan
    scaled = maxima / largest
    best, chosen, found = -math.inf, (0.0, 0.0, 0.0), False
    for shape in _SHAPES:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the search, where it tries what cannot be
            try:
                fit = stats.weibull_max.fit(scaled, shape)
            except (ValueError, RuntimeError):  # SciPy's, where no maximum of the likelihood is found
                continue
            likelihood = float(stats.weibull_max.logpdf(scaled, *fit).sum())
        found = True
        if likelihood > best and fit[0] > _SMALLEST_SHAPE:
            best, chosen = likelihood, fit
    if best == -math.inf:
        return None, (0.0 if found else math.nan)
    p = float(stats.kstest(scaled, "weibull_max", args=chosen).pvalue)
    known = p >= _REJECTED and chosen[0] <= _LARGEST_SHAPE and chosen[1] >= 1
    return (largest * float(chosen[1]) if known else None), p
