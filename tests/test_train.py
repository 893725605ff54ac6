"""Training: what the recipes learn from, going on where it stopped, and bad input."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from equifast import attacks, train
from equifast.nn import GCNN, StdCNN
from equifast.spatial import Grid, transform
from equifast.train import Recipe, crop_and_flip, rotate_and_shift

LINF = functools.partial(attacks.PGD, eps=0.1, step_size=0.125, steps=1)
GRID = Grid(degrees=15, pixels=1)
WORST = functools.partial(attacks.Spatial, search="worst-of-k", k=3, grid=GRID)


def bars(count: int = 96, seed: int = 0) -> TensorDataset:
    """Noisy images of one bar, at one of three heights, 16x16."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = 0.3 * torch.rand((count, 1, 16, 16), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 + 5 * label : 4 + 5 * label] += 0.5
    return TensorDataset(images, labels)


def small(kind: Any = StdCNN) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(1, 3, size=16, widths=(4, 8), hidden=16)
    return model


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


RECIPES = {
    "ordinary": Recipe(),
    "augmented": Recipe(augment=crop_and_flip),
    "by chance": Recipe(transform=functools.partial(rotate_and_shift, grid=GRID)),
    "by chance, KL": Recipe(transform=functools.partial(rotate_and_shift, grid=GRID), regularizer="kl"),
    "fast adversarial": Recipe(adversary=LINF),
    "worst of k": Recipe(adversary=WORST),
    "S-PGD, L2": Recipe(
        adversary=functools.partial(attacks.Spatial, search="spgd", k=1, steps=2, grid=GRID), regularizer="l2"
    ),
    "KL adversary, on clean": Recipe(
        adversary=functools.partial(WORST, objective="kl"), regularizer="kl", weight=2.0, on="clean"
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_learn(name: str) -> None:
    model, data = small(), bars()
    log = train.train(model, data, RECIPES[name], epochs=8, batch=16, rate=0.05)
    assert [row["epoch"] for row in log] == list(range(1, 9))
    assert log[-1]["loss"] < log[0]["loss"]
    assert not model.training
    if name == "ordinary":
        assert accuracy(model, data) > 0.9


def test_end_to_end() -> None:
    """A network trained on the worst of k is better under the grid than an ordinary one."""
    data, (x, y) = bars(192), bars(48, seed=1).tensors
    found = {}
    for name in ("ordinary", "worst of k"):
        model = small()
        train.train(model, data, RECIPES[name], epochs=12, batch=16, rate=0.05)
        moved = attacks.Spatial(model, grid=Grid(15, 1, (5, 3, 3)))(x, y)
        found[name] = accuracy(model, TensorDataset(moved, y))
    assert found["worst of k"] > found["ordinary"] + 0.2


def test_seed_and_precision() -> None:
    """The same seed gives the same weights, another does not, and the global generator stays as it was."""
    weights = []
    for seed in (0, 0, 1):
        model = small()
        before = torch.get_rng_state()
        train.train(model, bars(), RECIPES["worst of k"], epochs=1, batch=16, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.float32


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [3, 6, 7, 16])
def test_stopped_and_started_again(tmp_path: Path, at: int) -> None:
    """Dropout, batch norm, momentum, schedule and attacks go on as if nothing had been."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)]
        return nn.Sequential(*body, nn.Linear(4 * 14 * 14, 3))

    settings: dict[str, Any] = {"epochs": 3, "batch": 16, "rate": 0.01}
    recipe = Recipe(augment=crop_and_flip, adversary=LINF)
    whole = build()
    expected = train.train(whole, bars(), recipe, **settings)

    def stop(done: int, total: int) -> None:
        assert total == 18
        if done == at:
            raise Stopped

    with pytest.raises(Stopped):
        train.train(build(), bars(), recipe, folder=tmp_path, progress=stop, **settings)
    model = build()
    log = train.train(model, bars(), recipe, folder=tmp_path, **settings)
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)
    for row, other in zip(log, expected, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert json.loads((tmp_path / "log.json").read_text()) == log
    assert not list(tmp_path.glob("*.partial"))
    # and when it is done there is nothing left to do
    again = build()
    assert train.train(again, bars(), recipe, folder=tmp_path, **settings) == log
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.02}, r"rate \(was 0.01, is 0.02\)"),
        ({"recipe": Recipe(adversary=WORST)}, r"adversary \(was None, is .Spatial"),
        ({"data": bars(80)}, r"images \(was 96, is 80\)"),
        ({"model": small(GCNN)}, "other settings: model"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    given = {"model": small(), "data": bars(), "recipe": Recipe(), "rate": 0.01}
    train.train(**given, epochs=1, folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        train.train(**{**given, **change}, epochs=1, folder=tmp_path)


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is no checkpoint of a training"):
        train.train(small(), bars(), epochs=1, folder=tmp_path)
    seen: list[Any] = []
    with pytest.raises(OSError, match=r"File exists|Not a directory"):  # before the first epoch
        train.train(small(), bars(), epochs=1, folder=tmp_path / "checkpoint.pt", progress=lambda *at: seen.append(at))
    assert not seen


@pytest.mark.parametrize("kind", ["kl", "l2"])
@pytest.mark.parametrize("on", ["clean", "transformed", "both"])
def test_loss_is_as_stated(kind: str, on: str) -> None:
    """The first step's figures by hand: the model is in training mode and sees both halves as one batch."""

    def darker(images: Tensor, generator: torch.Generator) -> Tensor:
        return images / 2

    data = bars(16)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 3))
    x, y = data.tensors
    model.train()
    clean, moved = model(torch.cat((x, x / 2))).detach().split(16)
    entropies = {"clean": functional.cross_entropy(clean, y), "transformed": functional.cross_entropy(moved, y)}
    entropies["both"] = (entropies["clean"] + entropies["transformed"]) / 2
    kl = functional.kl_div(moved.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="batchmean")
    penalty = kl if kind == "kl" else ((clean - moved) ** 2).sum(1).mean() / 4
    recipe = Recipe(transform=darker, regularizer=kind, on=on)
    (row,) = train.train(model, data, recipe, epochs=1, batch=16, dtype="float32")
    assert row["cross-entropy"] == pytest.approx(float(entropies[on]), rel=1e-5)
    assert row["penalty"] == pytest.approx(float(penalty), rel=1e-4)
    factor = {"kl": 8, "l2": 1}[kind]
    assert row["loss"] == pytest.approx(float(entropies[on] + factor * penalty), rel=1e-4)


