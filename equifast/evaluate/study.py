"""Attackers against defenses, image by image: what is recorded, and what a table makes of it."""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from equifast import __version__, _checks, ops, rng
from equifast._cheap import has_fast_bfloat16
from equifast._fingerprint import Known, describe
from equifast.attacks import BPDA, Adaptive, Attack
from equifast.defenses import RandomNoise
from equifast.evaluate.metrics import Estimate, accuracy, average, class_iou, difference, mean_iou, over_draws
from equifast.evaluate.records import (
    CLEAN,
    Advance,
    Clock,
    Image,
    Part,
    Records,
    as_aimed,
    as_array,
    batches,
    judged,
    list_images,
    listed,
)
from equifast.evaluate.tables import grid, markdown
from equifast.evaluate.worst import worst_accuracy, worst_iou
from equifast.features import evaluating, output
from equifast.objectives import outside
from equifast.purifier import Defended, DefendedModel, Purifier

__all__ = ["Attacker", "Evaluation", "Report"]

Array = NDArray[Any]
Attacked = Callable[..., Tensor]
"""``(x, y, ids, progress=...) -> x``, as attacks are."""


@dataclass(frozen=True)
class Attacker:
    """A column of the table.

    Args:
        name: its heading.
        make: ``(model, defended) -> attack``, or None where it is no attacker of that defense.
        knows: whether the attack depends on the defense; where not, its images are attacked once for all defenses.
        radius: of its ball, in that of the evaluation. Above 1 it is no part of the worst case: it is there to see
            whether anything is left where nothing should be.
        gradients: whether it follows any; a black box does not, and should not do more damage than who does.
        known_draw: whether it sees the defense at the draw at which it will predict.
    """

    name: str
    make: Callable[[nn.Module, DefendedModel], Attacked | None]
    knows: bool = True
    radius: float = 1.0
    gradients: bool = True
    known_draw: bool = False


def arithmetic(device: torch.device) -> dict[str, Any]:
    """What computes, and in which dtype where that is left open (``"auto"``), as values that JSON can hold."""
    return {
        "backend": str(ops.choose(device)),
        "device": device.type,
        "auto": "bfloat16" if has_fast_bfloat16(device) else "float32",
    }


def _check_seed(name: str, random: object) -> None:
    """ValueError for what of ours draws numbers that nobody can draw again."""
    for part in (random, getattr(random, "purifier", None)):
        if isinstance(part, Attack | Purifier | RandomNoise | DefendedModel) and getattr(part, "seed", 0) is None:
            raise ValueError(
                f"{name} has seed=None, numbers that nobody can draw again; it must have a seed, of which an attacker "
                "without its draw knows as little"
            )


