"""Attacks: each the one ascent, on a loss of the task. A new one is a class with the hooks that differ.

An attack sees what it attacks as a callable from images to logits; :class:`BPDA` puts a defense before it.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from equifast import _checks, rng
from equifast._cheap import DTYPES, Cheap
from equifast.ascent import Ascent, Progress, Watch
from equifast.balls import Linf, make
from equifast.features import evaluating, output
from equifast.objectives import (
    Objective,
    Scaled,
    Selective,
    Sum,
    TaskLoss,
    check_labels,
    confusions,
    cross_entropies,
    cross_entropy,
    differentiate,
    divergence,
    label_index,
    label_mean,
    margins,
)
from equifast.purifier import Defended, DefendedModel, Purifier, Purify
from equifast.reference import probabilities, row_sum
from equifast.spatial import Box, Grid, transform

__all__ = [
    "APGD",
    "BPDA",
    "CW",
    "CWL2",
    "FGSM",
    "IFGSM",
    "MIM",
    "PGD",
    "Adaptive",
    "Attack",
    "CosPGD",
    "Evading",
    "Houdini",
    "SegPGD",
    "Spatial",
    "Square",
]


Prediction = Callable[[Tensor, Tensor, int], Iterator[Tensor]]


@dataclass(frozen=True)
class Call:
    """What a call of an attack is given beside images and labels, checked."""

    seed: int
    ids: Tensor
    progress: Progress | None
    watch: Watch | None


class Attack:
    """The base of all attacks: an ascent on :meth:`loss` inside a ball around each image.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, C) or (N, C, H, W); a dict with ``"out"`` is understood.
        eps: radius of the ball, in units of image values.
        step_size: length of a step, in the same units; a quarter of ``eps`` where None.
        steps: number of steps.
        norm: ``"linf"`` or ``"l2"``; that of the whole image, in which the default radius is next to nothing.
        targeted: whether ``y`` is what the model shall say, instead of what it shall not.
        start: ``"origin"``, ``"uniform"`` or ``"corner"``.
        restarts: runs from random starts, of which each image keeps the one with the largest loss; where images have
            one label, of those that have turned it, if any has (of a random defense, in most draws).
        keep: ``"last"`` iterate or ``"best"``, by the same.
        momentum, adaptive_steps: as in :class:`equifast.ascent.Ascent`.
        seed: 0..2**32-1, or None for a fresh one per call.
        ignore_index: the dense label that does not count.
        dtype: ``"float32"``: the model runs as it is. ``"auto"`` and ``"bfloat16"``: gradients come from a copy of the
            model with batch norm folded, under bfloat16 autocast (``"auto"``: where that is faster and images are
            float32); faster, and with gradients in all we measured as strong (``bench/equivalence.py``). A model with a
            defense inside predicts so too; what the defense itself computes in is its own setting. What cannot be
            copied, such as a function, runs as it is.

    Raises:
        TypeError, ValueError: for any setting that cannot be, in one sentence that names it.
    """

    least_classes = 1

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        eps: float = 4 / 255,
        step_size: float | None = None,
        steps: int = 50,
        norm: str = "linf",
        targeted: bool = False,
        start: str = "uniform",
        restarts: int = 1,
        keep: str = "last",
        momentum: float | None = None,
        adaptive_steps: bool = False,
        seed: int | None = 0,
        ignore_index: int = 255,
        dtype: str = "float32",
    ) -> None:
        if not callable(model):
            raise TypeError(f"model is a {type(model).__name__}; it must be callable")
        _checks.seed(seed)
        _checks.boolean("targeted", targeted)
        self.dtype = _checks.choice("dtype", dtype, DTYPES)
        self._cheap: Cheap | None = None
        self.model = model
        # BPDA sets them: with eot the model is random and takes ids and draw
        self.eot: int | None = None
        self.draw: int | None = None
        self.trajectory = False
        self.targeted = targeted
        self.seed = seed
        self.ignore_index = ignore_index
        ball = make(norm, eps)
        self.ascent = Ascent(
            ball=ball,
            steps=steps,
            step_size=ball.eps / 4 if step_size is None else step_size,
            start=start,
            restarts=restarts,
            keep=keep,
            momentum=momentum,
            adaptive_steps=adaptive_steps,
        )

    @property
    def total_steps(self) -> int:
        """How often a call asks for draws of a random defense."""
        return self.ascent.steps * self.ascent.restarts

    @property
    def most(self) -> float:
        """What there is to climb of :meth:`loss`: from there on it has no gradient; infinity where it has no end."""
        return math.inf

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """What the attack increases (targeted: decreases), by which restarts and iterates are compared.

        (N, C) or (N, C, H, W) logits and labels -> (N,).
        """
        return cross_entropy(logits, y, self.ignore_index)

    def step_loss(self, logits: Tensor, y: Tensor, t: int) -> Tensor:
        """What step ``t`` of a run follows: :meth:`loss`, where it is not overridden."""
        return self.loss(logits, y)

    def _mean(self, values: Tensor, y: Tensor) -> Tensor:
        return label_mean(values, y, self.ignore_index)

    def _cheaper(self, x: Tensor) -> Callable[..., Any]:
        """The model as it runs for images as ``x``."""
        model = self.model
        inner = model.model if isinstance(model, DefendedModel) else model
        # what is defended twice is left alone, and so is a function, which cannot be copied
        if self.dtype == "float32" or not isinstance(inner, nn.Module) or isinstance(inner, DefendedModel):
            return model
        if self._cheap is None or self._cheap.model is not inner:
            self._cheap = Cheap(inner, self.dtype)
        if not isinstance(model, DefendedModel):
            return self._cheap.on(x)
        defended = copy.copy(model)
        defended.predictor = self._cheap.on(x)
        return defended

    def _draws(self, t: int) -> Sequence[int]:
        if self.eot is None or self.draw is not None:
            return (self.draw or 0,)
        return range(1 + t * self.eot, 1 + (t + 1) * self.eot)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            x: (N, C, H, W), floating point, in [0, 1].
            y: (N,) or (N, H, W) int64: true labels, or the target where the attack is targeted.
            ids: (N,) int64: which random numbers each image gets; all 0 where None.
            progress: called as ``progress(done, total)`` after every step.
            watch: told at every step of what is climbed, as in :class:`equifast.ascent.Ascent`: whether it rises, and
                whether there is a gradient. :class:`Square` and :class:`CWL2`, which are no such ascents, tell nothing.

        Returns:
            (N, C, H, W), in the ball around ``x`` and in [0, 1], no graph.

        Raises:
            TypeError: if ``x`` is not floating point or ``y`` not int64.
            ValueError: if shapes or ranges are wrong, or the logits do not depend on the image; :class:`Square`, which
                asks for no gradient, takes those that have none.
        """
        with torch.inference_mode(False):
            x = _checks.images("x", x).detach()
            x = x.clone() if x.is_inference() else x
            if not isinstance(y, Tensor) or y.dtype != torch.int64:
                got = y.dtype if isinstance(y, Tensor) else type(y).__name__
                raise TypeError(f"y is {got}; it must be an int64 tensor of labels")
            _checks.same_device("y", y, "x", x)
            y = y.clone() if y.is_inference() else y
            numbers = _checks.ids(ids, len(x), x.device)
            if len(x) == 0:
                return x.clone()
            seed = rng.fresh_seed() if self.seed is None else self.seed
            with evaluating(x, self.model, lean=True):
                predict = self._prediction(x, y)
                return self._search(predict, x, y, Call(seed, numbers, progress, watch))

    def _prediction(self, x: Tensor, y: Tensor) -> Prediction:
        """``(images, ids, draw) -> logits``, of which the first are checked against the labels."""
        model, checked = self._cheaper(x), False

        def predict(images: Tensor, numbers: Tensor, draw: int) -> Iterator[Tensor]:
            nonlocal checked
            if self.trajectory:
                found: Iterable[Any] = model.trajectory(images, ids=numbers, draw=draw)  # type: ignore[attr-defined]
            else:
                found = (model(images) if self.eot is None else model(images, ids=numbers, draw=draw),)
            for result in found:
                logits = output(result)
                if not checked:
                    _checks.logits(logits, len(images))
                    check_labels(logits, y, self.ignore_index)
                    self._check_classes(logits)
                    checked = True
                # sums over many labels leave half precision
                yield logits.to(torch.promote_types(logits.dtype, torch.float32))

        return predict

    def _check_classes(self, logits: Tensor) -> None:
        if logits.shape[1] < self.least_classes:
            raise ValueError(
                f"logits have {logits.shape[1]} classes; {type(self).__name__} needs at least {self.least_classes}"
            )

    def _objective(self, predict: Prediction, x: Tensor, y: Tensor, ids: Tensor, ranked: bool = False) -> Objective:
        """What the ascent climbs; ranked, a label that is as the attack wants it counts before all losses."""
        sign = -1.0 if self.targeted else 1.0
        draws = len(self._draws(0))

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return sign * self.loss(logits, y)

        def rank(logits: Tensor, y: Tensor) -> Tensor:
            # how many draws have it as it is wanted, and below 1 the loss
            return draws * ((logits.argmax(1) == y) == self.targeted) + loss(logits, y).atan() / math.pi + 0.5

        def climbed(logits: Tensor, t: int, y: Tensor) -> Tensor:
            return sign * self.step_loss(logits, y, t % max(1, self.ascent.steps))

        own = type(self).step_loss is not Attack.step_loss
        first = rank if ranked and y.dim() == 1 else None
        return TaskLoss(predict, loss, (y,), ids, self._draws, climbed if own else None, rank=first)

    def _search(self, predict: Prediction, x: Tensor, y: Tensor, call: Call) -> Tensor:
        several = self.ascent.restarts > 1 or self.ascent.keep == "best"
        return self._climb(self._objective(predict, x, y, call.ids, ranked=several), x, call, call.progress)

    def _climb(self, objective: Objective, x: Tensor, call: Call, progress: Progress | None) -> Tensor:
        # a start of its own: not the corner from which a purifier of the same seed starts
        return self.ascent(objective, x, seed=call.seed, ids=call.ids, party=1, progress=progress, watch=call.watch)


