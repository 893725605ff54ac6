"""Figures of a report: what each attacker leaves of each defense, over the radius, and images of the worst cases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from equifast._files import replacing
from equifast.evaluate.cost import Cost
from equifast.evaluate.detection import DetectionReport
from equifast.evaluate.metrics import Estimate
from equifast.evaluate.profile import Rates
from equifast.evaluate.records import CLEAN
from equifast.evaluate.studies import Sweep
from equifast.evaluate.study import Evaluation, Report

__all__ = [
    "bars",
    "characteristics",
    "corruption_map",
    "curves",
    "evasion",
    "front",
    "histograms",
    "overlay",
    "panels",
    "rates",
    "save",
    "sweep",
    "write_all",
]


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, beside and then renamed; ``path`` has no suffix. Returns where they are."""
    found = []
    for kind in ("png", "svg"):
        target = path.with_suffix(f".{kind}")
        with replacing(target) as beside:
            figure.savefig(beside, format=kind, dpi=110)
        found.append(target)
        figure.set_layout_engine("none")  # what was laid out once stays: finding it takes its time
    return found


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _errors(estimates: Sequence[Estimate]) -> list[float]:
    return [0.0 if np.isnan(e.standard_error) else e.standard_error for e in estimates]


def _points(axis: Axes, places: Sequence[float], estimates: Sequence[Estimate], label: str, **style: Any) -> None:
    values = [e.value for e in estimates]
    axis.errorbar(places, values, yerr=_errors(estimates), capsize=2, label=label, **style)


def _finish(axis: Axes, report: Report, title: str, across: str = "") -> None:
    axis.set_xlabel(across)
    axis.set_ylabel(report.figure)
    axis.set_ylim(bottom=0)
    axis.set_title(f"{title}{report.images} images, ± standard error by bootstrap over images", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8)  # beside what it would cover


def bars(report: Report) -> Figure:
    """A bar for each defense, in a group for each attacker of the worst case, with standard errors; that comes last."""
    table = report.table()
    attackers = [CLEAN, *dict.fromkeys(attack for defense in table for attack in report.attacks(defense))]
    attackers += ["worst"] if any("worst" in row for row in table.values()) else []
    figure = _figure(max(6.0, 1.1 * len(attackers) + 2), 4.5)
    axis = figure.subplots()
    width = 0.8 / len(table)
    for number, (defense, row) in enumerate(table.items()):
        places = [i for i, attack in enumerate(attackers) if attack in row]
        found = [row[attackers[i]] for i in places]
        axis.bar(
            [i + (number - (len(table) - 1) / 2) * width for i in places],
            [e.value for e in found],
            width,
            yerr=_errors(found),
            capsize=2,
            label=defense,
        )
    axis.set_xticks(range(len(attackers)), attackers, rotation=30, ha="right")
    _finish(axis, report, "")
    return figure


def curves(report: Report, eps: float, attack: str = "BPDA") -> Figure | None:
    """What is left of each defense over the radius of one attack; None where it was run at one radius alone."""
    lines: dict[str, list[tuple[float, str]]] = {}
    for defense, columns in report.results.items():
        names = [name for name in columns if name == attack or name.startswith(f"{attack}, radius")]
        if len(names) > 1:
            lines[defense] = sorted((report.radius[name], name) for name in (CLEAN, *names))
    if not lines:
        return None
    figure, table = _figure(6, 4.5), report.table()
    axis = figure.subplots()
    for defense, places in lines.items():
        found = [table[defense][name] for _, name in places]
        _points(axis, [255 * eps * radius for radius, _ in places], found, defense, marker="o")
    axis.set_xscale("symlog", linthresh=255 * eps)
    _finish(axis, report, f"{attack}; ", "radius of the attack, in levels of 255")
    return figure


def sweep(report: Report, swept: Sweep) -> Figure:
    """Clean images and each attacker over the setting that a study changes, with standard errors."""
    table, figure = report.table(), _figure(7, 4.5)
    axis = figure.subplots()
    names = list(swept.defenses)
    places = [float(i) if swept.places is None else swept.places[name] for i, name in enumerate(names)]
    for attack in (CLEAN, *dict.fromkeys(attack for name in names for attack in report.attacks(name))):
        # not every attacker is one of every defense
        met = [(place, table[name][attack]) for place, name in zip(places, names, strict=True) if attack in table[name]]
        line = "" if swept.places is None else "-"
        _points(axis, [place for place, _ in met], [found for _, found in met], attack, marker="o", linestyle=line)
    if swept.places is None:
        axis.set_xticks(places, names, rotation=30, ha="right")
    elif max(places) > 100 * min(places):
        axis.set_xscale("log")
    _finish(axis, report, f"{swept.title}\n", swept.label)
    return figure