def _check_kinds(model: object, data: object, attackers: Sequence[object], defenses: Mapping[str, object]) -> None:
    """TypeError for what would end in a traceback after hours of work, or at once in one that does not tell."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a Module")
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        hint = "; its dataset may be one" if hasattr(data, "dataset") else ""
        raise TypeError(f"data is a {type(data).__name__}; it must have a length and items (image, label){hint}")
    for attacker in attackers:
        if not isinstance(attacker, Attacker):
            raise TypeError(
                f"attackers has a {type(attacker).__name__}; each must be "
                "Attacker(name, lambda model, defended: attack)"
            )
    if not isinstance(defenses, Mapping):
        raise TypeError(f"defenses is a {type(defenses).__name__}; it must be a dict of names and defended models")
    for name, defended in defenses.items():
        _checks.defense(f"defense {name!r}", defended)


def check_range(y: Tensor, classes: int, ignore_index: int) -> None:
    """ValueError for labels that the model does not have."""
    if beyond := outside(y, classes, ignore_index):
        raise ValueError(f"data has labels {beyond}; the model has {classes} classes")


class Evaluation:
    """Every attacker against every defense, on every image; each result is recorded once, and whole.

    Started again in the same folder it computes what is missing. Results depend on the image and not on its place among
    the others: its random numbers are those of the digest of image and label.

    Args:
        model: the undefended model, images (N, 3, H, W) in [0, 1] -> logits.
        data: a map-style data set of (image, label).
        attackers: the columns; ``clean`` images are always there.
        defenses: the rows, models that predict: :class:`equifast.Defended`, :class:`equifast.defenses.Averaging`, or
            whatever takes ``(x, ids, draw)``.
        eps: the radius that no attack may leave; None for attacks that have none.
        norm: in which that is, ``"linf"`` or ``"l2"``.
        target: the class that attackers aim at, who must be targeted then; None for the true labels, which they flee.
            Images of which it is the one label are left out: there is nothing to turn.
        votes: over how many draws of a defense a figure is a mean, where the attacker knows none of them; they vote on
            every image too, label by label. 0 for one draw, without a vote.
        score: whose similarity (:meth:`equifast.Purifier.score`) is recorded of every image that a model predicts from,
            purified where it purifies.
        batch: images at a time.
        ignore_index: the dense label that does not count.
        arguments: what else decides the results, as values that JSON can hold.

    Raises:
        TypeError: for a model, data, an attacker or a defense of another kind than is said above.
        ValueError: for data without images, names that are given twice or are taken; for a defense or an attack of ours
            with ``seed=None``, whose results cannot be repeated; for attacks of ours that are targeted where there is
            no target, or are not where there is one, or leave out another dense label.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset[Any],
        attackers: Sequence[Attacker],
        defenses: Mapping[str, DefendedModel],
        *,
        eps: float | None,
        norm: str = "linf",
        target: int | None = None,
        votes: int = 0,
        score: Purifier | None = None,
        batch: int = 4,
        ignore_index: int = 255,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        _check_kinds(model, data, attackers, defenses)
        self.model, self.data = model, data
        self.attackers, self.defenses = tuple(attackers), dict(defenses)
        names = [CLEAN, *(attacker.name for attacker in attackers)]
        if len(set(names)) < len(names):
            raise ValueError(f"attackers are {', '.join(names[1:])}; names must differ, and from {CLEAN!r}")
        if not defenses:
            raise ValueError("defenses is empty; there must be at least one")
        self.eps = None if eps is None else _checks.number("eps", eps, above=0)
        self.norm = _checks.choice("norm", norm, ("linf", "l2"))
        self.target = None if target is None else _checks.integer("target", target, 0, 2**31)
        self.score = score
        self.votes = _checks.integer("votes", votes, 0, 1000)
        self.batch = _checks.integer("batch", batch, 1, 2**31)
        self.ignore_index = ignore_index
        every = list_images(data)
        self.images = [image for image in every if target is None or image.label != target]
        self.left_out = len(every) - len(self.images)
        if not self.images:
            raise ValueError(f"target is {target}, which all images are labeled with already")
        for name, random in (*self.defenses.items(), ("score", score)):
            _check_seed(name, random)
        # a model without parameters is where the images are
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._arguments = {
            **(arguments or {}),
            "version": __version__,
            "torch": torch.__version__,
            **arithmetic(self._device),
            "model": describe(model),
            "eps": eps,
            **({} if norm == "linf" else {"norm": norm}),
            "target": target,
            "votes": votes,
            **({"draws recorded": votes} if votes else {}),  # before, there was the majority alone
            "score": describe(score),
            "ignore_index": ignore_index,
        }
        self._dense = every[0].label is None

    def idle(self) -> list[str]:
        """Attackers that are attackers of none of the defenses."""
        attacking = {name for _, name in self._cells()}
        return [attacker.name for attacker in self.attackers if attacker.name not in attacking]

    def begin(self, folder: str | Path) -> int:
        """Open a folder as :meth:`run` does, so that parts can be run in it; how many cells of images it lacks."""
        cells = self._cells()
        with Records(Path(folder), self._manifest(cells)) as records:
            return sum(self._missing(cells, records, self.images).values())

    def run_part(self, folder: str | Path, part: Part, progress: Advance | None = None) -> None:
        """Compute what a folder lacks of every ``part.parts``-th batch, beside other processes that do the others.

        After :meth:`begin`; when all have ended, :meth:`run` has nothing left to compute, and makes the table. A
        process with fewer threads may round predictions otherwise.

        Raises:
            ValueError, OSError: as :meth:`run`.
        """
        cells = self._cells()
        with Records(Path(folder), self._manifest(cells), part) as records:
            own = list(batches(self.images, self.batch))[part.number :: part.parts]
            self._compute(own, cells, records, progress)

    def run(self, folder: str | Path, progress: Advance | None = None) -> "Report":
        """Compute what the folder lacks, and the table of all.

        Args:
            folder: where ``study.json`` and ``records.jsonl`` are kept.
            progress: told of seconds, done and estimated, after every batch.

        Raises:
            ValueError: if the folder holds results of other data or settings, with what changed; if an attack leaves
                its ball or [0, 1]; if a defense returns another shape than the model.
            OSError: if it cannot be written; what was, stays readable.
        """
        folder = Path(folder)
        cells = self._cells()
        with Records(folder, self._manifest(cells)) as records:
            self._compute(list(batches(self.images, self.batch)), cells, records, progress)
            return Report(self, cells, records.results)

    def _compute(
        self,
        parts: Sequence[list[Image]],
        cells: Mapping[tuple[str, str], Attacked | None],
        records: "Records",
        progress: Advance | None,
    ) -> None:
        missing = self._missing(cells, records, [image for batch in parts for image in batch])
        clock = Clock(missing, progress, {cell: _effort(attack) for cell, attack in cells.items()})
        for batch in parts:
            self._run(batch, cells, records, clock)

    def again(self, place: int, defense: str, attack: str) -> dict[str, Tensor]:
        """One image once more: ``image`` and ``attacked`` (3, H, W), ``labels``, and what the defense predicts
        ``before`` and ``after``, (H, W) or ().

        Args:
            place: in the order of a report's results.
            defense, attack: names.
        """
        image, defended = self.images[place], self.defenses[defense]
        x, y = (part[None].to(self._device) for part in listed(self.data, image))
        ids = torch.tensor([image.id], device=self._device)
        made = self._cells()[defense, attack]
        attacked = x if made is None else self._attack(made, x, y, ids)[0]
        before, after = (self._logits(defended, images, y, ids).argmax(1)[0] for images in (x, attacked))
        return {"image": x[0], "attacked": attacked[0], "labels": y[0], "before": before, "after": after}

    def _cells(self) -> dict[tuple[str, str], Attacked | None]:
        """What attacks each (defense, attacker); None for clean images. Cells that have no attacker are left out."""
        cells: dict[tuple[str, str], Attacked | None] = {}
        for attacker in self.attackers:
            shared = None if attacker.knows else attacker.make(self.model, next(iter(self.defenses.values())))
            for name, defended in self.defenses.items():
                attack = attacker.make(self.model, defended) if attacker.knows else shared
                if attack is not None:
                    self._fits(attacker.name, _own(attack))
                    cells[name, attacker.name] = attack
        return {**{(name, CLEAN): None for name in self.defenses}, **cells}

    def _fits(self, name: str, attack: object) -> None:
        """ValueError where an attack would be measured by something else than what it is after."""
        if not isinstance(attack, Attack):
            return
        for random in (attack, attack.model):
            _check_seed(name, random)
        if attack.targeted != (self.target is not None):
            aims = "there is none" if self.target is None else f"target is {self.target}"
            raise ValueError(f"{name} has targeted={attack.targeted}, and {aims}; they must go together")
        if self._dense and attack.ignore_index != self.ignore_index:
            raise ValueError(f"{name} has ignore_index {attack.ignore_index}; it must be {self.ignore_index}")

    def _manifest(self, cells: Mapping[tuple[str, str], Attacked | None]) -> dict[str, Any]:
        data = hashlib.sha256("".join(image.key for image in self.images).encode()).hexdigest()[:16]
        known: Known = {}
        made = {f"{defense} / {attack}": describe(made, known) for (defense, attack), made in cells.items()}
        return {
            **self._arguments,
            "data": {"images": len(self.images), "digest": data},
            "defenses": {name: describe(defended, known) for name, defended in self.defenses.items()},
            "attackers": made,
        }

    def _missing(
        self, cells: Mapping[tuple[str, str], object], records: "Records", images: Sequence[Image]
    ) -> dict[tuple[str, str], int]:
        return {cell: sum((image.key, *cell) not in records.results for image in images) for cell in cells}

    def _run(
        self,
        batch: list[Image],
        cells: Mapping[tuple[str, str], Attacked | None],
        records: "Records",
        clock: "Clock",
    ) -> None:
        shared = {attacker.name for attacker in self.attackers if not attacker.knows}
        radius = {attacker.name: attacker.radius for attacker in self.attackers}
        # by attacker and image, of those who do not know
        attacked: dict[str, dict[str, tuple[Tensor, dict[str, Any]]]] = {}
        for (name, attack_name), attack in cells.items():
            left = [image for image in batch if (image.key, name, attack_name) not in records.results]
            if not left:
                continue
            items = [listed(self.data, image) for image in left]
            x, y = (torch.stack(parts).to(self._device) for parts in zip(*items, strict=True))
            ids = torch.tensor([image.id for image in left], device=self._device)
            started, spent = time.perf_counter(), 0.0
            seen: list[dict[str, Any]] = [{} for _ in left]  # of the attack, on each image
            with _named(name, attack_name):
                if attack is not None:
                    kept = attacked.get(attack_name, {})
                    if all(image.key in kept for image in left):
                        x, seen = torch.stack([kept[i.key][0] for i in left]), [dict(kept[i.key][1]) for i in left]
                    else:
                        clean = x
                        x, seen = self._attack(attack, clean, y, ids)
                        self._check(clean, x, attack_name, radius[attack_name])
                        if attack_name in shared:
                            pairs = zip(x, map(dict, seen), strict=True)
                            attacked[attack_name] = dict(zip((image.key for image in left), pairs, strict=True))
                    spent = time.perf_counter() - started
                results, notes, seconds = self._judge(self.defenses[name], x, y, ids, clean=attack is None)
            records.add(
                {
                    "image": image.key,
                    "index": image.index,
                    "defense": name,
                    "attack": attack_name,
                    "result": result,
                    **of_attack,
                    **note,
                    "seconds": round(seconds / len(left), 6),
                    "attack_seconds": round(spent / len(left), 6),
                }
                for image, result, of_attack, note in zip(left, results, seen, notes, strict=True)
            )
            clock.done((name, attack_name), len(left), time.perf_counter() - started)

    def _judge(
        self, defended: DefendedModel, x: Tensor, y: Tensor, ids: Tensor, clean: bool
    ) -> tuple[list[Any], list[dict[str, Any]], float]:
        """What a defense predicts of images: the results, what else is recorded of each, the seconds they took."""
        begun = time.perf_counter()
        logits = self._logits(defended, x, y, ids)
        seconds = time.perf_counter() - begun
        classes = logits.shape[1]
        notes: list[dict[str, Any]] = [{} for _ in x]
        suspected = getattr(defended, "suspected", None)
        if suspected is not None:
            for note, flag in zip(notes, suspected.tolist(), strict=True):
                note["purified"] = flag
        for note, bad in zip(notes, logits.isnan().flatten(1).any(1).tolist(), strict=True):
            note |= {"nan": True} if bad else {}
        if clean and self.images[0].id in ids.tolist():  # once: some again, and at another draw
            again = [self._logits(defended, x[:4], y[:4], ids[:4], draw) for draw in (0, 1)]
            notes[0] |= {"changes": True} if _changes(logits[:4], *again) else {}
        if clean:
            for note, chances in zip(notes, _probabilities(logits), strict=True):
                note["probabilities"] = chances
        if self.score is not None:
            shown = defended.purifier(x, ids=ids, draw=0) if isinstance(defended, Defended) else x
            if suspected is not None:
                shown = torch.where(suspected.view(-1, 1, 1, 1), shown, x)
            for note, similarity in zip(notes, self.score.score(shown, ids).tolist(), strict=True):
                note["similarity"] = similarity
        if self.votes:
            drawn = self._draws(defended, x, y, ids, logits)
            others = [judged(labels, y, classes, self.ignore_index) for labels in drawn[1:]]
            winners = judged(_majority(drawn, classes), y, classes, self.ignore_index)
            for i, note in enumerate(notes):
                note |= {"vote": winners[i], "draws": [each[i] for each in others]}
        return judged(logits.argmax(1), y, classes, self.ignore_index), notes, seconds

    def _attack(self, attack: Attacked, x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The attacked images, and of each the losses at every step, and how many steps had no gradient and no rise."""
        if self.target is not None:
            y = torch.where(y == self.ignore_index, y, self.target) if y.dim() > 1 else torch.full_like(y, self.target)
        if not isinstance(attack, Attack | BPDA):
            return attack(x, y, ids), [{} for _ in x]
        losses, stuck = [[] for _ in x], [0] * len(x)  # type: list[list[float]], list[int]
        own = _own(attack)
        assert isinstance(own, Attack)
        steps, begun, won = _steps(attack), 0, own.most * (1 - 1e-6)  # of rounding

        def watch(t: int, value: Tensor, gradient: Tensor) -> None:
            nonlocal begun
            begun = len(losses[0]) if t % steps == 0 else begun  # a run of its own
            flat = gradient.flatten(1)
            useless = ((flat == 0).all(1) | ~flat.isfinite().all(1)).tolist()
            for row, (loss, none) in enumerate(zip(value.tolist(), useless, strict=True)):
                losses[row].append(float(f"{loss:.5g}"))
                # a margin that is won has none either: it has risen before, or was won from the start, by a model
                # that is wrong where its defense is not; a loss that is NaN has not
                stuck[row] += none and not (losses[row][-1] > losses[row][begun] or loss >= won)

        x = attack(x, y, ids, watch=watch)
        return x, [{"losses": a, "no_gradient": b} if a else {} for a, b in zip(losses, stuck, strict=True)]

    def _check(self, clean: Tensor, x: Tensor, name: str, radius: float) -> None:
        if x.shape != clean.shape:
            raise ValueError(f"{name} gives images {tuple(x.shape)} for {tuple(clean.shape)}; it must keep the shape")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} gives images with values that are NaN or infinite")
        if float(x.min()) < 0 or float(x.max()) > 1:
            raise ValueError(f"{name} leaves [0, 1]: values from {float(x.min()):g} to {float(x.max()):g}")
        change, what = (x - clean).double(), "a value"
        moved = float(change.abs().max())
        if self.norm == "l2":
            moved, what = float(change.flatten(1).norm(dim=1).max()), "an image"
        rounding = 1e-6 if x.dtype.itemsize > 2 else torch.finfo(x.dtype).eps  # of values up to 1
        if self.norm == "l2" and x.dtype.itemsize <= 2:
            rounding *= clean[0].numel() ** 0.5
        if self.eps is not None and moved > radius * self.eps * (1 + 1e-6) + rounding:
            raise ValueError(f"{name} leaves its ball: it moves {what} by {moved:g}, and may by {radius * self.eps:g}")

    def _logits(self, defended: DefendedModel, x: Tensor, y: Tensor, ids: Tensor, draw: int = 0) -> Tensor:
        with evaluating(x, self.model), torch.no_grad():
            logits = output(defended(x, ids=ids, draw=draw))  # attackers draw from 1 on, or are told
        if logits.dim() not in (2, 4) or len(logits) != len(x) or logits.shape[2:] != y.shape[1:]:
            raise ValueError(
                f"a defense gives logits {tuple(logits.shape)} for labels {tuple(y.shape)}; "
                "they must be (N, C), or (N, C, H, W) as the labels"
            )
        classes = logits.shape[1]
        check_range(y, classes, self.ignore_index)
        if self.target is not None and self.target >= classes:
            raise ValueError(f"target is {self.target}; the model has {classes} classes")
        return logits

    def _draws(self, defended: DefendedModel, x: Tensor, y: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
        """(D, N) or (D, N, H, W): the labels of every draw that votes."""
        others = draws_that_judge(self.votes)[1:]
        return torch.stack([logits.argmax(1), *(self._logits(defended, x, y, ids, draw).argmax(1) for draw in others)])


@contextlib.contextmanager
def _named(defense: str, attack: str) -> Iterator[None]:
    """What is raised tells of which cell it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"it was {defense!r}, " + ("on clean images" if attack == CLEAN else f"under {attack!r}"))
        raise


