"""``equifast demo``."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from equifast.cli._common import Output, app, fail, progress_bar, stdout
from equifast.demo import report

__all__ = ["demo"]


@app.command()
def demo(
    output: Output = Path("equifast-demo"),
    scenes: Annotated[int, typer.Option(min=1, max=16, help="How many of the bundled scenes to use.")] = 4,
) -> None:
    """Attack and purify the bundled scenes with the bundled model: a table, and a panel per scene."""
    begun = time.perf_counter()
    try:
        with progress_bar() as progress:
            task = progress.add_task("starting", total=1)
            rows, similarity = report.run(
                output,
                scenes,
                lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
            )
    except OSError as error:
        raise fail(f"cannot write to {str(output)!r}: {error.strerror or error}") from error
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
    stdout.print(table)
    stdout.print(
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
