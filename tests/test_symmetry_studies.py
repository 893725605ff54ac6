"""The studies of symmetry, end to end on a few digits: what they write, going on, and refusing other settings."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import hybrids
import profiles
import spatial_training
import typer
from _symmetry import Kept, open_split

TINY = {"kind": "digits", "seeds": 1, "epochs": 1, "train_images": 96, "images": 12}


@pytest.mark.parametrize("study", [spatial_training, profiles])
def test_study(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "RADII", {"digits": (0, 0.1)})
    monkeypatch.setattr(profiles, "DEGREES", (0, 180))
    monkeypatch.setattr(profiles, "ROTATIONS", (0, 180))
    monkeypatch.setattr(profiles, "TRAINED_AGAINST", {"digits": (0.1,)})
    study.main(tmp_path, **TINY)
    written = json.loads((tmp_path / "table.json").read_text())
    assert len(written["table"]) >= 5
    for row in written["table"].values():
        assert all(0 <= cell["value"] <= 100 for cell in row.values())
    if study is spatial_training:
        assert all(row["grid"]["value"] <= row["clean"]["value"] for row in written["table"].values())
    assert list(tmp_path.glob("*.png"))
    assert list(tmp_path.glob("*.svg"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json") if path.name == "measured.json"}
    assert before
    (tmp_path / "table.json").unlink()
    study.main(tmp_path, **TINY)
    assert json.loads((tmp_path / "table.json").read_text()) == written
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(typer.BadParameter, match=r"epochs \(was 1, is 2\)"):
        study.main(tmp_path, **{**TINY, "epochs": 2})


def test_kept_refuses_what_was_dropped(tmp_path: Path) -> None:
    Kept(tmp_path, {"a": 1, "b": (1, 2)})
    Kept(tmp_path, {"a": 1, "b": (1, 2)})
    with pytest.raises(typer.BadParameter, match=r"a \(was 1, is None\)"):
        Kept(tmp_path, {"b": (1, 2)})


def test_digits() -> None:
    split = open_split("digits", Path("nowhere"))
    assert split.x.shape == (500, 1, 28, 28)
    assert len(split.train) == 1297
    assert split.x.min() >= 0
    assert split.x.max() <= 1
    assert not split.x[..., :4, :].any()  # the border that turns and shifts may use
    learned = {image.numpy().tobytes() for image in split.train.tensors[0]}
    assert sum(image.numpy().tobytes() in learned for image in split.x) < 5  # but for digits that are there twice


def test_a_study_of_image_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opencv: None) -> None:
    """Class folders and arrays; three classes."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for number in range(12):
        folder = data / "train" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    test = {"images": rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), "labels": np.array([0, 1, 2, 1, 0])}
    np.savez(data / "test.npz", **test)
    split = open_split("files", data)
    assert split.x.shape == (5, 3, 32, 32)
    assert split.classes == 3
    assert len(split.train) == 12
    monkeypatch.setattr(hybrids, "STEPS", {"PGD": 2, "CWL2": 3})
    monkeypatch.setattr(hybrids, "CLEVER", {"blocks": 3, "samples": 4})
    hybrids.main(tmp_path / "study", kind="files", data=data, seeds=1, epochs=1, batch=4, width=0.125, images=4,
                 corrupted_images=2, scores=1, train_images=8, as_released=False)  # fmt: skip
    assert set(json.loads((tmp_path / "study" / "table.json").read_text())["table"]) == set(hybrids.NETWORKS)
    np.savez(data / "test.npz", images=test["images"][:, :8], labels=test["labels"])
    with pytest.raises(typer.BadParameter, match="images must be square"):
        open_split("files", data)
    with pytest.raises(typer.BadParameter, match="nowhere"):
        open_split("files", tmp_path / "nowhere")


@pytest.mark.parametrize("study", [hybrids, profiles, spatial_training])
def test_studies_refuse_a_kind_that_is_not_theirs(study: Any, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="kind is 'mnist'; it must be digits, cifar10 or files"):
        study.main(tmp_path / "study", kind="mnist")
    assert not (tmp_path / "study").exists()


def test_the_first_layer_wants_colors(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"kind digits has images \(1, 28, 28\)"):
        hybrids.main(tmp_path, kind="digits")


def test_the_cut_of_the_released_code() -> None:
    """What was darker than mid-gray is mid-gray; what is lighter is within the ball."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    x, y = torch.rand(5, 3, 8, 8), torch.randint(0, 4, (5,))
    for steps in (1, 5):
        found = hybrids.cut(model, x, y, 2 / 255, steps)
        assert (found - x.clamp(min=0.5)).abs().max() <= 2 / 255 + 1e-6
        assert found.min() >= 0.5


def test_training_mode_changes_no_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    x, y = torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64)
    hybrids.right(model, x, y, training=True)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not model.training
    assert model[1].momentum == 0.1
