"""Attackers who know a defense: the adaptive protocol."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from equifast import attacks
from equifast.attacks import BPDA, PGD
from equifast.defenses import Averaging
from equifast.evaluate.studies import nothing
from equifast.evaluate.study import Attacked, Attacker
from equifast.purifier import Defended, DefendedModel, Purifier

__all__ = ["Strength", "adaptive", "known"]

RADII = (0.5, 2.0, 4.0, 16.0)
"""Of the curve of what is left over the radius; at the last nothing should be."""


@dataclass(frozen=True, kw_only=True)
class Strength:
    """How hard attackers try.

    Args:
        eps: radius of the ball, in units of image values.
        step_size: length of a step; a quarter of the radius where None. FGSM, MIM and APGD have their own.
        steps: of every attack with gradients; those who take their time (:meth:`patient`) have five times as many.
        eot: draws per step of attackers who take an expectation over the defense's randomness.
        queries: of the black box.
        weights: of the similarity in :class:`equifast.attacks.Adaptive`.
        last: steps of the ascent that the unrolled gradient goes through.
        seed: of the attacks.
        dtype: of attacks with gradients, as in :class:`equifast.attacks.Attack`.
        targeted: whether they aim at what they are given as labels.
        norm: of the ball, ``"linf"`` or ``"l2"``, in which there is no black box.
        ignore_index: the dense label that does not count.
    """

    eps: float = 4 / 255
    step_size: float | None = None
    steps: int = 20
    eot: int = 20
    queries: int = 500
    weights: tuple[float, ...] = (0.1, 1.0, 10.0)
    last: int = 2
    seed: int = 1
    dtype: str = "auto"
    targeted: bool = False
    norm: str = "linf"
    ignore_index: int = 255

    @property
    def task(self) -> dict[str, Any]:
        """What every attack is after, whatever its steps."""
        return {"eps": self.eps, "seed": self.seed, "targeted": self.targeted, "ignore_index": self.ignore_index}

    def settings(self, **changed: Any) -> dict[str, Any]:
        """Of an iterated attack."""
        size = self.eps / 4 if self.step_size is None else self.step_size
        chosen = {**self.task, "step_size": size, "steps": self.steps, "dtype": self.dtype, "norm": self.norm}
        return {**chosen, **changed}

    def patient(self, **changed: Any) -> dict[str, Any]:
        """Of an attack that takes its time: five times the steps of a quarter of the size, with momentum.

        Through a random defense momentum is also a mean over the draws of several steps, which costs no pass.
        """
        steps, size = 5 * self.steps, self.settings()["step_size"] / 4
        return self.settings(**{"steps": steps, "step_size": size, "momentum": 0.75, **changed})

    def times(self, radius: float) -> "Strength":
        """The same in a ball of another radius, with steps as much longer."""
        size = None if self.step_size is None else self.step_size * radius
        most = 1.0 if self.norm == "linf" else math.inf
        return replace(self, eps=min(most, self.eps * radius), step_size=size)

    @property
    def quick(self) -> "Strength":
        """The same with less patience: a look, not a figure."""
        return replace(self, steps=10, eot=4, queries=100, weights=(1.0,), last=1)


def _purifier(defended: DefendedModel) -> Purifier | None:
    """The purifier of a defended model, where it has one with a single run that keeps its last iterate."""
    purifier = defended.purifier if isinstance(defended, Defended) else None
    if not isinstance(purifier, Purifier) or purifier.ascent.steps == 0:
        return None
    single = purifier.ascent.restarts == 1 and purifier.ascent.keep == "last" and purifier.ascent.stop is None
    return purifier if single else None


def _detector(defended: DefendedModel) -> Any:
    """What a defended model suspects images by, where it does not purify all."""
    return defended.detector if isinstance(defended, Defended) else None


def patient_margin(strength: Strength, model: nn.Module, **changed: Any) -> attacks.CW:
    """Who takes his time on the margin."""
    return attacks.CW(model, confidence=1.0, **strength.patient(**changed))


def known(strength: Strength) -> dict[str, Attacker]:
    """Attackers by name, all of one strength."""
    s = strength

    def plain(kind: type[attacks.Attack], **changed: Any) -> Callable[[nn.Module, DefendedModel], Attacked]:
        return lambda model, defended: kind(model, **s.settings(**changed))

    def draws(defended: DefendedModel, eot: int) -> int:
        """Without a defense all are the same."""
        return 1 if isinstance(defended, Defended) and defended.purifier is nothing else eot

    def entropy(model: nn.Module, **changed: Any) -> attacks.Attack:
        """On the cross-entropy."""
        return PGD(model, **s.settings(**changed))

    def strongest(model: nn.Module, **changed: Any) -> attacks.Attack:
        """Of those without a defense and of as many steps (bench/attack_strength.py)."""
        return attacks.CW(model, confidence=5.0, **s.settings(**changed))

    def houdini(model: nn.Module, **changed: Any) -> attacks.Attack:
        """What leaves least of segmentation where the network was trained against attacks."""
        return attacks.Houdini(model, **s.settings(**changed))

    patient = partial(patient_margin, s)

    def straight(
        attack: Callable[..., attacks.Attack], draw: int | None = None, eot: int = 1
    ) -> Callable[[nn.Module, DefendedModel], Attacked]:
        return lambda model, defended: BPDA(attack(model), defended, draws(defended, eot), draw=draw)

    def trajectory(model: nn.Module, defended: DefendedModel) -> Attacked | None:
        if _purifier(defended) is None or _detector(defended) is not None:
            return None
        return BPDA(entropy(model), defended, trajectory=True)

    def shorter(model: nn.Module, defended: DefendedModel) -> Attacked | None:
        purifier = _purifier(defended)
        if purifier is None or purifier.ascent.steps < 2:
            return None
        short = copy.copy(purifier)
        # with noise the steps before the last draw corners (docs/corner.md)
        start = "corner" if purifier.ascent.noise else purifier.ascent.start
        short.ascent = replace(purifier.ascent, steps=1, start=start, noise=False)
        as_is = {"detector": _detector(defended), "dtype": defended.dtype}
        return BPDA(entropy(model), Defended(model, short, **as_is))

    def through(model: nn.Module, defended: DefendedModel) -> Defended | None:
        purifier = _purifier(defended)
        if purifier is None:
            return None
        as_is = {"detector": _detector(defended), "dtype": defended.dtype}
        return Defended(model, purifier, gradient="unrolled", last=min(s.last, purifier.ascent.steps), **as_is)

    def followed(
        attack: Callable[..., attacks.Attack], draw: int | None = None, eot: int = 1
    ) -> Callable[[nn.Module, DefendedModel], Attacked | None]:
        def make(model: nn.Module, defended: DefendedModel) -> Attacked | None:
            inside = through(model, defended)
            return None if inside is None else BPDA(attack(model, dtype="float32"), inside, eot, draw=draw)

        return make

    several = min(s.eot, 4)  # each takes three to four times as long as one of BPDA
    many = s.patient()["steps"]

    def both(model: nn.Module, defended: DefendedModel) -> Attacked | None:
        purifier = defended.purifier if isinstance(defended, Defended) else None
        if not isinstance(purifier, Purifier) or purifier.ascent.steps == 0:
            return None
        return BPDA(attacks.Adaptive(model, purifier, weight=s.weights, **s.settings()), defended)

    def overlooked(model: nn.Module, defended: DefendedModel) -> Attacked | None:
        detector = _detector(defended)
        if detector is None or not callable(getattr(detector, "objective", None)):
            return None
        return BPDA(attacks.Evading(model, detector, **s.patient(keep="best")), defended)

    def averaging(model: nn.Module, defended: DefendedModel) -> Attacked:
        return BPDA(entropy(model), Averaging(model))

    def square(draw: int | None = None) -> Callable[[nn.Module, DefendedModel], Attacked | None]:
        def make(model: nn.Module, defended: DefendedModel) -> Attacked | None:
            if s.norm != "linf":
                return None
            # from predictions as they are: what is won by a hair in bfloat16 is not won
            return BPDA(attacks.Square(model, steps=s.queries, **s.task), defended, draw=draw)

        return make

    def larger(radius: float) -> Attacker:
        def make(model: nn.Module, defended: DefendedModel) -> Attacked:
            return BPDA(PGD(model, **s.times(radius).settings()), defended)

        return Attacker(f"BPDA, radius x {radius:g}", make, radius=radius)

    def tuned(model: nn.Module, _: DefendedModel, **how: Any) -> Attacked:
        return attacks.APGD(model, **own_steps, **how)

    own_steps = s.settings()  # of attacks that choose their lengths
    del own_steps["step_size"]

    def iterated(model: nn.Module, _: DefendedModel) -> Attacked:
        # as many of its short steps as its definition takes, where that is more: with fewer it does not get there
        own = attacks.IFGSM(model, eps=s.eps).ascent.steps
        return attacks.IFGSM(model, **{**own_steps, "steps": max(s.steps, own)})

    found = [
        Attacker(
            "FGSM",
            lambda model, defended: attacks.FGSM(model, norm=s.norm, **s.task),
            knows=False,
        ),
        *(
            Attacker(kind.__name__, plain(kind), knows=False)
            for kind in (PGD, attacks.CW, attacks.Houdini, attacks.SegPGD, attacks.CosPGD)
        ),
        Attacker(f"CW, {many} steps", lambda model, defended: patient(model, keep="best"), knows=False),
        Attacker("IFGSM", iterated, knows=False),
        Attacker("MIM", lambda model, defended: attacks.MIM(model, **own_steps), knows=False),
        *(
            Attacker(name, partial(tuned, objective=objective, restarts=restarts), knows=False)
            for name, objective, restarts in (
                ("APGD", "ce", 1),
                ("APGD, DLR", "dlr", 1),
                ("APGD, targeted DLR", "targeted-dlr", 3),
            )
            if objective == "ce" or not s.targeted
        ),
        Attacker("through averaging", averaging, knows=False),
        Attacker("BPDA, known draw", straight(entropy, draw=0), known_draw=True),
        Attacker("BPDA", straight(entropy)),
        Attacker(f"BPDA, {s.eot} draws", straight(entropy, eot=s.eot)),
        Attacker("BPDA, margin", straight(strongest)),
        Attacker(f"BPDA, margin, {s.eot} draws", straight(strongest, eot=s.eot)),
        Attacker("BPDA, known draw, margin", straight(strongest, draw=0), known_draw=True),
        Attacker(f"BPDA, margin, {many} steps", straight(patient)),
        Attacker(f"BPDA, known draw, margin, {many} steps", straight(patient, draw=0), known_draw=True),
        Attacker("BPDA, Houdini", straight(houdini)),
        Attacker("BPDA, known draw, Houdini", straight(houdini, draw=0), known_draw=True),
        Attacker("BPDA, trajectory", trajectory),
        Attacker("BPDA, one step", shorter),
        Attacker("unrolled", followed(entropy)),
        Attacker("unrolled, margin", followed(strongest)),
        Attacker(f"unrolled, margin, {several} draws", followed(strongest, eot=several)),
        Attacker("unrolled, known draw, margin", followed(strongest, draw=0), known_draw=True),
        Attacker(f"unrolled, margin, {many} steps", followed(patient)),
        Attacker(f"unrolled, known draw, margin, {many} steps", followed(patient, draw=0), known_draw=True),
        Attacker("unrolled, Houdini", followed(houdini)),
        Attacker("unrolled, known draw, Houdini", followed(houdini, draw=0), known_draw=True),
        Attacker("Adaptive", both),
        Attacker("Evading", overlooked),
        Attacker(f"Square, {s.queries} queries", square(), gradients=False),
        Attacker(f"Square, known draw, {s.queries} queries", square(draw=0), gradients=False, known_draw=True),
        *(larger(radius) for radius in RADII),
    ]
    return {attacker.name: attacker for attacker in found}


def adaptive(strength: Strength) -> list[Attacker]:
    """The attackers of the adaptive protocol, from one who knows nothing to those who know all but the next draw.

    PGD, Houdini, and five times as many steps on the margin, on the model, whose points every defense is tested on; the
    attack through averaging over views; BPDA that knows the defender's draw; BPDA with another draw at each step, with
    expectation, along the trajectory, on Houdini's loss, and with five times the steps on the margin (these two also at
    the defender's draw); through a purifier of one step, transferred; unrolled through the last steps, on
    cross-entropy, on Houdini's loss and with five times the steps on the margin (those also at that draw); the paper's
    adaptive attack; who evades the detector, where there is one; and random search. Then BPDA at other radii: in larger
    balls it is no part of the worst case, and must leave nothing in the end.
    """
    everyone, many = known(strength), strength.patient()["steps"]
    names = (
        *("PGD", "Houdini", f"CW, {many} steps", "through averaging"),
        *("BPDA, known draw", "BPDA", f"BPDA, {strength.eot} draws"),
        *(
            f"BPDA, margin, {many} steps",
            f"BPDA, known draw, margin, {many} steps",
            "BPDA, Houdini",
            "BPDA, known draw, Houdini",
            "BPDA, trajectory",
            "BPDA, one step",
            "unrolled",
            f"unrolled, margin, {many} steps",
            f"unrolled, known draw, margin, {many} steps",
            "unrolled, Houdini",
            "unrolled, known draw, Houdini",
            "Adaptive",
            "Evading",
            f"Square, {strength.queries} queries",
        ),
        *(f"BPDA, radius x {radius:g}" for radius in RADII),
    )
    return [everyone[name] for name in names]
