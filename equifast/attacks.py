"""Attacks: each the one ascent, on a loss of the task. A new one is a class with the hooks that differ.

An attack sees what it attacks as a callable from images to logits; :class:`BPDA` puts a defense before it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equifast import _checks, rng
from equifast._cheap import DTYPES, Cheap
from equifast.ascent import Ascent, Progress
from equifast.balls import make
from equifast.features import evaluating, output
from equifast.objectives import TaskLoss, check_labels, cross_entropy
from equifast.purifier import Defended, DefendedModel, Purify

__all__ = ["BPDA", "FGSM", "MIM", "PGD", "Attack"]


class Attack:
    """The base of all attacks: an ascent on :meth:`loss` inside a ball around each image.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, C) or (N, C, H, W); a dict with ``"out"`` is understood.
        eps: radius of the ball, in units of image values.
        step_size: length of a step, in the same units.
        steps: number of steps.
        norm: ``"linf"`` or ``"l2"``.
        targeted: whether ``y`` is what the model shall say, instead of what it shall not.
        start: ``"origin"``, ``"uniform"`` or ``"corner"``.
        restarts: runs from random starts, of which each image keeps the one with the largest loss.
        keep: ``"last"`` iterate or ``"best"`` by the loss.
        momentum: as in :class:`equifast.ascent.Ascent`.
        seed: 0..2**32-1, or None for a fresh one per call.
        ignore_index: the dense label that does not count.
        dtype: ``"float32"``: the model runs as it is. ``"auto"`` and ``"bfloat16"``: gradients come from a copy of the
            model with batch norm folded, under bfloat16 autocast (``"auto"``: where the hardware has it and images are
            float32); faster, and in all we measured as strong (``bench/equivalence.py``). A model with a defense inside
            predicts so too; what the defense itself computes in is its own setting. What cannot be copied, such as a
            function, runs as it is.

    Raises:
        TypeError, ValueError: for any setting that cannot be, in one sentence that names it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        eps: float = 4 / 255,
        step_size: float = 1 / 255,
        steps: int = 50,
        norm: str = "linf",
        targeted: bool = False,
        start: str = "uniform",
        restarts: int = 1,
        keep: str = "last",
        momentum: float | None = None,
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
        self.eot: int | None = None  # BPDA sets it: then the model is random and takes ids and draw
        self.targeted = targeted
        self.seed = seed
        self.ignore_index = ignore_index
        self.ascent = Ascent(
            ball=make(norm, eps),
            steps=steps,
            step_size=step_size,
            start=start,
            restarts=restarts,
            keep=keep,
            momentum=momentum,
        )

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """What the attack increases (targeted: decreases): (N, C) or (N, C, H, W) logits and labels -> (N,)."""
        return cross_entropy(logits, y, self.ignore_index)

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
        return (0,) if self.eot is None else range(1 + t * self.eot, 1 + (t + 1) * self.eot)

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor | None = None, progress: Progress | None = None) -> Tensor:
        """Attack a batch.

        Args:
            x: (N, C, H, W), floating point, in [0, 1].
            y: (N,) or (N, H, W) int64: true labels, or the target where the attack is targeted.
            ids: (N,) int64: which random numbers each image gets; all 0 where None.
            progress: called as ``progress(done, total)`` after every step.

        Returns:
            (N, C, H, W), in the ball around ``x`` and in [0, 1], no graph.

        Raises:
            TypeError: if ``x`` is not floating point or ``y`` not int64.
            ValueError: if shapes or ranges are wrong, or the logits do not depend on the image.
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
            sign = -1.0 if self.targeted else 1.0
            checked = False

            def predict(images: Tensor, numbers: Tensor, draw: int) -> Tensor:
                nonlocal checked
                logits = output(model(images) if self.eot is None else model(images, ids=numbers, draw=draw))
                if not checked:
                    check_labels(logits, y, self.ignore_index)
                    checked = True
                return logits

            def loss(logits: Tensor, y: Tensor) -> Tensor:
                return sign * self.loss(logits, y)

            objective = TaskLoss(predict, loss, y, numbers, self._draws)
            with evaluating(x, self.model, lean=True):
                model = self._cheaper(x)
                # a start of its own: not the corner from which a purifier of the same seed starts
                return self.ascent(objective, x, seed=seed, ids=numbers, party=1, progress=progress)


class PGD(Attack):
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018)."""


class FGSM(Attack):
    """One signed step from the image (Goodfellow et al. 2015)."""

    def __init__(self, model: Callable[..., Any], *, eps: float = 4 / 255, **settings: Any) -> None:
        super().__init__(model, **{"eps": eps, "step_size": eps, "steps": 1, "start": "origin", **settings})


class MIM(Attack):
    """Iterated sign steps along the accumulated gradient (Dong et al. 2018); ``momentum`` is its decay."""

    def __init__(self, model: Callable[..., Any], *, momentum: float = 1.0, **settings: Any) -> None:
        super().__init__(model, **{"momentum": momentum, "start": "origin", **settings})


class BPDA:
    """An attacker who knows the defense: backward pass differentiable approximation, with expectation over draws.

    The forward pass runs the defense, the backward pass takes a purification for the identity (Athalye et al. 2018);
    a defense that is differentiable is differentiated. Step ``t`` averages over ``eot`` draws of the defense that no
    other step uses, and never over draw 0, which is left to the evaluation.

    Args:
        attack: an attack on the undefended model, with all its settings.
        defense: images to images, ``(x, ids=None, draw=0) -> x``, as a :class:`equifast.Purifier`, put before the
            attack's model; or a whole defended model (:class:`equifast.purifier.DefendedModel`), as
            :class:`equifast.Defended` and :class:`equifast.defenses.Averaging` are, attacked in place of it.
        eot: number of draws per step (expectation over transformation).

    Raises:
        TypeError, ValueError: if ``attack`` is no attack, ``defense`` not callable or ``eot`` not from 1 on.
    """

    def __init__(self, attack: Attack, defense: Purify | DefendedModel, eot: int = 1) -> None:
        if not isinstance(attack, Attack):
            raise TypeError(f"attack is a {type(attack).__name__}; it must be an attack of equifast.attacks")
        if not callable(defense):
            raise TypeError(f"defense is a {type(defense).__name__}; it must be callable")
        total = attack.ascent.steps * attack.ascent.restarts
        _checks.integer("eot", eot, 1, max(1, rng.MAX_DRAW // max(1, total)))
        defended: nn.Module
        if isinstance(defense, DefendedModel):
            defended = defense
        elif isinstance(attack.model, nn.Module):
            defended = Defended(attack.model, defense)
        else:
            raise TypeError(f"attack has a model that is a {type(attack.model).__name__}; it must be a Module")
        self._attack = copy.copy(attack)
        self._attack.model, self._attack.eot = defended, eot

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor | None = None, progress: Progress | None = None) -> Tensor:
        """Attack a batch; arguments and result as those of :class:`Attack`."""
        return self._attack(x, y, ids, progress)
