"""The command line: ``equifast demo``, ``purify``, ``detect``, ``evaluate``, ``bench`` and ``doctor``."""

import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from equifast import _C, __version__, ops
from equifast._allocator import keep_freed_memory, keep_kernels
from equifast._cheap import has_fast_bfloat16
from equifast._files import replacing
from equifast._fingerprint import weights
from equifast.defenses import Averaging, Contrastive, Invariance, RandomNoise, Rotation
from equifast.demo import report
from equifast.detectors import Combined, Detector, Deviation, OutputVariance, Similarity, needed
from equifast.evaluate import (
    PARTS,
    Cost,
    Evaluation,
    Part,
    Report,
    Strength,
    adaptive,
    cost,
    known,
    open_data,
    open_images,
    profile_step,
)
from equifast.evaluate.detection import STUDIES as DETECTION
from equifast.evaluate.detection import Detection, DetectionReport
from equifast.evaluate.records import CLEAN, Advance, list_images
from equifast.evaluate.studies import STUDIES, Make, Sweep, nothing
from equifast.evaluate.tables import Grid, grid, markdown
from equifast.features import Features, evaluating, suggest
from equifast.models import (
    find_images,
    first_line,
    function_in,
    load_defense,
    load_model,
    read_image,
    write_image,
)
from equifast.purifier import PRESETS, Defended, DefendedModel, Purifier
from equifast.views import Flip, guard, paper

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# What a command says in one sentence: those of its own, and those of users' files and models.
_FAILURES = (ValueError, TypeError, RuntimeError, OSError, AssertionError, LookupError, AttributeError)
_out = Console()
_err = Console(stderr=True)

WITH_HEADS: dict[str, type[Rotation] | type[Contrastive]] = {"rotation": Rotation, "contrastive": Contrastive}
DEFENSES = (
    *("none", "random", "averaging", "averaging-N", "flip", "invariance", *WITH_HEADS, *PRESETS, "detect"),
    "file.py:function",
)

Layers = Annotated[
    list[str] | None,
    typer.Option("--layer", help="Another submodule whose features deviation, or combined, compares; any number."),
]

DETECTORS: Mapping[str, Callable[[nn.Module, str | None, Sequence[str], int], Detector]] = {
    "similarity": lambda model, features, layers, seed: Similarity(
        Purifier(model, features, seed=seed, views=[Flip()])
    ),
    "variance": lambda model, features, layers, seed: OutputVariance(model, seed=seed),
    "guard": lambda model, features, layers, seed: OutputVariance(model, guard(), seed=seed),
    "error": lambda model, features, layers, seed: OutputVariance(model, error=True, seed=seed),
    "deviation": lambda model, features, layers, seed: Deviation(model, [features, *layers], seed=seed),
}

_OF_NO_PRESET = ("noise", "cost", "evasion", "corruptions", "ood")
"""Studies that a preset changes nothing of."""

HEAD = "rotation.safetensors"
"""Beside the detector.json of combined."""

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Model = Annotated[
    str, typer.Option(help="demo, torchvision:NAME[:WEIGHTS] (none: random ones), timm:NAME or file.py:function.")
]
WhereFeatures = Annotated[
    str | None, typer.Option("--features", help="Submodule whose output is used; found where not given.")
]
WhichPreset = Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")]
Device = Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")]


def _fail(message: str) -> typer.Exit:
    _err.print(f"equifast: {message}", highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(2)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=_err,
        transient=True,
    )


