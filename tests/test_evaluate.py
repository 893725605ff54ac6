"""Evaluations: what is recorded, what survives, and what the worst case is."""

import dataclasses
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from typer.testing import CliRunner

from equifast import Defended, Purifier, attacks, defenses, views
from equifast._fingerprint import describe
from equifast.attacks import BPDA
from equifast.cli import app
from equifast.cli import evaluate as command_evaluate
from equifast.evaluate import (
    Attacker,
    Estimate,
    Evaluation,
    Strength,
    accuracy,
    adaptive,
    known,
    mean_iou,
    open_data,
    over_draws,
    plots,
    worst_accuracy,
    worst_iou,
)
from equifast.evaluate.metrics import _totals, average
from equifast.evaluate.records import Part, Records
from equifast.evaluate.studies import nothing
from equifast.purifier import DefendedModel

MODEL = cases.dense().eval()
EPS = 4 / 255


def scenes(n: int = 6, model: nn.Module = MODEL, size: tuple[int, int] = (20, 28)) -> TensorDataset:
    """Images and labels that the model mostly has right, with rows that do not count where dense."""
    x = cases.images(n, *size)
    with torch.no_grad():
        y = model(x).argmax(1)
    if y.dim() == 3:
        y[:, :2] = 255
        y[:, 8:] = (y[:, 8:] + 1) % 5
    return TensorDataset(x, y)


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are measured once, which takes a third of the time."""
    monkeypatch.setattr(command_evaluate, "_ROUNDS", 1)


PGD = Attacker("PGD", lambda model, defended: attacks.PGD(model, steps=2), knows=False)
KNOWING = Attacker("BPDA", lambda model, defended: BPDA(attacks.PGD(model, steps=1), defended))


def evaluation(data: Dataset[Any] | None = None, **changed: Any) -> Evaluation:
    rows = {
        "none": Defended(MODEL, defenses.RandomNoise(1e-9)),
        "fast": Defended(MODEL, Purifier(MODEL, steps=1)),
        "averaging": defenses.Averaging(MODEL),
    }
    settings: dict[str, Any] = {"eps": EPS, "batch": 2, "attackers": [PGD, KNOWING], "defenses": rows, **changed}
    return Evaluation(MODEL, scenes() if data is None else data, **settings)


def records(folder: Path) -> dict[tuple[str, str, str], Any]:
    lines = [json.loads(text) for text in (folder / "records.jsonl").read_text().splitlines()]
    found = {(line["image"], line["defense"], line["attack"]): line["result"] for line in lines}
    assert len(found) == len(lines), "a record is there twice"
    return found


def test_figures_are_those_of_the_attacks_by_hand(tmp_path: Path) -> None:
    data, made = scenes(), evaluation()
    report = made.run(tmp_path)
    table = report.table()
    assert set(table) == {"none", "fast", "averaging"}
    assert set(table["fast"]) == {"clean", "PGD", "BPDA", "worst"}
    lines = str(report).splitlines()
    assert lines[0] == report.title
    assert lines[2] == "|  | none | fast | averaging |"
    of_pgd = " | ".join(str(table[defense]["PGD"]) for defense in ("none", "fast", "averaging"))
    assert f"| PGD | {of_pgd} |" in lines
    order = [image.index for image in made.images]
    x, y = data.tensors[0][order], data.tensors[1][order]
    ids = torch.tensor([image.id for image in made.images])
    defended = made.defenses["fast"]
    knowing = KNOWING.make(MODEL, defended)
    assert knowing is not None
    from equifast.evaluate import confusion

    for name, attacked in (
        ("clean", x),
        ("PGD", attacks.PGD(MODEL, steps=2)(x, y, ids)),
        ("BPDA", knowing(x, y, ids)),
    ):
        with torch.no_grad():
            matrices = confusion(defended(attacked, ids=ids).argmax(1), y, 5)
        assert np.array_equal(report.results["fast"][name], matrices)
        assert table["fast"][name] == mean_iou(matrices)
    worst = report.worst("fast")
    assert mean_iou(worst).value <= min(table["fast"][name].value for name in ("PGD", "BPDA"))
    assert report.difference("fast", "fast").value == 0
    apart = report.differences("none")
    assert set(apart) == {"fast", "averaging"}
    assert apart["fast"]["PGD"].value == pytest.approx(table["fast"]["PGD"].value - table["none"]["PGD"].value)
    assert apart["fast"]["worst"] == report.difference("fast", "none")
    document = json.loads(json.dumps(report.document()))
    assert document["rows"]["none"]["PGD"]["value"] == table["none"]["PGD"].value


@pytest.mark.parametrize("model", [MODEL, cases.classifier().eval()])
def test_order_and_batches_leave_the_records_as_they_are(tmp_path: Path, model: nn.Module) -> None:
    def made(order: list[int], batch: int) -> Evaluation:
        rows = {
            "fast": Defended(model, Purifier(model, None if model is MODEL else "features", steps=1)),
            "averaging": defenses.Averaging(model),
        }
        score = Purifier(model, None if model is MODEL else "features")
        settings: dict[str, Any] = {"eps": EPS, "votes": 3, "score": score, "batch": batch}
        return Evaluation(model, Subset(scenes(model=model), order), [PGD, KNOWING], rows, **settings)

    def everything(folder: Path) -> dict[tuple[str, str, str], Any]:
        lines = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
        passing = ("seconds", "attack_seconds", "index")
        return {
            (line["image"], line["defense"], line["attack"]): {k: v for k, v in line.items() if k not in passing}
            for line in lines
        }

    report = made(list(range(6)), 2).run(tmp_path / "a")
    shuffled = made([3, 1, 5, 0, 2, 4], 3).run(tmp_path / "b")
    single = made([5, 4, 3, 2, 1, 0], 1).run(tmp_path / "c")
    assert everything(tmp_path / "a") == everything(tmp_path / "b") == everything(tmp_path / "c")
    assert report.table() == shuffled.table() == single.table()


def test_another_order_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    report = evaluation().run(tmp_path / "a")
    again = evaluation(Subset(scenes(), [5, 4, 3, 2, 1, 0]), batch=5).run(tmp_path / "a")
    assert again.table() == report.table()


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    told: list[tuple[str, float, float]] = []
    evaluation(attackers=[PGD]).run(tmp_path)
    before = (tmp_path / "records.jsonl").read_bytes()
    evaluation(attackers=[PGD, KNOWING]).run(tmp_path, progress=lambda *at: told.append(at))
    assert (tmp_path / "records.jsonl").read_bytes().startswith(before)
    assert {what for what, _, _ in told} == {f"{name} / BPDA" for name in ("none", "fast", "averaging")}
    assert all(done <= total + 1e-9 for _, done, total in told)
    assert told[-1][1] == pytest.approx(told[-1][2])
    told.clear()
    evaluation(attackers=[KNOWING]).run(tmp_path, progress=lambda *at: told.append(at))  # fewer, of those
    assert not told


def test_half_a_line_is_written_again(tmp_path: Path) -> None:
    report = evaluation().run(tmp_path)
    kept, path = records(tmp_path), tmp_path / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert evaluation().run(tmp_path).table() == report.table()
    assert records(tmp_path) == kept


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"data": scenes(5)}, r"data \(6 images, now 5\)"),
        ({"data": TensorDataset(*(part.flip(3 - k) for k, part in enumerate(scenes().tensors)))}, "now as many others"),
        ({"eps": 5 / 255}, r"eps \(0.0156\d*, now 0.0196\d*\)"),
        ({"norm": "l2"}, "norm"),
        ({"arguments": {"size": 3}}, "size"),
        ({"attackers": [Attacker("PGD", lambda model, defended: attacks.PGD(model, steps=3), False)]}, "attacker"),
        (
            {"attackers": [Attacker("PGD", lambda model, defended: attacks.PGD(model, steps=3), knows=False)]},
            r"attacker none / PGD \(ascent.steps: 2, now 3\)",
        ),
        (
            {"defenses": {"fast": Defended(MODEL, Purifier(MODEL, steps=2))}},
            r"defense fast \(purifier.steps: 1, now 2\)",
        ),
        ({"defenses": {"fast": Defended(MODEL, Purifier(MODEL, "body", steps=1))}}, "defense fast"),
        (
            {
                "ignore_index": 254,
                "attackers": [
                    Attacker("PGD", lambda model, defended: attacks.PGD(model, steps=2, ignore_index=254), knows=False)
                ],
            },
            "ignore_index",
        ),
        ({"defenses": {"averaging": defenses.Averaging(MODEL, seed=4)}}, "defense averaging"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, changed: dict[str, Any], what: str) -> None:
    evaluation(arguments={"size": 2}).run(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    settings = {"arguments": {"size": 2}, **changed}
    with pytest.raises(ValueError, match=f"holds results of another .*{what}") as caught:
        evaluation(settings.pop("data", None), **settings).run(tmp_path)
    assert "choose another folder" in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_has_no_results_yet_may_change(tmp_path: Path) -> None:
    """A run that stopped before its first result has written its settings, and binds nobody to them."""
    x, y = scenes(2).tensors
    wrong = evaluation(TensorDataset(x, y + 100), attackers=[])
    with pytest.raises(ValueError, match="labels"):
        wrong.run(tmp_path)
    assert (tmp_path / "study.json").exists()
    attackers = [Attacker("late", lambda model, defended: attacks.PGD(model, steps=1), knows=False)]
    evaluation(TensorDataset(x, y), attackers=attackers).begin(tmp_path)
    report = evaluation(TensorDataset(x, y), attackers=[]).run(tmp_path)
    attackers = [Attacker("late", lambda model, defended: attacks.PGD(model, steps=2), knows=False)]
    assert evaluation(TensorDataset(x, y), attackers=attackers).begin(tmp_path) == 2 * len(report.table())


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"attackers": {}, "defenses": 3}'])
def test_a_damaged_study_is_refused(tmp_path: Path, content: str) -> None:
    evaluation(scenes(2), attackers=[]).run(tmp_path)
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match=r"study\.json is not as equifast wrote it; choose another folder"):
        evaluation(scenes(2), attackers=[]).run(tmp_path)


def test_a_line_of_somebody_else_is_refused(tmp_path: Path) -> None:
    evaluation(attackers=[]).run(tmp_path)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write("hello\n")
    with pytest.raises(ValueError, match="has a line that equifast did not write"):
        evaluation(attackers=[]).run(tmp_path)


def test_another_head_is_refused(tmp_path: Path) -> None:
    for epochs in (5, 6):
        purifier = defenses.Rotation(MODEL, steps=1).fit([cases.images(8)], epochs=epochs)
        made = evaluation(scenes(2), attackers=[], defenses={"rotation": Defended(MODEL, purifier)})
        if epochs == 5:
            made.run(tmp_path)
    with pytest.raises(ValueError, match="holds results of another defense rotation"):
        made.run(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    evaluation(attackers=[PGD]).run(tmp_path)
    other = cases.dense(seed=1).eval()
    made = Evaluation(other, scenes(), [PGD], {"averaging": defenses.Averaging(other)}, eps=EPS)
    with pytest.raises(ValueError, match="holds results of another model"):
        made.run(tmp_path)


def test_a_full_disk_leaves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def sync(descriptor: int) -> None:
        if next(calls) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=r"No space left on device; what .*records.jsonl had is kept"):
        evaluation().run(tmp_path)
    assert len(records(tmp_path)) >= 10
    assert evaluation().run(tmp_path).table() == evaluation().run(tmp_path / "other").table()


def test_a_disk_that_takes_half_a_line(tmp_path: Path) -> None:
    whole = Records(tmp_path, {"data": {}, "attackers": {}, "defenses": {}})
    lines = [{"image": str(i), "defense": "none", "attack": "clean", "result": {}} for i in range(3)]
    with whole:
        whole.add(iter(lines[:2]))

        class Short:
            def __init__(self, file: Any) -> None:
                self.file = file

            def write(self, content: bytes) -> int:
                return int(self.file.write(content[:20]))

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        whole._file = Short(whole._file)  # type: ignore[assignment]
        with pytest.raises(OSError, match=r"records.jsonl took 20 of \d+ bytes: the disk is full"):
            whole.add(iter(lines[2:]))
    assert set(Records(tmp_path, {"data": {}, "attackers": {}, "defenses": {}}).results) == {
        (str(i), "none", "clean") for i in range(2)
    }


class Liar(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        return {"ball": (x + 0.1).clamp(0, 1), "range": x + 0.01, "nan": x * torch.nan, "shape": x[:, :, 1:]}[self.how]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("ball", "leaves its ball: it moves a value by 0.1"),
        ("range", r"leaves \[0, 1\]"),
        ("nan", "gives images with values that are NaN or infinite"),
        ("shape", r"gives images \(2, 3, 19, 28\)"),
    ],
)
def test_attacks_that_cheat_are_found_out(tmp_path: Path, how: str, sentence: str) -> None:
    data = TensorDataset(torch.ones(2, 3, 20, 28) * (0.5 if how == "ball" else 1), scenes(2).tensors[1])
    made = evaluation(data, attackers=[Attacker("liar", lambda model, defended: Liar(how))])
    with pytest.raises(ValueError, match=f"liar {sentence}"):
        made.run(tmp_path)


class Cropped(defenses.Averaging):
    def forward(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        return super().forward(x, ids, draw)[:, :, 1:]


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a defense gives logits \(2, 5, 19, 28\) for labels \(2, 20, 28\)"):
        evaluation(defenses={"cropped": Cropped(MODEL)}).run(tmp_path / "a")
    x, y = scenes(2).tensors
    with pytest.raises(ValueError, match="data has labels from 0 to 9; the model has 5 classes"):
        evaluation(TensorDataset(x, y.clamp(max=0).index_fill(2, torch.tensor(3), 9)), attackers=[]).run(tmp_path / "b")
    with pytest.raises(ValueError, match="data has no images"):
        evaluation(TensorDataset(x[:0], y[:0]))
    with pytest.raises(ValueError, match=r"data has a label \(20, 28\) of torch.float32"):
        evaluation(TensorDataset(x, y.float()))
    with pytest.raises(ValueError, match="names must differ"):
        evaluation(attackers=[PGD, PGD])
    with pytest.raises(ValueError, match="defenses is empty"):
        evaluation(defenses={})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": lambda x: x}, "model is a function; it must be a Module"),
        ({"data": DataLoader(scenes(2))}, r"data is a DataLoader; .*\(image, label\); its dataset may be one"),
        (
            {"attackers": [attacks.PGD(MODEL)]},
            r"attackers has a PGD; each must be Attacker\(name, lambda model, defended",
        ),
        ({"defenses": [defenses.Averaging(MODEL)]}, "defenses is a list; it must be a dict"),
        ({"defenses": {"none": None}}, r"defense 'none' is a NoneType; it must be callable as \(x, ids=None, draw=0\)"),
        ({"defenses": {"none": MODEL}}, r"defense 'none' is called as \(x, ids=None, draw=0\), which it does not take"),
    ],
)
def test_arguments_of_another_kind_are_refused(changed: dict[str, Any], sentence: str) -> None:
    settings = {"model": MODEL, "data": scenes(2), "attackers": [], "defenses": {"none": Defended(MODEL, nothing)}}
    with pytest.raises(TypeError, match=sentence):
        Evaluation(**{**settings, **changed}, eps=EPS)


def test_outputs_that_are_no_number_are_said(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = cases.classifier()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model(x)
            return torch.where(x.flatten(1).mean(1, keepdim=True) < least, torch.nan, logits)

    x, y = cases.images(6), torch.zeros(6, dtype=torch.int64)
    least = float(x.flatten(1).mean(1).median()) + 1e-6
    model = Half().eval()
    rows = {"none": Defended(model, nothing), "other": Defended(cases.classifier().eval(), nothing)}
    report = Evaluation(model, TensorDataset(x, y), [], rows, eps=EPS).run(tmp_path)
    assert report.warnings() == [
        "none: outputs have NaN on images (clean 3 of 6 each), so that their labels are no predictions"
    ]
    assert str(report).endswith(f"\nWarning: {report.warnings()[0]}\n")


def test_images_that_are_there_twice_count_twice(tmp_path: Path) -> None:
    report = evaluation(Subset(scenes(), [0, 1, 0, 0]), attackers=[PGD]).run(tmp_path)
    assert report.images == 4
    assert len(records(tmp_path)) == 4 * 2 * 3


def test_classes(tmp_path: Path) -> None:
    model = cases.classifier().eval()
    data = scenes(5, model)
    rows = {"averaging": defenses.Averaging(model), "fast": Defended(model, Purifier(model, "features", steps=1))}
    attackers = [
        PGD,
        Attacker("strong", lambda model, defended: BPDA(attacks.PGD(model, eps=0.5, steps=8), defended)),
    ]
    report = Evaluation(model, data, attackers, rows, eps=0.5, batch=5).run(tmp_path)
    assert report.figure == "accuracy in %"
    for columns in report.results.values():
        assert columns["clean"].shape == (5,)
        worst = np.stack([columns["clean"], columns["PGD"], columns["strong"]]).min(0)
        assert np.array_equal(report.worst(next(d for d, c in report.results.items() if c is columns)), worst)
    assert report.table()["fast"]["worst"] == accuracy(report.worst("fast"))


def test_worst_of_accuracy_and_of_iou_against_every_choice() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        confusions = generator.integers(0, 6, (3, 4, 3, 3))
        chosen = worst_accuracy(confusions)
        right = np.trace(confusions, axis1=2, axis2=3)
        assert np.array_equal(right[chosen, np.arange(4)], right.min(0))
        greedy = worst_iou(confusions)
        values = {
            choice: mean_iou(confusions[list(choice), np.arange(4)], resamples=2).value
            for choice in itertools.product(range(3), repeat=4)
        }
        found = values[tuple(int(i) for i in greedy)]
        assert found <= min(values[(a,) * 4] for a in range(3))
        assert found <= values[tuple(int(i) for i in chosen)]
        # no single change makes it less
        for i, a in itertools.product(range(4), range(3)):
            other = greedy.copy()
            other[i] = a
            assert values[tuple(int(k) for k in other)] >= found - 1e-9
    correct = generator.random((4, 7)) < 0.5
    assert np.array_equal(correct[worst_accuracy(correct), np.arange(7)], correct.all(0))


def test_the_adaptive_protocol(tmp_path: Path) -> None:
    strength = Strength(eps=EPS, steps=2, eot=2, queries=3, weights=(0.0, 1.0), dtype="float32")
    rows = {
        "fast": Defended(MODEL, Purifier(MODEL, steps=2)),
        "averaging": defenses.Averaging(MODEL),
        "random": Defended(MODEL, defenses.RandomNoise()),
    }
    report = evaluation(scenes(2, size=(12, 16)), attackers=adaptive(strength), defenses=rows).run(tmp_path)
    table = report.table()
    everyone = {"clean", *(attacker.name for attacker in adaptive(strength)), "worst", "worst, draw unknown"}
    everyone -= {"Evading"}
    assert set(table["fast"]) == everyone
    of_purifiers = {name for name in everyone if name.startswith(("unrolled", "BPDA, trajectory", "BPDA, one step"))}
    assert len(of_purifiers) == 7
    assert everyone - set(table["random"]) == of_purifiers | {"Adaptive"}
    largest = max(report.radius, key=lambda name: report.radius[name])
    assert largest not in report.attacks("fast")
    assert table["fast"]["worst"].value <= min(table["fast"][name].value for name in report.attacks("fast"))
    assert set(table["averaging"]) == set(table["random"])
    # a random search by rounded differences would be no attacker
    square = known(Strength(dtype="auto", queries=3))["Square, 3 queries"].make(MODEL, Defended(MODEL, Purifier(MODEL)))
    assert isinstance(square, BPDA)
    assert square._attack.dtype == "float32"
    made = known(strength)["BPDA, one step"].make(MODEL, Defended(MODEL, Purifier(MODEL, preset="paper")))
    assert made is not None
    ascent = made._attack.model.purifier.ascent  # type: ignore[attr-defined]
    assert (ascent.steps, ascent.start, ascent.noise) == (1, "corner", False)
    assert known(strength)["BPDA, one step"].make(MODEL, Defended(MODEL, Purifier(MODEL, steps=1))) is None
    for name in ("BPDA, 2 draws", "BPDA, margin, 2 draws"):  # without a defense the draws are one
        for purifier, draws in ((nothing, 1), (Purifier(MODEL), 2)):
            attack = known(strength)[name].make(MODEL, Defended(MODEL, purifier))
            assert isinstance(attack, BPDA)
            assert attack._attack.eot == draws
    names = set(known(strength))
    assert {"PGD", "MIM", "CW", "Houdini", "SegPGD", "CosPGD", "APGD", "FGSM", "IFGSM"} <= names
    assert {"APGD, DLR", "APGD, targeted DLR"} <= names
    assert strength.quick.eps == EPS
    assert strength.quick.eot == 4


@pytest.mark.parametrize(
    ("name", "keep", "draw", "gradient"),
    [
        ("CW, 35 steps", "best", None, None),
        ("BPDA, margin, 35 steps", "last", None, "straight-through"),
        ("BPDA, known draw, margin, 35 steps", "last", 0, "straight-through"),
        ("unrolled, margin, 35 steps", "last", None, "unrolled"),
        ("unrolled, known draw, margin, 35 steps", "last", 0, "unrolled"),
    ],
)
def test_attackers_who_take_their_time(name: str, keep: str, draw: int | None, gradient: str | None) -> None:
    """Five times the steps of a quarter of the size, with momentum, on the margin; in the protocol."""
    strength = Strength(eps=EPS, steps=7)
    assert name in {attacker.name for attacker in adaptive(strength)}
    made = known(strength)[name].make(MODEL, Defended(MODEL, Purifier(MODEL, steps=2)))
    attack = made if gradient is None else made._attack  # type: ignore[union-attr]
    assert isinstance(attack, attacks.CW)
    ascent = attack.ascent
    assert (ascent.steps, ascent.step_size, ascent.momentum) == (35, pytest.approx(EPS / 16), 0.75)
    assert (attack.confidence, ascent.keep, attack.draw) == (1.0, keep, draw)
    assert getattr(attack.model, "gradient", None) == gradient


@pytest.mark.parametrize("draw", [None, 0])
@pytest.mark.parametrize("gradient", ["straight-through", "unrolled"])
def test_attackers_on_the_loss_of_houdini(gradient: str, draw: int | None) -> None:
    """Through the defense as on the model alone: else the latter's figure would be the only one that is low."""
    strength = Strength(eps=EPS, steps=7)
    name = "BPDA" if gradient == "straight-through" else gradient
    name = f"{name}, Houdini" if draw is None else f"{name}, known draw, Houdini"
    assert {"Houdini", name} <= {attacker.name for attacker in adaptive(strength)}
    made = known(strength)[name].make(MODEL, Defended(MODEL, Purifier(MODEL, steps=2)))
    assert isinstance(made, BPDA)
    attack = made._attack
    assert isinstance(attack, attacks.Houdini)
    assert (attack.ascent.steps, attack.ascent.step_size) == (7, pytest.approx(EPS / 4))
    assert (attack.draw, attack.model.gradient) == (draw, gradient)
    assert known(strength)[name].known_draw == (draw == 0)
    assert attack.dtype == ("float32" if gradient == "unrolled" else "auto")


