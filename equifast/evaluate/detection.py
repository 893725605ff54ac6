"""Detectors against anomalies, image by image: attacked, corrupted and foreign images, and what they do to a model."""

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from equifast import __version__, _checks, attacks, rng
from equifast._fingerprint import describe
from equifast.detectors import Detector
from equifast.evaluate.corruptions import CORRUPTIONS, SEVERITIES, corrupt, version
from equifast.evaluate.metrics import (
    Estimate,
    Interval,
    Separation,
    accuracy,
    average,
    mean_auroc,
    mean_auroc_difference,
    mean_iou,
    separation,
)
from equifast.evaluate.protocol import Strength, patient_margin
from equifast.evaluate.records import (
    CLEAN,
    Advance,
    Clock,
    Image,
    Records,
    as_array,
    batches,
    judged,
    list_images,
    listed,
)
from equifast.evaluate.study import arithmetic, check_range
from equifast.features import evaluating, output
from equifast.purifier import Purifier

__all__ = [
    "STUDIES",
    "Anomaly",
    "Detection",
    "DetectionReport",
    "attacked",
    "corrupted",
    "evading",
    "foreign",
    "noise",
    "patient",
]

Array = NDArray[Any]
Changed = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]
"""``(x, y, ids, places) -> x``: what becomes of clean images, which have these places among all."""


@dataclass(frozen=True)
class Anomaly:
    """A kind of image that is not as the clean ones: a column of the table.

    Args:
        name: its heading.
        make: ``(model, detector) -> change``, what makes such images of clean ones.
        settings: what decides them, as values that JSON can hold.
        knows: whether they depend on the detector; where not, they are made once for all.
        group: the anomalies over which a mean is told, as severities of corruptions are.
        rate: of false positives, whose threshold decides what of them is flagged; the detector's own where None.
    """

    name: str
    make: Callable[[nn.Module, Detector], Changed]
    settings: Any = None
    knows: bool = False
    group: str | None = None
    rate: float | None = None


def attacked(strength: Strength, purifier: Purifier | None = None) -> Anomaly:
    """PGD on the model; or what a purifier makes of it, which is to look clean again."""
    _check_untargeted(strength)
    level = f"PGD {_radius(strength)}"

    def make(model: nn.Module, detector: Detector) -> Changed:
        attack = attacks.PGD(model, **strength.settings())

        def change(x: Tensor, y: Tensor, ids: Tensor, places: Sequence[int]) -> Tensor:
            x = attack(x, y, ids)
            return x if purifier is None else purifier(x, ids)

        return change

    if purifier is None:
        return Anomaly(level, make, describe(strength))
    return Anomaly(f"{level}, purified", make, {"attack": describe(strength), "purifier": describe(purifier)})


def evading(strength: Strength, rate: float) -> Anomaly:
    """Selective PGD, which stays below the threshold that a detector has for a rate of false positives.

    :class:`equifast.attacks.Evading`, through the model alone: an image that is not suspected is not purified. What is
    left over the rate is the curve of detection against damage: whoever flags more clean images leaves such an attacker
    less room.
    """
    _check_untargeted(strength)

    def make(model: nn.Module, detector: Detector) -> Changed:
        attack = attacks.Evading(model, detector.at(rate), **strength.patient(keep="best"))
        return lambda x, y, ids, places: attack(x, y, ids)

    name = f"evading {_radius(strength)}, rate {100 * rate:g}%"
    settings = {"attack": describe(strength), "by": "Evading", "rate": rate}
    return Anomaly(name, make, settings, knows=True, group="evading", rate=rate)


def patient(strength: Strength) -> Anomaly:
    """As many steps on the margin as those of :func:`evading`, by an attacker who does not look at detectors."""
    _check_untargeted(strength)

    def make(model: nn.Module, detector: Detector) -> Changed:
        attack = patient_margin(strength, model, keep="best")
        return lambda x, y, ids, places: attack(x, y, ids)

    name = f"CW {_radius(strength)}, {strength.patient()['steps']} steps"
    return Anomaly(name, make, {"attack": describe(strength), "by": "CW"})


def _radius(strength: Strength) -> str:
    return f"{255 * strength.eps:g}/255" if strength.norm == "linf" else f"{strength.eps:g} in l2"


def _check_untargeted(strength: Strength) -> None:
    if strength.targeted:
        raise ValueError("strength is targeted; anomalies flee the true labels")