def _changes(logits: Tensor, again: Tensor, other: Tensor) -> bool:
    """Whether the output for the same image, ids and draw is as another draw's, and differs by more than rounding."""
    apart, drawn = (float((each.float() - logits.float()).abs().mean()) for each in (again, other))
    return apart > 0.5 * drawn + 0.02 * float(logits.float().std(correction=0))


def draws_that_judge(count: int) -> list[int]:
    """The first is 0, which an attacker may be told, the others the last there are: attackers draw from 1 on."""
    return [0, *(rng.MAX_DRAW + 1 - number for number in range(1, count))]


def _majority(labels: Tensor, classes: int) -> Tensor:
    """(D, N, ...) -> (N, ...), the label that most of the draws have, of equals the first."""
    votes = torch.zeros(labels.shape[1], classes, *labels.shape[2:], dtype=torch.int32, device=labels.device)
    one = torch.ones_like(labels[0][:, None], dtype=votes.dtype)
    for chosen in labels:
        votes.scatter_add_(1, chosen[:, None], one)
    return votes.argmax(1)


def _probabilities(logits: Tensor) -> list[bool]:
    """Of each image, whether what a model gives are probabilities and no logits: in [0, 1], with a sum of 1."""
    if logits.shape[1] < 2:
        return [False] * len(logits)
    flat = logits.detach().float().flatten(2) if logits.dim() > 2 else logits.detach().float()[:, :, None]
    inside = ((flat >= 0) & (flat <= 1)).flatten(1).all(1)
    return (inside & ((flat.sum(1) - 1).abs() < 1e-3).flatten(1).all(1)).tolist()