def rates(curves: Mapping[str, Rates], title: str = "") -> Figure:
    """Profiles of several models, one curve each: how often predictions stay, in percent, with standard errors."""
    if not curves:
        raise ValueError("curves is empty; there must be at least one")
    figure = _figure(6, 4.5)
    axis = figure.subplots()
    for name, each in curves.items():
        _points(axis, each.places, each.estimates, name, marker="o", markersize=3)
    first = next(iter(curves.values()))
    axis.set_xlabel(first.label)
    axis.set_ylabel(f"rate of {first.what}, %")
    axis.set_ylim(0, 101)
    axis.set_title(f"{title}{first.kept.shape[1]} images, ± standard error by bootstrap over images", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def front(report: Report, costs: Mapping[str, Cost]) -> Figure:
    """Clean images, circles, and the worst case, squares, of each defense over its time, in forward passes."""
    figure = _figure(7.5, 4.5)
    axis = figure.subplots()
    for number, (name, row) in enumerate(report.table().items()):
        for column, marker in ((CLEAN, "o"), ("worst", "s")):
            if column in row:
                label, color = name if column == CLEAN else "", colormaps["tab20"](number % 20)
                _points(axis, [costs[name].times], [row[column]], label, marker=marker, color=color)
    axis.set_xscale("log")
    _finish(axis, report, "circles: clean images, squares: worst case\n", "time, in forward passes of the model")
    return figure


def panels(evaluation: Evaluation, report: Report, defense: str, count: int = 4) -> Figure:
    """The images on which a defense loses most labels to its worst attackers, attacked once more.

    Rows are images; columns the image, what changed, the labels, and what the defense predicts before and after. Of an
    image without labels of its own the predicted class is written beneath it.
    """
    rows = report.worst_images(defense, count)
    figure = _figure(11, 2.1 * len(rows))
    axes = figure.subplots(len(rows), 5, squeeze=False)
    names = report.worst_attacks(defense)
    for axis_row, place in zip(axes, rows, strict=True):
        shown = evaluation.again(place, defense, names[place])
        change = shown["attacked"] - shown["image"]
        changed = 0.5 + change / (2 * float(change.abs().max()) or 1.0)
        titles = ("image", names[place], "labels", "before", "after")
        for axis, title, content in zip(
            axis_row, titles, (shown["image"], changed, shown["labels"], shown["before"], shown["after"]), strict=True
        ):
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
            if content.dim() == 3:
                axis.imshow(content.permute(1, 2, 0).clamp(0, 1).cpu().numpy())
            elif content.dim() == 2:
                axis.imshow(_colors(content, evaluation.ignore_index))
            else:
                axis.text(0.5, 0.5, f"class {int(content)}", ha="center", va="center")
    return figure


def _colors(labels: Tensor, ignore_index: int) -> NDArray[Any]:
    """(H, W) classes -> (H, W, 3), black where they do not count."""
    palette = (255 * colormaps["tab20"](np.arange(20))[:, :3]).astype(np.uint8)
    classes = labels.cpu().numpy()
    painted: NDArray[Any] = palette[classes % 20]
    painted[classes == ignore_index] = 0
    return painted


def write_all(
    evaluation: Evaluation, report: Report, folder: Path, count: int = 0, defenses: Sequence[str] = ()
) -> list[Path]:
    """Every figure there is for a report, into a folder; panels of ``count`` images of each of some defenses."""
    found = save(bars(report), folder / "comparison")
    over = curves(report, evaluation.eps) if evaluation.eps is not None else None
    if over is not None:
        found += save(over, folder / "radius")
    for defense in defenses if count else ():
        found += save(panels(evaluation, report, defense, count), folder / f"worst-{_file_name(defense)}")
    return found


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)


def overlay(image: Tensor, heat: Tensor, most: float | None = None) -> Tensor:
    """An image in gray with a map of the same size over it, from violet to yellow.

    Args:
        image: (3, H, W) in [0, 1].
        heat: (H, W), at least 0.
        most: what is yellow; the largest value where None.

    Returns:
        (3, H, W) float32 in [0, 1], on the CPU.
    """
    top = float(heat.max()) if most is None else most
    share = (heat.float().cpu() / max(top, 1e-12)).clamp(0, 1)
    painted = torch.from_numpy(colormaps["inferno"](share.numpy())[:, :, :3]).permute(2, 0, 1).float()
    gray = image.float().cpu().mean(0).expand(3, -1, -1)
    return ((1 - share) * gray + share * (0.3 * gray + 0.7 * painted)).clamp(0, 1)


