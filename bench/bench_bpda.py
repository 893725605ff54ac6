"""What an attacker who knows pays: BPDA of 20 steps in units of one purification, and of one defended prediction.

    python bench/bench_bpda.py --output bench/results/bpda.json

A step of BPDA purifies, and takes the gradient of the prediction on the result: it cannot cost less than a
purification. Beside it a step of an attack that goes through the last two steps of the ascent, by the native
operators and by the reference. Timed in turns, in one process.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from _data import DATA
from _study import ATTACK_SEED, DEFENSE_SEED, Data, Output
from _write import write_json
from front import study_of
from rich.console import Console
from rich.table import Table

import equifast
from equifast import ops
from equifast.attacks import BPDA, PGD


def by_reference(task: Callable[[], object]) -> None:
    """Run something with the operators in plain PyTorch."""
    with ops.use("reference"):
        task()


def main(
    data: Data = DATA,
    steps: Annotated[int, typer.Option(help="Steps of BPDA.")] = 20,
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 3,
    output: Output = None,
) -> None:
    """A table for CamVid and CIFAR-10."""
    equifast.keep_freed_memory()
    table = Table(title=f"BPDA, {steps} steps, against fast; medians of {rounds}")
    headings = (
        *("", "ms/image: purification", "prediction", "BPDA", "BPDA / purification", "BPDA / prediction"),
        *("a step, unrolled", "by the reference"),
    )
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    found: dict[str, Any] = {}
    for data_set in ("camvid", "cifar"):
        study = study_of(data_set, data, "standard", "val", None)
        x, y, ids = study.images[: study.batch], study.labels[: study.batch], torch.arange(study.batch)
        purifier = equifast.Purifier(study.model, study.features, eps=study.eps_purify, seed=DEFENSE_SEED)
        defended = equifast.Defended(study.model, purifier)
        attack = PGD(study.model, eps=study.eps, step_size=study.step_size, steps=steps, seed=ATTACK_SEED, dtype="auto")
        knowing = BPDA(attack, purifier)
        through = equifast.Defended(study.model, purifier, gradient="unrolled", last=2)
        one = PGD(study.model, eps=study.eps, step_size=study.step_size, steps=1, seed=ATTACK_SEED)
        following = BPDA(one, through, draw=0)

        runs = (
            ("purification", partial(purifier, x, ids)),
            ("prediction", partial(defended, x, ids)),
            ("BPDA", partial(knowing, x, y, ids)),
            ("unrolled", partial(following, x, y, ids)),
            ("unrolled, reference", partial(by_reference, partial(following, x, y, ids))),
        )
        times: dict[str, list[float]] = {name: [] for name, _ in runs}
        with torch.no_grad():
            for number in range(rounds + 1):
                for name, run in runs:
                    start = time.perf_counter()
                    run()
                    if number:  # the first warms up
                        times[name].append(time.perf_counter() - start)
        entry = {name: statistics.median(each) / len(x) for name, each in times.items()}
        ratios = [entry["BPDA"] / entry[name] for name in ("purification", "prediction")]
        found[data_set] = {**entry, "over purification": ratios[0], "over prediction": ratios[1], "steps": steps}
        milliseconds = [f"{1e3 * entry[name]:.1f}" for name in times]
        table.add_row(data_set, *milliseconds[:3], *(f"{ratio:.1f}" for ratio in ratios), *milliseconds[3:])
    Console().print(table)
    if output is not None:
        write_json(output, found)


if __name__ == "__main__":
    typer.run(main)