def corrupted(name: str, severity: int, seed: int = 0) -> Anomaly:
    """One of the fifteen common corruptions."""

    def make(model: nn.Module, detector: Detector) -> Changed:
        return lambda x, y, ids, places: corrupt(x, name, severity, ids, seed)

    return Anomaly(f"{name} {severity}", make, {"seed": seed, "library": version()}, group=f"severity {severity}")


def foreign(name: str, data: Dataset[Any]) -> Anomaly:
    """Images of another data set, resized (bilinear, antialiased where smaller) to the size of those in their place."""
    count = len(cast(Sized, data))
    digest = hashlib.sha256()
    for place in range(count):
        digest.update(data[place][0].contiguous().numpy(force=True).tobytes())

    def make(model: nn.Module, detector: Detector) -> Changed:
        def change(x: Tensor, y: Tensor, ids: Tensor, places: Sequence[int]) -> Tensor:
            if max(places, default=0) >= count:
                raise ValueError(f"{name} has {count} images; there must be as many as clean ones")
            size = (x.shape[2], x.shape[3])
            found = [
                functional.interpolate(data[place][0][None].to(x), size, mode="bilinear", antialias=True)
                for place in places
            ]
            return torch.cat(found).clamp(0, 1)

        return change

    return Anomaly(name, make, {"images": count, "digest": digest.hexdigest()[:16]}, group="foreign")


def noise(seed: int = 0) -> Anomaly:
    """Uniform noise, which is an image of nothing."""

    def make(model: nn.Module, detector: Detector) -> Changed:
        def change(x: Tensor, y: Tensor, ids: Tensor, places: Sequence[int]) -> Tensor:
            return rng.uniform(seed, rng.Stream.DEFENSE, ids, 0, 0, x[0].numel()).view(x.shape).to(x.dtype)

        return change

    return Anomaly("uniform noise", make, {"seed": seed}, group="foreign")


