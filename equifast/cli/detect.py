"""``equifast detect``."""

import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from equifast.cli._by_name import DETECTORS
from equifast.cli._common import (
    FAILURES,
    Device,
    Layers,
    Model,
    Output,
    WhereFeatures,
    app,
    check_layers,
    fail,
    find_features,
    list_targets,
    parse_device,
    progress_bar,
    stderr,
    stdout,
    write_text,
)
from equifast.defenses import Rotation
from equifast.detectors import Combined, Detector, Similarity, needed
from equifast.models import find_images, first_line, load_model, read_image, write_image

__all__ = ["detect"]

HEAD = "rotation.safetensors"
"""Beside the detector.json of combined."""
_NO_OVERLAYS = "there are no overlays, since this detector sees an image of this model as a whole."


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
        targets = list_targets(list(find_images(paths, output / "overlays")), output / "overlays")
        if not targets:
            raise ValueError(f"no PNG, JPEG or WebP file in {', '.join(map(str, paths))}")
        network = load_model(model).to(parse_device(device))
        if features is None:
            features = find_features(network, _first_readable(targets)[None].to(parse_device(device)))
        if layer and detector not in ("deviation", "combined"):
            raise ValueError(f"layer is given with detector {detector!r}; it is for 'deviation' and 'combined'")
        check_layers(network, layer or ())
        chosen = DETECTORS["deviation" if detector == "combined" else detector](network, features, layer or (), seed)
        head = Rotation(network, features, seed=seed) if detector == "combined" else None
        if head is not None:
            chosen = Combined([chosen, Similarity(head)])
        kept = next((path for path in clean if path.suffix.lower() == ".json"), None)
        like = [] if kept is not None else _once(source for source, _ in find_images(clean, output / "overlays"))
        if kept is not None and len(clean) > 1:
            raise ValueError(f"clean is {', '.join(map(str, clean))}; {kept.name} of an earlier run is given alone")
        if not (like or kept is not None):
            raise ValueError(f"clean is {', '.join(map(str, clean))}, which has no PNG, JPEG or WebP file")
        with progress_bar() as progress:
            if kept is not None:
                if head is not None:
                    head.load(kept.with_name(HEAD))
                chosen.load(kept)
                chosen = chosen if rate is None else chosen.at(rate)
            else:
                _fit(chosen, head, like, 0.05 if rate is None else rate, parse_device(device), progress)
            output.mkdir(parents=True, exist_ok=True)
            chosen.save(output / "detector.json")
            if head is not None:
                head.save(output / HEAD)
            lines, failed, drawn = _scored(chosen, targets, output, parse_device(device), progress)
            if not lines:
                raise ValueError(f"none of {failed} images can be read, {str(targets[0][0])!r} the first")
        scores = {"threshold": chosen.threshold, "interval": chosen.interval, "images": lines}
        write_text(output / "scores.json", json.dumps(scores, indent=2) + "\n")
    except FAILURES as error:
        raise fail(first_line(error)) from error
    table = Table(title=f"{detector}: threshold {chosen.threshold:.4g}")
    for heading in ("image", "score", "flagged"):
        table.add_column(heading, justify="right" if heading == "score" else "left")
    for line in lines[:20]:
        score = "NaN" if line["score"] is None else f"{line['score']:.4g}"
        table.add_row(escape(line["image"]), score, "yes" if line["flagged"] else "")
    stdout.print(table)
    low, high = chosen.interval
    about = "about " if detector in ("deviation", "combined") else ""  # whose threshold learned from the same images
    stdout.print(
        f"{sum(line['flagged'] for line in lines)} of {len(lines)} images are suspicious; of clean ones like those of "
        f"the threshold {about}{100 * low:.1f}% to {100 * high:.1f}% would be. All scores are in "
        f"{output / 'scores.json'}; " + (f"overlays are in {output / 'overlays'}." if drawn else _NO_OVERLAYS),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if failed:
        raise typer.Exit(1)


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


def _once(paths: Iterable[Path]) -> list[Path]:
    """Without those that are there again: folders may lie in each other, and an image counts once."""
    return list({path.resolve(): path for path in paths}.values())


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
            stderr.print(f"equifast: {source}: {first_line(error)}", highlight=False, markup=False, soft_wrap=True)
    # a score of NaN is suspicious, and JSON has none
    scored.sort(key=lambda line: (not math.isnan(line[0]), -line[0], line[1]))
    lines = [
        {"image": name, "score": None if math.isnan(score) else score, "flagged": not score <= detector.threshold}
        for score, name in scored
    ]
    return lines, failed, drawn