def test_dense_labels_and_void() -> None:
    x, y = torch.rand(8, 3, 12, 12), torch.randint(0, 2, (8, 12, 12))
    y[:, :3] = 255
    model = nn.Conv2d(3, 2, 3, padding=1)
    log = train.train(model, TensorDataset(x, y), Recipe(adversary=LINF), epochs=1, batch=4)
    assert math.isfinite(log[0]["loss"])
    assert 0 <= log[0]["accuracy"] <= 1


def test_a_batch_that_is_void() -> None:
    x, y = torch.rand(4, 3, 12, 12), torch.full((4, 12, 12), 255)
    (row,) = train.train(nn.Conv2d(3, 2, 3, padding=1), TensorDataset(x, y), epochs=1, batch=4)
    assert row["loss"] == 0


def test_class_255_of_images_is_a_class() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 300))
    data = TensorDataset(torch.rand(8, 1, 4, 4), torch.full((8,), 255))
    log = train.train(model, data, epochs=20, batch=8, rate=0.5, dtype="float32")
    assert log[0]["loss"] > 4
    assert log[-1]["accuracy"] == 1


def test_dense_labels_are_not_moved() -> None:
    data = TensorDataset(torch.rand(4, 3, 12, 12), torch.zeros(4, 12, 12, dtype=torch.int64))
    for recipe in (Recipe(augment=crop_and_flip), RECIPES["by chance"]):
        with pytest.raises(ValueError, match="moves images and not their dense labels"):
            train.train(nn.Conv2d(3, 2, 3, padding=1), data, recipe, epochs=1, batch=4)