class PGD(Attack):
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018)."""


class FGSM(Attack):
    """One signed step from the image (Goodfellow et al. 2015)."""

    def __init__(self, model: Callable[..., Any], *, eps: float = 4 / 255, **settings: Any) -> None:
        super().__init__(model, **{"eps": eps, "step_size": eps, "steps": 1, "start": "origin", **settings})


class IFGSM(Attack):
    """Iterated signed steps of 1/255 from the image, the attack on segmentation of Arnab et al. 2018.

    ``steps`` are ``min(255 eps + 4, 1.25 * 255 eps)``, rounded up, where not given (Kurakin et al. 2017).
    """

    def __init__(self, model: Callable[..., Any], *, eps: float = 4 / 255, **settings: Any) -> None:
        levels = 255 * _checks.number("eps", eps, above=0)
        steps = math.ceil(min(levels + 4, 1.25 * levels) - 1e-6)
        super().__init__(model, **{"eps": eps, "step_size": 1 / 255, "steps": steps, "start": "origin", **settings})


class MIM(Attack):
    """Iterated sign steps along the accumulated gradient (Dong et al. 2018); ``momentum`` is its decay.

    Steps are of half the radius where ``step_size`` is not given: what has accumulated turns slowly, and with shorter
    ones less is reached in as many steps than by :class:`PGD` (bench/attack_strength.py). The paper's are the radius
    over ``steps``.
    """

    def __init__(
        self, model: Callable[..., Any], *, momentum: float = 1.0, eps: float = 4 / 255, **settings: Any
    ) -> None:
        half = _checks.number("eps", eps, above=0) / 2
        super().__init__(model, **{"eps": eps, "momentum": momentum, "start": "origin", "step_size": half, **settings})


class CW(Attack):
    """Projected gradient ascent on the margin of Carlini and Wagner 2017 (their loss f6).

    The margin of a label is the largest logit of another class minus its own, and is driven up to ``confidence``.
    """

    least_classes = 2

    def __init__(self, model: Callable[..., Any], *, confidence: float = 0.0, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.confidence = _checks.number("confidence", confidence, least=0)

    @property
    def most(self) -> float:
        """The confidence."""
        return self.confidence

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean margin of the labels; each no further beyond 0 than ``confidence``."""
        margin = margins(logits, y, self.ignore_index)
        enough = {"min": -self.confidence} if self.targeted else {"max": self.confidence}
        return self._mean(margin.clamp(**enough), y)


