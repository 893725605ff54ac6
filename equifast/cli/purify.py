"""``equifast purify``."""

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import TaskID
from torch import Tensor, nn

from equifast import __version__
from equifast._fingerprint import weights
from equifast.cli._common import (
    FAILURES,
    Device,
    Model,
    Output,
    WhereFeatures,
    WhichPreset,
    app,
    fail,
    find_features,
    list_targets,
    parse_device,
    parse_radius,
    progress_bar,
    stderr,
    stdout,
    write_text,
)
from equifast.models import find_images, first_line, load_model, read_image, write_image
from equifast.purifier import Purifier

__all__ = ["purify"]


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
    radius = parse_radius("--eps", eps)
    try:
        targets = list_targets(list(find_images(paths, output)), output)
        if not targets:
            raise ValueError(f"no PNG, JPEG or WebP file in {', '.join(map(str, paths))}")
        network = load_model(model).to(parse_device(device))
        if (number := _seed(seed)) is None:
            torch.seed()  # seeds are drawn from torch's generator, which the model's file may have set
        purifier = Purifier(network, features, preset, radius, number)  # refuses bad settings before any work
        output.mkdir(parents=True, exist_ok=True)
        ledger = _Ledger(output, _arguments(model, network, purifier, features))
    except FAILURES as error:
        raise fail(first_line(error)) from error
    failed, known = 0, features is not None
    with ledger, progress_bar() as progress:
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
                    x = read_image(source)[None].to(parse_device(device))
                if not known:  # found on the first image, done or not, the same for all
                    features, known = find_features(network, x), True
                    purifier = Purifier(network, features, preset, radius, number)
                if not done:
                    line = _purify_one(purifier, features, x, output / name, advance)
                    ledger.add({"image": name.as_posix(), "source": str(source), "sha256": digest, **line})
            except Exception as error:  # one bad file, or one that the model chokes on: report it, do the rest
                failed += 1
                stderr.print(f"equifast: {source}: {first_line(error)}", highlight=False, markup=False, soft_wrap=True)
            finally:
                progress.remove_task(steps)
            progress.advance(task)
    stdout.print(
        f"{len(targets) - failed} of {len(targets)} images purified in {output}{os.sep}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if failed:
        raise typer.Exit(1)


def _seed(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        sentence = f"{text!r} is no seed; it must be a whole number, or none"
        raise typer.BadParameter(sentence, param_hint="'--seed'") from error


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
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines.values()))
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