def test_bfloat16_and_seeds_far_apart() -> None:
    found = []
    for seed, dtype in ((0, "bfloat16"), (256, "bfloat16"), (0, "float32")):
        model = small()
        train.train(model, bars(), epochs=1, batch=16, seed=seed, dtype=dtype)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    # the ways are of 0.06; rounding takes 3% of one away, another seed a third
    start = torch.cat([p.detach().flatten() for p in small().parameters()])
    way = (found[2] - start).norm()
    assert (found[0] - found[2]).norm() < 0.1 * way
    assert (found[1] - found[0]).norm() > 0.2 * way


def test_numbers_of_validation_can_be_of_numpy(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"validate": lambda model: {"a": np.float64(0.5), "b": torch.tensor(2.0)}}
    train.train(small(), bars(), epochs=1, folder=str(tmp_path), **settings)
    assert train.train(small(), bars(), epochs=1, folder=tmp_path, **settings)[0]["a"] == 0.5


def test_validation_goes_into_the_log() -> None:
    modes = []

    def validate(model: nn.Module) -> dict[str, float]:
        modes.append(model.training)
        return {"validation": 0.5}

    log = train.train(small(), bars(), epochs=2, validate=validate)
    assert modes == [False, False]
    assert [row["validation"] for row in log] == [0.5, 0.5]


def test_augmentation_stays_in_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 9, 7)
    cropped = crop_and_flip(x, generator)
    assert cropped.shape == x.shape
    windows = functional.pad(x, (4, 4, 4, 4)).unfold(2, 9, 1).unfold(3, 7, 1).flatten(2, 3)
    for image, places in zip(cropped, windows.transpose(1, 2), strict=True):
        assert any(torch.equal(place, image) or torch.equal(place.flip(-1), image) for place in places)
    torch.testing.assert_close(rotate_and_shift(x, generator, grid=Grid(0, 0, (1, 1, 1))), x)
    moved = rotate_and_shift(x, torch.Generator().manual_seed(3), grid=GRID)
    drawn = 2 * torch.rand((64, 3), generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1
    torch.testing.assert_close(moved, transform(x, drawn * torch.tensor([15.0, 1.0, 1.0])).clamp(0, 1))


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight) / 0


def wrong(labels: Tensor) -> TensorDataset:
    return TensorDataset(torch.rand(4, 1, 16, 16), labels)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recipe(transform=crop_and_flip, adversary=LINF), "both given"),
        (lambda: Recipe(adversary=attacks.PGD(small())), "adversary is a PGD of a model already"),
        (lambda: train.train(small(), bars(), epochs=1, folder=5), "folder is a int"),
        (lambda: Recipe(regularizer="kl"), "without a transform or an adversary"),
        (lambda: Recipe(adversary=LINF, regularizer="js"), "regularizer is 'js'"),
        (lambda: Recipe(weight=1.0), "without a regularizer"),
        (lambda: Recipe(adversary=LINF, regularizer="kl", weight=-1.0), "weight is -1"),
        (lambda: Recipe(on="both"), "on is 'both' without"),
        (lambda: Recipe(adversary=LINF, on="clean"), "would not count"),
        (lambda: Recipe(augment=3), "augment is a int"),
        (lambda: train.train(small(), bars(), epochs=0), "epochs is 0"),
        (lambda: train.train(small(), bars(), epochs=1, schedule="linear"), "schedule is 'linear'"),
        (lambda: train.train(small(), bars(), epochs=1, rate=0.0), "rate is 0"),
        (lambda: train.train(small(), bars(0), epochs=1), "data has no images"),
        (lambda: train.train(abs, bars(), epochs=1), "model is a builtin"),
        (lambda: train.train(small(), bars(), LINF, epochs=1), "recipe is a partial"),
        (lambda: train.train(small(), wrong(torch.tensor([0, 1, 2, 3])), epochs=1), "y has values from 0 to 3"),
        (lambda: train.train(small(), wrong(torch.zeros(4)), epochs=1), "labels have dtype torch.float32"),
        (lambda: train.train(small(), TensorDataset(torch.rand(4, 1, 16, 16) + 1, torch.zeros(4).long()), epochs=1),
         r"must lie in \[0, 1\]"),
        (lambda: train.train(Exploding(), bars(), epochs=1), "not finite at step 1 of epoch 1"),
    ],
)  # fmt: skip
def test_bad_input(build: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, FloatingPointError), match=message):
        build()
