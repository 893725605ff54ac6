"""What ``equifast demo`` does: attack the bundled model on the bundled scenes, defend it, and tell the worth of it."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from equifast._files import replacing
from equifast.attacks import BPDA, PGD
from equifast.defenses import Averaging, RandomNoise
from equifast.demo import CLASSES, PALETTE, load_model, load_scenes
from equifast.evaluate import Estimate, confusion, mean_iou
from equifast.objectives import disagreement
from equifast.purifier import Purifier
from equifast.views import sample

__all__ = ["ADAPTIVE_STEPS", "ATTACK_EPS", "PURIFY_EPS", "STEPS", "Row", "run"]

# Chosen after looking at the bundled scenes, so that the demo shows something: it illustrates, bench/ measures.
ATTACK_EPS = 8 / 255
PURIFY_EPS = 10 / 255
STEPS = 20
ADAPTIVE_STEPS = 8

Report = Callable[[str, int, int], object]
"""Called as ``report(what, done, total)``."""


@dataclass(frozen=True)
class Row:
    """One defense: mIoU in percent on clean scenes, under PGD, under an attacker who knows it; and what it costs."""

    defense: str
    clean: Estimate
    pgd: Estimate
    adaptive: Estimate
    similarity: float  # of the PGD images after the defense, mean over scenes
    seconds: float  # per image, median of three times the same work
    unsteady: bool  # whether these times lie far apart, as on a busy machine


def _predict(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def _score(prediction: Tensor, y: Tensor) -> Estimate:
    return mean_iou(confusion(prediction, y, len(CLASSES)))


def run(
    folder: Path, scenes: int = 4, report: Report = lambda what, done, total: None
) -> tuple[list[Row], dict[str, float]]:
    """Attack, defend, measure; write ``results.json`` and one panel per scene into ``folder``.

    Args:
        folder: made where it does not exist.
        scenes: how many of the 16 bundled scenes are used.
        report: told of progress.

    Returns:
        The rows of the table, and the mean similarity of the clean and of the attacked scenes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model()
    x, y = (tensor[:scenes] for tensor in load_scenes())
    # The head's logits, before they are enlarged to the image: the same content on a sixteenth of the positions.
    where = "head"
    paper = Purifier(model, where, preset="paper", eps=PURIFY_EPS)
    fast = Purifier(model, where, preset="fast", eps=PURIFY_EPS)
    # All but the last steps of Algorithm 1 draw random corners and the last one climbs (docs/corner.md), so an attacker
    # takes that step for it: the same points are then tested on Algorithm 1 itself.
    stand_in = Purifier(model, where, preset="paper", eps=PURIFY_EPS, steps=1, start="corner", noise=False)
    noise = RandomNoise(PURIFY_EPS)

    pgd = PGD(model, eps=ATTACK_EPS, step_size=1 / 255, steps=STEPS)  # docs/panel.png is of these
    adversarial = pgd(x, y, progress=lambda done, total: report("PGD", done, total))

    def knowing(defense: Any, name: str) -> Tensor:
        attack = PGD(model, eps=ATTACK_EPS, step_size=2 / 255, steps=ADAPTIVE_STEPS)
        return BPDA(attack, defense)(x, y, progress=lambda done, total: report(f"BPDA on {name}", done, total))

    def nothing(images: Tensor) -> Tensor:
        return images

    averaging = Averaging(model)
    defenses: list[tuple[str, Callable[[Tensor], Tensor], nn.Module, Callable[[], Tensor]]] = [
        ("none", nothing, model, lambda: adversarial),
        ("random noise", noise, model, lambda: knowing(noise, "random noise")),
        ("averaging", nothing, averaging, lambda: knowing(averaging, "averaging")),
        ("paper", paper, model, lambda: knowing(stand_in, "paper")),
        # which averages its predictions, as Defended does
        ("fast", fast, Averaging(model, fast.average), lambda: knowing(fast, "fast")),
    ]
    rows = []
    restored = adversarial
    for name, purify, network, attack in defenses:
        figures, times = [], []
        for number, images in enumerate((x, attack(), adversarial)):
            report(f"measuring {name}", number, 3)
            begun = time.perf_counter()
            restored = purify(images)
            prediction = _predict(network, restored)
            times.append((time.perf_counter() - begun) / len(x))
            figures.append(_score(prediction, y))
        report(f"measuring {name}", 3, 3)
        clean, adaptive, attacked = figures
        similarity, seconds = float(paper.score(restored).mean()), statistics.median(times)
        rows.append(Row(name, clean, attacked, adaptive, similarity, seconds, seconds > 1.5 * min(times)))
    similarities = {"clean": float(paper.score(x).mean()), "attacked": float(paper.score(adversarial).mean())}
    _write_results(folder / "results.json", scenes, rows, similarities)
    for i in range(len(x)):
        report("writing panels", i, len(x))  # of the last row, fast
        _panel(folder / f"scene_{i:02}.png", model, x[i : i + 1], adversarial[i : i + 1], restored[i : i + 1])
    report("writing panels", len(x), len(x))
    return rows, similarities


def _write_results(path: Path, scenes: int, rows: list[Row], similarities: dict[str, float]) -> None:
    results = {
        "attack_eps": ATTACK_EPS,
        "purify_eps": PURIFY_EPS,
        "scenes": scenes,
        "steps": {"PGD": STEPS, "BPDA": ADAPTIVE_STEPS},
        "similarity": similarities,
        "rows": [asdict(row) for row in rows],
    }
    # JSON has no NaN, which is the error of one scene
    results = json.loads(json.dumps(results), parse_constant=lambda _: None)
    with replacing(path) as beside:
        beside.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def _rgb(x: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = x[0].permute(1, 2, 0).clamp(0, 1).numpy()
    return array


def _panel(path: Path, model: nn.Module, clean: Tensor, attacked: Tensor, purified: Tensor) -> None:
    from matplotlib.figure import Figure  # here, since it takes its time

    palette = np.asarray(PALETTE, dtype=np.uint8)
    sampled = sample(
        Purifier(model).views, (clean.shape[2], clean.shape[3]), seed=0, ids=torch.zeros(1, dtype=torch.int64)
    )
    with torch.no_grad():
        predictions = [palette[model(image)[0].argmax(0).numpy()] for image in (clean, attacked, purified)]
        maps = [disagreement(model, image, sampled)[0].numpy() for image in (clean, attacked, purified)]
    magnified = 0.5 + (attacked - clean) / (2 * ATTACK_EPS)
    restored = 0.5 + (purified - attacked) / (2 * PURIFY_EPS)
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots(4, 3)
    titles = ("clean", "attacked (PGD)", "purified (fast)")
    for column, (title, image) in enumerate(zip(titles, (clean, attacked, purified), strict=True)):
        axes[0, column].imshow(_rgb(image))
        axes[0, column].set_title(title)
        axes[1, column].imshow(predictions[column])
        axes[1, column].set_title("prediction", fontsize=9)
        axes[2, column].imshow(maps[column], cmap="magma", vmin=0, vmax=1)
        axes[2, column].set_title("disagreement of the views", fontsize=9)
    axes[3, 1].imshow(_rgb(magnified))
    axes[3, 1].set_title(f"perturbation, magnified {1 / (2 * ATTACK_EPS):.0f} times", fontsize=9)
    axes[3, 2].imshow(_rgb(restored))
    axes[3, 2].set_title(f"purification, magnified {1 / (2 * PURIFY_EPS):.0f} times", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=64)
