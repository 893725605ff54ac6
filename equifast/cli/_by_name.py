"""Defenses and detectors by their names."""

import functools
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equifast.cli._common import progress_bar
from equifast.defenses import Averaging, Contrastive, Invariance, RandomNoise, Rotation
from equifast.detectors import Combined, Detector, Deviation, OutputVariance, Similarity, needed
from equifast.evaluate import open_images
from equifast.evaluate.records import list_images
from equifast.evaluate.studies import nothing
from equifast.models import function_in, load_defense
from equifast.purifier import PRESETS, Defended, DefendedModel, Purifier
from equifast.views import Flip, guard, paper

__all__ = ["DEFENSES", "DETECTORS", "ByName", "Heads", "check_against", "titles_of"]

WITH_HEADS: dict[str, type[Rotation] | type[Contrastive]] = {"rotation": Rotation, "contrastive": Contrastive}
DEFENSES = (
    *("none", "random", "averaging", "averaging-N", "flip", "invariance", *WITH_HEADS, *PRESETS, "detect"),
    "file.py:function",
)
DETECTORS: Mapping[str, Callable[[nn.Module, str | None, Sequence[str], int], Detector]] = {
    "similarity": lambda model, features, layers, seed: Similarity(
        Purifier(model, features, seed=seed, views=[Flip()])
    ),
    "variance": lambda model, features, layers, seed: OutputVariance(model, seed=seed),
    "guard": lambda model, features, layers, seed: OutputVariance(model, guard(), seed=seed),
    "error": lambda model, features, layers, seed: OutputVariance(model, error=True, seed=seed),
    "deviation": lambda model, features, layers, seed: Deviation(model, [features, *layers], seed=seed),
}


def titles_of(defenses: Sequence[str]) -> dict[str, str]:
    """Defenses by the names of their rows: of one in a file that of its function."""
    found: dict[str, str] = {}
    for name in defenses:
        place = function_in(name)
        title = name if place is None else place[1]
        if found.setdefault(title, name) != name:
            raise ValueError(f"defenses {found[title]!r} and {name!r} are both named {title!r}; names must differ")
    return found


def check_against(against: str | None, rows: Collection[str]) -> None:
    if against is not None and against not in rows:
        raise ValueError(f"against is {against!r}; it must be one of {', '.join(rows)}")
    if against is not None and len(rows) == 1:
        raise ValueError(f"against is {against!r}, the only one there is; differences are between two")


@dataclass(frozen=True)
class Heads:
    """Where heads and thresholds are kept, and what they are of: data for the heads, and clean data."""

    folder: Path
    data: Path | None
    clean: Path | None
    rate: float  # of clean images that may be flagged
    images: int
    size: tuple[int, int] | None
    device: torch.device
    tested: Any  # the images of the evaluation

    def fitted(self, detector: Detector, name: str) -> Detector:
        """The detector with its threshold, fitted the first time; the file is named after what it was fitted on."""
        chosen, known = self._calibrating
        path = self.folder / f"detector-{name}-{_digest(sorted(known), detector.description())}.json"
        if path.exists():
            return detector.load(path).at(self.rate)
        with progress_bar() as progress:
            task = progress.add_task(f"the threshold of {name}", total=len(chosen))
            batches = (chosen[i][0][None].to(self.device) for i in range(len(chosen)))
            detector.fit(progress.track(batches, task_id=task, total=len(chosen)), false_positive_rate=self.rate)
        self.folder.mkdir(parents=True, exist_ok=True)
        detector.save(path)
        return detector

    def _open(self, data: Path) -> tuple[Any, set[str]]:
        """The images, none of which may be one that is tested, and their digests."""
        chosen = open_images(data, min(self.images, len(open_images(data, None, self.size))), self.size)
        known = {image.digest for image in list_images(chosen)}
        if both := known & {image.digest for image in list_images(self.tested)}:
            raise ValueError(
                f"{data} has {len(both)} of the images that are tested; a threshold, or a head, is of others"
            )
        return chosen, known

    def check(self, names: Sequence[str]) -> None:
        """ValueError where detectors of these names can have no threshold, before anything is trained or fitted."""
        if self.clean is None:
            raise ValueError(f"detector {names[0]} needs clean images; name data for it with --clean")
        if not 0 < self.rate < 1:
            raise ValueError(f"--rate is {self.rate}; it must be above 0 and below 1")
        chosen, known = self._calibrating
        if len(chosen) < (least := needed(self.rate)):
            raise ValueError(f"--clean has {len(chosen)} images; for --rate {self.rate} it must have at least {least}")
        headed = not {*WITH_HEADS, "combined"}.isdisjoint(names)
        if self.data is not None and headed and (both := len(known & self._trained)):
            raise ValueError(
                f"--clean has {both} of the images of --fit; a head knows those, and the threshold must be of others"
            )

    @functools.cached_property
    def _calibrating(self) -> tuple[Any, set[str]]:
        """Clean images, and their digests."""
        assert self.clean is not None
        return self._open(self.clean)

    @functools.cached_property
    def _trained(self) -> set[str]:
        """The images of heads."""
        return set() if self.data is None else self._open(self.data)[1]

    def give(self, purifier: Rotation | Contrastive, name: str) -> Purifier:
        """The purifier with its head, trained the first time; the file is named after what it was trained on."""
        if self.data is None:
            found = list(self.folder.glob(f"{name}-*.safetensors"))
            if len(found) != 1:
                where = f"{self.folder} has {len(found)}"
                raise ValueError(f"{name} needs one trained head, of which {where}; name data for it with --fit")
            return purifier.load(found[0])
        chosen, known = self._open(self.data)
        path = self.folder / f"{name}-{_digest(sorted(known))}.safetensors"
        if path.exists():
            return purifier.load(path)
        with progress_bar() as progress:
            task = progress.add_task(f"the head of {name}", total=None)
            purifier.fit(
                (chosen[i][0][None].to(self.device) for i in range(len(chosen))),
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        purifier.save(path)
        return purifier


def _digest(*things: object) -> str:
    return hashlib.sha256(repr(things).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ByName:
    """Makes detectors and defenses of a model."""

    network: nn.Module
    features: str | None
    layers: Sequence[str]  # further ones, of Deviation
    eps: float  # of defenses
    seed: int
    heads: Heads

    def detectors(self, wanted: Sequence[str], against: str | None = None) -> dict[str, Detector]:
        """Detectors with their thresholds, all where none is wanted; ``against`` is one of them."""

        def turned(kind: type[Rotation] | type[Contrastive], name: str) -> Detector:
            return Similarity(self.heads.give(kind(self.network, self.features, seed=self.seed), name))

        makes: dict[str, Callable[[], Detector]] = {
            **{
                name: partial(make, self.network, self.features, self.layers, self.seed)
                for name, make in DETECTORS.items()
            },
            "invariance": lambda: Similarity(Invariance(self.network, self.features, seed=self.seed)),
            **{name: partial(turned, kind, name) for name, kind in WITH_HEADS.items()},
            # of parts of its own, which are fitted together
            "combined": lambda: Combined([makes["deviation"](), makes["rotation"]()]),
        }
        for name in wanted:
            if name not in makes:
                raise ValueError(f"detector is {name!r}; it must be one of {', '.join(makes)}")
        names = list(wanted or makes)
        check_against(against, names)
        self.heads.check(names)
        made = {name: makes[name]() for name in names}  # all first: a head that is not there shows at once
        return {name: self.heads.fitted(detector, name) for name, detector in made.items()}

    def defended(self, whole: str, looking: str) -> DefendedModel:
        """A defense by its name; ``looking`` is that of the detector of ``detect``."""
        if function_in(whole) is not None:
            return load_defense(whole, self.network)
        name, own, where = whole.partition("@")
        network, features, seed = self.network, where if own else self.features, self.seed
        if name == "averaging":
            return Averaging(network, seed=seed)
        if count := re.fullmatch(r"averaging-([1-9]\d{0,2})", name):
            return Averaging(network, list(islice(cycle(paper()), int(count[1]))), seed=seed)
        if name == "flip":
            return Averaging(network, [Flip()], seed=seed)
        if name == "none":
            return Defended(network, nothing)
        if name == "random":
            return Defended(network, RandomNoise(self.eps, seed=seed))
        if name == "invariance":
            return Defended(network, Invariance(network, features, eps=self.eps, seed=seed))
        if name in WITH_HEADS:
            headed = WITH_HEADS[name](network, features, eps=self.eps, seed=seed)
            return Defended(network, self.heads.give(headed, whole))
        if name in PRESETS:
            return Defended(network, Purifier(network, features, name, self.eps, seed))
        if name == "detect":
            detector = replace(self, features=features).detectors([looking])[looking]
            # in the arithmetic of the detector, whose passes give the predictions of what is not suspected
            purifier = Purifier(network, features, "fast", self.eps, seed)
            return Defended(network, purifier, detector=detector, dtype="auto")
        raise ValueError(f"defense is {whole!r}; it must be one of {', '.join(DEFENSES)}")
