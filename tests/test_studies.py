"""The studies of the paper: what their rows are, and that they run from the command line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from equifast import Defended, Purifier, attacks
from equifast.cli import app, evaluate
from equifast.evaluate import Attacker, Evaluation, plots
from equifast.evaluate.studies import STUDIES, Constrained, Make
from equifast.purifier import DefendedModel

MODEL = cases.dense().eval()
EPS = 6 / 255


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are measured once, which takes a third of the time."""
    monkeypatch.setattr(evaluate, "_ROUNDS", 1)


def make(**changed: Any) -> Make:
    return Make(**{"model": MODEL, "features": None, "preset": "fast", "eps": EPS, "seed": 0, **changed})


def gradient(purifier: Purifier, x: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.arange(len(x))
    with purifier._objective(x, ids, 0, None) as (images, objective, _, _):
        return objective.gradient(images, 0)


def test_all_positions_are_the_purifier() -> None:
    """With every position constrained, the value and the gradient are those of the purifier with the whole gradient."""
    x = cases.images(2).double()
    settings: dict[str, Any] = {"eps": EPS, "seed": 3, "dtype": "float32", "fold": False}
    model = cases.dense().double().eval()
    whole = gradient(Purifier(model, view_gradient=1, followed="all", **settings), x)
    for positions in (20 * 28, 10**6):
        for a, b in zip(gradient(Constrained(model, positions=positions, **settings), x), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    few = gradient(Constrained(model, positions=40, **settings), x)
    assert not torch.allclose(few[0], whole[0])


def test_positions_that_are_not_kept_do_not_count() -> None:
    """What features are where nothing is asked changes neither value nor gradient."""
    purifier = Constrained(MODEL, eps=EPS, positions=30, preset="fast", dtype="float32", fold=False)
    x = cases.images(1)
    with purifier._objective(x, None, 0, None) as (images, objective, _, _):
        kept = objective._kept(objective.features(images))  # type: ignore[attr-defined]
        assert int(kept.sum()) == 30
        sampled = objective.sample(images, 0, None)
        before = objective.columns(images, sampled)
        anchor = objective.anchor

        def spoiled(image: Tensor) -> Tensor:
            return torch.where(kept, anchor(image), 1e3)

        objective.anchor = spoiled  # type: ignore[method-assign]
        torch.testing.assert_close(objective.columns(images, sampled), before)
    with pytest.raises(ValueError, match="positions is 0; it must be an integer from 1"):
        Constrained(MODEL, positions=0)
    assert purifier.settings()["positions"] == 30


def test_the_result_does_not_depend_on_the_batch() -> None:
    purifier = Constrained(MODEL, eps=EPS, positions=30)
    x, ids = cases.images(3), torch.arange(3)
    together = purifier(x, ids)
    for i in range(3):
        assert torch.equal(purifier(x[i : i + 1], ids[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("model", [MODEL, cases.classifier().eval()])
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs(tmp_path: Path, name: str, model: nn.Module) -> None:
    features = None if model is MODEL else "features"
    sweep = STUDIES[name](make(model=model, features=features))
    settings = [json.dumps(_settings(defended), sort_keys=True) for defended in sweep.defenses.values()]
    for defended in sweep.defenses.values():  # of twenty steps two will do
        purifier = getattr(defended, "purifier", None)
        if isinstance(purifier, Purifier):
            purifier.ascent = dataclasses.replace(purifier.ascent, steps=min(2, purifier.ascent.steps))
    x = cases.images(2, 16, 20)
    with torch.no_grad():
        y = model(x).argmax(1)
    pgd = Attacker("PGD", lambda model, defended: attacks.PGD(model, steps=2), knows=False)
    first = next(iter(sweep.defenses.values()))

    def some(model: nn.Module, defended: DefendedModel) -> attacks.PGD | None:
        return None if defended is first else attacks.PGD(model, steps=1)

    attackers = [pgd, Attacker("some", some)]  # of some rows alone
    made = Evaluation(model, TensorDataset(x, y), attackers, sweep.defenses, eps=4 / 255, score=sweep.score)
    report = made.run(tmp_path)
    assert set(report.table()) == set(sweep.defenses)
    if sweep.places is not None:
        assert set(sweep.places) == set(sweep.defenses)
    assert set(report.table()[next(iter(sweep.defenses))]) < {"clean", "PGD", "some", "worst"}
    assert len(set(settings)) == len(settings), "two rows are the same"
    for path in plots.save(plots.sweep(report, sweep), tmp_path / name):
        assert path.stat().st_size > 1000


def _settings(defended: DefendedModel) -> Any:
    purifier = getattr(defended, "purifier", None)
    if isinstance(purifier, Purifier):
        return purifier.settings()
    return [type(purifier).__name__, repr(getattr(defended, "views", None))]


def test_similarities_are_those_of_what_is_predicted_from(tmp_path: Path) -> None:
    sweep = STUDIES["equivariance"](make())
    x = cases.images(3, 16, 20)
    y = torch.zeros(3, 16, 20, dtype=torch.int64)
    made = Evaluation(MODEL, TensorDataset(x, y), [], sweep.defenses, eps=4 / 255, score=sweep.score)
    report = made.run(tmp_path)
    assert sweep.score is not None
    ids = torch.tensor([image.id for image in made.images])
    x = x[[image.index for image in made.images]]
    strong = sweep.defenses["strong"]
    assert isinstance(strong, Defended)
    for name, shown in (("none", x), ("strong", strong.purifier(x, ids=ids, draw=0))):
        expected = sweep.score.score(shown, ids).double().numpy()
        assert np.array_equal(report.similarities[name]["clean"], expected)
    assert report.document()["rows"]["none"]["clean"]["similarity"]["value"] == pytest.approx(
        100 * report.similarities["none"]["clean"].mean()
    )
    assert report.similarity("strong", "clean").value > report.similarity("none", "clean").value


def test_command(tmp_path: Path) -> None:
    x = cases.images(3, 12, 16)
    with torch.no_grad():
        y = MODEL(x).argmax(1)
    np.savez(tmp_path / "data.npz", images=(x * 255).byte().permute(0, 2, 3, 1).numpy(), labels=y.numpy())
    (tmp_path / "model.py").write_text(
        f"import sys\nsys.path.append({str(Path(cases.__file__).parent)!r})\nimport cases\n"
        "def dense():\n    return cases.dense()\n"
    )
    others = (cases.images(4, 12, 16, seed=9) * 255).byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "others.npz", images=others, labels=np.zeros((4, 12, 16), np.int64))
    base = ["evaluate", str(tmp_path / "data.npz"), "--model", f"{tmp_path / 'model.py'}:dense", "--steps", "1"]

    def run(*more: str) -> Any:
        return CliRunner().invoke(app, [*base, *more])

    done = run("-o", str(tmp_path / "bounds"), "--study", "bounds", "--attack", "PGD", "--images", "1")
    assert done.exit_code == 0, done.output
    assert "2/255" in done.output
    assert json.loads((tmp_path / "bounds" / "table.json").read_text())["votes"] == 0
    assert (tmp_path / "bounds" / "bounds.svg").exists()
    assert set(json.loads((tmp_path / "bounds" / "costs.json").read_text())) >= {"2/255", "12/255"}
    done = run("-o", str(tmp_path / "equivariance"), "--study", "equivariance", "--attack", "PGD", "--images", "1")
    assert done.exit_code == 0, done.output
    assert "similarity" in (tmp_path / "equivariance" / "table.json").read_text()
    heads = ["--defense", "rotation", "--defense", "contrastive@body", "--fit", str(tmp_path / "others.npz")]
    for _ in range(2):  # the second time the heads are there
        done = run("-o", str(tmp_path / "heads"), "--attack", "PGD", *heads)
        assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "heads").glob("rotation-*.safetensors"))) == 1
    done = run("-o", str(tmp_path / "heads"), "--attack", "PGD", *heads[:4])  # without the data they were trained on
    assert done.exit_code == 0, done.output
    before = (tmp_path / "heads" / "records.jsonl").read_bytes()
    done = run("-o", str(tmp_path / "heads"), "--attack", "PGD", *heads, "--fit-images", "2")  # other heads
    assert done.exit_code == 2
    assert "another defense rotation" in done.output.replace("\n", " ")
    assert (tmp_path / "heads" / "records.jsonl").read_bytes() == before
    study = json.loads((tmp_path / "heads" / "study.json").read_text())
    assert study["defenses"]["contrastive@body"]["purifier"]["features"] == "body"
    for more, sentence in (
        (["--study", "luck"], "study is 'luck'; it must be one of equivariance, views"),
        (["--study", "views", "--defense", "none"], "study is given with defenses"),
        (["--defense", "rotation"], "needs one trained head, of which"),
        (["--study", "views", "--preset", "slow"], "preset is 'slow'"),
    ):
        done = run("-o", str(tmp_path / "refused"), *more)
        assert done.exit_code == 2
        assert sentence in done.output.replace("\n", " ")