class Houdini(Attack):
    """Ascent on a surrogate of the task loss (Cisse et al. 2017, Eq. 4).

    For each label the probability that its margin exceeds Gaussian noise; times the task loss of the image, 1 -
    mean IoU where labels are dense (of a class, a constant). Where the model is still right, the runner-up takes the
    place of its prediction, as the term would be constant.

    A step follows the gradient of an image up to a factor, without underflow. Where one step has several, of draws of a
    random defense or along a trajectory, each has a factor of its own: their sum is no expectation of that loss.
    """

    least_classes = 2

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean probability times the task loss."""
        return self._mean(torch.special.ndtr(margins(logits, y, self.ignore_index)), y) * self._task(logits, y)

    def step_loss(self, logits: Tensor, y: Tensor, t: int) -> Tensor:
        """What has the gradient of the loss up to a factor per image, which a step does not see, and no underflow."""
        margin = margins(logits, y, self.ignore_index)
        exponent = -margin.detach().square() / 2  # the density of the noise there
        if y.dim() > 1:
            exponent = torch.where(y == self.ignore_index, -torch.inf, exponent)
        largest = exponent.flatten(1).amax(1) if y.dim() > 1 else exponent
        largest = torch.where(largest.isfinite(), largest, 0.0).view(-1, *[1] * (y.dim() - 1))
        return self._mean((exponent - largest).exp() * margin, y)

    def _task(self, logits: Tensor, y: Tensor) -> Tensor:
        if y.dim() == 1:
            return torch.ones(len(y), device=y.device)
        classes = logits.shape[1]
        counts = confusions(logits.detach().argmax(1), y, classes, self.ignore_index).to(logits.dtype)
        hit = counts.diagonal(dim1=1, dim2=2)
        union = counts.sum(1) + counts.sum(2) - hit
        present = (union > 0).to(hit.dtype)
        return 1 - (hit / union.clamp(min=1)).sum(1) / present.sum(1).clamp(min=1)


class SegPGD(Attack):
    """Cross-entropy that turns from right labels to wrong ones (Gu et al. 2022).

    In step ``t`` of ``T`` labels that the model gets wrong weigh ``t / 2T``, the others ``1 - t / 2T``; targeted, those
    that it does not give yet weigh the latter.
    """

    def step_loss(self, logits: Tensor, y: Tensor, t: int) -> Tensor:
        """The weighted cross-entropy."""
        share = t / (2 * self.ascent.steps)
        done = (logits.detach().argmax(1) == y) == self.targeted
        return self._mean(cross_entropies(logits, y, self.ignore_index) * torch.where(done, share, 1 - share), y)


class CosPGD(Attack):
    """Cross-entropy weighted by how alike prediction and label are (Agnihotri et al. 2024).

    The weight of a label is the cosine of the softmax of the logits and its one-hot vector, without a gradient;
    targeted, 1 minus that.
    """

    def step_loss(self, logits: Tensor, y: Tensor, t: int) -> Tensor:
        """The weighted cross-entropy."""
        chances = probabilities(logits.detach())
        index = label_index(y, self.ignore_index)
        cosine = chances.gather(1, index)[:, 0] / chances.norm(dim=1)
        weight = 1 - cosine if self.targeted else cosine
        return self._mean(cross_entropies(logits, y, self.ignore_index) * weight, y)


class APGD(Attack):
    """Auto-PGD (Croce and Hein 2020): step sizes of each image that halve where progress stalls, and no parameters.

    Progress is that of what a run climbs; points of several runs are compared by :meth:`loss`.

    Args:
        objective: ``"ce"``, cross-entropy; ``"dlr"``, the difference of logits ratio; ``"targeted-dlr"``, which in each
            restart aims at another class, the next in the order in which the model has them on the given image. Of
            several restarts each image keeps the one with the largest ratio. Ratios take at least three classes,
            respectively four. Of dense labels, and through a defense, a ratio counts up to 1, what the first is where
            the label has come third.
    """

    def __init__(self, model: Callable[..., Any], *, objective: str = "ce", **settings: Any) -> None:
        self.objective = _checks.choice("objective", objective, ("ce", "dlr", "targeted-dlr"))
        self.least_classes = {"ce": 2, "dlr": 3, "targeted-dlr": 4}[objective]
        if "step_size" in settings:
            raise TypeError("step_size is given; APGD begins with twice the radius and finds its own")
        several = 9 if objective == "targeted-dlr" else 1
        default = {"steps": 100, "adaptive_steps": True, "keep": "best", "restarts": several}
        super().__init__(model, **{**default, **settings})
        if objective != "ce" and self.targeted:
            raise ValueError(f"objective is {objective!r} with targeted; it must be 'ce'")
        self.ascent = dataclasses.replace(self.ascent, step_size=2 * self.ascent.ball.eps)

    @property
    def most(self) -> float:
        """1 of a ratio, where it is capped; where not it stays there while the label is third."""
        return super().most if self.objective == "ce" else 1.0

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, or the mean over the labels of their margin over the distance from first to third logit."""
        if self.objective == "ce":
            return super().loss(logits, y)
        top = logits.topk(3, 1).values
        return self._ratio(margins(logits, y, self.ignore_index), top[:, 0] - top[:, 2], y)

    def _ratio(self, difference: Tensor, scale: Tensor, y: Tensor) -> Tensor:
        ratio = difference / (scale + 1e-12)
        # Of one label it ends with the attack. Of many, or of many draws, those that are lost would take over: it grows
        # without bound
        return self._mean(ratio if y.dim() == 1 and self.eot is None else ratio.clamp(max=1.0), y)

    def _objective(self, predict: Prediction, x: Tensor, y: Tensor, ids: Tensor, ranked: bool = False) -> Objective:
        if self.objective != "targeted-dlr":
            return super()._objective(predict, x, y, ids, ranked)
        with torch.no_grad():
            *_, logits = predict(x.clone(), ids, self._draws(0)[0])
        index = label_index(y, self.ignore_index)
        order = logits.scatter(1, index, -torch.inf).argsort(dim=1, descending=True, stable=True)
        others = logits.shape[1] - 1

        def climbed(logits: Tensor, t: int, y: Tensor, index: Tensor, order: Tensor) -> Tensor:
            rank = t // self.ascent.steps % others
            difference = logits.gather(1, order[:, rank : rank + 1]) - logits.gather(1, index)
            top = logits.topk(4, 1).values
            return self._ratio(difference[:, 0], top[:, 0] - (top[:, 2] + top[:, 3]) / 2, y)

        def loss(logits: Tensor, y: Tensor, *_: Tensor) -> Tensor:
            return self.loss(logits, y)

        return TaskLoss(predict, loss, (y, index, order), ids, self._draws, climbed, tells_climbed=True)