def _version(wanted: bool) -> None:
    if wanted:
        _out.print(f"equifast {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Test-time purification by equivariance, and what it is worth."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    keep_freed_memory()
    keep_kernels()


@app.command()
def demo(
    output: Output = Path("equifast-demo"),
    scenes: Annotated[int, typer.Option(min=1, max=16, help="How many of the bundled scenes to use.")] = 4,
) -> None:
    """Attack and purify the bundled scenes with the bundled model: a table, and a panel per scene."""
    begun = time.perf_counter()
    try:
        with _progress() as progress:
            task = progress.add_task("starting", total=1)
            rows, similarity = report.run(
                output,
                scenes,
                lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
            )
    except OSError as error:
        raise _fail(f"cannot write to {str(output)!r}: {error.strerror or error}") from error
    table = Table(
        title="mIoU in percent ± standard error over scenes; "
        f"attacks within {report.ATTACK_EPS * 255:.0f}/255, defenses within {report.PURIFY_EPS * 255:.0f}/255"
    )
    table.add_column("defense")
    for name in ("clean", "PGD", "attacker knows*", "similarity", "s/image"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.defense,
            str(row.clean),
            str(row.pgd),
            str(row.adaptive),
            f"{row.similarity:.3f}",
            f"{row.seconds:.4f}",
        )
    _out.print(table)
    _out.print(
        f"PGD: {report.STEPS} steps on the model. * {report.ADAPTIVE_STEPS} steps of BPDA through the defense, a draw "
        "for each, none of them\nthe evaluation's; averaging: through its own gradient; paper: through its last step "
        "alone, from a random\ncorner, tested on paper; none: PGD as before.\n"
        f"Similarity of PGD images after the defense; clean images have {similarity['clean']:.3f}.\n"
        f"{_unsteady([row.defense for row in rows if row.unsteady])}"
        f"Panels and results.json are in {output}{os.sep} ({time.perf_counter() - begun:.0f} s).",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _unsteady(defenses: Sequence[str]) -> str:
    if not defenses:
        return ""
    return f"Times of {', '.join(defenses)} were unsteady, of the same work; something else may have been running.\n"


def _radius(option: str, text: str) -> float:
    try:
        radius = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        radius = math.nan
    if not radius > 0:
        raise typer.BadParameter(f"{text!r} is no number above 0, such as 6/255 or 0.02", param_hint=repr(option))
    return radius


def _seed(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        sentence = f"{text!r} is no seed; it must be a whole number, or none"
        raise typer.BadParameter(sentence, param_hint="'--seed'") from error


def _check_layers(network: nn.Module, layers: Sequence[str]) -> None:
    for name in layers:
        try:
            Features(network, name)
        except ValueError as error:
            raise ValueError(str(error).replace("features", "layer", 1)) from None


@app.command()
def purify(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of PNG, JPEG and WebP files.")],
    output: Output,
    model: Model,
    features: WhereFeatures = None,
    preset: WhichPreset = "fast",
    eps: Annotated[str, typer.Option(help="Radius of the ball, as 6/255.")] = "6/255",
    seed: Annotated[
        str,
        typer.Option(help="Seed of the random numbers, for results that repeat; or none: new ones for every image."),
    ] = "0",
    device: Device = "cpu",
) -> None:
    """Purify image files; results are PNG files with the same names, and purified.jsonl with a line per image.

    Started again with the same settings, it goes on where it stopped.
    """
    radius = _radius("--eps", eps)
    try:
        targets = _targets(list(find_images(paths, output)), output)
        if not targets:
            raise ValueError(f"no PNG, JPEG or WebP file in {', '.join(map(str, paths))}")
        network = load_model(model).to(_device(device))
        if (number := _seed(seed)) is None:
            torch.seed()  # seeds are drawn from torch's generator, which the model's file may have set
        purifier = Purifier(network, features, preset, radius, number)  # refuses bad settings before any work
        output.mkdir(parents=True, exist_ok=True)
        ledger = _Ledger(output, _arguments(model, network, purifier, features))
    except _FAILURES as error:
        raise _fail(first_line(error)) from error
    failed, known = 0, features is not None
    with ledger, _progress() as progress:
        task = progress.add_task("purifying", total=len(targets))
        for source, name in targets:
            progress.update(task, description=str(name))
            steps = progress.add_task("  steps", total=None)

            def advance(done: int, total: int, steps: TaskID = steps) -> None:
                progress.update(steps, completed=done, total=total)

            try:
                digest = hashlib.sha256(source.read_bytes()).hexdigest()
                done = ledger.has(name, digest)
                if not (done and known):
                    x = read_image(source)[None].to(_device(device))
                if not known:  # found on the first image, done or not, the same for all
                    features, known = _find_features(network, x), True
                    purifier = Purifier(network, features, preset, radius, number)
                if not done:
                    line = _purify_one(purifier, features, x, output / name, advance)
                    ledger.add({"image": name.as_posix(), "source": str(source), "sha256": digest, **line})
            except Exception as error:  # one bad file, or one that the model chokes on: report it, do the rest
                failed += 1
                _err.print(f"equifast: {source}: {first_line(error)}", highlight=False, markup=False, soft_wrap=True)
            finally:
                progress.remove_task(steps)
            progress.advance(task)
    _out.print(
        f"{len(targets) - failed} of {len(targets)} images purified in {output}{os.sep}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if failed:
        raise typer.Exit(1)


@app.command()
def detect(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of PNG, JPEG and WebP files.")],
    output: Output,
    model: Model,
    clean: Annotated[
        list[Path],
        typer.Option(
            "--clean",
            "--fit",
            help="Clean images for the threshold, any number of files and folders; or a detector.json of an earlier "
            "run, alone.",
        ),
    ],
    features: WhereFeatures = None,
    layer: Layers = None,
    detector: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(DETECTORS)}, or combined: deviation, and a head that tells how images are turned, "
            "trained on every second image of --clean."
        ),
    ] = "deviation",
    rate: Annotated[
        float | None, typer.Option(help="Part of clean images that may be flagged; 0.05, or that of a detector.json.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the random numbers.")] = 0,
    device: Device = "cpu",
) -> None:
    """Score image files, the suspicious first: scores.json, detector.json, and an overlay of where views disagree."""
    try:
        if detector not in (*DETECTORS, "combined"):
            raise ValueError(f"detector is {detector!r}; it must be one of {', '.join(DETECTORS)}, combined")
        targets = _targets(list(find_images(paths, output / "overlays")), output / "overlays")
        if not targets:
            raise ValueError(f"no PNG, JPEG or WebP file in {', '.join(map(str, paths))}")
        network = load_model(model).to(_device(device))
        if features is None:
            features = _find_features(network, _first_readable(targets)[None].to(_device(device)))
        if layer and detector not in ("deviation", "combined"):
            raise ValueError(f"layer is given with detector {detector!r}; it is for 'deviation' and 'combined'")
        _check_layers(network, layer or ())
        chosen = DETECTORS["deviation" if detector == "combined" else detector](network, features, layer or (), seed)
        head = Rotation(network, features, seed=seed) if detector == "combined" else None
        if head is not None:
            chosen = Combined([chosen, Similarity(head)])
        kept = clean[0] if len(clean) == 1 and clean[0].suffix.lower() == ".json" else None
        like = [] if kept is not None else [source for source, _ in find_images(clean, output / "overlays")]
        if not (like or kept is not None):
            raise ValueError(f"clean is {', '.join(map(str, clean))}, which has no PNG, JPEG or WebP file")
        with _progress() as progress:
            if kept is not None:
                if head is not None:
                    head.load(kept.with_name(HEAD))
                chosen.load(kept)
                chosen = chosen if rate is None else chosen.at(rate)
            else:
                _fit(chosen, head, like, 0.05 if rate is None else rate, _device(device), progress)
            output.mkdir(parents=True, exist_ok=True)
            chosen.save(output / "detector.json")
            if head is not None:
                head.save(output / HEAD)
            lines, failed, drawn = _scored(chosen, targets, output, _device(device), progress)
            if not lines:
                raise ValueError(f"none of {failed} images can be read, {str(targets[0][0])!r} the first")
        scores = {"threshold": chosen.threshold, "interval": chosen.interval, "images": lines}
        _write(output / "scores.json", json.dumps(scores, indent=2) + "\n")
    except _FAILURES as error:
        raise _fail(first_line(error)) from error
    table = Table(title=f"{detector}: threshold {chosen.threshold:.4g}")
    for heading in ("image", "score", "flagged"):
        table.add_column(heading, justify="right" if heading == "score" else "left")
    for line in lines[:20]:
        score = "NaN" if line["score"] is None else f"{line['score']:.4g}"
        table.add_row(escape(line["image"]), score, "yes" if line["flagged"] else "")
    _out.print(table)
    low, high = chosen.interval
    about = "about " if detector in ("deviation", "combined") else ""  # whose threshold learned from the same images
    _out.print(
        f"{sum(line['flagged'] for line in lines)} of {len(lines)} images are suspicious; of clean ones like those of "
        f"the threshold {about}{100 * low:.1f}% to {100 * high:.1f}% would be. All scores are in "
        f"{output / 'scores.json'}; " + (f"overlays are in {output / 'overlays'}." if drawn else _NO_OVERLAYS),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if failed:
        raise typer.Exit(1)


_NO_OVERLAYS = "there are no overlays, since this detector sees an image of this model as a whole."


def _fit(
    detector: Detector, head: Rotation | None, clean: list[Path], rate: float, device: torch.device, progress: Progress
) -> None:
    """The threshold by clean images; of every second one the head, since what it was trained on is no measure of it."""
    least = needed(rate) * (1 if head is None else 2)
    if len(clean) < least:
        half = "" if head is None else ", every second one for the head"
        raise ValueError(f"--clean has {len(clean)} images{half}; for --rate {rate} it must have at least {least}")

    def opened(paths: Sequence[Path], what: str) -> Iterable[Tensor]:
        tensors = (_readable(path)[None].to(device) for path in paths)
        return progress.track(tensors, task_id=progress.add_task(what, total=len(paths)))

    if head is not None:
        head.fit(opened(clean[::2], "a head"))
        clean = clean[1::2]
    detector.fit(opened(clean, "clean images"), false_positive_rate=rate)


def _readable(path: Path) -> Tensor:
    try:
        return read_image(path)
    except OSError as error:
        raise OSError(f"{path}: {first_line(error)}") from error


def _first_readable(targets: Sequence[tuple[Path, Path]]) -> Tensor:
    for source, _ in targets:
        with contextlib.suppress(ValueError, OSError):
            return read_image(source)
    raise ValueError(f"none of {len(targets)} images can be read, {str(targets[0][0])!r} the first")


def _scored(
    detector: Detector, found: Sequence[tuple[Path, Path]], output: Path, device: torch.device, progress: Progress
) -> tuple[list[dict[str, Any]], int, int]:
    """What is told of each image, the suspicious first, how many could not be read, and how many overlays there are."""
    from equifast.evaluate.plots import overlay  # here, since matplotlib takes its time

    scored: list[tuple[float, str]] = []
    failed = drawn = 0
    for source, name in progress.track(found, description="images"):
        try:
            x = read_image(source)[None].to(device)
            score = float(detector.score(x))
            heat = None
            with contextlib.suppress(TypeError):  # of those that see an image as a whole
                heat = detector.map(x)[0]
            if heat is not None:
                write_image(output / "overlays" / name, overlay(x[0], heat, detector.most))
                drawn += 1
            scored.append((score, str(source)))
        except Exception as error:  # one bad file: report it, do the rest
            failed += 1
            _err.print(f"equifast: {source}: {first_line(error)}", highlight=False, markup=False, soft_wrap=True)
    # a score of NaN is suspicious, and JSON has none
    scored.sort(key=lambda line: (not math.isnan(line[0]), -line[0], line[1]))
    lines = [
        {"image": name, "score": None if math.isnan(score) else score, "flagged": not score <= detector.threshold}
        for score, name in scored
    ]
    return lines, failed, drawn


@app.command()
def bench(
    model: Model,
    size: Annotated[str, typer.Option(help="Height and width of the images, as 176x240.")],
    images: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 1,
    features: WhereFeatures = None,
    preset: WhichPreset = "fast",
    rounds: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 5,
    device: Device = "cpu",
) -> None:
    """Show where a step of purification goes, on random images."""
    height, width = _size(size)
    try:
        network = load_model(model).to(_device(device))
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(images, 3, height, width, generator=generator).to(_device(device))
        where = features if features is not None else _find_features(network, x)
        purifier = Purifier(network, where, preset)
        profile = profile_step(purifier, x, rounds)
    except _FAILURES as error:
        raise _fail(first_line(error)) from error
    table = Table(title=f"one step of {preset} on {images} x {size}, median of {rounds}")
    for heading in ("", "ms", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for part in PARTS:
        seconds = profile.seconds[part]
        table.add_row(part, f"{1e3 * seconds:.1f}", f"{100 * seconds / profile.total:.0f}%")
    table.add_row("together", f"{1e3 * profile.total:.1f}", "100%")
    _out.print(table)
    steps = purifier.ascent.steps
    _out.print(
        f"A step makes {profile.passes:.1f} forward and backward passes of an image (a forward pass alone is half of "
        f"one); {steps} steps make {steps * profile.passes:.0f}.\n"
        f"{100 * profile.overhead:.0f}% of a step is not the network, which runs "
        f"{'as a folded copy' if profile.folded else 'as it is'}, on the {ops.choose(x.device)} backend.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command()
def evaluate(
    data: Annotated[
        Path,
        typer.Argument(
            help="An .npz file of images and labels; a folder of images/ and labels/; or "
            "one with a folder for each class."
        ),
    ],
    output: Output,
    model: Model,
    features: WhereFeatures = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Any of {', '.join(DEFENSES)}; none, averaging and fast where not given "
            "(with a protocol averaging-12, of about as many passes as fast; averaging-N is over N views, the eight of "
            "averaging and again from the first; a function in a file takes the model and returns Defended(model, "
            "purifier) or a purifier, with a radius and a seed of its own, and gives the row its name). "
            "With @SUBMODULE one takes its own features."
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="Attackers by name (PGD, APGD, BPDA, ...; a wrong one lists all); PGD, through averaging and BPDA "
            "where not given."
        ),
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="adaptive: the attackers who know, instead of --attack.")] = None,
    study: Annotated[
        str | None,
        typer.Option(help=f"Instead of --defense, one of {', '.join(STUDIES)}; of detectors, {', '.join(DETECTION)}."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The preset of which a --study changes one setting; fast where not given.")
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Data, or a folder of image files, on which the heads of rotation and contrastive are trained.",
        ),
    ] = None,
    clean: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Clean data, or a folder of image files, like those to come, for the thresholds of detectors.",
        ),
    ] = None,
    layer: Layers = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            help="Which detectors such a study has, all of them where not given; or the one of the defense detect, "
            "guard where not given."
        ),
    ] = None,
    foreign: Annotated[
        list[Path] | None,
        typer.Option(
            help="Data, or a folder of image files, that the model does not know, for --study ood; any number."
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Part of clean images that detectors may flag, 0.05 where not given.")
    ] = None,
    fit_images: Annotated[int, typer.Option(min=1, help="How many images of --fit and of --clean are used.")] = 256,
    kept: Annotated[
        Path | None,
        typer.Option("--heads", help="Where heads and thresholds are kept, for several runs; OUTPUT where not given."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A look: 10 or 50 steps, 4 draws, 100 queries, unrolled through one step, whatever these are set to; "
            "and 8 images where --images is not given.",
        ),
    ] = False,
    images: Annotated[int | None, typer.Option(min=1, help="How many images, evenly over the data.")] = None,
    size: Annotated[str | None, typer.Option(help="Height and width that image files are resized to.")] = None,
    eps: Annotated[
        str | None, typer.Option(help="Radius of the attacks, as 4/255, where not given; l2 wants one, as 0.5.")
    ] = None,
    norm: Annotated[str, typer.Option(help="In which the radius of the attacks is: linf or l2.")] = "linf",
    purify_eps: Annotated[str, typer.Option(help="Radius of the defenses, as 6/255, always linf.")] = "6/255",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the attacks.")] = 20,
    eot: Annotated[int, typer.Option(min=1, help="Draws per step of attackers with an expectation.")] = 20,
    queries: Annotated[int, typer.Option(min=1, help="Queries of the black box.")] = 500,
    target: Annotated[int | None, typer.Option(help="A class that all attacks aim at.")] = None,
    votes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="How many draws a figure is the mean of, where the attacker knows none of them; they vote, too. 5 "
            "where not given, with --study 0: one draw, and no vote.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="A defense of which all others' differences are told, paired over images; or of --study corruptions a "
            "detector, of means."
        ),
    ] = None,
    panels: Annotated[int, typer.Option(min=0, help="Images of the worst cases to show, of each defense.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 4,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that share the images, and the cores of the CPU; not for a --study. With fewer cores each, "
            "predictions may round otherwise.",
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 2, help="Seed of defenses; attacks have the next.")] = 0,
    device: Device = "cpu",
) -> None:
    """Attack defended models and tell what is left: a table, table.json, figures, and a record for each image and cell.

    Started again with the same settings it computes what is missing.
    """
    asked = dict(locals())
    radius, purify_radius = _radius("--eps", eps or "4/255"), _radius("--purify-eps", purify_eps)
    try:
        _check_protocol(protocol, attack, norm, eps)
        _check_study(study, preset, workers)
        detects = study in DETECTION or "detect" in {name.partition("@")[0] for name in defense or ()}
        titles = _titles(defense or ("none", "averaging" if protocol is None else "averaging-12", "fast"))
        looking = detector or ([] if study in DETECTION else ["guard"])  # of a study all, where none is named
        deviates = detects and (not looking or not {"deviation", "combined"}.isdisjoint(looking))
        if layer and not deviates:
            raise ValueError("layer is given without the detector 'deviation' or 'combined', which it is for")
        if rate is not None and not detects:
            raise ValueError("rate is given without a detector, whose threshold it is for")
        if data.resolve() in (output.resolve(), *output.resolve().parents) and not (data / "labels").is_dir():
            raise ValueError(f"output {str(output)!r} is in the data, whose folders are classes; choose another")
        network = load_model(model).to(_device(device))
        _check_layers(network, layer or ())
        shape = None if size is None else _size(size)
        if quick and images is None:
            images = min(8, len(open_data(data, None, shape)))
        chosen = open_data(data, images, shape)
        how: dict[str, Any] = {"steps": steps, "eot": eot, "queries": queries, "seed": seed + 1}
        strength = Strength(eps=radius, norm=norm, targeted=target is not None, **how)
        strength = strength.quick if quick else strength
        everyone = known(strength)
        wanted = attack or ("PGD", "through averaging", "BPDA")
        for name in wanted:
            if name not in everyone:
                raise ValueError(f"attack is {name!r}; it must be one of {'; '.join(everyone)}")
        attackers = [everyone[name] for name in wanted] if protocol is None else adaptive(strength)
        if features is None:
            features = _find_features(network, chosen[0][0][None].to(_device(device)))
        make = Make(network, features, preset or "fast", purify_radius, seed)
        flagged = 0.05 if rate is None else rate
        heads = _Heads(kept or output, fit, clean, flagged, fit_images, shape, _device(device), chosen)
        if study is not None and study in DETECTION:
            given: dict[str, object] = {"target": target, "protocol": protocol, "votes": votes}
            given |= {"against": against if study != "corruptions" else None}
            given |= {"defense": defense or None, "attack": attack or None, "panels": panels or None}
            _check_detection(study, given, foreign or ())
            others = {_name(path): open_images(path, len(chosen)) for path in foreign or ()}
            anomalies = DETECTION[study](strength, make.purifier(), others)
            detectors = _detectors(network, features, layer or (), seed, heads, detector or (), against)
            told = {"size": size, "spec": model, "study": study}
            detection = Detection(network, chosen, detectors, anomalies, batch=batch, arguments=told)
            _report_detection(study, detection, output, against)
            return
        if foreign:
            raise ValueError("foreign is given without the study 'ood', which it is for")
        if detector and (not detects or len(detector) > 1):
            studies = ", ".join(DETECTION)
            raise ValueError(
                f"detector is given; it is for the defense 'detect', which has one, or for a study, one of {studies}"
            )
        sweep = _sweep(study, defense, make)
        against = next((title for title, name in titles.items() if name == against), against)
        _check_against(against, titles if sweep is None else sweep.defenses)
        if sweep is not None:
            rows = dict(sweep.defenses)
        else:
            rows = {
                title: _defended(name, network, features, layer or (), purify_radius, seed, heads, looking[0])
                for title, name in titles.items()
            }
        votes = votes if votes is not None else 0 if sweep is not None else 5
        workers = min(workers, len(chosen))
        batch = min(batch, math.ceil(len(chosen) / workers))
        arguments = {"size": size, "spec": model}
        settings: dict[str, Any] = {"target": target, "votes": votes, "batch": batch, "arguments": arguments}
        score = None if sweep is None else sweep.score
        evaluation = Evaluation(network, chosen, attackers, rows, eps=strength.eps, norm=norm, score=score, **settings)
        if attack and (idle := evaluation.idle()):
            raise ValueError(f"attack is {idle[0]!r}, which is for none of these defenses: {', '.join(rows)}")
        if _work is not None:
            evaluation.run_part(output, _work.part, _work.tell)
            return
        if workers > 1 and evaluation.begin(output):
            _share({**asked, "workers": workers}, workers)
        with _progress() as progress:
            task = progress.add_task("starting", total=1.0)
            report = evaluation.run(
                output,
                lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
            )
            document = report.document(against)
            _write(output / "table.json", json.dumps(document, indent=2) + "\n")
            progress.update(task, description="figures and costs")
            costs = {name: _cost(network, defended, chosen, _device(device)) for name, defended in rows.items()}
            _write(output / "costs.json", json.dumps({k: asdict(v) for k, v in costs.items()}, indent=2) + "\n")
            tables = [(report.title, *_cells(report, costs))]
            if against is not None:
                tables.append((f"minus {against}, paired over images", *grid(_signed(document["differences"]))))
            warnings = [*document["warnings"], *_busy(costs)]
            _write(output / "table.md", markdown(tables, warnings, _FOOTNOTE))
            from equifast.evaluate import plots  # here, since matplotlib takes its time

            plots.write_all(evaluation, report, output, panels, list(rows))
            if sweep is not None:
                plots.save(plots.sweep(report, sweep), output / str(study))
            plots.save(plots.front(report, costs), output / "cost")
    except typer.Exit:  # of a worker, which has said why
        raise
    except _FAILURES as error:
        raise _fail(first_line(error)) from error
    _print(tables, warnings)


