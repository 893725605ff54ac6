"""Whether backends, folding, the place where features end and the dtype of attacks change a table: CamVid's val split.

    python bench/equivalence.py --output bench/results/equivalence.json

Sign steps amplify rounding, so purified pixels differ between kinds of arithmetic; the figures must not. Each row is
paired with `native`, the setting that a user gets, on the same adversarial images. Then attacks on what they know,
their gradients in float32 and from the folded copy in bfloat16 (`dtype="auto"`), and what they cost in purifications
by `fast`. The network is that of `bench/camvid.py`, which trains it where it is absent.
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _data import DATA, load_camvid
from _study import ATTACK_SEED, BpdaSteps, Data, Images, Output, Steps
from _write import write_json
from camvid import attacked, judge
from rich.console import Console
from rich.progress import track
from rich.table import Table

import equifast
from equifast import ops
from equifast.attacks import BPDA, PGD
from equifast.defenses import Averaging
from equifast.evaluate import Estimate, difference, mean_iou
from equifast.purifier import DefendedModel

PURIFICATIONS = range(1, 5)  # draws that are timed: their views have other sizes
ROWS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "native": ("native", {}),
    "reference": ("reference", {}),
    "not folded": ("native", {"fold": False}),
    "features before the logits are enlarged": ("native", {"features": "head"}),
}


def _entry(figure: Estimate, apart: Estimate, images: int) -> dict[str, float]:
    return {
        "value": figure.value,
        "error": figure.standard_error,
        "difference": apart.value,
        "difference_error": apart.standard_error,
        "images": images,
    }


def attacks_by_dtype(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, bpda_steps: int
) -> dict[str, dict[str, float]]:
    """Attacks on three defenses, gradients in float32 and cheaper, in turns on every batch of four."""
    settings: dict[str, Any] = {"eps": 4 / 255, "step_size": 1 / 255, "seed": ATTACK_SEED}
    fast = equifast.Purifier(model, eps=6 / 255)
    victims: dict[str, DefendedModel | None] = {
        "none": None,
        "averaging": Averaging(model),
        "fast": equifast.Defended(model, fast),
    }
    found = {}
    table = Table(title="robust mIoU in %, ± standard error; the cheaper attack minus that in float32; seconds")
    for heading in ("attack on", "float32", "auto", "auto minus float32", "float32 / auto", "auto / a purification"):
        table.add_column(heading)
    for name, victim in victims.items():
        results: dict[str, list[Any]] = {"float32": [], "auto": []}
        seconds = {"float32": 0.0, "auto": 0.0, "purification": 0.0}
        attacks: dict[str, Any] = {}
        for dtype in results:
            attacks[dtype] = PGD(model, steps=bpda_steps if victim else steps, dtype=dtype, **settings)
            attacks[dtype] = attacks[dtype] if victim is None else BPDA(attacks[dtype], victim)
        for ids in track(torch.arange(len(x)).split(4), f"attacks on {name}"):
            for dtype, attack in attacks.items():
                start = time.perf_counter()
                adversarial = attack(x[ids], y[ids], ids)
                seconds[dtype] += time.perf_counter() - start
                with torch.no_grad():
                    logits = model(adversarial) if victim is None else victim(adversarial, ids=ids, draw=0)
                results[dtype].append(judge(logits, y[ids]))
            for draw in PURIFICATIONS:
                start = time.perf_counter()
                fast(x[ids], ids=ids, draw=draw)
                seconds["purification"] += (time.perf_counter() - start) / len(PURIFICATIONS)
        exact, cheap = (np.concatenate(results[dtype]) for dtype in ("float32", "auto"))
        figures = mean_iou(exact), mean_iou(cheap), difference(cheap, exact)
        ratios = seconds["float32"] / seconds["auto"], seconds["auto"] / seconds["purification"]
        cells = (f"{e.value:.2f} ± {e.standard_error:.2f}" for e in figures)
        table.add_row(name, *cells, f"{ratios[0]:.2f}", f"{ratios[1]:.1f}")
        found[name] = _entry(figures[1], figures[2], len(y)) | {
            "float32": figures[0].value,
            "speed": ratios[0],
            "purifications": ratios[1],
            "steps": bpda_steps if victim else steps,
        }
    Console().print(table)
    return found


def main(
    data: Data = DATA,
    images: Images = 32,
    paper_images: Annotated[int, typer.Option(help="Images on which `paper` is compared.")] = 12,
    steps: Steps = 30,
    bpda_steps: BpdaSteps = 20,
    output: Output = None,
) -> None:
    """Print the table and write it."""
    model, adversarial, y = attacked(data, images, steps)
    table = Table(title="robust mIoU in %, ± standard error, and the difference from native, paired over images")
    for heading in ("preset", "", "images", "robust mIoU", "minus native"):
        table.add_column(heading)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for preset, count in (("fast", len(y)), ("paper", min(paper_images, len(y)))):
        results = {}
        for row, (backend, settings) in ROWS.items():
            defended = equifast.Defended(model, equifast.Purifier(model, preset=preset, eps=6 / 255, **settings))
            chosen = track(torch.arange(count).split(4), f"{preset}, {row}")
            with torch.no_grad(), ops.use(backend):
                parts = [judge(defended(adversarial[ids], ids=ids, draw=0), y[ids]) for ids in chosen]
            results[row] = np.concatenate(parts)
            figure, apart = mean_iou(results[row]), difference(results[row], results["native"])
            cells = (f"{e.value:.2f} ± {e.standard_error:.2f}" for e in (figure, apart))
            table.add_row(preset, row, str(count), *cells)
            found.setdefault(preset, {})[row] = _entry(figure, apart, count)
    Console().print(table)
    equifast.keep_freed_memory()
    by_dtype = attacks_by_dtype(model, *load_camvid(data, "val", images), steps, bpda_steps)
    if output is not None:
        document = {"results": found, "attacks": by_dtype, "steps": steps}
        write_json(output, document)


if __name__ == "__main__":
    typer.run(main)