class Watching(Protocol):
    """What an attacker may want to please: a :class:`equifast.Purifier`, or a fitted detector."""

    def objective(
        self, x: Tensor, ids: Tensor | None = None, draw: int = 0
    ) -> contextlib.AbstractContextManager[Objective]:
        """What such an attacker climbs."""
        ...


class Adaptive(Attack):
    """An attacker who keeps the image equivariant, lest it be purified (Mao et al. 2023, Eq. 6).

    Climbs the task loss plus ``weight`` times the mean similarity of the purifier's views, both of the attacked image.
    With a detector in its place, minus what the score has above the threshold, in standard deviations of clean scores;
    :class:`Evading` needs no weight for that, and does more.

    Args:
        model: the undefended model; :class:`BPDA` puts a defense before it.
        purifier: whose features, views and pairing the similarity has; or a :class:`equifast.detectors.Detector` after
            ``fit``, by which the image is to be overlooked.
        weight: a number, or several of which each image keeps the result with the largest task loss, where it has one
            label of those that turned it; with a defense, of the defended model, at draws of the attacker's. Restarts
            and iterates of a run compare by what is climbed.
    """

    def __init__(
        self, model: Callable[..., Any], purifier: Watching, *, weight: float | Sequence[float] = 1.0, **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        if not callable(getattr(purifier, "objective", None)):
            raise TypeError(f"purifier is a {type(purifier).__name__}; it must be a Purifier, or a Detector")
        weights = [weight] if isinstance(weight, int | float) else list(weight)
        if not weights:
            raise ValueError("weight is empty; it must be a number, or several")
        self.weights = tuple(_checks.number("weight", each) for each in weights)
        self.purifier = purifier

    def _search(self, predict: Prediction, x: Tensor, y: Tensor, call: Call) -> Tensor:
        task, judge = (self._objective(predict, x, y, call.ids, ranked=ranked) for ranked in (False, True))
        best, most = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        for number, weight in enumerate(self.weights):

            def advance(done: int, total: int, number: int = number) -> None:
                if call.progress is not None:
                    call.progress(number * total + done, len(self.weights) * total)

            # draw 0 is left to the evaluation
            with self.purifier.objective(x, call.ids, draw=1) as similarity:
                found = self._climb(Sum(task, Scaled(similarity, weight)), x, call, advance)
            value = judge.value(found)
            better = value > most
            best[better], most[better] = found[better], value[better].to(most.dtype)
        return best


class Evading(CW):
    """Selective projected gradient ascent past a detector (Bryniarski et al. 2022).

    Where an image is overlooked a step follows the margin, and where it is suspected the detector's score,
    downwards: neither outweighs the other, as in the sum of both that :class:`Adaptive` climbs. The first quarter
    of the steps follows the margin alone: many a detector suspects what lies between two labels, but not what is
    beyond. The iterate is kept that is overlooked and has the largest margin, or else the smallest score;
    overlooked with something to spare (:meth:`equifast.detectors.Detector.objective`), in one draw of the
    detector's views.

    Args:
        model: the undefended model; :class:`BPDA` puts a defense before it.
        detector: a :class:`equifast.detectors.Detector` after ``fit``; ``detector.at(rate)`` for another threshold.
        confidence: as in :class:`CW`; with less some labels turn back, with more there is less left for the detector
            (``bench/evading.py``).
        settings: as in :class:`Attack`. Where not given 100 steps of a sixteenth of the radius, with momentum, the best
            iterate kept: few and long ones stand on one side of a threshold or on the other.

    Raises:
        TypeError: for a detector that is none.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        detector: Watching,
        *,
        confidence: float = 1.0,
        eps: float = 4 / 255,
        **settings: Any,
    ) -> None:
        size = _checks.number("eps", eps, above=0) / 16
        patient = {"steps": 100, "step_size": size, "keep": "best", "momentum": 0.75}
        super().__init__(model, confidence=confidence, eps=eps, **{**patient, **settings})
        if not all(callable(getattr(detector, name, None)) for name in ("objective", "predict")):
            raise TypeError(f"detector is a {type(detector).__name__}; it must be a Detector")
        self.detector = detector

    def _search(self, predict: Prediction, x: Tensor, y: Tensor, call: Call) -> Tensor:
        task = self._objective(predict, x, y, call.ids, ranked=True)
        # draw 0 is left to the evaluation
        with self.detector.objective(x, call.ids, draw=1) as overlooked:
            return self._climb(Selective(task, overlooked, self._free), x, call, call.progress)

    def _free(self, t: int) -> bool:
        return t % self.ascent.steps < self.ascent.steps // 4


class Square(Attack):
    """Random search with squares of color, a black box attack (Andriushchenko et al. 2020, Algorithms 1 and 2).

    It asks the model for logits ``steps`` times, first for those of the image itself, and for no gradients; an image
    that has no label left to change is left alone. For ``norm="linf"``. Of a random defense all queries see the same
    draws, those of the attacker's first step: values under different random numbers do not compare. There an image with
    one label is not done when that has turned, since it may not have in other draws. With another ``dtype`` than
    ``"float32"`` it is much weaker: it goes by small differences, and stops where the label has turned in that one.

    Args:
        share: the part of the image that the first squares cover.
        settings: ``eps``, ``steps``, ``targeted``, ``seed``, ``ignore_index`` and ``dtype``, as in :class:`Attack`.
    """

    least_classes = 2
    _SHRINKS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries out of 10,000 at which that halves

    def __init__(self, model: Callable[..., Any], *, share: float = 0.8, **settings: Any) -> None:
        for name in ("step_size", "start", "keep", "momentum", "adaptive_steps"):
            if name in settings:
                raise TypeError(f"{name} is given; Square is a search by random squares and has none")
        super().__init__(model, **{"steps": 1000, **settings})
        self.share = _checks.number("share", share, above=0, most=1)
        if not isinstance(self.ascent.ball, Linf):
            raise ValueError("norm is 'l2'; for Square it must be 'linf'")
        if self.ascent.restarts > 1:
            raise ValueError(f"restarts is {self.ascent.restarts}; for Square it must be 1")

    @property
    def _random(self) -> bool:
        """Whether what is attacked may predict otherwise in the draw that counts."""
        return self.eot is not None and self.draw is None

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean margin of the labels that are still to change; 0 where none is."""
        margin = margins(logits, y, self.ignore_index)
        if y.dim() == 1 and self._random:
            return margin  # of a random defense: by how much it turns, since it may not under other draws
        return self._mean(margin.clamp(min=0) if self.targeted else margin.clamp(max=0), y)

    def _search(self, predict: Prediction, x: Tensor, y: Tensor, call: Call) -> Tensor:
        sign, ids = -1.0 if self.targeted else 1.0, call.ids
        draws = self._draws(0)
        objective = TaskLoss(predict, lambda logits, y: sign * self.loss(logits, y), (y,), ids, lambda t: draws)
        ball, steps, stream = self.ascent.ball, self.ascent.steps, rng.Stream.START.of(2)
        channels, height, width = x.shape[1:]
        stripes = rng.uniform(call.seed, stream, ids, 0, 0, channels * width).view(-1, channels, 1, width)
        wide = torch.promote_types(x.dtype, torch.float32)  # late squares change less than a step of 16 bits
        best, best_value = x.clone(), torch.full((len(x),), -torch.inf, dtype=wide, device=x.device)
        on = torch.arange(len(x), device=x.device)  # images that still have labels to change
        for t in range(steps):
            if t == 0:
                tried = x  # the result is not better than this
            elif t == 1:
                tried = (x + ball.eps * _signs(stripes).to(x))[on]
            else:
                side = max(1, round(math.sqrt(self._share(t, steps) * height * width)))
                u = rng.uniform(call.seed, stream, ids[on], 0, t, 2 + channels)
                change = _square(u[:, :2], (height, width), (min(side, height), min(side, width)))
                color = 2 * ball.eps * _signs(u[:, 2:]).to(x)
                tried = best[on] + torch.where(change, color[:, :, None, None], 0.0)
            tried = ball.project(tried, x[on])
            value = objective.only(on).value(tried).to(best_value)
            better = value > best_value[on]
            best[on[better]], best_value[on[better]] = tried[better], value[better]
            if not self._random or y.dim() > 1:
                on = on[best_value[on] < 0]
            if call.progress is not None:
                call.progress(t + 1, steps)
            if len(on) == 0:
                break
        return best

    def _share(self, t: int, steps: int) -> float:
        return self.share / 2.0 ** sum(t * 10_000 > shrink * steps for shrink in self._SHRINKS)


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0)