def characteristics(report: DetectionReport) -> Figure:
    """For each detector the curves of true over false positives, one for each kind that is no mean's member."""
    from sklearn.metrics import roc_curve

    names = list(report.scores)
    figure = _figure(3.2 * min(3, len(names)), 3.4 * -(-len(names) // 3))
    axes = list(figure.subplots(-(-len(names) // 3), min(3, len(names)), squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        for kind in report.groups:
            clean, found = report.scores[name][CLEAN], report.scores[name][kind]
            truth = np.arange(len(clean) + len(found)) >= len(clean)
            ranks = np.unique(np.concatenate([clean, found]), return_inverse=True, equal_nan=True)[1]
            false, true, _ = roc_curve(truth, ranks)
            axis.plot(100 * false, 100 * true, label=f"{kind} ({report.separations[name][kind].auroc.value:.0f})")
        axis.axvline(100 * report.rates[name], color="gray", linewidth=0.5)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("clean images flagged, %", fontsize=8)
        axis.set_ylabel("others flagged, %", fontsize=8)
        axis.legend(fontsize=6, title="area, %", title_fontsize=6)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    return figure


def histograms(report: DetectionReport) -> Figure:
    """Scores of clean images and of each kind, for each detector, with its threshold."""
    names = list(report.scores)
    figure = _figure(9, 2.2 * len(names))
    for axis, name in zip(figure.subplots(len(names), 1, squeeze=False).flat, names, strict=True):
        columns = {kind: np.nan_to_num(scores, nan=np.inf) for kind, scores in report.scores[name].items()}
        together = np.concatenate(list(columns.values()))
        finite = together[np.isfinite(together)] if np.isfinite(together).any() else np.zeros(1)
        bins = np.linspace(float(finite.min()), max(float(np.quantile(finite, 0.98)), float(finite.min()) + 1e-9), 40)
        for kind, scores in columns.items():
            filled = kind == CLEAN
            axis.hist(
                np.clip(scores, bins[0], bins[-1]),
                bins,
                label=kind,
                histtype="stepfilled" if filled else "step",
                alpha=0.4 if filled else 1.0,
                density=True,
            )
        axis.axvline(report.thresholds[name], color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"{name}: scores; dashed, the threshold", fontsize=9)
        axis.legend(fontsize=6, ncols=2)
    return figure


def corruption_map(report: DetectionReport, detector: str) -> Figure:
    """The area under the characteristic of each corruption at each severity."""
    kinds = [kind.rsplit(" ", 1) for kind in report.groups]
    rows, columns = list(dict.fromkeys(k[0] for k in kinds)), sorted({k[1] for k in kinds})
    found = np.full((len(rows), len(columns)), np.nan)
    for name, severity in kinds:
        area = report.separations[detector][f"{name} {severity}"].auroc.value
        found[rows.index(name), columns.index(severity)] = area
    figure = _figure(5, 0.3 * len(rows) + 1.2)
    axis = figure.subplots()
    axis.imshow(found, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for (i, j), value in np.ndenumerate(found):
        axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_xlabel("severity")
    axis.set_title(f"{detector}: area under the characteristic, %, {report.images} images", fontsize=9)
    return figure


def evasion(report: DetectionReport) -> Figure | None:
    """What attackers who evade detectors leave of the model, over the rate of false positives of their threshold."""
    kinds = [kind for kind, group in report.groups.items() if group == "evading"]
    if not kinds:
        return None
    rates = [float(kind.rsplit(" ", 1)[1].rstrip("%")) for kind in kinds]
    figure = _figure(6, 4.5)
    axis = figure.subplots()
    for name in report.scores:
        _points(axis, rates, [report.damage(name, kind) for kind in kinds], name, marker="o")
    first = next(iter(report.scores))
    alike = [CLEAN, *(kind for kind, group in report.groups.items() if group is None)]  # for all detectors
    for number, kind in enumerate(alike):
        style = ("-", "--", ":")[number % 3]
        axis.axhline(report.damage(first, kind).value, color="gray", linewidth=0.8, linestyle=style, label=kind)
    axis.set_xlabel("clean images that the threshold flags, in %")
    axis.set_ylabel(f"what is left of the model, {report.figure}")
    axis.set_ylim(bottom=0)
    axis.set_title(f"attackers who evade; {report.images} images, ± standard error by bootstrap", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure
