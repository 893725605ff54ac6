"""Symmetry in the first layer against attacks on CIFAR-10 (Wang et al. 2025), by a fair protocol and as released.

python bench/hybrids.py -o hybrids

Five networks, the same but for the first of their ten convolutions, trained alike; FGSM and PGD on the exact ball,
common corruptions, CLEVER. With `--as-released` (the default) four things stand beside it that the released code does
otherwise: attacked images, normalized to [-1,1], are cut to [0,1], which grays all that is dark; networks are tested
in training mode, so that batch norm sees the attacked batch; the parallel network is trained on FGSM examples too; and
what follows the first convolution has widths, depth and places of pooling of its own in each network.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import typer
from _data import DATA
from _symmetry import Kept, Kind, Output, Seeds, Split, bars, open_split, table
from _write import write_json
from torch import Tensor, nn
from torch.nn import functional

from equifast import attacks, keep_freed_memory
from equifast.certify import clever
from equifast.evaluate import CORRUPTIONS, corrupt, plots
from equifast.nn import Hybrid
from equifast.train import Recipe, crop_and_flip

NETWORKS = ("baseline", "parallel", "rotation-and-scale", "weighted", "cascaded")
ON_FGSM, OWN = "parallel, on FGSM", ", its own rest"
FAIR = ("clean", "FGSM", "PGD", "corrupted")
AS_RELEASED = ("FGSM, cut", "PGD, cut", "clean, training mode", "PGD, training mode")
SEVERITY = 3
STEPS = {"PGD": 20, "CWL2": 100}
CLEVER = {"blocks": 50, "samples": 32}


def recipes(eps: float, as_released: bool) -> dict[str, Recipe]:
    plain, fgsm = Recipe(augment=crop_and_flip), functools.partial(attacks.FGSM, eps=eps)
    found = dict.fromkeys(NETWORKS, plain)
    if as_released:
        found[ON_FGSM] = Recipe(augment=crop_and_flip, adversary=fgsm, on="both")
        found |= {name + OWN: plain for name in NETWORKS if name != "baseline"}
    return found


def right(model: nn.Module, x: Tensor, y: Tensor, training: bool = False) -> Tensor:
    """Whether each image is; in training mode by the statistics of batches of 256, which are not kept."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        with torch.no_grad():
            model.train(training)
            return torch.cat([model(part).argmax(1) for part in x.split(256)]) == y
    finally:
        model.eval()
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def cut(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """Signed steps on images in [-1,1], each cut to [0,1], as released; `eps` in units of [0,1]; given back in [0,1].

    The first cut moves every dark pixel to mid-gray, whatever `eps` is.
    """
    origin = 2 * x - 1
    found = origin.clone()
    for _ in range(steps):
        found.requires_grad_()
        loss = functional.cross_entropy(model((found + 1) / 2), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, found)
        length = 2 * eps if steps == 1 else eps / 2
        moved = found.detach() + length * gradient.sign()
        found = (origin + (moved - origin).clamp(-2 * eps, 2 * eps)).clamp(0, 1)
    return (found.detach() + 1) / 2


def in_parts(function: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([function(*part) for part in zip(x.split(256), y.split(256), strict=True)])


def measure(
    model: nn.Module, split: Split, corrupted: dict[str, Tensor], eps: float, scores: int, as_released: bool
) -> dict[str, Any]:
    x, y = split.x, split.y
    pgd = attacks.PGD(model, eps=eps, step_size=eps / 4, steps=STEPS["PGD"])
    found = {"clean": right(model, x, y)}
    strong = in_parts(pgd, x, y)
    found["FGSM"] = right(model, in_parts(attacks.FGSM(model, eps=eps), x, y), y)
    found["PGD"] = right(model, strong, y)
    each = [right(model, images, y[: len(images)]).float() for images in corrupted.values()]
    result: dict[str, Any] = {name: value.tolist() for name, value in found.items()}
    result["corrupted"] = torch.stack(each).mean(0).tolist()
    if as_released:
        result["FGSM, cut"] = right(model, in_parts(lambda a, b: cut(model, a, b, eps, 1), x, y), y).tolist()
        result["PGD, cut"] = right(model, in_parts(lambda a, b: cut(model, a, b, eps, STEPS["PGD"]), x, y), y).tolist()
        result["clean, training mode"] = right(model, x, y, training=True).tolist()
        result["PGD, training mode"] = right(model, strong, y, training=True).tolist()
    asked, labels = x[:scores], y[:scores]
    near = attacks.CWL2(model, steps=STEPS["CWL2"])(asked, labels)
    distances = (near - asked).flatten(1).norm(dim=1)
    distances[right(model, near, labels)] = torch.inf
    score = clever(model, asked, labels, **CLEVER, distances=distances, dtype="auto")
    result["CLEVER"] = score.scores.tolist()
    result["CLEVER, warnings"] = score.warnings
    result["nearest"] = distances.nan_to_num(posinf=-1.0).tolist()
    return result


def main(
    output: Output,
    kind: Kind = "cifar10",
    data: Path = DATA,
    seeds: Seeds = 3,
    epochs: int = 20,
    batch: int = 64,
    rate: float = 0.1,
    width: float = 0.5,
    train_images: int = 5000,
    images: int = 1000,
    corrupted_images: int = 200,
    scores: int = 10,
    eps: float = 2 / 255,
    as_released: bool = True,
) -> None:
    """Train, attack, and write table.json and table.png."""
    keep_freed_memory()
    settings = {k: v for k, v in locals().items() if k not in ("output", "data")}
    split = open_split(kind, data, train_images, images)
    if split.channels != 3 or split.x.shape[-1] < 32:
        raise typer.BadParameter(
            f"kind {kind} has images {tuple(split.x.shape[1:])}; corruptions take 3 channels of 32x32"
        )
    kept = Kept(output, {**settings, "severity": SEVERITY, "steps": STEPS, "CLEVER": CLEVER})
    corrupted = {name: corrupt(split.x[:corrupted_images], name, SEVERITY) for name in CORRUPTIONS}
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for name, recipe in recipes(eps, as_released).items():
            build = functools.partial(
                Hybrid, name.split(",")[0], classes=split.classes, width=width, released=name.endswith(OWN)
            )
            model = kept.trained(name, build, split.train, recipe, seed, epochs=epochs, batch=batch, rate=rate)
            compute = functools.partial(measure, model, split, corrupted, eps, scores, as_released)
            results.setdefault(name, []).append(kept.measured(name, seed, compute))
    pairs = [(name, "baseline") for name in results if name != "baseline"]
    pairs += [(name, name.removesuffix(OWN)) for name in results if name.endswith(OWN)]
    columns = FAIR + (AS_RELEASED if as_released else ())
    title = (
        f"{kind}: {len(split.y)} test images ({corrupted_images} corrupted), {seeds} trainings, eps {255 * eps:g}/255"
    )
    written = table(title, results, columns, pairs)
    written["CLEVER, l2"] = {}
    for name, rows in results.items():
        # an image that is wrong already has the score 0, which says nothing of those that are right
        every = torch.tensor([row["CLEVER"] for row in rows]).double().flatten()
        nearest = torch.tensor([row["nearest"] for row in rows]).double().flatten()
        right_ones = torch.tensor([row["clean"][:scores] for row in rows]).flatten()
        every, nearest = every[right_ones], nearest[right_ones]
        known = nearest >= 0
        written["CLEVER, l2"][name] = {
            "images that are right": len(every),
            "mean": float(every.mean()) if len(every) else None,
            "standard error": float(every.std() / len(every) ** 0.5) if len(every) > 1 else None,
            "nearest adversarial image, mean": float(nearest[known].mean()) if known.any() else None,
            "violations": int((known & (every > nearest)).sum()),
            "warnings": rows[0]["CLEVER, warnings"],
        }
        print(name, {k: v for k, v in written["CLEVER, l2"][name].items() if k != "warnings"})
    write_json(output / "table.json", {"settings": settings, **written})
    plots.save(bars(written["table"], columns, title), output / "table")


if __name__ == "__main__":
    typer.run(main)