def _square(u: Tensor, size: tuple[int, int], sides: tuple[int, int]) -> Tensor:
    """Masks (N, 1, H, W) of a rectangle each, at a place by (N, 2) uniform numbers."""
    inside = []
    for number, (whole, side) in enumerate(zip(size, sides, strict=True)):
        first = (u[:, number] * (whole - side + 1)).floor()[:, None]
        place = torch.arange(whole, device=u.device)
        inside.append((place >= first) & (place < first + side))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


class CWL2(Attack):
    """The nearest image in Euclidean distance that fools the model (Carlini and Wagner 2017, section VI.A).

    Minimizes ``|delta|^2 + c * margin`` by Adam over the inverse hyperbolic tangent of the image, and searches ``c`` by
    bisection. There is no ball: what changes is how far it must go. An image that it cannot fool stays as it is. Of a
    random defense all steps see the same draws, those of the attacker's first step, since which images fool it is
    compared; an image fools it that does so in all of them.

    Args:
        confidence: by how much the margin must be won.
        steps: of Adam, for each ``c``.
        rate: its learning rate.
        searches: how many ``c`` are tried.
        constant: the first.
        share: the part of an image's labels that must be won, where labels are dense.
        targeted, seed, ignore_index, dtype: as in :class:`Attack`.
    """

    least_classes = 2

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        confidence: float = 0.0,
        steps: int = 200,
        rate: float = 0.01,
        searches: int = 9,
        constant: float = 1e-3,
        share: float = 0.99,
        targeted: bool = False,
        seed: int | None = 0,
        ignore_index: int = 255,
        dtype: str = "float32",
    ) -> None:
        rest: dict[str, Any] = {"targeted": targeted, "seed": seed, "ignore_index": ignore_index, "dtype": dtype}
        super().__init__(model, eps=1e6, norm="l2", steps=steps, start="origin", **rest)
        self.confidence = _checks.number("confidence", confidence, least=0)
        self.rate = _checks.number("rate", rate, above=0)
        self.searches = _checks.integer("searches", searches, 1, 100)
        self.constant = _checks.number("constant", constant, above=0)
        self.share = _checks.number("share", share, above=0, most=1)

    @property
    def total_steps(self) -> int:
        return self.searches * self.ascent.steps

    def _search(self, predict: Prediction, x: Tensor, y: Tensor, call: Call) -> Tensor:
        given, x = x, x.to(torch.promote_types(x.dtype, torch.float32))  # in half 1 - 1e-6 is 1
        best, least, draws = x.clone(), x.new_full((len(x),), torch.inf), self._draws(0)
        low, high = torch.zeros_like(least), torch.full_like(least, torch.inf)
        c = torch.full_like(least, self.constant)
        start = torch.atanh((2 * x - 1) * (1 - 1e-6))
        for search in range(self.searches):
            won_once = torch.zeros_like(least, dtype=torch.bool)
            w = start.clone().requires_grad_()
            optimizer = torch.optim.Adam([w], lr=self.rate)
            for t in range(self.ascent.steps):
                step = search * self.ascent.steps + t
                with torch.enable_grad():
                    image = (w.tanh() + 1) / 2
                    short, won = torch.zeros_like(least), torch.zeros_like(least)
                    for draw in draws:
                        found = list(predict(image.to(given.dtype, copy=True), call.ids, draw))
                        for logits in found:
                            margin = margins(logits, y, self.ignore_index)
                            margin = -margin if self.targeted else margin
                            apart = (self.confidence - margin).clamp(min=0)
                            short = short + self._mean(apart, y) / (len(draws) * len(found))
                        reached = (margin > 0) & (margin >= self.confidence)
                        won = won + self._mean(reached.to(won.dtype), y)
                    (slope,) = differentiate((c * short).sum(), [image])
                    (gradient,) = torch.autograd.grad(image, [w], slope + 2 * (image - x))
                distance = row_sum((image - x).flatten(1).square()).detach()
                # not their mean, which falls short of 1 by rounding
                success = won >= len(draws) * (1.0 if y.dim() == 1 else self.share)
                nearer = success & (distance < least)
                best = torch.where(nearer.view(-1, 1, 1, 1), image, best).detach()
                least, won_once = torch.where(nearer, distance, least).detach(), won_once | success
                w.grad = gradient
                optimizer.step()
                if call.progress is not None:
                    call.progress(step + 1, self.total_steps)
            high, low = torch.where(won_once, c.minimum(high), high), torch.where(won_once, low, c.maximum(low))
            c = torch.where(high.isfinite(), (low + high) / 2, 10 * low)
        return best.clamp(0, 1).to(given.dtype)