@pytest.mark.parametrize("model", [MODEL, cases.classifier().eval()])
def test_the_protocol_in_euclidean_balls(tmp_path: Path, model: nn.Module) -> None:
    """Every attacker but the black box stays in the ball, and all of it is used."""
    strength = Strength(eps=0.5, norm="l2", steps=2, eot=1, weights=(1.0,), dtype="float32")
    where = None if model is MODEL else "features"
    rows = {"fast": Defended(model, Purifier(model, where, steps=2))}
    data = scenes(2, model, size=(12, 16))
    made = Evaluation(model, data, adaptive(strength), rows, eps=0.5, norm="l2", batch=2)
    report = made.run(tmp_path)
    assert not any(name.startswith("Square") for name in report.results["fast"])
    assert {"BPDA", "unrolled, margin, 10 steps", "BPDA, radius x 16"} <= set(report.results["fast"])
    again = made.again(0, "fast", "BPDA")
    moved = (again["attacked"] - again["image"]).norm()
    assert 0.3 < float(moved) <= 0.5 + 1e-5
    wide = [Attacker("wide", lambda model, defended: attacks.PGD(model, eps=0.6, step_size=0.3, steps=4, norm="l2"))]
    with pytest.raises(ValueError, match="wide leaves its ball: it moves an image by"):
        Evaluation(model, data, wide, rows, eps=0.5, norm="l2").run(tmp_path / "b")