def _titles(defenses: Sequence[str]) -> dict[str, str]:
    """Defenses by the names of their rows: of one in a file that of its function."""
    found: dict[str, str] = {}
    for name in defenses:
        place = function_in(name)
        title = name if place is None else place[1]
        if found.setdefault(title, name) != name:
            raise ValueError(f"defenses {found[title]!r} and {name!r} are both named {title!r}; names must differ")
    return found


def _check_protocol(protocol: str | None, attack: Sequence[str] | None, norm: str, eps: str | None) -> None:
    if protocol not in (None, "adaptive"):
        raise ValueError(f"protocol is {protocol!r}; it must be 'adaptive'")
    if protocol is not None and attack:
        raise ValueError("protocol is given with attacks; it brings its own")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is {norm!r}; it must be 'linf' or 'l2'")
    if norm == "l2" and eps is None:
        raise ValueError("norm is 'l2' without --eps; it must be given, as 0.5: 4/255 is next to nothing there")


def _check_study(study: str | None, preset: str | None, workers: int) -> None:
    if workers > 1 and study is not None:
        raise ValueError(f"workers is {workers} with a study; a study has one")
    if preset is not None and study is None:
        raise ValueError("preset is given without a study; name it as a defense")
    if preset is not None and study in _OF_NO_PRESET:
        raise ValueError(f"preset is given with study {study!r}, which does not depend on it")


