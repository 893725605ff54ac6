"""What the CamVid and the CIFAR-10 study share: rows, columns, standard errors, table, results file."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _data import spread
from _write import machine, write_json
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import equifast
from equifast.attacks import BPDA, CW, PGD, Attack, Houdini
from equifast.defenses import Averaging, RandomNoise
from equifast.evaluate import Estimate, Strength, difference, nothing
from equifast.evaluate.protocol import patient_margin
from equifast.evaluate.study import draws_that_judge

Array = np.ndarray[Any, Any]

# Options that the studies share.
Data = Annotated[Path, typer.Option(help="Folder that holds the data sets.", show_default=False)]
Images = Annotated[int, typer.Option(help="Number of test images.")]
Steps = Annotated[int, typer.Option(help="Steps of PGD.")]
BpdaSteps = Annotated[int, typer.Option(help="Steps of BPDA.")]
Eot = Annotated[int, typer.Option(help="Draws per step of BPDA.")]
WhereFeatures = Annotated[str | None, typer.Option(help="Submodule where the features end.")]
StandIn = Annotated[bool, typer.Option(help="BPDA on paper follows its last step alone.")]
Adversarial = Annotated[bool, typer.Option("--adversarial", help="The network trained against attacks.")]
Quick = Annotated[bool, typer.Option(help="A few images and steps, to see that it runs.")]
Output = Annotated[Path | None, typer.Option(help="Where the JSON goes.")]

CACHE = Path(__file__).resolve().parent / "cache"
ROWS = ("none", "random", "averaging", "paper", "fast")
COLUMNS = ("clean", "PGD", "BPDA")
DIFFERENCES = (("paper", "none"), ("paper", "random"), ("fast", "paper"), ("fast", "averaging"))
DEFENSE_SEED, ATTACK_SEED = 0, 1  # the attacks start elsewhere than the purifiers do
MARGIN, CONFIDENCE = " (margin)", 5.0
HOUDINI = " (Houdini)"
PATIENT = " (patient)"  # on the margin too, in more and shorter steps


@dataclass(frozen=True, kw_only=True)
class Study:
    """One data set, one model, one attack strength.

    `judge` takes logits and labels of a batch to a result per image, (N, ...); `estimate` takes such results to the
    figure of the table. `slow_images` is the number of images on which the row `paper` is attacked by BPDA.
    `prediction_dtype` is that of defended models' predictions (`DefendedModel`).
    """

    name: str
    figure: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    judge: Callable[[Tensor, Tensor], Array]
    estimate: Callable[[Array], Estimate]
    batch: int
    slow_images: int
    eps: float
    step_size: float
    eps_purify: float
    steps: int = 30
    bpda_steps: int = 20
    eot: int = 1
    features: str | None = None
    stand_in: bool = False
    attack_dtype: str = "float32"
    prediction_dtype: str = "float32"

    def settings(self) -> dict[str, object]:
        """What determines the results, as values that JSON can hold."""
        left_out = ("model", "images", "labels", "judge", "estimate")
        chosen = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        if self.prediction_dtype == "float32":  # as all were before there was a choice
            del chosen["prediction_dtype"]
        return chosen | {"images": len(self.images), "defense_seed": DEFENSE_SEED, "attack_seed": ATTACK_SEED}


@dataclass(frozen=True)
class Cell:
    """The results of some images, by index, under one defense and one attack: means over its draws."""

    results: Array
    indices: list[int]
    seconds: float


def defended(study: Study, row: str) -> nn.Module:
    """The model behind the defense that a row names: `(x, ids, draw) -> logits`."""
    model, eps, features = study.model, study.eps_purify, study.features
    if row == "averaging":
        return Averaging(model, seed=DEFENSE_SEED)
    if row == "none":
        return equifast.Defended(model, nothing)
    if row == "random":
        return equifast.Defended(model, RandomNoise(eps, seed=DEFENSE_SEED))
    if row == "paper, last step":  # from a random corner of the ball, which is where the steps before it end
        purifier = equifast.Purifier(model, features, "paper", eps, DEFENSE_SEED, steps=1, start="corner", noise=False)
    else:
        purifier = equifast.Purifier(model, features, row, eps, DEFENSE_SEED)
    return equifast.Defended(model, purifier)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


# What else in this folder decides the figures; what they are computed for is in the keys.
_SOURCES = ("_data.py", "_models.py", "_published.py", "_study.py", "camvid.py", "cifar.py")


def _fingerprint(study: Study) -> str:
    """Changes with the settings, the weights, the images, and the code: of equifast, its library, the studies."""
    state = hashlib.sha256()
    for tensor in (*study.model.state_dict().values(), study.images, study.labels):
        state.update(tensor.contiguous().numpy().tobytes())
    package, bench = Path(equifast.__file__).parent, Path(__file__).parent
    sources = [path for path in package.glob("*.py") if path.name != "models.py"]
    for source in sorted([*sources, *package.glob("evaluate/*.py"), *(bench / name for name in _SOURCES)]):
        state.update(source.read_bytes())
    for library in sorted(package.glob("_ops*.so")):
        state.update(library.read_bytes())
    state.update(equifast.ops.backend().encode())
    return _digest(study.settings(), state.hexdigest(), torch.__version__, machine())


def _plain(victim: str) -> str:
    """The defense that a victim names, however it is attacked."""
    return victim.removesuffix(MARGIN).removesuffix(HOUDINI).removesuffix(PATIENT)


Defenses = Callable[[str], nn.Module]
"""The defended models that names stand for, `(x, ids, draw) -> logits`; "none" is the model itself."""


class Runner:
    """Computes cells batch by batch and keeps every batch: an interrupted run goes on where it stopped.

    Two defenses of one `identity`, in this run or another, are taken for the same. `strength` gives the steps and the
    draws per step of an attacker who knows a defense, where these are not the study's, `houdini` the steps of one on
    that loss and `patient` of one who takes his time on the margin. Images are judged by so many `draws` of a defense.
    """

    def __init__(
        self,
        study: Study,
        defenses: Defenses,
        progress: Progress,
        identity: Callable[[str], str] = lambda name: name,
        strength: Callable[[str], tuple[int, int]] | None = None,
        houdini: int = 20,
        patient: int = 100,
        draws: int = 1,
    ) -> None:
        self._study = study
        self._defenses = defenses
        self._progress = progress
        self._identity = identity
        self._strength = strength or (lambda name: (study.bpda_steps, study.eot))
        self._houdini = houdini
        self._patient = patient
        self._draws = draws_that_judge(draws)
        self._folder = CACHE / f"{study.name}-{_fingerprint(study)}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def _cached(self, compute: Callable[[], dict[str, Tensor]], *key: object) -> dict[str, Tensor]:
        path = self._folder / f"{_digest(*key)}.safetensors"
        if not path.exists():
            beside = path.with_suffix(".partial")
            save_file({name: value.contiguous() for name, value in compute().items()}, beside)
            beside.replace(path)
        return load_file(path)

    def attacked(self, victim: str | None, ids: Tensor) -> Tensor:
        """The images after an attack on a defense by one who knows it; on "none" that is plain PGD.

        A victim whose name ends with `MARGIN` or `PATIENT` is attacked on the margin of its logits instead of the
        cross-entropy, with `HOUDINI` on that loss.
        """
        study = self._study
        x, y = study.images[ids], study.labels[ids]
        if victim is None:
            return x

        plain = _plain(victim)

        def compute() -> dict[str, Tensor]:
            steps, eot = (study.steps, 1) if plain == "none" else self._strength(plain)
            strength = Strength(eps=study.eps, step_size=study.step_size, seed=ATTACK_SEED, dtype=study.attack_dtype)
            if victim.endswith(PATIENT):
                steps, eot, keep = self._patient, 1, "best" if plain == "none" else "last"
                attack: Attack = patient_margin(strength, study.model, steps=steps, keep=keep)
            elif victim.endswith(MARGIN):
                attack = CW(study.model, confidence=CONFIDENCE, **strength.settings(steps=steps))
            elif victim.endswith(HOUDINI):
                steps, eot = self._houdini, 1
                attack = Houdini(study.model, **strength.settings(steps=steps))
            else:
                attack = PGD(study.model, **strength.settings(steps=steps))
            task = self._progress.add_task(f"  attacking {victim}", total=steps)

            def advance(done: int, total: int) -> None:
                self._progress.update(task, completed=done)

            if plain == "none":
                adversarial = attack(x, y, ids, advance)
            else:
                adversarial = BPDA(attack, self._defenses(plain), eot=eot)(x, y, ids, advance)
            self._progress.remove_task(task)
            return {"x": adversarial}

        return self._cached(compute, "attack", self._known(victim), ids.tolist())["x"]

    def _known(self, victim: str) -> str:
        """The identity of an attack on a defense."""
        how = f"{MARGIN} {CONFIDENCE}" if victim.endswith(MARGIN) else ""
        how = f"{PATIENT} {self._patient}" if victim.endswith(PATIENT) else how
        how = f"{HOUDINI} {self._houdini}" if victim.endswith(HOUDINI) else how
        return self._identity(_plain(victim)) + how

    def cell(self, row: str, victim: str | None, indices: Sequence[int] | None = None) -> Cell:
        """The results of a defense on images attacked by one who knows `victim`; on clean ones where it is None."""
        study = self._study
        indices = list(range(len(study.images)) if indices is None else indices)
        model, known = self._defenses(row), None if victim is None else self._known(victim)
        task = self._progress.add_task(f"{row}, {victim or 'clean'}", total=len(indices))
        parts, seconds = [], 0.0
        for ids in torch.tensor(indices).split(study.batch):

            def compute(ids: Tensor = ids) -> dict[str, Tensor]:
                x = self.attacked(victim, ids)
                start = time.perf_counter()
                with torch.no_grad():
                    logits = [model(x, ids=ids, draw=draw) for draw in self._draws]
                elapsed = torch.tensor((time.perf_counter() - start) / len(logits))
                judged = np.stack([study.judge(each, study.labels[ids]) for each in logits])
                return {"results": torch.from_numpy(judged.mean(0)), "seconds": elapsed}

            result = self._cached(compute, "cell", self._identity(row), known, ids.tolist(), *self._draws)
            parts.append(result["results"])
            seconds += float(result["seconds"])
            self._progress.update(task, advance=len(ids))
        self._progress.remove_task(task)
        return Cell(torch.cat(parts).numpy(), indices, seconds / len(indices))


def _victim(study: Study, row: str, column: str) -> str | None:
    """Whom the attacker of a column of the table knows."""
    if column == "BPDA":
        return "paper, last step" if row == "paper" and study.stand_in else row
    return "none" if column == "PGD" else None


def figure(study: Study, cell: Cell) -> dict[str, float]:
    """The figure of a cell, its standard error and the number of images."""
    return _entry(study.estimate(cell.results), len(cell.results))


def paired(a: Cell, b: Cell) -> dict[str, float]:
    """a - b over the images that both have, resampled in pairs."""
    common = sorted(set(a.indices) & set(b.indices))
    left, right = (cell.results[[cell.indices.index(i) for i in common]] for cell in (a, b))
    return _entry(difference(left, right), len(common))


def _entry(estimate: Estimate, images: int) -> dict[str, float]:
    return {"value": estimate.value, "error": estimate.standard_error, "images": images}


def _cells(study: Study, progress: Progress) -> Iterator[tuple[str, str, Cell]]:
    runner = Runner(study, lambda row: defended(study, row), progress)
    task = progress.add_task(study.name, total=len(ROWS) * len(COLUMNS))
    everyone = range(len(study.images))
    slow = min(study.slow_images, len(everyone))
    for column in COLUMNS:
        for row in ROWS:
            indices = spread(len(everyone), slow) if (row, column) == ("paper", "BPDA") else everyone
            yield row, column, runner.cell(row, _victim(study, row, column), indices)
            progress.update(task, advance=1)


def _text(entry: Mapping[str, float], everyone: int) -> str:
    note = "" if entry["images"] == everyone else f" ({entry['images']:.0f} images)"
    return f"{entry['value']:.1f} ± {entry['error']:.1f}{note}"


def run(study: Study, output: Path | None) -> dict[str, object]:
    """Fill the table, print it, write it."""
    console = Console()
    progress = Progress(console=Console(stderr=True), transient=True)
    with progress:
        cells = {(row, column): cell for row, column, cell in _cells(study, progress)}
    everyone = len(study.images)
    table = Table(title=f"{study.name}: {study.figure}, {everyone} images, ± standard error by bootstrap")
    if study.stand_in:
        table.caption = "paper under BPDA: the attacker follows Algorithm 1's last step alone"
    for heading in ("defense", *COLUMNS, "s/image"):
        table.add_column(heading, justify="left" if heading == "defense" else "right")
    results: dict[str, dict[str, object]] = {}
    for row in ROWS:
        entries = {column: figure(study, cells[row, column]) for column in COLUMNS}
        seconds = cells[row, "PGD"].seconds
        results[row] = {**entries, "seconds": seconds}
        table.add_row(row, *(_text(entry, everyone) for entry in entries.values()), f"{seconds:.3f}")
    console.print(table)
    differing = Table(title="differences, paired over images")
    for heading in ("", *COLUMNS):
        differing.add_column(heading, justify="right" if heading else "left")
    differences: dict[str, dict[str, object]] = {}
    for a, b in DIFFERENCES:
        entries = {column: paired(cells[a, column], cells[b, column]) for column in COLUMNS}
        differences[f"{a} - {b}"] = dict(entries)
        differing.add_row(f"{a} - {b}", *(_text(entry, everyone) for entry in entries.values()))
    console.print(differing)
    speed = cells["paper", "PGD"].seconds / cells["fast", "PGD"].seconds
    console.print(f"fast is {speed:.1f} times as fast as paper")
    document: dict[str, object] = {
        "results": results,
        "differences": differences,
        "speed_fast_over_paper": speed,
        "settings": study.settings(),
        "purifiers": {row: defended(study, row).purifier.settings() for row in ("paper", "fast")},
    }
    if output is not None:
        write_json(output, document)
    return document
