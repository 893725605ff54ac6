"""Whether backends, folding and the place where features end change a table: CamVid's val split under PGD.

    python bench/equivalence.py --output bench/results/equivalence.json

Sign steps amplify rounding, so purified pixels differ between kinds of arithmetic; the figures must not. Each row is
paired with `native`, the setting that a user gets, on the same adversarial images. The network is that of
`bench/camvid.py`, which trains it where it is absent.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _data import DATA
from _study import Data, Images, Output, Steps, machine, versions, write
from camvid import attacked, judge
from rich.console import Console
from rich.progress import track
from rich.table import Table

import equifast
from equifast import ops
from equifast.evaluate import difference, mean_iou

ROWS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "native": ("native", {}),
    "reference": ("reference", {}),
    "not folded": ("native", {"fold": False}),
    "features before the logits are enlarged": ("native", {"features": "head"}),
}


def main(
    data: Data = DATA,
    images: Images = 32,
    paper_images: Annotated[int, typer.Option(help="Images on which `paper` is compared.")] = 12,
    steps: Steps = 30,
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
            found.setdefault(preset, {})[row] = {
                "value": figure.value,
                "error": figure.standard_error,
                "difference": apart.value,
                "difference_error": apart.standard_error,
                "images": count,
            }
    Console().print(table)
    if output is not None:
        write({"results": found, "steps": steps, "versions": versions(), "machine": machine()}, output)


if __name__ == "__main__":
    typer.run(main)
