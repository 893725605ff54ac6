"""``equifast evaluate``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from equifast.cli._by_name import DEFENSES, ByName, Heads, check_against, titles_of
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
    parse_device,
    parse_radius,
    parse_size,
    progress_bar,
    write_text,
)
from equifast.cli._tables import FOOTNOTE, cells, detection_tables, show, signed
from equifast.cli._workers import current, share
from equifast.evaluate import Attacker, Cost, Evaluation, Strength, adaptive, cost, known, open_data, open_images
from equifast.evaluate.detection import STUDIES as DETECTION
from equifast.evaluate.detection import Detection
from equifast.evaluate.studies import STUDIES, Make, Sweep
from equifast.evaluate.tables import grid, markdown
from equifast.models import first_line, load_model
from equifast.purifier import DefendedModel

__all__ = ["evaluate"]

_OF_NO_PRESET = ("noise", "cost", "evasion", "corruptions", "ood")
"""Studies that a preset changes nothing of."""


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
    radius, purify_radius = parse_radius("--eps", eps or "4/255"), parse_radius("--purify-eps", purify_eps)
    try:
        _check_protocol(protocol, attack, norm, eps)
        _check_study(study, preset, workers)
        looking = _check_detectors(study, defense or (), detector, layer, rate)
        titles = titles_of(defense or ("none", "averaging" if protocol is None else "averaging-12", "fast"))
        if data.resolve() in (output.resolve(), *output.resolve().parents) and not (data / "labels").is_dir():
            raise ValueError(f"output {str(output)!r} is in the data, whose folders are classes; choose another")
        place = parse_device(device)
        network = load_model(model).to(place)
        check_layers(network, layer or ())
        shape = None if size is None else parse_size(size)
        if quick and images is None:
            images = min(8, len(open_data(data, None, shape)))
        chosen = open_data(data, images, shape)
        how: dict[str, Any] = {"steps": steps, "eot": eot, "queries": queries, "seed": seed + 1}
        strength = Strength(eps=radius, norm=norm, targeted=target is not None, **how)
        strength = strength.quick if quick else strength
        attackers = adaptive(strength) if protocol is not None else _named(attack, strength)
        if features is None:
            features = find_features(network, chosen[0][0][None].to(place))
        make = Make(network, features, preset or "fast", purify_radius, seed)
        heads = Heads(kept or output, fit, clean, 0.05 if rate is None else rate, fit_images, shape, place, chosen)
        by_name = ByName(network, features, layer or (), purify_radius, seed, heads)
        if study is not None and study in DETECTION:
            given: dict[str, object] = {"target": target, "protocol": protocol, "votes": votes}
            given |= {"against": against if study != "corruptions" else None}
            given |= {"defense": defense or None, "attack": attack or None, "panels": panels or None}
            _check_detection(study, given, foreign or ())
            others = {_name(path): open_images(path, len(chosen)) for path in foreign or ()}
            anomalies = DETECTION[study](strength, make.purifier(), others)
            told = {"size": size, "spec": model, "study": study}
            detectors = by_name.detectors(detector or (), against)
            detection = Detection(network, chosen, detectors, anomalies, batch=batch, arguments=told)
            _report_detection(study, detection, output, against)
            return
        if foreign:
            raise ValueError("foreign is given without the study 'ood', which it is for")
        sweep = _sweep(study, defense, make)
        against = next((title for title, name in titles.items() if name == against), against)
        check_against(against, titles if sweep is None else sweep.defenses)
        if sweep is None:
            rows = {title: by_name.defended(name, looking[0]) for title, name in titles.items()}
        else:
            rows = dict(sweep.defenses)
        votes = votes if votes is not None else 0 if sweep is not None else 5
        workers = min(workers, len(chosen))
        batch = min(batch, math.ceil(len(chosen) / workers))
        arguments = {"size": size, "spec": model}
        settings: dict[str, Any] = {"target": target, "votes": votes, "batch": batch, "arguments": arguments}
        score = None if sweep is None else sweep.score
        evaluation = Evaluation(network, chosen, attackers, rows, eps=strength.eps, norm=norm, score=score, **settings)
        if attack and (idle := evaluation.idle()):
            raise ValueError(f"attack is {idle[0]!r}, which is for none of these defenses: {', '.join(rows)}")
        if (work := current()) is not None:
            evaluation.run_part(output, work.part, work.tell)
            return
        if workers > 1 and evaluation.begin(output):
            share(evaluate, {**asked, "workers": workers}, workers)
        with progress_bar() as progress:
            task = progress.add_task("starting", total=1.0)
            report = evaluation.run(
                output,
                lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
            )
            document = report.document(against)
            write_text(output / "table.json", json.dumps(document, indent=2) + "\n")
            progress.update(task, description="figures and costs")
            costs = {name: _cost(network, defended, chosen, place) for name, defended in rows.items()}
            write_text(output / "costs.json", json.dumps({k: asdict(v) for k, v in costs.items()}, indent=2) + "\n")
            tables = [(report.title, *cells(report, costs))]
            if against is not None:
                tables.append((f"minus {against}, paired over images", *grid(signed(document["differences"]))))
            warnings = [*document["warnings"], *_busy(costs)]
            write_text(output / "table.md", markdown(tables, warnings, FOOTNOTE))
            from equifast.evaluate import plots  # here, since matplotlib takes its time

            plots.write_all(evaluation, report, output, panels, list(rows))
            if sweep is not None:
                plots.save(plots.sweep(report, sweep), output / str(study))
            plots.save(plots.front(report, costs), output / "cost")
    except typer.Exit:  # of a worker, which has said why
        raise
    except FAILURES as error:
        raise fail(first_line(error)) from error
    show(tables, warnings)


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


def _check_detectors(
    study: str | None,
    defense: Sequence[str],
    detector: Sequence[str] | None,
    layer: Sequence[str] | None,
    rate: float | None,
) -> Sequence[str]:
    """The detectors that look: of a study those named, none for all; else the one of the defense ``detect``."""
    of_study = study in DETECTION
    detects = of_study or "detect" in {name.partition("@")[0] for name in defense}
    looking = detector or ([] if of_study else ["guard"])
    if layer and not (detects and (not looking or not {"deviation", "combined"}.isdisjoint(looking))):
        raise ValueError("layer is given without the detector 'deviation' or 'combined', which it is for")
    if rate is not None and not detects:
        raise ValueError("rate is given without a detector, whose threshold it is for")
    if detector and not of_study and (not detects or len(detector) > 1):
        studies = ", ".join(DETECTION)
        raise ValueError(
            f"detector is given; it is for the defense 'detect', which has one, or for a study, one of {studies}"
        )
    return looking


def _named(attack: Sequence[str] | None, strength: Strength) -> list[Attacker]:
    everyone = known(strength)
    wanted = attack or ("PGD", "through averaging", "BPDA")
    for name in wanted:
        if name not in everyone:
            raise ValueError(f"attack is {name!r}; it must be one of {'; '.join(everyone)}")
    return [everyone[name] for name in wanted]


def _check_detection(study: str, given: Mapping[str, object], foreign: Sequence[Path]) -> None:
    other = [f"--{name}" for name, value in given.items() if value is not None]
    if other:
        raise ValueError(f"study {study!r} is of detectors; it takes no {', '.join(other)}")
    if foreign and study != "ood":
        raise ValueError(f"foreign is given with study {study!r}; it is for 'ood'")
    if len({_name(path) for path in foreign}) < len(foreign):
        raise ValueError(f"foreign is {', '.join(map(str, foreign))}; names and their folders' must differ")


def _sweep(study: str | None, defense: list[str] | None, make: Make) -> Sweep | None:
    if study is None:
        return None
    if study not in STUDIES:
        raise ValueError(f"study is {study!r}; it must be one of {', '.join((*STUDIES, *DETECTION))}")
    if defense:
        raise ValueError("study is given with defenses; it brings its own")
    return STUDIES[study](make)


def _name(data: Path) -> str:
    """Of foreign data: that of the file or folder, after that of the folder it is in."""
    return "/".join(data.resolve().with_suffix("").parts[-2:])


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


def _report_detection(study: str, detection: Detection, output: Path, against: str | None) -> None:
    with progress_bar() as progress:
        task = progress.add_task("starting", total=1.0)
        report = detection.run(
            output,
            lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
        progress.update(task, description="figures")
        document = report.document(against)
        write_text(output / "table.json", json.dumps(document, indent=2) + "\n")
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
            apart = [(title, *grid(signed(document["differences"])))]
        write_text(output / "table.md", markdown([*detection_tables(study, report, every=True), *apart]))
    show([*detection_tables(study, report), *apart], (), "")