@pytest.mark.parametrize("name", sorted(known(Strength())))
def test_every_attacker_by_name(name: str) -> None:
    """Each stays in its ball on a model of five classes."""
    strength = Strength(eps=EPS, steps=2, eot=2, queries=3, weights=(1.0,), dtype="float32")
    fewer = name.replace("20 draws", "2 draws").replace("4 draws", "2 draws").replace("500", "3")
    fewer = fewer.replace("100 steps", "10 steps")
    attacker = known(strength).get(name) or known(strength)[fewer]
    attack = attacker.make(MODEL, Defended(MODEL, Purifier(MODEL, steps=2)))
    if name == "Evading":
        assert attack is None
        return
    assert attack is not None
    x, y = scenes(2, size=(12, 16)).tensors
    moved = (attack(x, y, None) - x).abs().amax()
    assert 0 < moved <= attacker.radius * EPS + 1e-6
    assert attacker.known_draw == ("known draw" in name)
    assert attacker.gradients != name.startswith("Square")


def attacker(name: str, **settings: Any) -> Attacker:
    return Attacker(name, lambda model, defended: None, **settings)


def test_a_black_box_that_sees_more_is_a_warning() -> None:
    from equifast.evaluate.study import Report

    report = Report.__new__(Report)
    report.dense, report.votes, report.losses, report.no_gradient, report.probabilities = False, 0, {}, {}, {}
    report.drawn = {}
    report.nan, report.changes = {}, {}
    report.target = None
    right = np.ones(20, bool)
    report.attackers = {"PGD": attacker("PGD"), "black box": attacker("black box", gradients=False)}
    report.results = {"a": {"clean": right, "PGD": right, "black box": ~right}, "b": {"clean": right}}
    assert len(report.warnings()) == 1
    assert report.warnings()[0].startswith("a: black box, a black box, does more damage")
    # who knows the draw has more than a gradient, and so does a black box that does
    report.attackers["PGD, known draw"] = attacker("PGD, known draw", known_draw=True)
    report.results["a"]["PGD, known draw"] = ~right
    assert len(report.warnings()) == 1
    report.attackers["black box"] = attacker("black box", gradients=False, known_draw=True)
    assert not report.warnings()
    report.results["a"]["PGD"] = ~right
    assert not report.warnings()


def report_of(**columns: Any) -> Any:
    """A report of one defense, `a`, with accuracies given by hand."""
    from equifast.evaluate.study import Report

    report: Any = Report.__new__(Report)
    report.dense, report.votes, report.probabilities, report.target = False, 0, {"a": False}, None
    report.losses, report.no_gradient = {"a": {}}, {"a": {}}
    report.nan, report.changes = {}, {}
    right = np.arange(20) < 10
    report.results = {"a": {"clean": right, "PGD": right & (np.arange(20) < 5)}}
    report.attackers = {"PGD": attacker("PGD"), "far": attacker("far", radius=16.0)}
    for name, value in columns.items():
        setattr(report, name, value)
    return report


def test_the_accuracy_under_the_worst_is_that_of_the_fewest_right_labels() -> None:
    """Which is not where the mean IoU is least; in the mean over draws too."""
    clean, fewest, least = ([[90, 0], [0, 10]], [[60, 30], [0, 10]], [[90, 0], [10, 0]])
    drawn = {
        "clean": np.array([clean, clean])[:, None],
        "p": np.array([fewest, clean])[:, None],
        "q": np.array([least, least])[:, None],
    }
    report = report_of(
        dense=True,
        votes=2,
        figure="mIoU in %",
        images=1,
        voted={"a": {name: draws[0] for name, draws in drawn.items()}},
        aimed={},
        similarities={},
        purified={},
        drawn={"a": drawn},
        results={"a": {name: draws[0] for name, draws in drawn.items()}},
        attackers={name: attacker(name) for name in ("p", "q")},
    )
    worst = report.document()["rows"]["a"]["worst"]
    assert worst["accuracy"] == pytest.approx(85)  # of p: 70 and 100
    assert worst["value"] == pytest.approx(45)  # of q: 90 and 0
    assert worst["IoU"] == [pytest.approx(90), 0]


def test_who_does_not_know_the_defense_and_does_more_damage_is_a_warning() -> None:
    """What a loss takes of a model alone it may take of defenses, which nobody has tried."""
    right = np.arange(20) < 10
    attackers = {name: attacker(name, knows=name == "BPDA") for name in ("PGD", "Houdini", "BPDA")}
    results = {"clean": right, "PGD": right, "Houdini": np.zeros(20, bool), "BPDA": right}
    report = report_of(attackers=attackers, results={"a": results})
    (warning,) = report.warnings()
    assert warning.startswith("a: Houdini, made without this defense, leaves 50.0 ± ")
    assert warning.endswith("less than all who know it; attack it on that loss, with as many steps")
    results["Houdini"] = right & (np.arange(20) != 3)  # one image is chance
    assert not report_of(attackers=attackers, results={"a": results}).warnings()
    results["Houdini"], results["BPDA"] = results["BPDA"], np.zeros(20, bool)
    assert not report_of(attackers=attackers, results={"a": results}).warnings()
    results["Houdini"] = np.zeros(20, bool)
    del results["BPDA"]  # of those who do not know there is nothing to ask
    assert not report_of(attackers=attackers, results={"a": results}).warnings()
    boxes = attackers | {"Houdini": attacker("Houdini", knows=False, gradients=False)}  # has a rule of its own
    results["BPDA"] = right
    (warning,) = report_of(attackers=boxes, results={"a": results}).warnings()
    assert "a black box" in warning