class Report:
    """The figures of an evaluation: accuracy, or mean IoU from the totals, in percent, by bootstrap over images.

    ``results[defense][attack]`` are (N,) bool or (N, C, C) confusion matrices of each image, in the order of the
    images' digests, of the draw that attackers may know; ``voted`` the same of the majority of draws, where they vote,
    and ``drawn`` (D, N) or (D, N, C, C) that of each of them, whose mean is the figure of an attack that knows none
    (:meth:`judged`); ``aimed``, where there is a target, with the target in place of the true labels. ``worst`` of a
    defense takes, image by image, the attack that leaves fewest labels right, or the image as it is; of dense labels
    the attacks that make the mean IoU least (:func:`equifast.evaluate.worst_iou`), but for the accuracy over all
    labels, which is that of the former. It is of the one draw where an attack knows it.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        cells: Mapping[tuple[str, str], object],
        records: Mapping[tuple[str, str, str], Mapping[str, Any]],
    ) -> None:
        self.dense = evaluation._dense
        self.figure = "mIoU in %" if self.dense else "accuracy in %"
        self.images, self.left_out = len(evaluation.images), evaluation.left_out
        self.votes, self.target = evaluation.votes, evaluation.target
        self.attackers = {attacker.name: attacker for attacker in evaluation.attackers}
        self.results: dict[str, dict[str, Array]] = {}
        self.voted: dict[str, dict[str, Array]] = {}
        self.drawn: dict[str, dict[str, Array]] = {}
        self.aimed: dict[str, dict[str, Array]] = {}
        self.seconds: dict[str, dict[str, tuple[float, float]]] = {}
        self.similarities: dict[str, dict[str, Array]] = {}
        self.losses: dict[str, dict[str, Array]] = {}  # (N, runs, steps)
        self.no_gradient: dict[str, dict[str, Array]] = {}  # (N,) steps
        self.changes: dict[str, bool] = {}  # whether a defense gives another output for the same images, ids and draw
        self.probabilities: dict[str, bool] = {}
        self.nan: dict[str, dict[str, int]] = {}  # on how many images a defense gives NaN, where it does
        self.purified: dict[str, dict[str, Array]] = {}  # (N,) bool, of defenses that purify what a detector suspects
        for defense, attack in cells:
            lines = [records[image.key, defense, attack] for image in evaluation.images]
            results = [line["result"] for line in lines]
            self.results.setdefault(defense, {})[attack] = np.stack([as_array(result) for result in results])
            if self.votes:
                self.voted.setdefault(defense, {})[attack] = np.stack([as_array(line["vote"]) for line in lines])
                drawn = [[as_array(each) for each in (line["result"], *line["draws"])] for line in lines]
                self.drawn.setdefault(defense, {})[attack] = np.array(drawn).swapaxes(0, 1)
            if self.target is not None:
                aimed = [as_aimed(result, self.target) for result in results]
                self.aimed.setdefault(defense, {})[attack] = np.stack(aimed)
            if all("losses" in line for line in lines):
                steps = _steps(cells[defense, attack])
                losses = np.array([line["losses"] for line in lines])
                self.losses.setdefault(defense, {})[attack] = losses.reshape(len(lines), -1, steps)
                self.no_gradient.setdefault(defense, {})[attack] = np.array([line["no_gradient"] for line in lines])
            if evaluation.score is not None:
                self.similarities.setdefault(defense, {})[attack] = np.array([line["similarity"] for line in lines])
            if all("purified" in line for line in lines):
                self.purified.setdefault(defense, {})[attack] = np.array([line["purified"] for line in lines])
            if nan := sum(line.get("nan", False) for line in lines):
                self.nan.setdefault(defense, {})[attack] = nan
            if attack == CLEAN:
                self.changes[defense] = any(line.get("changes", False) for line in lines)
                self.probabilities[defense] = all(line["probabilities"] for line in lines)
            times = [(line["seconds"], line["attack_seconds"]) for line in lines]
            mean = (sum(t[0] for t in times) / len(times), sum(t[1] for t in times) / len(times))
            self.seconds.setdefault(defense, {})[attack] = mean

    def estimate(self, results: Array) -> Estimate:
        """The figure of results and its standard error."""
        return mean_iou(results) if self.dense else accuracy(results)

    def judged(self, defense: str, attack: str) -> Array:
        """(D, N) or (D, N, C, C): the draws of a defense whose mean is its figure under an attack.

        All that vote; where there are none, or the attack knows one, that one.
        """
        known = attack in self.attackers and self.attackers[attack].known_draw
        if known or not self.votes:
            return self.results[defense][attack][None]
        return self.drawn[defense][attack]

    def reached(self, defense: str, attack: str) -> Estimate:
        """How much of the labels that count is the target: accuracy, or the IoU of that class alone, and the error."""
        assert self.target is not None
        results = self.aimed[defense][attack]
        return class_iou(results, self.target) if self.dense else accuracy(results)

    def similarity(self, defense: str, attack: str) -> Estimate:
        """The mean similarity of the images that a defense predicts from, times 100, where it was recorded."""
        return average(self.similarities[defense][attack])

    @property
    def radius(self) -> dict[str, float]:
        """Of each attacker, in that of the evaluation, and 0 for images as they are."""
        return {CLEAN: 0.0, **{name: attacker.radius for name, attacker in self.attackers.items()}}

    def attacks(self, defense: str) -> list[str]:
        """The attacks among which the worst is sought: those within the radius of the evaluation."""
        return [attack for attack in self.results[defense] if 0 < self.radius[attack] <= 1]

    def worst(self, defense: str, voted: bool = False, fewest: bool = False) -> Array:
        """The results of a defense under the worst of its attackers, image by image; the image itself is one of them.

        It lies in the ball of every attack, and a random defense may be right under all of these and wrong without.
        With ``fewest`` the worst leaves fewest labels right, of dense labels too.
        """
        results = (self.voted if voted else self.results)[defense]
        stacked = np.stack([results[attack] for attack in (CLEAN, *self.attacks(defense))])
        chosen = worst_accuracy(stacked) if fewest else self._worst(stacked)
        worst: Array = stacked[chosen, np.arange(stacked.shape[1])]
        return worst

    def worst_unknown(self, defense: str, fewest: bool = False) -> Array:
        """(D, N) or (D, N, C, C): a defense's draws under the worst of the attackers who know none of them.

        That is, image by image as in :meth:`worst`, what leaves least in their mean. D is 1 without a vote.
        """
        names = [CLEAN, *(name for name in self.attacks(defense) if not self.attackers[name].known_draw)]
        draws = np.stack([self.judged(defense, name) for name in names], axis=1)  # (D, A, N, ...)
        chosen = worst_accuracy(draws.mean(0)) if fewest else self._worst(draws.mean(0))
        worst: Array = draws[:, chosen, np.arange(draws.shape[2])]
        return worst

    @property
    def unknown_row(self) -> str | None:
        """What its row is called; None where no attack knows a draw, and it is the worst."""
        known = any(attacker.known_draw and attacker.radius <= 1 for attacker in self.attackers.values())
        return "worst, draw unknown" if known else None

    def _worst_judged(self, defense: str, fewest: bool = False) -> Array:
        """The draws whose mean is the figure of the worst."""
        if self.unknown_row is None:
            return self.worst_unknown(defense, fewest)
        return self.worst(defense, fewest=fewest)[None]

    def worst_attacks(self, defense: str) -> list[str]:
        """Which attack that is, of each image."""
        names = [CLEAN, *self.attacks(defense)]
        stacked = np.stack([self.results[defense][attack] for attack in names])
        return [names[int(i)] for i in self._worst(stacked)]

    def worst_images(self, defense: str, count: int) -> list[int]:
        """Of which images a defense loses most right labels to them; places in the order of the results."""
        lost = _right(self.results[defense][CLEAN]) - _right(self.worst(defense))
        return [int(place) for place in np.argsort(-lost, kind="stable")[:count]]

    def _worst(self, stacked: Array) -> Array:
        chosen: Array = worst_iou(stacked) if self.dense else worst_accuracy(stacked)
        return chosen

    def difference(self, defense: str, other: str, attack: str | None = None) -> Estimate:
        """The figure of one defense minus that of another, paired; of the worst case where no attack is named.

        With :attr:`unknown_row` for the attack, of :meth:`worst_unknown`.
        """
        if attack is not None and attack == self.unknown_row:
            return over_draws(self.worst_unknown(defense), self.worst_unknown(other))
        if attack is not None:
            return over_draws(self.judged(defense, attack), self.judged(other, attack))
        return over_draws(self._worst_judged(defense), self._worst_judged(other))

    def differences(self, other: str) -> dict[str, dict[str, Estimate]]:
        """``[defense][attack]``: what each defense has more than another, paired; of attacks that both were under.

        Raises:
            ValueError: if there is no such defense.
        """
        if other not in self.results:
            raise ValueError(f"there is no defense {other!r}; it must be one of {', '.join(self.results)}")
        found: dict[str, dict[str, Estimate]] = {}
        for defense in self.results:
            if defense != other:
                both = [attack for attack in self.results[defense] if attack in self.results[other]]
                found[defense] = {attack: self.difference(defense, other, attack) for attack in both}
                found[defense]["worst"] = self.difference(defense, other)
                if self.unknown_row is not None:
                    found[defense][self.unknown_row] = self.difference(defense, other, self.unknown_row)
        return found

    def table(self) -> dict[str, dict[str, Estimate]]:
        """``[defense][attack]`` figures; the worst of several attackers as ``worst``, its figure by vote, and that of
        those who do not know the draw, the mean over draws where they vote."""
        return self._table

    @property
    def title(self) -> str:
        """Of the table: the figure, and of how many images."""
        without = f" ({self.left_out} labeled {self.target} left out)" if self.left_out else ""
        over = "images"
        if self.votes > 1:
            over += f", with the spread of {self.votes} draws, whose mean it is, where the draw is not known"
            over += "; the worst is of the draw that is" if self.unknown_row else ""
        return f"{self.figure}, {self.images} images{without}, ± standard error by bootstrap over {over}"

    def cells(self) -> dict[str, dict[str, str]]:
        """``[defense][attack]`` the table as text, and what else was recorded."""
        table = self.table()
        attackers = list(dict.fromkeys(attack for row in table.values() for attack in row))
        attackers.sort(key=lambda attack: (self.radius.get(attack, 1) > 1, attack.startswith("worst")))
        columns: dict[str, dict[str, str]] = {}
        for defense, row in table.items():
            column = columns.setdefault(defense, {})
            for attack in attackers:
                column[attack] = str(row.get(attack, ""))
                if attack in self.aimed.get(defense, {}):
                    column[f"{attack}: target"] = str(self.reached(defense, attack))
                if attack in self.purified.get(defense, {}):
                    column[f"{attack}: purified, %"] = f"{100 * self.purified[defense][attack].mean():.1f}"
                if attack in self.similarities.get(defense, {}):
                    column[f"{attack}: similarity x 100"] = str(self.similarity(defense, attack))
        return columns

    def __str__(self) -> str:
        return markdown([(self.title, *grid(self.cells()))], self.warnings())

    @functools.cached_property
    def _table(self) -> dict[str, dict[str, Estimate]]:
        rows = {}
        for defense, columns in self.results.items():
            rows[defense] = {attack: over_draws(self.judged(defense, attack)) for attack in columns}
            if self.attacks(defense):
                rows[defense]["worst"] = over_draws(self._worst_judged(defense))
                if self.votes > 1:
                    rows[defense][f"worst, vote of {self.votes}"] = self.estimate(self.worst(defense, voted=True))
                if self.unknown_row is not None:
                    rows[defense][self.unknown_row] = over_draws(self.worst_unknown(defense))
        return rows

    def warnings(self) -> list[str]:
        """Signs that an attack fails rather than the defense holds (Athalye et al. 2018, section 3.1; Carlini 2019)."""
        found = []
        for defense, columns in self.results.items():
            row = {attack: self.estimate(results) for attack, results in columns.items()}  # of one draw, all
            within = self.attacks(defense)
            following = [attacker for name, attacker in self.attackers.items() if name in within and attacker.gradients]
            for name in within:
                estimate, blind = row[name], self.attackers[name]
                # whoever has the draw has more than gradients
                alike = [row[each.name].value for each in following if blind.known_draw or not each.known_draw]
                if not blind.gradients and alike and estimate.value < min(alike) - estimate.standard_error:
                    found.append(f"{defense}: {name}, a black box, does more damage than every attacker with gradients")
            knowing = [name for name in within if self.attackers[name].knows]
            if knowing and self.target is None:
                best = min(knowing, key=lambda name: row[name].value)
                for name in within:
                    unaware = self.attackers[name]
                    if unaware.knows or not unaware.gradients or row[name].value >= row[best].value:
                        continue
                    more = difference(self.results[defense][best], self.results[defense][name])
                    if more.value > max(2 * more.standard_error, 0.05):  # and more than rounding
                        found.append(
                            f"{defense}: {name}, made without this defense, leaves {more.value:.1f} ± "
                            f"{more.standard_error:.1f} less than all who know it; attack it on that loss, with as "
                            "many steps"
                        )
            for name, losses in self.losses.get(defense, {}).items():
                still = ~(losses[:, :, -1] > losses[:, :, 0])  # run by run, of restarts or weights; NaN too
                held = 2 * still.sum(1) > still.shape[1]
                # of images that are lost from the start a margin may have nowhere to go
                asked = (_right(self.results[defense][CLEAN]) > 0) | np.isnan(losses).any((1, 2))
                images, of = int((held & asked).sum()), int(asked.sum())
                if losses.shape[2] > 1 and 2 * images > of:
                    found.append(
                        f"{defense}: the loss of {name} does not rise with its steps on {images} of {of} images"
                    )
            for name, steps in self.no_gradient.get(defense, {}).items():
                # where nothing is left to turn, a margin has none
                held = _right(self.results[defense][name]) >= 0.5
                if self.target is not None:
                    held = _right(self.aimed[defense][name]) < 0.5
                if stuck := int(((steps > 0) & held).sum()):
                    where = "that are right" if self.target is None else "that are not as aimed"
                    found.append(f"{defense}: {name} has steps without any gradient on {stuck} images {where}")
            if nan := self.nan.get(defense):
                on = ", ".join(f"{name} {count}" for name, count in nan.items())
                found.append(
                    f"{defense}: outputs have NaN on images ({on} of {self.images} each), so that their labels are "
                    "no predictions"
                )
            if self.changes.get(defense):
                found.append(
                    f"{defense}: gives another output for the same image, ids and draw; its random numbers must be "
                    "functions of these, or nobody can repeat its figures"
                )
            if self.probabilities.get(defense):
                found.append(f"{defense}: its outputs look like probabilities; losses are made for logits")
            largest = max((name for name in self.results[defense]), key=lambda name: self.radius[name])
            if self.radius[largest] > 1 and row[largest].value > max(5.0, row[CLEAN].value / 5):
                left = f"{row[largest].value:.1f} of {row[CLEAN].value:.1f}"
                found.append(f"{defense}: {largest} leaves {left}, at a radius where nothing should be left")
        return found

    def document(self, against: str | None = None) -> dict[str, Any]:
        """All figures, and differences from one defense where it is named, as values that JSON can hold."""
        rows: dict[str, dict[str, Any]] = {}
        for defense, row in self.table().items():
            for attack, estimate in row.items():
                cell = _values(estimate)
                if self.dense and attack in self.results[defense]:
                    cell.update(_per_class(self.judged(defense, attack).mean(0)))
                elif self.dense and attack == "worst":
                    fewest = _per_class(self._worst_judged(defense, fewest=True).mean(0))["accuracy"]
                    cell.update(_per_class(self._worst_judged(defense).mean(0)) | {"accuracy": fewest})
                if attack in self.voted.get(defense, {}):
                    cell["vote"] = _values(self.estimate(self.voted[defense][attack]))
                    cell["one draw"] = _values(self.estimate(self.results[defense][attack]))
                if attack in self.aimed.get(defense, {}):
                    cell["target"] = _values(self.reached(defense, attack))
                elif attack == "worst" and self.target is not None and not self.dense:
                    every = [self.aimed[defense][name] for name in self.attacks(defense)]
                    cell["target"] = _values(accuracy(np.logical_or.reduce(every)))
                if attack in self.similarities.get(defense, {}):
                    cell["similarity"] = _values(self.similarity(defense, attack))
                if attack in self.purified.get(defense, {}):
                    cell["purified"] = _values(accuracy(self.purified[defense][attack]))
                if attack in self.losses.get(defense, {}):
                    mean = self.losses[defense][attack].mean(0).flatten()
                    cell["loss"] = [float(f"{value:.5g}") if np.isfinite(value) else None for value in mean]
                rows.setdefault(defense, {})[attack] = cell
        kept = {"figure": self.figure, "images": self.images, "votes": self.votes, "target": self.target}
        kept |= {} if self.target is None else {"left out": self.left_out}
        document = {**kept, "rows": rows, "warnings": self.warnings()}
        if against is not None:
            apart = self.differences(against)
            document["against"] = against
            document["differences"] = {d: {a: _values(e) for a, e in row.items()} for d, row in apart.items()}
        return document


def _own(attack: object) -> object:
    """The attack that one who knows makes of a defense."""
    return attack._attack if isinstance(attack, BPDA) else attack


def _steps(attack: object) -> int:
    """Of one run."""
    own = _own(attack)
    return max(1, own.ascent.steps) if isinstance(own, Attack) else 1


def _effort(attack: object) -> float:
    """About how many passes an attack makes of what it attacks: what its time is guessed by until it is seen."""
    own = _own(attack)
    if not isinstance(own, Attack):
        return 1.0
    passes = len(own.weights) if isinstance(own, Adaptive) else 1
    return 1.0 + passes * own.total_steps * (own.eot or 1)


def _values(estimate: Estimate) -> dict[str, Any]:
    error = None if np.isnan(estimate.standard_error) else estimate.standard_error
    return {"value": estimate.value, "error": error}


def _right(results: Array) -> Array:
    """(N,) the part of an image's labels that are right."""
    if results.ndim == 1:
        return results.astype(float)
    part: Array = np.trace(results, axis1=1, axis2=2) / np.maximum(results.sum((1, 2)), 1)
    return part


def _per_class(results: Array) -> dict[str, Any]:
    """Accuracy over all labels, its mean over the classes that occur, and the IoU of each class; in percent."""
    total = results.sum(0)
    hit, true, union = np.diag(total), total.sum(1), total.sum(0) + total.sum(1) - np.diag(total)
    recall = [100 * float(h / t) for h, t in zip(hit, true, strict=True) if t]
    return {
        "accuracy": 100 * float(hit.sum() / max(1, total.sum())),
        "mean accuracy": float(np.mean(recall)) if recall else None,
        "IoU": [100 * float(h / u) if u else None for h, u in zip(hit, union, strict=True)],
    }