class Detection:
    """Every detector on clean images and on every kind of anomaly; each score is recorded once, and whole.

    Started again in the same folder it computes what is missing, as :class:`equifast.evaluate.Evaluation`.

    Args:
        model: images (N, 3, H, W) in [0, 1] -> logits; what anomalies do to it is recorded beside the scores.
        data: a map-style data set of (image, label), clean.
        detectors: fitted ones, by name.
        anomalies: the kinds.
        batch: images at a time.
        ignore_index: the dense label that does not count.
        arguments: what else decides the results, as values that JSON can hold.

    Raises:
        ValueError: for data without images, no detectors, or names that are given twice or are taken.
        RuntimeError: for a detector that is not fitted.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset[Any],
        detectors: Mapping[str, Detector],
        anomalies: Sequence[Anomaly],
        *,
        batch: int = 4,
        ignore_index: int = 255,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.data = model, data
        self.detectors, self.anomalies = dict(detectors), tuple(anomalies)
        names = [CLEAN, *(anomaly.name for anomaly in anomalies)]
        if len(set(names)) < len(names):
            raise ValueError(f"anomalies are {', '.join(names[1:])}; names must differ, and from {CLEAN!r}")
        if not detectors:
            raise ValueError("detectors is empty; there must be at least one")
        for detector in self.detectors.values():
            _ = detector.threshold  # raises
        self.batch = _checks.integer("batch", batch, 1, 2**31)
        self.ignore_index = ignore_index
        self.images = list_images(data)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.dense = self.images[0].label is None
        self._arguments = {
            **(arguments or {}),
            "kind": "detection",
            "version": __version__,
            "torch": torch.__version__,
            **arithmetic(self._device),
            "model": describe(model),
            "ignore_index": ignore_index,
        }

    def run(self, folder: str | Path, progress: Advance | None = None) -> "DetectionReport":
        """Compute what the folder lacks; arguments and errors as those of :meth:`equifast.evaluate.Evaluation.run`."""
        kinds = (Anomaly(CLEAN, lambda model, detector: lambda x, y, ids, places: x), *self.anomalies)
        digest = hashlib.sha256("".join(image.key for image in self.images).encode()).hexdigest()[:16]
        manifest = {
            **self._arguments,
            "data": {"images": len(self.images), "digest": digest},
            "defenses": {name: describe(detector) for name, detector in self.detectors.items()},
            "attackers": {kind.name: kind.settings for kind in kinds},
        }
        place = {image.key: number for number, image in enumerate(self.images)}
        with Records(Path(folder), manifest) as records:
            cells = [(kind, name) for kind in kinds for name in self.detectors]
            missing = {
                (name, kind.name): sum((image.key, name, kind.name) not in records.results for image in self.images)
                for kind, name in cells
            }
            clock = Clock(missing, progress)
            for batch in batches(self.images, self.batch):
                for kind in kinds:
                    self._run(kind, batch, place, records, clock)
            return DetectionReport(self, records.results)

    def _run(self, kind: Anomaly, batch: list[Image], place: Mapping[str, int], records: Records, clock: Clock) -> None:
        made: dict[str, tuple[Tensor, Any]] = {}  # of those who do not know the detector
        for name, detector in self.detectors.items():
            left = [image for image in batch if (image.key, name, kind.name) not in records.results]
            if not left:
                continue
            started = time.perf_counter()
            if not all(image.key in made for image in left):
                x, y = (
                    torch.stack(p).to(self._device) for p in zip(*(listed(self.data, i) for i in left), strict=True)
                )
                ids = torch.tensor([image.id for image in left], device=self._device)
                changed = kind.make(self.model, detector)(x, y, ids, [place[image.key] for image in left])
                damage = self._damage(changed, y)
                made = dict(zip((i.key for i in left), zip(changed, damage, strict=True), strict=True))
            x = torch.stack([made[image.key][0] for image in left])
            begun = time.perf_counter()
            scores = detector.score(x, torch.tensor([image.id for image in left], device=self._device)).tolist()
            seconds = (time.perf_counter() - begun) / len(left)
            records.add(
                {
                    "image": image.key,
                    "index": image.index,
                    "defense": name,
                    "attack": kind.name,
                    "result": score,
                    "damage": made[image.key][1],
                    "seconds": round(seconds, 6),
                }
                for image, score in zip(left, scores, strict=True)
            )
            clock.done((name, kind.name), len(left), time.perf_counter() - started)
            if kind.knows:
                made = {}

    def _damage(self, x: Tensor, y: Tensor) -> list[Any]:
        """What the model without a defense makes of them."""
        with evaluating(x, self.model), torch.no_grad():
            logits = output(self.model(x.clone()))  # models may work in place
        if len(logits) != len(x) or logits.shape[2:] != y.shape[1:]:
            raise ValueError(f"the model gives logits {tuple(logits.shape)} for labels {tuple(y.shape)}")
        check_range(y, logits.shape[1], self.ignore_index)
        return judged(logits.argmax(1), y, logits.shape[1], self.ignore_index)


class DetectionReport:
    """The figures of a study of detectors: ``scores[detector][kind]`` are (N,), in the order of the images' digests."""

    def __init__(self, study: Detection, records: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> None:
        self.dense, self.images = study.dense, len(study.images)
        self.figure = "mIoU in %" if study.dense else "accuracy in %"
        self.thresholds = {name: detector.threshold for name, detector in study.detectors.items()}
        self.rates = {name: float(detector._known("false_positive_rate")) for name, detector in study.detectors.items()}
        self.groups = {kind.name: kind.group for kind in study.anomalies}
        self._evaded = {
            (name, kind.name): detector.at(kind.rate).threshold
            for name, detector in study.detectors.items()
            for kind in study.anomalies
            if kind.rate is not None
        }
        self.scores: dict[str, dict[str, Array]] = {}
        self.seconds: dict[str, float] = {}
        self._damage: dict[str, dict[str, Array]] = {}
        for name in study.detectors:
            for kind in (CLEAN, *self.groups):
                lines = [records[image.key, name, kind] for image in study.images]
                self.scores.setdefault(name, {})[kind] = np.array([line["result"] for line in lines], float)
                self._damage.setdefault(name, {})[kind] = np.stack([as_array(line["damage"]) for line in lines])
            self.seconds[name] = float(np.median([records[i.key, name, CLEAN]["seconds"] for i in study.images]))

    def damage(self, detector: str, kind: str) -> Estimate:
        """What is left of the model's figure, without a defense, on images of a kind."""
        results = self._damage[detector][kind]
        return mean_iou(results) if self.dense else accuracy(results)

    def flagged(self, detector: str, kind: str) -> Estimate:
        """The part of the images of a kind that a detector suspects, in percent; of clean ones, its false positives.

        By its threshold; of a kind that has a rate, by the one for that.
        """
        threshold = self._evaded.get((detector, kind), self.thresholds[detector])
        return average((~(self.scores[detector][kind] <= threshold)).astype(float))

    @functools.cached_property
    def separations(self) -> dict[str, dict[str, Separation]]:
        """``[detector][kind]``: how well its scores tell images of the kind from clean ones."""
        return {
            name: {
                kind: separation(scores[CLEAN], scores[kind], paired=group != "foreign")
                for kind, group in self.groups.items()
            }
            for name, scores in self.scores.items()
        }

    def means(self) -> dict[str, dict[str, Interval]]:
        """``[detector][group]``: the mean area under the characteristic over the kinds of a group of several."""
        found: dict[str, dict[str, Interval]] = {}
        for group in self._severities:
            for name in self.scores:
                found.setdefault(name, {})[group] = mean_auroc(*self._of_group(name, group))
        return found

    def differences(self, against: str) -> dict[str, dict[str, Estimate]]:
        """``[detector][group]``: those means minus those of one detector, paired over images.

        Raises:
            ValueError: if there is no such detector.
        """
        if against not in self.scores:
            raise ValueError(f"there is no detector {against!r}; it must be one of {', '.join(self.scores)}")
        others = [name for name in self.scores if name != against]
        return {
            name: {
                group: mean_auroc_difference(self._of_group(name, group), self._of_group(against, group))
                for group in self._severities
            }
            for name in others
        }

    @property
    def _severities(self) -> list[str]:
        """The groups of several kinds, over which a mean is told."""
        groups = [group for group in self.groups.values() if group is not None and group.startswith("severity")]
        return [group for group in dict.fromkeys(groups) if groups.count(group) > 1]

    def _of_group(self, name: str, group: str) -> tuple[Array, Array]:
        """A detector's scores of clean images (N,), and of those of every kind of a group (G, N)."""
        scores = self.scores[name]
        return scores[CLEAN], np.stack([scores[kind] for kind, other in self.groups.items() if other == group])

    def document(self, against: str | None = None) -> dict[str, Any]:
        """All figures, and differences of means from one detector where it is named, as values that JSON can hold."""
        rows: dict[str, Any] = {}
        for name, kinds in self.separations.items():
            row = rows.setdefault(name, {})
            row["clean"] = {"flagged": _values(self.flagged(name, CLEAN)), "model": _values(self.damage(name, CLEAN))}
            for kind, found in kinds.items():
                row[kind] = {
                    **{key: vars(value) for key, value in vars(found).items()},
                    "flagged": _values(self.flagged(name, kind)),
                }
                if self.groups[kind] != "foreign":  # whose labels nobody knows
                    row[kind]["model"] = _values(self.damage(name, kind))
        document = {
            "figure": self.figure,
            "images": self.images,
            "false positive rate": self.rates,
            "seconds": self.seconds,
            "means": {name: {g: vars(m) for g, m in row.items()} for name, row in self.means().items()},
            "rows": rows,
        }
        if against is not None:
            apart = self.differences(against)
            document["against"] = against
            document["differences"] = {name: {g: _values(e) for g, e in row.items()} for name, row in apart.items()}
        return document


def _values(estimate: Estimate) -> dict[str, Any]:
    error = None if np.isnan(estimate.standard_error) else estimate.standard_error
    return {"value": estimate.value, "error": error}


RATES = (0.05, 0.1, 0.2, 0.5)
"""Of false positives, at which attackers evade."""


def _detection(strength: Strength, purifier: Purifier, others: Mapping[str, Dataset[Any]]) -> list[Anomaly]:
    weaker = [strength.times(part) for part in (1 / 4, 1 / 2)]
    return [
        *(attacked(each) for each in (*weaker, strength)),
        patient(strength),
        attacked(strength, purifier),
    ]


def _evasion(strength: Strength, purifier: Purifier, others: Mapping[str, Dataset[Any]]) -> list[Anomaly]:
    return [attacked(strength), patient(strength), *(evading(strength, rate) for rate in RATES)]


def _corruptions(strength: Strength, purifier: Purifier, others: Mapping[str, Dataset[Any]]) -> list[Anomaly]:
    return [corrupted(name, severity, strength.seed) for name in CORRUPTIONS for severity in SEVERITIES]


def _ood(strength: Strength, purifier: Purifier, others: Mapping[str, Dataset[Any]]) -> list[Anomaly]:
    return [*(foreign(name, data) for name, data in others.items()), noise(strength.seed)]


STUDIES: Mapping[str, Callable[[Strength, Purifier, Mapping[str, Dataset[Any]]], list[Anomaly]]] = {
    "detection": _detection,
    "evasion": _evasion,
    "corruptions": _corruptions,
    "ood": _ood,
}