def test_signs_of_masked_gradients() -> None:
    right = np.arange(20) < 10
    assert not report_of().warnings()
    rising, falling = np.tile([1.0, 2.0], (20, 1, 1)), np.tile([2.0, 1.0], (20, 1, 1))
    assert not report_of(losses={"a": {"PGD": rising}}).warnings()
    assert report_of(losses={"a": {"PGD": falling}}).warnings() == [
        "a: the loss of PGD does not rise with its steps on 10 of 10 images"  # those that are right without it
    ]
    nothing = np.full((20, 1, 2), np.nan)
    assert "on 20 of 20 images" in report_of(losses={"a": {"PGD": nothing}}).warnings()[0]
    few = np.where(np.arange(20)[:, None, None] < 5, falling, rising)
    assert not report_of(losses={"a": {"PGD": few}}).warnings()
    # runs of their own: that a later one begins higher is no rise
    runs = np.concatenate([falling, falling + 5], 1)
    assert len(report_of(losses={"a": {"Adaptive": runs}}).warnings()) == 1
    assert not report_of(losses={"a": {"Adaptive": np.concatenate([falling, rising, rising], 1)}}).warnings()
    stuck = (np.arange(20) < 7).astype(int)  # 5 of them are still right, the others have been turned
    assert report_of(no_gradient={"a": {"PGD": stuck}}).warnings() == [
        "a: PGD has steps without any gradient on 5 images that are right"
    ]
    assert "probabilities" in report_of(probabilities={"a": True}).warnings()[0]
    assert not report_of(results={"a": {"clean": right, "PGD": right, "far": right & False}}).warnings()
    assert report_of(results={"a": {"clean": right, "PGD": right, "far": right}}).warnings() == [
        "a: far leaves 50.0 of 50.0, at a radius where nothing should be left"
    ]


class Mine(attacks.PGD):
    """An attack of a user's own, who keeps a setting where he likes."""

    def __init__(self, model: Any, strength: float = 1.0) -> None:
        super().__init__(model, steps=1, eps=strength * EPS, step_size=strength * EPS)


@dataclasses.dataclass(frozen=True)
class Zoom(views.View):
    """A view of a user's own."""

    part: float = 0.9