class Spatial(Attack):
    """Rotations and translations of each image (Engstrom et al. 2019; Yang et al. 2019), of images with one label.

    Args:
        search: ``"grid"``: every point of the grid; an image fails if any point fails it, and the first that does so is
            what it gets, or else the one with the largest loss. ``"worst-of-k"``: of ``k`` transforms, uniform in the
            bounds, the one with the largest loss; with ``k=1`` a random one. ``"spgd"``: from each of the same ``k``
            transforms, projected sign ascent on angle and translation, of which the best iterate is kept, so that it
            is never weaker.
        grid: bounds, and the points of the grid.
        order: in which the grid's points are tried, as :meth:`learned_order` gives it from other images: all indices of
            ``grid.points()``, once; None for that order. It changes which of several points is found, and the time.
        batch: how many transformed images the model is given at once in a grid search. It is always as many, so that
            what is found for an image does not depend on the others.
        k: random transforms, of the other two searches.
        objective: the loss that these two climb, ``"cross-entropy"``; or how far logits are from those of the image
            itself: ``"kl"``, the divergence of the latter's probabilities from the former's, or ``"l2"``, the squared
            distance.
        steps: of each ascent.
        step_degrees, step_pixels: their lengths; a quarter of the bound where None.
        two_pass: whether rotation and translation resample one after the other, as in published code; else once.
        targeted, seed, dtype: as in :class:`Attack`.

    Raises:
        TypeError, ValueError: for any setting that cannot be, in one sentence that names it.
    """

    least_classes = 2

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        search: str = "grid",
        grid: Grid | None = None,
        order: Sequence[int] | None = None,
        batch: int = 256,
        k: int = 10,
        objective: str = "cross-entropy",
        steps: int = 5,
        step_degrees: float | None = None,
        step_pixels: float | None = None,
        two_pass: bool = False,
        targeted: bool = False,
        seed: int | None = 0,
        dtype: str = "float32",
    ) -> None:
        self.search = _checks.choice("search", search, ("grid", "worst-of-k", "spgd"))
        self.grid = Grid() if grid is None else grid
        if not isinstance(self.grid, Grid):
            raise TypeError(f"grid is a {type(grid).__name__}; it must be an equifast.spatial.Grid")
        self.batch = _checks.integer("batch", batch, 1, 2**20)
        self.objective = _checks.choice("objective", objective, ("cross-entropy", "kl", "l2"))
        if self.objective != "cross-entropy" and (targeted or search == "grid"):
            what = "targeted" if targeted else "search 'grid'"
            raise ValueError(f"objective is {objective!r} with {what}; it must be 'cross-entropy'")
        self.two_pass = _checks.boolean("two_pass", two_pass)
        rest: dict[str, Any] = {"targeted": targeted, "seed": seed, "dtype": dtype, "restarts": k, "keep": "best"}
        super().__init__(model, steps=steps if search == "spgd" else 0, **rest)
        sizes = []
        given = {"step_degrees": step_degrees, "step_pixels": step_pixels}
        for (name, length), most in zip(given.items(), self.grid.bounds[:2], strict=True):
            length = most / 4 if length is None else _checks.number(name, length, above=0)
            sizes.append(length / (2 * most) if most else 0.0)
        box = Box(0.5, (sizes[0], sizes[1], sizes[1]))
        self.ascent = dataclasses.replace(self.ascent, ball=box, step_size=1.0)
        count = math.prod(self.grid.counts)
        self.order = tuple(range(count) if order is None else order)
        if any(type(index) is not int for index in self.order) or sorted(self.order) != list(range(count)):
            raise ValueError(
                f"order has {len(self.order)} indices; it must be those of the grid's {count} points, each once"
            )

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Attack a batch; arguments as those of :class:`Attack`, and the transformed images (N, C, H, W)."""
        found = self.find(x, y, ids, progress, watch)
        return transform(x.detach(), found, two_pass=self.two_pass).clamp(0, 1)

    def find(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """The transforms instead of the images: (N, 3) float64, as :func:`equifast.spatial.transform` takes them."""
        found = super().__call__(x, y, ids, progress, watch)
        return found.flatten(1).double() if len(x) else torch.zeros(0, 3, dtype=torch.float64, device=x.device)

    def failures(self, x: Tensor, y: Tensor, ids: Tensor | None = None, progress: Progress | None = None) -> Tensor:
        """Every point of the grid on every image, (N, P) bool in the order of ``grid.points()``: whether it fails."""
        every = copy.copy(self)
        every.search = "everything"
        if len(x) == 0:
            return torch.zeros(0, len(self.order), dtype=torch.bool, device=x.device)
        return every.find(x, y, ids, progress) > 0

    def learned_order(
        self, x: Tensor, y: Tensor, ids: Tensor | None = None, progress: Progress | None = None
    ) -> list[int]:
        """An order for ``order``, by the failures of images other than those to be attacked.

        First the point that fails most images, then the one that fails most of the rest, and so on; then points by how
        many they fail.
        """
        failed = self.failures(x, y, ids, progress)
        counts = failed.sum(0)
        rest, left = failed.clone(), torch.ones(len(self.order), dtype=torch.bool, device=failed.device)
        order: list[int] = []
        while bool(rest.any()):
            point = int(rest.sum(0).argmax())
            order.append(point)
            left[point] = False
            rest[rest[:, point].clone()] = False
        return order + [int(i) for i in counts.argsort(descending=True, stable=True) if left[i]]

    def _search(self, predict: Prediction, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if y.dim() != 1:
            raise ValueError(f"y has shape {_checks.shape(y)}; for Spatial it must be (N,), one label for each image")
        draw = self._draws(0)[0]
        with torch.no_grad():
            *_, logits = predict(x.clone(), call.ids, draw)
        if self.search in ("grid", "everything"):
            return self._through_grid(predict, x, y, call)
        task = self._task(predict, logits, y, call.ids)
        middle = x.new_full((len(x), 3, 1, 1), 0.5)
        found = self._climb(_Transformed(task, x, self._parameters, self.two_pass), middle, call, call.progress)
        return self._parameters(found)

    def _parameters(self, u: Tensor) -> Tensor:
        """(N, 3, 1, 1) in the unit cube -> (N, 3) degrees, right and down."""
        bounds = u.new_tensor(self.grid.bounds, dtype=torch.float64)
        return (2 * u.flatten(1).double() - 1) * bounds

    def _task(self, predict: Prediction, clean: Tensor, y: Tensor, ids: Tensor) -> Objective:
        if self.objective == "cross-entropy":
            return self._objective(predict, y, y, ids)

        def loss(logits: Tensor, clean: Tensor) -> Tensor:
            if self.objective == "l2":
                return (logits - clean).square().sum(1)
            return divergence(clean, logits)

        return TaskLoss(predict, loss, (clean,), ids, self._draws)

    def _through_grid(self, predict: Prediction, x: Tensor, y: Tensor, call: Call) -> Tensor:
        """What :meth:`find` gives of a grid: (N, 3); or, of everything, (N, P). A point fails where all draws do."""

        def last(images: Tensor, ids: Tensor, draw: int) -> Tensor:
            *_, logits = predict(images, ids, draw)
            return logits

        everything = self.search == "everything"
        points = self.grid.points().to(x.device)[list(range(len(self.order)) if everything else self.order)]
        n, total = len(x), len(points)
        failures = torch.zeros(n if everything else 0, total, device=x.device)
        place = torch.zeros(n, dtype=torch.int64, device=x.device)  # the next point of each image
        chosen, most = place.clone(), x.new_full((n,), -torch.inf, dtype=torch.float64)
        alive = torch.arange(n, device=x.device)
        sign = -1.0 if self.targeted else 1.0
        while len(alive):
            # as many points of each image as fill a batch
            at = alive[: self.batch]
            share, more = divmod(self.batch, len(at))
            counts = (share + (torch.arange(len(at), device=x.device) < more)).minimum(total - place[at])
            first = counts.cumsum(0) - counts
            row = torch.arange(len(at), device=x.device).repeat_interleave(counts)
            point = place[at][row] + torch.arange(len(row), device=x.device) - first[row]
            image = at[row]
            fill = torch.zeros(self.batch, dtype=torch.int64, device=x.device)
            fill[: len(row)] = torch.arange(len(row), device=x.device)
            moved = transform(x[image[fill]], points[point[fill]], two_pass=self.two_pass).clamp(0, 1)
            with torch.no_grad():
                ids = call.ids[image[fill]]
                draws = self._draws(0)  # models may work in place
                shown = [moved, *(moved.clone() for _ in draws[1:])]
                found = [last(images, ids, draw)[: len(row)] for images, draw in zip(shown, draws, strict=True)]
                value = sign * torch.stack([self.loss(logits, y[image]).double() for logits in found]).mean(0)
            failed = torch.stack([(logits.argmax(1) == y[image]) == self.targeted for logits in found]).all(0)
            place[at] += counts
            if everything:
                failures[image, point] = failed.to(failures)
            else:
                # of each image the first point that fails it, and the first of those with the largest loss
                never = torch.full_like(at, total)
                fails = never.scatter_reduce(0, row, torch.where(failed, point, total), "amin")
                value = value.nan_to_num(-torch.inf)
                largest = most[at].scatter_reduce(0, row, value, "amax")
                where = never.scatter_reduce(0, row, torch.where(value == largest[row], point, total), "amin")
                risen = largest > most[at]
                chosen[at] = torch.where(fails < total, fails, torch.where(risen, where, chosen[at]))
                most[at] = largest
                place[at] = torch.where(fails < total, total, place[at])
            alive = alive[place[alive] < total]
            if call.progress is not None:
                call.progress(int(place.sum()), n * total)
        return failures if everything else points[chosen]


class _Transformed:
    """An objective of transformed images, as one of the numbers by which the transforms are given, (N, 3, 1, 1)."""

    def __init__(
        self, objective: Objective, images: Tensor, parameters: Callable[[Tensor], Tensor], two_pass: bool
    ) -> None:
        self._objective, self._images, self._parameters, self._two_pass = objective, images, parameters, two_pass

    @property
    def fixed(self) -> bool:
        return self._objective.fixed

    def _moved(self, u: Tensor) -> Tensor:
        return transform(self._images, self._parameters(u), two_pass=self._two_pass).clamp(0, 1)

    def value(self, x: Tensor) -> Tensor:
        return self._objective.value(self._moved(x))

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            moved = self._moved(leaf)
        value, upstream = self._objective.gradient(moved.detach(), t)
        return value, torch.autograd.grad(moved, leaf, upstream)[0]

    def only(self, rows: Tensor | slice) -> "_Transformed":
        return _Transformed(self._objective.only(rows), self._images[rows], self._parameters, self._two_pass)


class BPDA:
    """An attacker who knows the defense: backward pass differentiable approximation, with expectation over draws.

    The forward pass runs the defense, the backward pass takes a purification for the identity (Athalye et al. 2018);
    a defense that is differentiable is differentiated. Step ``t`` averages over ``eot`` draws of the defense that no
    other step uses, and never over draw 0, which is left to the evaluation; or it sees one draw only.

    Args:
        attack: an attack on the undefended model, with all its settings.
        defense: images to images, ``(x, ids=None, draw=0) -> x``, as a :class:`equifast.Purifier`, put before the
            attack's model; or a whole defended model (:class:`equifast.purifier.DefendedModel`), as
            :class:`equifast.Defended` and :class:`equifast.defenses.Averaging` are, attacked in place of it.
        eot: number of draws per step (expectation over transformation). All steps together have at most 65535.
        draw: the one draw that every step sees, instead: of an attacker who knows the defender's random numbers.
        trajectory: whether gradients are the mean of those at the images after every step of the purification, instead
            of that at the last. For a :class:`equifast.Purifier` with one run that keeps its last iterate.

    Raises:
        TypeError, ValueError: if ``attack`` is no attack, ``defense`` not callable, ``eot`` not from 1 on, or the
            defense has no such trajectory.
    """

    def __init__(
        self,
        attack: Attack,
        defense: Purify | DefendedModel,
        eot: int = 1,
        *,
        draw: int | None = None,
        trajectory: bool = False,
    ) -> None:
        if not isinstance(attack, Attack):
            raise TypeError(f"attack is a {type(attack).__name__}; it must be an attack of equifast.attacks")
        if not callable(defense):
            raise TypeError(f"defense is a {type(defense).__name__}; it must be callable")
        _checks.integer("eot", eot, 1, max(1, rng.MAX_DRAW // max(1, attack.total_steps)))
        defended: nn.Module
        if isinstance(defense, DefendedModel):
            defended = defense
        elif isinstance(attack.model, nn.Module):
            defended = Defended(attack.model, defense)
        else:
            raise TypeError(f"attack has a model that is a {type(attack.model).__name__}; it must be a Module")
        if draw is not None:
            _checks.integer("draw", draw, 0, rng.MAX_DRAW)
            if eot != 1:
                raise ValueError(f"draw is given with eot {eot}; of one draw the expectation is its value")
        if _checks.boolean("trajectory", trajectory):
            if not isinstance(defended, Defended) or not isinstance(defended.purifier, Purifier):
                raise TypeError(f"trajectory is True for a {type(defense).__name__}; it must be for a Purifier")
            defended.purifier._check_last(1)
        self._attack = copy.copy(attack)
        self._attack.model, self._attack.eot = defended, eot
        self._attack.draw, self._attack.trajectory = draw, trajectory

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Attack a batch; arguments and result as those of :class:`Attack`."""
        return self._attack(x, y, ids, progress, watch)