def _check_against(against: str | None, rows: Collection[str]) -> None:
    if against is not None and against not in rows:
        raise ValueError(f"against is {against!r}; it must be one of {', '.join(rows)}")
    if against is not None and len(rows) == 1:
        raise ValueError(f"against is {against!r}, the only one there is; differences are between two")


def _check_detection(study: str, given: Mapping[str, object], foreign: Sequence[Path]) -> None:
    other = [f"--{name}" for name, value in given.items() if value is not None]
    if other:
        raise ValueError(f"study {study!r} is of detectors; it takes no {', '.join(other)}")
    if foreign and study != "ood":
        raise ValueError(f"foreign is given with study {study!r}; it is for 'ood'")
    if len({_name(path) for path in foreign}) < len(foreign):
        raise ValueError(f"foreign is {', '.join(map(str, foreign))}; names and their folders' must differ")


@dataclass(frozen=True)
class _Work:
    """What a worker does of an evaluation."""

    part: Part
    tell: Advance


# That of this process, where it is a worker.
_work: _Work | None = None


def _share(arguments: Mapping[str, Any], workers: int) -> None:
    """Run an evaluation in processes of their own, each a part; typer.Exit where one fails, once it has said why."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use OpenMP
    told: Any = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // workers)
    processes = [
        context.Process(target=_run_worker, args=(arguments, Part(number, workers), threads, told), daemon=True)
        for number in range(workers)
    ]
    seconds = [(0.0, 1.0)] * workers
    with _progress() as progress:
        task = progress.add_task("starting", total=1.0)
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes):
                multiprocessing.connection.wait([process.sentinel for process in processes if process.is_alive()], 0.5)
                while not told.empty():
                    number, what, done, total = told.get()
                    seconds[number] = (done, total)
                    done, total = (sum(column) for column in zip(*seconds, strict=True))
                    progress.update(task, description=what, completed=done, total=total)
                _look(processes)
            _look(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
                    process.join()


def _look(processes: Sequence[Any]) -> None:
    """Raises for processes that failed."""
    for process in processes:
        if process.exitcode is not None and process.exitcode < 0:
            raise RuntimeError(f"a worker was ended by signal {-process.exitcode}; what was done is kept, start again")
        if process.exitcode:
            raise typer.Exit(process.exitcode)


def _run_worker(arguments: Mapping[str, Any], part: Part, threads: int, told: Any) -> None:
    """What a worker's process runs. It ends when the process that started it does, however that ends."""

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it is told too, and ends it
    main()
    torch.set_num_threads(threads)
    global _work
    _work = _Work(part, lambda what, done, total: told.put((part.number, what, done, total)))
    try:
        evaluate(**arguments)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)