class Compressed:
    """A purifier of a user's own, no Module."""

    def __init__(self, quality: int) -> None:
        self._quality, self.lock = quality, threading.Lock()

    def __call__(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        return (x * self._quality).round() / self._quality


class CompressedModule(nn.Module):
    def __init__(self, quality: int) -> None:
        super().__init__()
        self.quality = quality

    def forward(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        return (x * self.quality).round() / self.quality


def _scaled(quality: int) -> Callable[..., Tensor]:
    return lambda x, ids=None, draw=0: (x * quality).round() / quality


class Tempered(cases.DenseNet):
    temperature = 1.0


@pytest.mark.parametrize(
    "make",
    {
        "attack": lambda n: Mine(MODEL, n),
        "what BPDA is around": lambda n: BPDA(Mine(MODEL), Defended(MODEL, Compressed(n))),
        "draws of BPDA around it": lambda n: BPDA(Mine(MODEL), Defended(MODEL, Compressed(1)), eot=n),
        "view": lambda n: defenses.Averaging(MODEL, [Zoom(n / 10)]),
        "purifier": lambda n: Defended(MODEL, Compressed(n)),
        "purifying module": lambda n: Defended(MODEL, CompressedModule(n)),
        "function": lambda n: Defended(MODEL, _scaled(n)),
        "partial": lambda n: functools.partial(_scaled, n),
        "numbers of numpy": lambda n: Defended(MODEL, Compressed(np.int64(n))),  # type: ignore[arg-type]
        "range": lambda n: Defended(MODEL, Compressed(range(n))),  # type: ignore[arg-type]
        "model of the purifier": lambda n: Defended(MODEL, Purifier(DIFFERENT[n])),
        "function of features": lambda n: Defended(MODEL, Purifier(MODEL, DIFFERENT[n].forward)),
        "attribute of the model": lambda n: _tempered(n),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_settings_of_users_classes_are_told_apart(make: tuple[str, Callable[[int], object]]) -> None:
    first, again, other = (json.dumps(describe(make[1](n))) for n in (2, 2, 3))
    assert first == again
    assert first != other


DIFFERENT = {n: cases.dense(seed=n) for n in (2, 3)}


def _tempered(n: int) -> nn.Module:
    torch.manual_seed(0)
    model = Tempered()
    model.temperature = n
    return model


def _compiled(text: str) -> dict[str, Any]:
    """The names of a user's module."""
    names: dict[str, Any] = {"__name__": "users", "nn": nn, "torch": torch, "functools": functools}
    names |= {"DefendedModel": DefendedModel, "MODEL": MODEL}
    exec(text, names)
    return names


@pytest.mark.parametrize(
    "text",
    [
        "made = lambda x: x * {}",
        "SIZE = {}\ndef made(x): return x * SIZE",
        "def inner(x): return x * {}\ndef made(x): return inner(x)",
        "def made(x): return [y * {} for y in x]",
        "class Kind:\n    def __call__(self, x): return x * {}\nmade = Kind()",
        "class Kind:\n    @property\n    def size(self): return {}\nmade = Kind()",
        "class Kind:\n    @torch.no_grad()\n    def __call__(self, x): return x * {}\nmade = Kind()",
        "class Kind:\n    @functools.cached_property\n    def size(self): return {}\nmade = Kind()",
        "class Kind:\n    @staticmethod\n    @functools.cache\n    def size(x): return {}\nmade = Kind()",
        "@torch.no_grad()\ndef made(x): return x * {}",
        "@functools.cache\ndef made(x): return x * {}",
        "class Kind(nn.Module):\n    def forward(self, x): return x * {}\nmade = Kind()",
        "class Kind:\n    def __call__(self, x, k={}): return x * k\nmade = Kind()",
        "class Kind(nn.Module):\n    def forward(self, x, *, k={}): return x * k\nmade = Kind()",
        "class Kind(nn.Module):\n    size = {}\n    def forward(self, x): return x * self.size\nmade = Kind()",
        "SIZE = {}\nclass Kind(nn.Module):\n    def forward(self, x): return x * SIZE\nmade = Kind()",
        "def inner(x): return x * {}\nclass Kind(nn.Module):\n    def forward(self, x): return inner(x)\nmade = Kind()",
        "def make(k):\n    class Kind:\n        def size(self): return k\n    return Kind()\nmade = make({})",
        "class Kind:\n    __slots__ = ('size',)\nmade = Kind()\nmade.size = {}",
        "class Kind:\n    def __init__(self, f, k):\n        functools.update_wrapper(self, f)\n        self.k = k\n"
        "made = Kind(len, {})",
        "class Kind(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self._size = {}\n"
        "made = Kind()",
        "class Kind(DefendedModel):\n    def __init__(self, size):\n        super().__init__(MODEL)\n"
        "        self._size = size\nmade = Kind({})",
    ],
)
def test_what_users_code_does_is_told_apart(text: str) -> None:
    first, again, other = (json.dumps(describe(_compiled(text.format(n))["made"])) for n in (2, 2, 3))
    moved = json.dumps(describe(_compiled("\n\n" + text.format(2))["made"]))
    assert first == again == moved
    assert first != other


@pytest.mark.parametrize(
    "text",
    [
        "count = 0\ndef made(x):\n    global count\n    count += 1\n    return x",
        "from pathlib import Path\nROOT = Path({!r})\ndef made(x): return ROOT",
        "def made(x):\n    {!r}\n    return x",
    ],
)
def test_what_does_not_decide_is_not_told(text: str) -> None:
    one, two = (_compiled(text.format(word))["made"] for word in ("a", "b"))
    before = describe(one)
    one(torch.zeros(1))
    assert describe(one) == before == describe(two)


def test_code_that_names_much_code_is_described_in_no_time() -> None:
    functions = [f"def f{i}(x): return x" + "".join(f" + f{j}(x)" for j in range(40)) for i in range(40)]
    names = _compiled("\n".join(functions))
    assert len(json.dumps(describe(names["f39"]))) < 1000


def test_objects_that_answer_to_every_name_are_described() -> None:
    class Delegates:
        def __init__(self, inner: object, size: int) -> None:
            self.inner, self.size = inner, size

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    one, two = (describe(Delegates(Purifier(MODEL), n)) for n in (1, 2))
    assert one != two
    describe(mock.MagicMock())


def test_descriptions_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Sets of strings come in another order under another hash seed."""
    code = (
        "import json; from equifast._fingerprint import describe\n"
        "def made(x): return x in {'a', 'b', 'c', 'd', 'e'}\n"
        "print(json.dumps(describe([made, {'x', 'y', 'z'}])))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=tmp_path,  # not beside the sources, which are not built where the package is installed
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_numbers_that_nobody_can_draw_again_are_refused() -> None:
    for defended in (
        Defended(MODEL, Purifier(MODEL, seed=None)),
        defenses.Averaging(MODEL, seed=None),
        Defended(MODEL, defenses.RandomNoise(0.1, seed=None)),
    ):
        with pytest.raises(ValueError, match="mine has seed=None, numbers that nobody can draw again"):
            evaluation(defenses={"mine": defended})
    attacker = Attacker("PGD", lambda model, defended: attacks.PGD(model, seed=None), knows=False)
    with pytest.raises(ValueError, match="PGD has seed=None"):
        evaluation(attackers=[attacker])._cells()


class Wavering(Dataset[Any]):
    """Another image at each look."""

    def __init__(self) -> None:
        self.x, self.y = scenes(3).tensors
        self.looks = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.looks += 1
        return (self.x[index] - 1e-3 * self.looks).clamp(0, 1), self.y[index]


def test_data_that_change_between_looks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data gives another image or label at . than before; it must always be the"):
        evaluation(Wavering()).run(tmp_path)


def test_a_folder_of_an_attack_of_ones_own_is_refused(tmp_path: Path) -> None:
    def attacker(strength: float) -> Attacker:
        return Attacker("mine", lambda model, defended: Mine(model, strength), knows=False)

    evaluation(attackers=[attacker(0.1)]).run(tmp_path)
    with pytest.raises(ValueError, match="another attacker"):
        evaluation(attackers=[attacker(1.0)]).run(tmp_path)


def test_attackers_must_be_after_what_is_measured(tmp_path: Path) -> None:
    aiming = Attacker("aiming", lambda model, defended: attacks.PGD(model, steps=1, targeted=True), knows=False)
    knowing = Attacker("knowing", lambda model, defended: BPDA(attacks.PGD(model, steps=1), defended))
    void = Attacker("void", lambda model, defended: attacks.PGD(model, steps=1, ignore_index=0), knows=False)
    for settings, sentence in (
        ({"attackers": [aiming]}, "aiming has targeted=True, and there is none; they must go together"),
        ({"attackers": [knowing], "target": 1}, "knowing has targeted=False, and target is 1"),
        ({"attackers": [void]}, "void has ignore_index 0; it must be 255"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluation(**settings).run(tmp_path)
    assert not list(tmp_path.iterdir())
    strength = Strength(steps=1, eot=1, queries=1, ignore_index=254)
    made = [attacker.make(MODEL, Defended(MODEL, Purifier(MODEL))) for attacker in known(strength).values()]
    assert {getattr(a, "_attack", a).ignore_index for a in made if a is not None} == {254}


def test_a_loss_that_is_no_number_is_said(tmp_path: Path) -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = cases.classifier()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model(x)
            return logits * torch.nan if x.requires_grad else logits

    model = Nothing().eval()
    attackers = [Attacker("PGD", lambda model, defended: attacks.PGD(model, steps=3), knows=False)]
    rows = {"none": Defended(model, lambda x, ids=None, draw=0: x)}
    warnings = Evaluation(model, scenes(4, model), attackers, rows, eps=EPS).run(tmp_path).warnings()
    assert any("does not rise" in warning for warning in warnings)
    assert any("without any gradient" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("model", "make", "most"),
    [
        (cases.classifier().eval(), functools.partial(attacks.CW, confidence=1e-3), 1e-3),
        (MODEL, functools.partial(attacks.APGD, objective="dlr"), 1.0),
    ],
    ids=["margin", "ratio"],
)
def test_what_is_won_from_the_start_is_no_masked_gradient(
    tmp_path: Path, model: nn.Module, make: Callable[..., attacks.Attack], most: float
) -> None:
    """Of a model that is wrong where its defense is right, which has no gradient beyond what an attacker climbs to."""
    x = cases.images(4)
    with torch.no_grad():
        lightest = model(x).argmin(1)  # what the model does not say, and its defense does
    attack = make(model, eps=1e-4, steps=3)
    attackers = [Attacker("plain", lambda model, defended: attack, knows=False)]
    study = Evaluation(model, TensorDataset(x, lightest), attackers, {"opposite": Opposite(model)}, eps=EPS)
    report = study.run(tmp_path)
    assert report.table()["opposite"]["worst"].value > (95 if model is MODEL else 99)  # of pixels some are near a tie
    assert not report.no_gradient["opposite"]["plain"].any()
    assert report.losses["opposite"]["plain"] == pytest.approx(most)
    assert not any("without any gradient" in warning for warning in report.warnings())


class Opposite(DefendedModel):
    """Says what its model does not."""

    def forward(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        return -self.model(x)


def test_half_images_stay_in_their_ball_up_to_rounding(tmp_path: Path) -> None:
    model = cases.classifier().half().eval()
    x = cases.images(4).half()
    data = TensorDataset(x, model(x).argmax(1).detach())
    rows = {"none": Defended(model, lambda x, ids=None, draw=0: x)}
    for norm in ("linf", "l2"):
        attackers = [known(Strength(steps=3, norm=norm, eps=EPS))["PGD"]]
        Evaluation(model, data, attackers, rows, eps=EPS, norm=norm).run(tmp_path / norm)


def test_ifgsm_of_the_protocol_reaches_its_radius() -> None:
    x = cases.images(2)
    for norm, eps in (("l2", 1.0), ("linf", 32 / 255)):
        attack = known(Strength(norm=norm, eps=eps))["IFGSM"].make(MODEL, Defended(MODEL, Purifier(MODEL)))
        assert attack is not None
        moved = (attack(x, MODEL(x).argmax(1)) - x).flatten(1)
        assert float((moved.norm(dim=1) if norm == "l2" else moved.abs().amax(1)).min()) > 0.8 * eps


class Masked(nn.Module):
    """Logits behind a staircase: nothing comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.model = cases.classifier()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits.round() + 0 * logits


def test_a_masked_model_is_found_out(tmp_path: Path) -> None:
    model = Masked().eval()
    attackers = [Attacker("PGD", lambda model, defended: attacks.PGD(model, eps=EPS, steps=3, start="origin"))]
    rows = {"masked": Defended(model, lambda x, ids=None, draw=0: x.detach())}
    report = Evaluation(model, scenes(4, model), attackers, rows, eps=EPS).run(tmp_path)
    assert any("without any gradient on 4 images" in warning for warning in report.warnings())
    chances = nn.Sequential(cases.classifier(), nn.Softmax(1)).eval()
    rows = {"chances": Defended(chances, lambda x, ids=None, draw=0: x.detach())}
    report = Evaluation(chances, scenes(4, chances), [], rows, eps=EPS).run(tmp_path / "b")
    assert report.warnings() == ["chances: its outputs look like probabilities; losses are made for logits"]


@pytest.mark.parametrize("name", cases.ATTACKS)
def test_attacks_tell_what_they_climb(name: str) -> None:
    """The losses that an attack tells of are those of its images, and it finds the same whether watched or not."""
    attack = cases.ATTACKS[name](MODEL)
    x, y = scenes(2).tensors
    seen: list[tuple[int, Tensor, Tensor]] = []
    found = attack(x, y, watch=lambda *step: seen.append(step))
    assert torch.equal(found, attack(x, y))
    if name == "square":
        assert not seen
        return
    runs = len(attack.weights) if isinstance(attack, attacks.Adaptive) else 1
    steps = list(range(attack.total_steps)) * runs
    assert [t for t, _, _ in seen] == steps
    assert all(value.shape == (2,) and gradient.shape == x.shape for _, value, gradient in seen)
    if name == "pgd":
        assert bool((seen[-1][1] > seen[0][1]).all())


def test_votes(tmp_path: Path) -> None:
    """The label that most draws predict, counted by hand; the first draw is the one that counts without a vote."""
    noise = Defended(MODEL, defenses.RandomNoise(0.3))
    made = evaluation(attackers=[PGD], defenses={"random": noise, "averaging": defenses.Averaging(MODEL)}, votes=5)
    report = made.run(tmp_path)
    order = [image.index for image in made.images]
    x, y = (part[order] for part in made.data.tensors)  # type: ignore[attr-defined]
    ids = torch.tensor([image.id for image in made.images])
    from equifast.evaluate import confusion

    with torch.no_grad():
        labels = [noise(x, ids=ids, draw=draw).argmax(1) for draw in (0, 65535, 65534, 65533, 65532)]
    counted = torch.stack([sum((label == c).long() for label in labels) for c in range(5)]).argmax(0)  # type: ignore[misc,arg-type]
    assert np.array_equal(report.voted["random"]["clean"], confusion(counted, y, 5))
    assert not np.array_equal(report.voted["random"]["clean"], report.results["random"]["clean"])
    assert "worst, vote of 5" in report.table()["random"]
    alone = evaluation(attackers=[PGD], defenses={"random": noise}, votes=1).run(tmp_path / "one").table()["random"]
    assert list(alone) == ["clean", "PGD", "worst"]  # a vote of one says nothing else
    assert report.document()["rows"]["random"]["PGD"]["vote"]["value"] == mean_iou(report.voted["random"]["PGD"]).value
    assert np.array_equal(report.drawn["random"]["clean"], np.stack([confusion(label, y, 5) for label in labels]))


def test_the_mean_of_draws(tmp_path: Path) -> None:
    """The worst case of who does not know the draw: in the mean over draws, whose spread is in the standard error."""
    strength = Strength(eps=EPS, steps=2)
    attackers = [PGD, known(strength)["BPDA"], known(strength)["BPDA, known draw"]]
    rows = {"none": Defended(MODEL, nothing), "random": Defended(MODEL, defenses.RandomNoise(0.5))}
    report = evaluation(attackers=attackers, defenses=rows, votes=4).run(tmp_path)
    name = "worst, draw unknown"
    assert report.unknown_row == name
    draws = np.stack([report.drawn["random"][attack] for attack in ("clean", "PGD", "BPDA")])
    means = draws.mean(1)
    chosen = worst_iou(means)
    worst = draws[chosen, :, np.arange(draws.shape[2])].swapaxes(0, 1)
    assert np.array_equal(worst, report.worst_unknown("random"))
    whole, each = mean_iou(worst.mean(0)), [mean_iou(draw).value for draw in worst]
    estimate = report.table()["random"][name]
    assert estimate.value == pytest.approx(whole.value)
    assert estimate.standard_error == pytest.approx(np.hypot(whole.standard_error, np.std(each, ddof=1) / 2))
    assert np.std(each) > 0
    assert report.table()["none"][name].standard_error == mean_iou(report.worst_unknown("none")[0]).standard_error
    apart = report.differences("none")["random"][name]
    assert apart.value == pytest.approx(estimate.value - report.table()["none"][name].value)
    assert name in str(report)
    for attack in ("clean", "PGD", "BPDA"):
        assert report.table()["random"][attack] == over_draws(report.drawn["random"][attack])
        apart = report.differences("none")["random"][attack]
        assert apart == over_draws(report.drawn["random"][attack], report.drawn["none"][attack])
    told = report.document()["rows"]["random"]
    assert told["PGD"]["one draw"]["value"] == mean_iou(report.results["random"]["PGD"]).value != told["PGD"]["value"]
    assert np.nanmean(np.array(told["PGD"]["IoU"], dtype=float)) == pytest.approx(told["PGD"]["value"])
    knows = "BPDA, known draw"  # who knows one is judged by that
    assert told[knows]["value"] == mean_iou(report.results["random"][knows]).value == told[knows]["one draw"]["value"]
    assert "4 draws, whose mean it is, where the draw is not known; the worst is of the draw that is" in report.title
    single = evaluation(attackers=attackers, defenses=rows).run(tmp_path / "single")
    assert single.unknown_row == name
    among = np.stack([single.results["random"][attack] for attack in ("clean", "PGD", "BPDA")])
    assert np.array_equal(single.worst_unknown("random")[0], among[worst_iou(among), np.arange(among.shape[1])])
    two = evaluation(attackers=attackers[:2], defenses=rows, votes=4).run(tmp_path / "two")
    assert two.unknown_row is None
    assert two.table()["random"]["worst"] == over_draws(two.worst_unknown("random")) == estimate
    assert two.difference("random", "none") == report.differences("none")["random"][name]


def test_over_draws() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((3, 50)) < np.array([0.2, 0.5, 0.8])[:, None]  # draws differ by more than images tell
    estimate = over_draws(right)
    assert estimate.value == pytest.approx(100 * right.mean())
    spread = 100 * np.std(right.mean(1), ddof=1) / 3**0.5
    assert spread < estimate.standard_error == pytest.approx(np.hypot(average(right.mean(0)).standard_error, spread))
    assert over_draws(right[:1]) == accuracy(right[0])
    assert over_draws(right, right) == Estimate(0.0, 0.0)
    assert over_draws(right, ~right).value == pytest.approx(200 * right.mean() - 100)
    with pytest.raises(ValueError, match=r"a has shape \(3, 50\), b \(2, 50\); they must be"):
        over_draws(right, right[:2])


@pytest.mark.parametrize("model", [MODEL, cases.classifier().eval()])
def test_a_target(tmp_path: Path, model: nn.Module) -> None:
    dense = model is MODEL
    attackers = [
        Attacker("PGD", lambda model, defended: attacks.PGD(model, eps=0.2, step_size=0.02, steps=10, targeted=True))
    ]
    rows = {"none": Defended(model, lambda x, ids=None, draw=0: x.detach())}
    data = scenes(4, model)
    report = Evaluation(model, data, attackers, rows, eps=0.2, target=3).run(tmp_path)
    clean, attacked = (report.reached("none", name).value for name in ("clean", "PGD"))
    assert attacked > clean
    assert report.document()["rows"]["none"]["PGD"]["target"]["value"] == attacked
    with torch.no_grad():
        predicted = model(data.tensors[0]).argmax(1)
    if dense:
        counts = data.tensors[1] != 255
        hit = (predicted[counts] == 3).sum()  # wherever it is, the target is what was wanted there
        assert clean == pytest.approx(100 * float(hit / counts.sum()), abs=0.01)
    else:
        assert clean == pytest.approx(100 * float((predicted == 3).float().mean()))
    with pytest.raises(ValueError, match="target is 7; the model has 5 classes"):
        Evaluation(model, data, attackers, rows, eps=0.2, target=7).run(tmp_path / "b")


def test_images_of_the_target_are_left_out(tmp_path: Path) -> None:
    model = cases.classifier().eval()
    x, y = scenes(6, model).tensors
    y[:2], y[2:] = 3, torch.where(y[2:] == 3, 1, y[2:])
    attackers = [
        Attacker("PGD", lambda model, defended: attacks.PGD(model, eps=1.0, step_size=0.1, steps=20, targeted=True))
    ]
    rows = {"none": Defended(model, lambda x, ids=None, draw=0: x.detach())}
    report = Evaluation(model, TensorDataset(x, y), attackers, rows, eps=1.0, target=3).run(tmp_path)
    assert (report.images, report.left_out) == (4, 2)
    assert report.reached("none", "PGD").value == 100
    document = report.document()
    assert document["left out"] == 2
    assert document["rows"]["none"]["worst"]["target"]["value"] == 100
    assert not report.warnings()  # who has arrived needs no gradient
    with pytest.raises(ValueError, match="target is 3, which all images are labeled with already"):
        Evaluation(model, TensorDataset(x[:2], y[:2]), attackers, rows, eps=1.0, target=3)


def test_the_accuracy_of_the_worst_case_is_that_of_fewest_right_labels(tmp_path: Path) -> None:
    attackers = [PGD, Attacker("CW", lambda model, defended: attacks.CW(model, steps=2), knows=False)]
    report = evaluation(attackers=attackers).run(tmp_path)
    for defense, cells in report.document()["rows"].items():
        found = np.stack([report.results[defense][name] for name in ("clean", "PGD", "CW")])
        right, counted = np.trace(found, axis1=2, axis2=3), found[0].sum()
        assert cells["worst"]["accuracy"] == pytest.approx(100 * right.min(0).sum() / counted)


def test_totals_of_many_samples_are_those_of_each() -> None:
    confusions = np.random.default_rng(0).integers(0, 50, (7, 4, 4))
    index = np.random.default_rng(1).integers(0, 7, (3, 5, 9))
    assert np.array_equal(_totals(confusions, index), confusions[index].sum(-3))
    assert np.array_equal(_totals(confusions, index[0, 0]), confusions[index[0, 0]].sum(0))


def test_per_class_figures(tmp_path: Path) -> None:
    report = evaluation(attackers=[]).run(tmp_path)
    cell, total = report.document()["rows"]["none"]["clean"], report.results["none"]["clean"].sum(0)
    iou = [value for value in cell["IoU"] if value is not None]
    assert np.mean(iou) == pytest.approx(cell["value"])
    assert cell["accuracy"] == pytest.approx(100 * np.trace(total) / total.sum())
    present = total.sum(1) > 0
    recall = np.diag(total)[present] / total.sum(1)[present]
    assert cell["mean accuracy"] == pytest.approx(100 * recall.mean())


def test_costs() -> None:
    from equifast.evaluate import cost

    x = cases.images(1, 40, 60)
    bounded = Purifier(MODEL, steps=1, max_memory=10**7)
    first = [cost(MODEL, Defended(MODEL, bounded), x, rounds=1).passes for _ in range(2)]
    assert first[0] == first[1]  # what a first call looks at is no part of it
    none = cost(MODEL, Defended(MODEL, lambda x, ids=None, draw=0: x.detach()), x, rounds=2)
    assert none.passes == 1
    half = defenses.Averaging(MODEL, [views.Resize(0.5)])
    assert cost(MODEL, half, x, rounds=1).passes == pytest.approx(1.25)
    flips = Purifier(MODEL, views=[views.Flip()], steps=3, view_gradient=1, average=False, start="origin")
    fast = cost(MODEL, Defended(MODEL, flips), x, rounds=1)
    assert fast.passes == 3 * 2 * 3 + 1
    assert fast.mebibytes > none.mebibytes > 0
    assert fast.times > 1
    with pytest.raises(ValueError, match="x is empty"):
        cost(MODEL, half, x[:0])


def test_figures_are_written(tmp_path: Path) -> None:
    strength = Strength(eps=EPS, steps=1, eot=1, queries=2, weights=(0.0,), dtype="float32")
    rows = {"fast": Defended(MODEL, Purifier(MODEL, steps=1)), "averaging": defenses.Averaging(MODEL)}
    made = evaluation(scenes(3, size=(12, 16)), attackers=adaptive(strength), defenses=rows, votes=2)
    report = made.run(tmp_path)
    found = plots.write_all(made, report, tmp_path, 2, ["fast"])
    assert [path.name for path in found] == [
        f"{n}.{s}" for n in ("comparison", "radius", "worst-fast") for s in ("png", "svg")
    ]
    for path in found:
        if path.suffix == ".png":
            assert np.asarray(Image.open(path)).std() > 10  # something is drawn
        else:
            assert path.read_text().startswith("<?xml")
    place = report.worst_images("fast", 1)[0]
    again = made.again(place, "fast", "BPDA")
    matrix = report.results["fast"]["BPDA"][place]
    counts = again["labels"] != 255
    assert int((again["after"] == again["labels"])[counts].sum()) == np.trace(matrix)


# The files that data come from, and the command.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    x, y = scenes(size=(10, 14)).tensors
    pixels = (x * 255).byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "dense.npz", images=pixels, labels=y.numpy())
    for name in ("images", "labels", "cats", "dogs"):
        (tmp_path / "dense" / name if name in ("images", "labels") else tmp_path / "classes" / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(pixels, y.numpy().astype(np.uint8), strict=True)):
        Image.fromarray(image).save(tmp_path / "dense" / "images" / f"{i}.png")
        Image.fromarray(label).save(tmp_path / "dense" / "labels" / f"{i}.png")
        Image.fromarray(image).save(tmp_path / "classes" / ("cats", "dogs")[i % 2] / f"{i}.png")
    (tmp_path / "model.py").write_text(
        f"import sys\nsys.path.append({str(Path(cases.__file__).parent)!r})\nimport cases\n"
        "def dense():\n    return cases.dense()\n"
    )
    return tmp_path


def test_data_from_files(folder: Path) -> None:
    arrays, files = open_data(folder / "dense.npz"), open_data(folder / "dense")
    assert len(arrays) == len(files) == 6
    for i in range(6):
        (x, y), (also, labels) = arrays[i], files[i]
        assert torch.equal(x, also)
        assert torch.equal(y, labels)
        assert y.dtype == torch.int64
    few = open_data(folder / "dense", images=2, size=(20, 12))
    assert few[1][0].shape == (3, 20, 12)
    assert few[1][1].shape == (20, 12)
    assert torch.equal(open_data(folder / "dense.npz", images=2)[1][0], arrays[5][0])
    classes = open_data(folder / "classes")
    assert [int(classes[i][1]) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    (folder / "classes" / ".ipynb_checkpoints").mkdir()
    (folder / "classes" / "__MACOSX").mkdir()
    assert int(open_data(folder / "classes")[5][1]) == 1
    (folder / "classes" / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing has no images; every folder there is a class"):
        open_data(folder / "classes")


def test_image_files_are_read_as_elsewhere(tmp_path: Path) -> None:
    """Turned as they are seen, and none of more than 8 bits, which would be white."""
    (tmp_path / "a").mkdir()
    turned = Image.new("RGB", (4, 3))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a" / "turned.jpg", exif=exif)
    assert open_data(tmp_path)[0][0].shape == (3, 4, 3)
    assert open_data(tmp_path, size=(6, 5))[0][0].shape == (3, 6, 5)
    Image.new("I;16", (4, 3)).save(tmp_path / "a" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png cannot be read: it has pixels of mode .*; it must have 8 bits"):
        open_data(tmp_path)[0]


def test_data_that_are_refused(folder: Path) -> None:
    np.savez(folder / "half.npz", images=np.zeros((1, 4, 4, 3)), labels=np.zeros(1))
    np.savez(folder / "other.npz", x=np.zeros(1))
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(folder / "float.npz", images=pixels, labels=np.full(2, 1.7))
    np.savez(folder / "flat.npz", images=pixels, labels=np.zeros((2, 4), np.int64))
    (folder / "empty").mkdir()
    (folder / "dense" / "labels" / "3.png").unlink()
    for path, settings, sentence in (
        ("half.npz", {}, "must have as many, uint8"),
        ("other.npz", {}, "has x; it must have images and labels"),
        ("float.npz", {}, r"has labels \(2,\) of float64; they must be integers, \(N,\) or \(N, H, W\)"),
        ("flat.npz", {}, r"has labels \(2, 4\) of int64; they must be integers"),
        ("dense", {}, "3.png is not there; every image must have a file of labels"),
        ("empty", {}, "has no images"),
        ("absent", {}, "is neither a folder nor an .npz file"),
        ("dense.npz", {"images": 7}, "images is 7; .* has 6"),
        ("dense.npz", {"size": (2, 2)}, "arrays are taken as they are"),
    ):
        with pytest.raises(ValueError, match=sentence):
            open_data(folder / path, **settings)  # type: ignore[arg-type]


def test_damaged_files_are_named(folder: Path) -> None:
    whole = (folder / "dense.npz").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:40] + bytes(200) + whole[240:]):
        (folder / "damaged.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.npz cannot be read"):
            open_data(folder / "damaged.npz")
    data = open_data(folder / "dense")
    for kind in ("images", "labels"):
        path = sorted((folder / "dense" / kind).iterdir())[0]
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(ValueError, match=f"{kind}/{path.name} cannot be read"):
            data[0]
        path.unlink()
        with pytest.raises(FileNotFoundError, match=path.name):
            data[0]


def command(folder: Path, *more: object) -> list[str]:
    settings = ["--model", f"{folder / 'model.py'}:dense", "--steps", "2", "--images", "4", *map(str, more)]
    return ["evaluate", str(folder / "dense.npz"), "-o", str(folder / "out"), *settings]


def test_command(folder: Path) -> None:
    plain = ["--attack", "PGD", "--defense", "none", "--defense", "fast"]
    done = CliRunner().invoke(app, command(folder, *plain, "--against", "none"))
    assert done.exit_code == 0, done.output
    assert "minus none" in done.output
    against = json.loads((folder / "out" / "table.json").read_text())["differences"]["fast"]
    assert set(against) == {"clean", "PGD", "worst"}
    single = [str(folder / "single") if a.endswith("out") else a for a in command(folder, *plain, "--against", "none")]
    done = CliRunner().invoke(app, [*single, "--images", "1"])
    assert done.exit_code == 0, done.output
    assert "NaN" not in (folder / "single" / "table.json").read_text()  # which is no JSON
    assert "│ PGD" in done.output
    document = json.loads((folder / "out" / "table.json").read_text())
    assert document["images"] == 4
    assert set(document["rows"]["none"]) == {"clean", "PGD", "worst", "worst, vote of 5"}
    assert set(json.loads((folder / "out" / "costs.json").read_text())) == {"none", "fast"}
    assert (folder / "out" / "comparison.svg").exists()
    lines = (folder / "out" / "table.md").read_text().splitlines()
    assert lines[2:4] == ["|  | none | fast |", "| --- | --- | --- |"]
    assert lines[4].startswith("| clean | ")
    aimed = ["--attack", "PGD", "--defense", "none", "--target", "1", "--votes", "2", "--panels", "1"]
    done = CliRunner().invoke(app, [str(folder / "aimed") if a.endswith("out") else a for a in command(folder, *aimed)])
    assert done.exit_code == 0, done.output
    assert "PGD: target" in done.output
    assert (folder / "aimed" / "worst-none.png").exists()
    more = ["--protocol", "adaptive", "--eot", "2", "--queries", "2", "--defense", "averaging", "--images", "2"]
    done = CliRunner().invoke(app, [str(folder / "other") if a.endswith("out") else a for a in command(folder, *more)])
    assert done.exit_code == 0, done.output
    assert "Square" in done.output
    quick = ["evaluate", str(folder / "dense"), "-o", str(folder / "quick"), "--model", f"{folder / 'model.py'}:dense"]
    done = CliRunner().invoke(app, [*quick, "--defense", "averaging-16", "--attack", "PGD", "--quick"])
    assert done.exit_code == 0, done.output
    assert "6 images" in done.output


MINE = """
import equifast
SHARE = {share}
def mine(model):
    return lambda x, ids=None, draw=0: x.detach() * SHARE
def quicker(model):
    return equifast.Defended(model, equifast.Purifier(model, steps=1))
"""


def test_command_with_a_defense_of_a_file(folder: Path) -> None:
    """Its row has the function's name, all differences too; once its file says otherwise it is another."""
    path = folder / "defenses.py"
    path.write_text(MINE.format(share=1))
    given = [
        "--defense",
        "none",
        "--defense",
        f"{path}:mine",
        "--defense",
        f"{path}:quicker",
        "--against",
        f"{path}:mine",
    ]
    run = command(folder, "--attack", "PGD", "--attack", "unrolled", *given, "--workers", "2")
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 0, done.output
    rows = json.loads((folder / "out" / "table.json").read_text())["rows"]
    assert set(rows) == {"none", "mine", "quicker"}
    assert json.loads((folder / "out" / "table.json").read_text())["against"] == "mine"
    assert rows["mine"]["PGD"] == rows["none"]["PGD"]
    assert "unrolled" not in rows["mine"]
    assert "unrolled" in rows["quicker"]
    path.write_text(MINE.format(share=0.5))
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 2
    assert "another defense mine (purifier.code" in done.output.replace("\n", " ")


def test_what_fails_names_its_row(folder: Path) -> None:
    """Of two defenses and two attacks the error tells which it was."""
    path = folder / "fails.py"
    path.write_text(
        "import equifast\n"
        "def late(model):\n"
        "    def purify(x, ids=None, draw=0):\n"
        "        if draw > 1:\n"
        "            raise RuntimeError('no more draws\\nof mine')\n"
        "        return x\n"
        "    return equifast.Defended(model, purify)\n"
    )
    given = ["--attack", "PGD", "--attack", "BPDA", "--defense", "none", "--defense", f"{path}:late", "--images", "2"]
    done = CliRunner().invoke(app, command(folder, *given, "--votes", "0"))
    assert done.exit_code == 2
    assert done.output.splitlines()[-1] == "equifast: no more draws; it was 'late', under 'BPDA'"

    def broken(x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        raise ValueError("broken")

    made = evaluation(attackers=[PGD], defenses={"mine": Defended(MODEL, broken)})
    with pytest.raises(ValueError, match="broken") as raised:  # in Python it is what it was, with a note
        made.run(folder / "mine")
    assert str(raised.value) == "broken"
    assert raised.value.__notes__ == ["it was 'mine', on clean images"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--defense", "none.py:fast"), "defense file 'none.py' does not exist"),
        (("--defense", "a.py:mine", "--defense", "b.py:mine"), "are both named 'mine'; names must differ"),
        (("--attack", "nuke"), "attack is 'nuke'; it must be one of FGSM; PGD"),
        (("--defense", "wall"), "defense is 'wall'; it must be one of none, random"),
        (("--protocol", "casual"), "protocol is 'casual'; it must be 'adaptive'"),
        (("--protocol", "adaptive", "--attack", "PGD"), "it brings its own"),
        (("--eps", "0"), "'--eps': '0' is no number above 0"),
        (("--eps", "nan"), "'--eps': 'nan' is no number above 0"),
        (("--eps", "1e400"), "'--eps': '1e400' is no number above 0"),
        (("--purify-eps", "a/b"), "'--purify-eps': 'a/b' is no number above 0"),
        (("--seed", "4294967295"), "'--seed'"),
        (("--fit", "nowhere"), "'--fit'"),
        (("--layer", "nowhere", "--study", "detection"), "layer is 'nowhere', which is no submodule of the model"),
        (("--study", "cost", "--preset", "paper"), "preset is given with study 'cost', which does not depend on it"),
        (
            ("--attack", "Evading", "--defense", "none"),
            "attack is 'Evading', which is for none of these defenses: none",
        ),
        (("--workers", "2", "--study", "cost"), "workers is 2 with a study; a study has one"),
        (
            ("--defense", "averaging-0"),
            "defense is 'averaging-0'; it must be one of none, random, averaging, averaging-N",
        ),
        (("--against", "wall", "--attack", "PGD"), "against is 'wall'; it must be one of none, averaging"),
        (("--against", "none", "--defense", "none"), "against is 'none', the only one there is; differences are"),
        (("--target", "9"), "target is 9; the model has 5 classes"),
        (("--target", "-1"), "target is -1; it must be an integer from 0"),
    ],
)
def test_command_refuses(folder: Path, more: tuple[str, ...], sentence: str) -> None:
    done = CliRunner().invoke(app, command(folder, *more))
    assert done.exit_code == 2
    assert sentence in done.output.replace("\n", " ")
    assert not (folder / "out" / "table.json").exists()


def asked(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, Any]:
    """What a command makes of its options, before anything is evaluated."""
    seen: dict[str, Any] = {}

    def stop(model: nn.Module, data: Any, attackers: Any, rows: Any, **settings: Any) -> None:
        attacks = {attacker.name: attacker.make(model, rows["fast"]) for attacker in attackers}
        seen.update(images=len(data), attacks=attacks, rows=rows, **settings)
        raise ValueError("that is enough")

    monkeypatch.setattr(command_evaluate, "Evaluation", stop)
    plain = ["evaluate", str(folder / "dense"), "-o", str(folder / "out"), "--model", f"{folder / 'model.py'}:dense"]
    done = CliRunner().invoke(app, [*plain, *more])
    assert "that is enough" in done.output
    return seen


def test_what_options_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = asked(monkeypatch, folder)
    assert list(plain["rows"]) == ["none", "averaging", "fast"]
    assert list(plain["attacks"]) == ["PGD", "through averaging", "BPDA"]
    pgd, fast = plain["attacks"]["PGD"], plain["rows"]["fast"].purifier
    assert (pgd.ascent.steps, pgd.ascent.ball.eps, pgd.seed) == (20, 4 / 255, 1)
    assert (fast.ascent.ball.eps, fast.seed) == (6 / 255, 0)
    assert (plain["eps"], plain["norm"], plain["votes"], plain["images"]) == (4 / 255, "linf", 5, 6)

    whole = asked(monkeypatch, folder, "--protocol", "adaptive", "--seed", "3", "--purify-eps", "8/255")
    assert list(whole["rows"]) == ["none", "averaging-12", "fast"]
    assert [type(v).__name__ for v in whole["rows"]["averaging-12"].views][:8] == [
        type(v).__name__ for v in views.paper()
    ]
    assert len(whole["rows"]["averaging-12"].views) == 12
    assert whole["votes"] == 5
    assert whole["attacks"]["BPDA, 20 draws"]._attack.eot == 20
    assert (whole["attacks"]["PGD"].seed, whole["rows"]["fast"].purifier.seed) == (4, 3)
    assert whole["rows"]["fast"].purifier.ascent.ball.eps == 8 / 255

    look = asked(monkeypatch, folder, "--protocol", "adaptive", "--quick", "--steps", "50", "--eot", "9")
    assert look["attacks"]["PGD"].ascent.steps == 10
    assert look["attacks"]["BPDA, 4 draws"]._attack.eot == 4
    assert look["attacks"]["Square, 100 queries"]._attack.ascent.steps == 100

    other = asked(monkeypatch, folder, "--norm", "l2", "--eps", "0.5", "--attack", "PGD", "--images", "2")
    assert (other["norm"], other["eps"], other["images"]) == ("l2", 0.5, 2)
    assert type(other["attacks"]["PGD"].ascent.ball).__name__ == "L2"


def test_killed_at_any_moment(folder: Path) -> None:
    """SIGKILL at random moments, until it ends by itself: nothing is lost, nothing twice, the table is the same."""
    asked = os.environ.get("EQUIFAST_KILLS")
    most = int(asked or 4)  # each starts Python anew
    x, y = scenes(2 * most, size=(10, 14)).tensors  # work for all of them, on a fast machine too
    np.savez(folder / "dense.npz", images=(x * 255).byte().permute(0, 2, 3, 1).numpy(), labels=y.numpy())
    some = ("--images", 2 * most if asked else 4)
    arguments = command(folder, "--batch", 1, "--defense", "fast", "--defense", "none", *some)
    whole = CliRunner().invoke(app, [str(folder / "whole") if a == str(folder / "out") else a for a in arguments])
    assert whole.exit_code == 0, whole.output
    chance, path, log, kills = random.Random(0), folder / "out" / "records.jsonl", folder / "log", 0
    # -P: the installed package, also where the suite is run from a source tree (which has no compiled module)
    python = [sys.executable, "-P", "-m", "equifast.cli"]
    while True:
        before = path.read_bytes() if path.exists() else b""
        with log.open("w") as stream:
            run = subprocess.Popen([*python, *arguments], stdout=stream, stderr=stream)
        # once it writes
        while run.poll() is None and (not path.exists() or path.stat().st_size <= len(before)):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 10 / most**2))  # so soon that there is work for all of them
        run.send_signal(signal.SIGKILL)
        assert run.wait() in (0, -signal.SIGKILL), log.read_text()
        ended = run.returncode == 0
        after = path.read_bytes()
        assert after.startswith(before[: before.rfind(b"\n") + 1])
        kills += not ended
        if ended or kills == most:
            break
    assert kills >= (most if asked else 2)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert records(folder / "out") == records(folder / "whole")
    assert (folder / "out" / "table.json").read_bytes() == (folder / "whole" / "table.json").read_bytes()


def test_workers_share_the_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command(folder, "--batch", 1, "--defense", "fast", "--defense", "none", "--attack", "BPDA")
    alone = [str(folder / "alone") if a == str(folder / "out") else a for a in arguments]
    done = CliRunner().invoke(app, alone)
    assert done.exit_code == 0, done.output
    # all is done by the workers
    monkeypatch.setattr(Evaluation, "_compute", idle)
    done = CliRunner().invoke(app, [*arguments, "--workers", "2"])
    assert done.exit_code == 0, done.output
    assert records(folder / "out") == records(folder / "alone")
    assert [path.name for path in (folder / "out").glob("records*")] == ["records.jsonl"]
    # with nothing left to do none is started
    monkeypatch.setattr(command_evaluate, "share", None)
    before = (folder / "out" / "records.jsonl").read_bytes()
    done = CliRunner().invoke(app, [*arguments, "--workers", "64"])
    assert done.exit_code == 0, done.output
    assert (folder / "out" / "records.jsonl").read_bytes() == before


def idle(made: Evaluation, parts: list[Any], cells: Any, kept: Records, progress: object) -> None:
    """In the place of `Evaluation._compute`, where nothing must be left."""
    assert all((image.key, *cell) in kept.results for batch in parts for image in batch for cell in cells)


def test_a_folder_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    manifest: dict[str, Any] = {"data": {}, "attackers": {}, "defenses": {}}
    with Records(tmp_path, manifest):
        for part in (None, Part(0, 2)):
            with pytest.raises(ValueError, match="is being written by another process; wait"):
                Records(tmp_path, manifest, part)
    with Records(tmp_path, manifest, Part(0, 2)) as first, Records(tmp_path, manifest, Part(1, 2)):
        first.add(iter([{"image": "a", "defense": "b", "attack": "c"}]))
        with pytest.raises(ValueError, match="is being written by another process; wait"):
            Records(tmp_path, manifest)
        with pytest.raises(ValueError, match=r"records-2-of-2\.jsonl is being written by another process; wait"):
            Records(tmp_path, manifest, Part(1, 2))
    assert set(Records(tmp_path, manifest).results) == {("a", "b", "c")}
    assert [path.name for path in tmp_path.glob("records*")] == ["records.jsonl"]


def test_workers_end_with_who_started_them(folder: Path) -> None:
    x, y = scenes(20, size=(10, 14)).tensors
    np.savez(folder / "dense.npz", images=(x * 255).byte().permute(0, 2, 3, 1).numpy(), labels=y.numpy())
    rows = ("--defense", "fast", "--defense", "none", "--attack", "PGD", "--images", "20")
    arguments = command(folder, "--batch", 1, *rows)
    python = [sys.executable, "-P", "-m", "equifast.cli"]
    run = subprocess.Popen([*python, *arguments, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = folder / "out"
    while run.poll() is None and not any(path.stat().st_size for path in out.glob("records-*-of-2.jsonl")):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    printed, _ = run.communicate(timeout=60)  # which workers hold open as long as they are there
    assert run.returncode == -signal.SIGKILL, printed.decode()
    kept = b"".join(path.read_bytes() for path in out.glob("records-*-of-2.jsonl"))
    with (out / "records-1-of-2.jsonl").open("ab") as file:
        file.write(b'{"image": "half a li')
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert [path.name for path in out.glob("records*")] == ["records.jsonl"]
    assert all(line in (out / "records.jsonl").read_bytes() for line in kept.splitlines(keepends=True)[:-1])
    assert len(records(out)) == 20 * 2 * 2


def test_a_worker_that_fails(folder: Path) -> None:
    (folder / "model.py").write_text(
        "import multiprocessing, torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        if multiprocessing.parent_process() is not None:\n"
        "            raise RuntimeError('this model does not work')\n"
        "        return torch.cat([x, x], 1)\n"
        "def dense():\n    return Model()\n"
    )
    arguments = command(folder, "--defense", "none", "--attack", "PGD", "--workers", "2", "--batch", "1")
    python = [sys.executable, "-P", "-m", "equifast.cli"]
    done = subprocess.run([*python, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "this model does not work" in done.stderr
    assert "Traceback" not in done.stderr
    assert all("this model does not work" in line for line in done.stderr.splitlines() if line.startswith("equifast: "))
    assert not (folder / "out" / "table.json").exists()


@pytest.mark.parametrize("model", [MODEL, cases.classifier().eval()])
def test_a_defense_with_random_numbers_of_its_own_is_a_warning(tmp_path: Path, model: nn.Module) -> None:
    features, own = None if model is MODEL else "features", torch.Generator().manual_seed(0)
    rows = {
        "own": Defended(model, lambda x, ids=None, draw=0: (x + 0.3 * torch.randn(x.shape, generator=own)).clamp(0, 1)),
        "random": Defended(model, defenses.RandomNoise(0.3)),
        "fast": Defended(model, Purifier(model, features, steps=1)),
        "none": Defended(model, nothing),
    }
    warnings = Evaluation(model, scenes(3, model=model), [PGD], rows, eps=EPS).run(tmp_path).warnings()
    assert [line.partition(":")[0] for line in warnings if "gives another output" in line] == ["own"]