_ROUNDS = 5  # in which the time of a defense is measured


def _cost(network: nn.Module, defended: DefendedModel, data: Any, device: torch.device) -> Cost:
    """Of one image; where it depends on the image what is done, the mean over clean images."""
    count = 1 if getattr(defended, "detector", None) is None else min(20, len(data))
    places = [place * len(data) // count for place in range(count)]
    found = [cost(network, defended, data[i][0][None].to(device), rounds=_ROUNDS if count == 1 else 1) for i in places]
    mean = {key: sum(getattr(each, key) for each in found) / count for key in ("seconds", "times", "passes")}
    return Cost(**mean, mebibytes=max(each.mebibytes for each in found))


def _busy(costs: Mapping[str, Cost]) -> list[str]:
    """A warning where the model alone, which every defense is measured in turns with, did not take alike."""
    alone = {name: spent.seconds / spent.times for name, spent in costs.items()}
    slowest, quickest = max(alone, key=alone.__getitem__), min(alone, key=alone.__getitem__)
    if alone[slowest] <= 1.5 * alone[quickest]:
        return []
    took = f"{alone[slowest]:.3g} s beside {slowest} and {alone[quickest]:.3g} s beside {quickest}"
    return [f"a forward pass of the model took {took}; the machine was busy, and seconds of defenses do not compare"]


def _write(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text)


def _detectors(
    network: nn.Module,
    features: str | None,
    layers: Sequence[str],
    seed: int,
    heads: "_Heads",
    wanted: Sequence[str],
    against: str | None,
) -> dict[str, Detector]:
    """Detectors with their thresholds; `against` is one of them."""

    def turned(kind: type[Rotation] | type[Contrastive], name: str) -> Detector:
        return Similarity(heads.give(kind(network, features, seed=seed), name))

    makes: dict[str, Callable[[], Detector]] = {
        **{name: partial(make, network, features, layers, seed) for name, make in DETECTORS.items()},
        "invariance": lambda: Similarity(Invariance(network, features, seed=seed)),
        **{name: partial(turned, kind, name) for name, kind in WITH_HEADS.items()},
        # of parts of its own, which are fitted together
        "combined": lambda: Combined([makes["deviation"](), makes["rotation"]()]),
    }
    for name in wanted:
        if name not in makes:
            raise ValueError(f"detector is {name!r}; it must be one of {', '.join(makes)}")
    _check_against(against, dict.fromkeys(wanted or makes))
    heads.check(list(wanted or makes))
    made = {name: makes[name]() for name in wanted or makes}  # all first: a head that is not there shows at once
    return {name: heads.fitted(detector, name) for name, detector in made.items()}


def _report_detection(study: str, detection: Detection, output: Path, against: str | None) -> None:
    with _progress() as progress:
        task = progress.add_task("starting", total=1.0)
        report = detection.run(
            output,
            lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
        progress.update(task, description="figures")
        document = report.document(against)
        _write(output / "table.json", json.dumps(document, indent=2) + "\n")
        from equifast.evaluate import plots  # here, since matplotlib takes its time

        plots.save(plots.histograms(report), output / "scores")
        if study == "corruptions":
            for name in report.scores:
                plots.save(plots.corruption_map(report, name), output / f"corruptions-{name}")
        else:
            plots.save(plots.characteristics(report), output / "characteristics")
        curve = plots.evasion(report)
        if curve is not None:
            plots.save(curve, output / "evasion")
        apart = []
        if against is not None:
            title = f"mean area minus that of {against}, in points, ± standard error, paired over images"
            apart = [(title, *grid(_signed(document["differences"])))]
        _write(output / "table.md", markdown([*_detection_tables(study, report, every=True), *apart]))
    _print([*_detection_tables(study, report), *apart], (), "")


_SEPARATION = {
    "auroc": "area under the characteristic",
    "aupr": "average precision",
    "fpr95": "clean images above the threshold that 95% of the others reach",
}


def _separation_tables(
    report: DetectionReport, rows: Mapping[str, str], of: str
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of the three figures, of rows by their headings."""
    names = list(report.scores)
    return [
        (
            f"{what} in %, {of}",
            ["", *names],
            [[head, *(str(getattr(report.separations[n][kind], key)) for n in names)] for head, kind in rows.items()],
        )
        for key, what in _SEPARATION.items()
    ]


def _detection_tables(
    study: str, report: DetectionReport, every: bool = False
) -> list[tuple[str, list[str], list[list[str]]]]:
    """All tables; of corruptions those of severity 3 where not ``every`` is wanted, and the mean of each severity."""
    names, kinds = list(report.scores), list(report.groups)
    first = names[0]
    of = f"{report.images} images (95% by bootstrap)"
    if study == "corruptions":
        means = report.means()
        chosen = {kind if every else kind.rsplit(" ", 1)[0]: kind for kind in kinds if every or kind.endswith(" 3")}
        groups = list(dict.fromkeys(group for group in report.groups.values() if group))
        found = _separation_tables(report, chosen, of if every else f"severity 3, {of}")
        found[0][2].extend([f"mean, {group}", *(str(means[n][group]) for n in names)] for group in groups)
        return found
    rates = [[kind, *(f"{report.flagged(n, kind).value:.1f}" for n in names)] for kind in (CLEAN, *kinds)]
    damage = [
        [kind, *(str(report.damage(n, kind)) for n in (names if report.groups.get(kind) == "evading" else [first]))]
        for kind in (CLEAN, *kinds)
        if report.groups.get(kind) != "foreign"
    ]
    evaded = ", of those who evade at theirs" if "evading" in report.groups.values() else ""
    times = [["ms per image", *(f"{1e3 * report.seconds[n]:.1f}" for n in names)]]
    tables = [
        *_separation_tables(report, dict(zip(kinds, kinds, strict=True)), of),
        (f"images flagged at the threshold{evaded}, in %", ["", *names], rates + times),
    ]
    if len(damage) > 1:
        whole = [[*row, *[""] * (1 + len(names) - len(row))] for row in damage]
        tables.append((f"what attackers leave of the model, {report.figure}", ["", *names], whole))
    return tables


def _sweep(study: str | None, defense: list[str] | None, make: Make) -> Sweep | None:
    if study is None:
        return None
    if study not in STUDIES:
        raise ValueError(f"study is {study!r}; it must be one of {', '.join((*STUDIES, *DETECTION))}")
    if defense:
        raise ValueError("study is given with defenses; it brings its own")
    return STUDIES[study](make)


@dataclass(frozen=True)
class _Heads:
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
        with _progress() as progress:
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
        with _progress() as progress:
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


def _defended(
    name: str,
    network: nn.Module,
    features: str | None,
    layers: Sequence[str],
    eps: float,
    seed: int,
    heads: _Heads,
    guard: str,
) -> DefendedModel:
    if function_in(name) is not None:
        return load_defense(name, network)
    whole = name
    name, own, where = name.partition("@")
    features = where if own else features
    if name == "averaging":
        return Averaging(network, seed=seed)
    if count := re.fullmatch(r"averaging-([1-9]\d{0,2})", name):
        return Averaging(network, list(islice(cycle(paper()), int(count[1]))), seed=seed)
    if name == "flip":
        return Averaging(network, [Flip()], seed=seed)
    if name == "none":
        return Defended(network, nothing)
    if name == "random":
        return Defended(network, RandomNoise(eps, seed=seed))
    if name == "invariance":
        return Defended(network, Invariance(network, features, eps=eps, seed=seed))
    if name in WITH_HEADS:
        return Defended(network, heads.give(WITH_HEADS[name](network, features, eps=eps, seed=seed), whole))
    if name in PRESETS:
        return Defended(network, Purifier(network, features, name, eps, seed))
    if name == "detect":
        detector = _detectors(network, features, layers, seed, heads, [guard], None)[guard]
        # in the arithmetic of the detector, whose passes give the predictions of what is not suspected
        return Defended(network, Purifier(network, features, "fast", eps, seed), detector=detector, dtype="auto")
    raise ValueError(f"defense is {whole!r}; it must be one of {', '.join(DEFENSES)}")


def _cells(report: Report, costs: Mapping[str, Cost]) -> Grid:
    """Attackers down, or defenses where there are many."""
    columns = report.cells()
    for defense, column in columns.items():
        spent = costs[defense]
        column["s/image"], column["forward passes' time"] = f"{spent.seconds:.3f}", f"{spent.times:.1f}"
        column["passes*"], column["MiB"] = f"{spent.passes:.1f}", f"{spent.mebibytes:.0f}"
    return grid(columns)


def _signed(differences: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    def text(cell: Mapping[str, Any]) -> str:
        error = "?" if cell["error"] is None else f"{cell['error']:.1f}"
        return f"{cell['value']:+.1f} ± {error}"

    return {defense: {attack: text(cell) for attack, cell in row.items()} for defense, row in differences.items()}


_WIDEST = 10_000  # characters of a table's line
_FOOTNOTE = "* forward passes of an image, by area; a backward pass counts as two"


def _print(
    tables: Sequence[tuple[str, list[str], list[list[str]]]], warnings: Sequence[str], footnote: str = _FOOTNOTE
) -> None:
    for title, headings, rows in tables:  # names are a user's, who may have put brackets into them
        table = Table(title=escape(title))
        for heading in headings:
            table.add_column(escape(heading), justify="right" if heading else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        wide = Measurement.get(_out, _out.options.update(width=_WIDEST), table).maximum
        # a terminal folds what is too wide; a file has no edge
        console = _out if _out.is_terminal else Console(file=_out.file, width=max(_out.width, wide))
        console.print(table)
    if footnote:
        _out.print(footnote, highlight=False, soft_wrap=True)
    for warning in warnings:
        _out.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)


def _name(data: Path) -> str:
    """Of foreign data: that of the file or folder, after that of the folder it is in."""
    return "/".join(data.resolve().with_suffix("").parts[-2:])


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size such as 176x240", param_hint="'--size'")
    return int(match[1]), int(match[2])


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but no CUDA device can be used here")
    return device


def _arguments(model: str, network: nn.Module, purifier: Purifier, features: str | None) -> dict[str, Any]:
    """What decides the results, but for the images: lines of another run of these do not count."""
    return {
        "version": __version__,
        "model": model,
        "weights": weights(network),
        "features": features,
        **{key: value for key, value in purifier.settings().items() if key != "views"},
        "device": next((p.device.type for p in network.parameters()), "cpu"),
    }


def _targets(found: list[tuple[Path, Path]], output: Path) -> list[tuple[Path, Path]]:
    targets: dict[Path, Path] = {}
    for source, name in found:
        target = name.with_suffix(".png")
        if targets.setdefault(target, source) != source:
            raise ValueError(f"{str(targets[target])!r} and {str(source)!r} would both be written to {str(target)!r}")
        if (output / target).resolve() == source.resolve():
            raise ValueError(f"{str(source)!r} would be overwritten; choose another output folder")
    return [(source, target) for target, source in targets.items()]


def _purify_one(purifier: Purifier, features: str | None, x: Tensor, target: Path, progress: Any) -> dict[str, Any]:
    before = float(purifier.score(x))
    if not math.isfinite(before):
        raise ValueError("the model's features have values that are NaN or infinite on it; they must be finite")
    begun = time.perf_counter()
    purified = purifier(x, progress=progress)
    if purified.is_cuda:
        torch.cuda.synchronize(purified.device)
    seconds = time.perf_counter() - begun
    write_image(target, purified[0])
    return {
        "height": x.shape[2],
        "width": x.shape[3],
        "score_before": before,
        "score_after": float(purifier.score((purified * 255).round() / 255)),  # of what the file holds
        "seconds": seconds,
        "settings": {**purifier.settings(), "features": features},
    }


def _find_features(network: nn.Module, x: Tensor) -> str | None:
    """The model's own output where it is dense, else its last dense submodule."""
    try:
        with evaluating(x, network), torch.no_grad():
            Features(network)(x.clone())  # models may work in place
    except ValueError:
        name = suggest(network, x)
        if name is None:
            raise ValueError(
                "the model has no submodule with features (N, C, h, w); name one with --features"
            ) from None
        _err.print(f"equifast: features of {name!r}, the model's last dense submodule", highlight=False, markup=False)
        return name
    return None


class _Ledger:
    """``purified.jsonl``: what is done, one line per image, each written at once and whole."""

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        self._folder = folder
        self._path = folder / "purified.jsonl"
        self._arguments = arguments
        self._lines: dict[str, dict[str, Any]] = {}

        if self._path.exists():
            for text in self._path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue  # half a line, from a run that was killed while writing it
                if not isinstance(line, dict) or not {"image", "sha256", "arguments"} <= line.keys():
                    raise ValueError(f"{self._path} has a line that equifast did not write; choose another folder")
                changed = [key for key, now in arguments.items() if line["arguments"].get(key) != now]
                if changed:
                    was = ", ".join(f"{key} was {line['arguments'].get(key)!r}" for key in changed)
                    raise ValueError(f"{folder} holds results of other settings ({was}); choose another folder")
                self._lines[line["image"]] = line
        self._rewrite()

    def __enter__(self) -> "_Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _rewrite(self) -> None:
        _write(self._path, "".join(json.dumps(line) + "\n" for line in self._lines.values()))
        self._file = self._path.open("a")

    def has(self, name: Path, digest: str) -> bool:
        line = self._lines.get(name.as_posix())
        return line is not None and line["sha256"] == digest and (self._folder / name).is_file()

    def add(self, line: dict[str, Any]) -> None:
        known = line["image"] in self._lines
        self._lines[line["image"]] = {**line, "arguments": self._arguments}
        if known:  # the source has changed since
            self._file.close()
            self._rewrite()
            return
        self._file.write(json.dumps(self._lines[line["image"]]) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.command()
def doctor() -> None:
    """Show versions, backends built and usable, GPU, threads and instruction sets."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    sets = _C.instruction_sets()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, kernels = ops.backend(), ops.instruction_set()
    rows = {
        "equifast": __version__
        + ("" if _C.version == __version__ else f" (compiled part is {_C.version}: build again)"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        **{name: _installed(name) for name in ("torchvision", "timm", "triton", "numpy")},
        "backend": f"{chosen}: {chosen.reason}" + (f" ({kernels} kernels)" if chosen == "native" else ""),
        **({"backend on CUDA": _on_cuda()} if torch.cuda.is_available() else {}),
        "operator libraries": ", ".join(_C.operator_libraries) or "none",
        "compiled by": f"{_C.compiler}, C++{_C.cxx_standard}; CUDA compiler: {_C.cuda_compiler or 'none found'}",
        "GPU": _gpu(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "instruction sets": ", ".join(sets) or "none beyond the baseline",
        "dtype='auto'": f"{'bfloat16' if has_fast_bfloat16(device) else 'float32'} on {device.type}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    _out.print(table, highlight=False)


def _on_cuda() -> str:
    chosen = ops.choose(torch.device("cuda"))
    architectures = ", ".join(f"sm_{architecture}" for architecture in _C.cuda_architectures)
    return f"{chosen}: {chosen.reason}" + (f" (kernels for {architectures})" if chosen == "native" else "")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none usable"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


if __name__ == "__main__":
    sys.exit(app())
