"""Detectors: their scores, their thresholds, and a model that purifies what they suspect."""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equifast import Defended, Purifier, attacks, defenses, demo, detectors, views
from equifast._fingerprint import describe
from equifast.detectors import Combined, Detector, Deviation, OutputVariance, Similarity, own_ids
from equifast.evaluate.studies import Constrained
from equifast.features import output
from equifast.reference import invert, warp
from equifast.views import sample

DETECTORS: dict[str, Callable[[nn.Module], Detector]] = {
    "similarity": lambda model: Similarity(Purifier(model)),
    "flip": lambda model: Similarity(Purifier(model, views=[views.Flip()])),
    "invariance": lambda model: Similarity(defenses.Invariance(model)),
    "variance": lambda model: OutputVariance(model, views.paper()),
    "guard": lambda model: OutputVariance(model, views.guard()),
    "error": lambda model: OutputVariance(model, error=True),
    "deviation": lambda model: Deviation(model),
    "combined": lambda model: Combined([Deviation(model), Similarity(Purifier(model, views=[views.Flip()]))]),
    "deviation of layers": lambda model: Deviation(
        model, "stem", [views.Flip(), views.Resize(0.5), views.Rotation(15)]
    ),
}


@pytest.fixture(params=DETECTORS)
def detector(request: pytest.FixtureRequest) -> Detector:
    made: Detector = DETECTORS[request.param](cases.dense())
    return made


def clean(count: int = 24, seed: int = 0) -> list[Tensor]:
    return list(torch.rand(count, 3, 20, 28, generator=torch.Generator().manual_seed(seed)).split(5))


def test_a_score_does_not_depend_on_the_batch(detector: Detector) -> None:
    x, ids = torch.cat(clean(6)), torch.arange(6)
    detector.fit(clean())
    together = detector.score(x, ids)
    assert together.shape == (6,)
    assert together.isfinite().all()
    assert not together.requires_grad
    for n in range(6):
        assert torch.equal(detector.score(x[n : n + 1], ids[n : n + 1]), together[n : n + 1])
    assert detector.score(x[:0]).shape == (0,)
    shown = detector.settings().get("views", [repr(views.Flip())])  # of which two have no randomness
    fixed = shown in ([repr(views.Flip())], [repr(view) for view in views.guard()])
    assert torch.equal(detector.score(x, ids, draw=1), together) == fixed


@pytest.mark.parametrize("kind", ["similarity", "variance", "deviation"])
def test_a_score_is_one_pass_for_each_view_without_a_graph(kind: str) -> None:
    """Views of one size are a batch; the similarity's image has a call of its own."""
    model, calls = cases.dense(), list[tuple[tuple[int, ...], bool]]()
    chosen = [views.Flip(), views.Resize(0.5), views.Flip(vertical=True)]
    made: dict[str, Callable[[], Detector]] = {
        "similarity": lambda: Similarity(Purifier(model, views=chosen, fold=False)),
        "variance": lambda: OutputVariance(model, chosen),
        "deviation": lambda: Deviation(model, None, chosen),
    }
    detector, x = made[kind]().fit(clean()), torch.cat(clean(3))
    model.register_forward_pre_hook(lambda _, given: calls.append((tuple(given[0].shape), torch.is_grad_enabled())))
    detector.score(x)
    whole = [(3, 3, 20, 28), (6, 3, 20, 28)] if kind == "similarity" else [(9, 3, 20, 28)]
    assert sorted(calls) == [((n, c, h, w), False) for n, c, h, w in sorted([*whole, (3, 3, 10, 14)])]
    model._forward_pre_hooks.clear()


def test_similarity_is_the_purifiers_own_score() -> None:
    purifier, x = Purifier(cases.dense()), cases.images()
    ids = torch.arange(2)
    assert torch.equal(Similarity(purifier).score(x, ids), 1 - purifier.score(x, ids))
    assert torch.equal(Similarity(purifier).score(x), 1 - purifier.score(x, own_ids(x)))


def test_ids_of_their_own() -> None:
    x = torch.cat(clean(12))
    ids = own_ids(x)
    assert ids.dtype == torch.int64
    assert len(set(ids.tolist())) == 12
    assert torch.equal(own_ids(x[3:5].to(memory_format=torch.channels_last).double()), ids[3:5])
    assert own_ids(x[:, :0]).tolist() == [0] * 12
    assert own_ids(x[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["variance", "deviation", "similarity"])
def test_the_rate_holds_whatever_random_numbers_images_get(name: str) -> None:
    """With views that differ from image to image: those of their own, or given ones, in the interval or near it."""
    chosen = [views.Rotation(15.0), views.Shift()]
    model = cases.dense()
    made = {
        "variance": lambda: OutputVariance(model, chosen),
        "deviation": lambda: Deviation(model, views=chosen),
        "similarity": lambda: Similarity(Purifier(model, views=chosen)),
    }
    detector = made[name]().fit(clean(120), false_positive_rate=0.2)
    x = torch.cat(clean(200, seed=11))
    # of 200 images like 120 others the part flagged is beta-binomial, with a standard deviation of 0.046
    for ids, draw in ((None, 0), (torch.arange(200), 0), (torch.arange(200), 7)):
        rate = float(detector.predict(x, ids, draw).float().mean())
        assert 0.06 < rate < 0.34, (ids is None, draw)


@pytest.mark.parametrize("dense", [True, False])
def test_variance_of_the_output_by_hand(dense: bool) -> None:
    model = cases.dense().eval() if dense else cases.classifier().eval()
    x, chosen = cases.images().double(), [views.Flip(), views.Rotation(20), views.Resize(0.5)]
    model = model.double()
    found = OutputVariance(model, chosen, seed=3, dtype="float32").score(x, torch.zeros(2, dtype=torch.int64))
    drawn = sample(chosen, (20, 28), seed=3, ids=torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        maps = [model(x).softmax(1)]
        seen = [torch.ones_like(maps[0][:, :1], dtype=torch.bool)]
        for view in drawn:
            p = model(*warp(x, view.theta[None], [view.size])).softmax(1)
            if dense:
                inverse, size = invert(view.theta)[None], (maps[0].shape[2], maps[0].shape[3])
                seen.append(warp(torch.ones_like(p[:, :1]), inverse, [size])[0] > 0.5)
                p = warp(p, inverse, [size])[0]
            else:
                seen.append(seen[0])
            maps.append(p)
    for n in range(2):
        if not dense:
            expected = torch.stack([p[n] for p in maps]).var(0, correction=0).sum()
        else:
            total = 0.0
            height, width = maps[0].shape[2:]
            for i in range(height):
                for j in range(width):
                    values = [p[n, :, i, j] for p, s in zip(maps, seen, strict=True) if s[n, 0, i, j]]
                    total += float(torch.stack(values).var(0, correction=0).sum())
            expected = torch.tensor(total / (height * width), dtype=torch.float64)
        torch.testing.assert_close(found[n], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dense", [True, False])
def test_the_mean_error_is_that_of_the_mean_plus_the_variance(dense: bool) -> None:
    """Whatever the truth is; and the estimate is its expectation where the mean prediction is the truth's."""
    model, x = (cases.dense() if dense else cases.classifier()).eval().double(), cases.images().double()
    with torch.no_grad():
        views_of = [model(x).softmax(1), model(x.flip(3)).softmax(1)]
    if dense:
        views_of[1] = views_of[1].flip(3)
    mean = sum(views_of) / 2
    variance = OutputVariance(model, dtype="float32").score(x)
    estimate = OutputVariance(model, dtype="float32", error=True).score(x)

    def whole(values: Tensor) -> Tensor:
        return values.flatten(1).mean(1) if dense else values

    expected = torch.zeros(2, dtype=torch.float64)
    for label in range(5):  # the expectation over labels that the mean prediction gives
        truth = nn.functional.one_hot(torch.tensor(label), 5).double().view(1, 5, *[1] * (mean.dim() - 2))
        error = sum((p - truth).square().sum(1) for p in views_of) / 2
        torch.testing.assert_close(whole(error), whole((mean - truth).square().sum(1)) + variance)
        expected += whole(error * mean[:, label])
    torch.testing.assert_close(estimate, expected)


def test_deviation_by_hand() -> None:
    """The measurements of the definition, and the distance by NumPy."""
    model = cases.dense().eval().double()
    detector = Deviation(model, "stem", [views.Flip(), views.Resize(0.5)], dtype="float32")
    x = cases.images().double()
    measured = detector._measured(x, torch.zeros(2, dtype=torch.int64), 0)
    drawn = sample(detector.views, (20, 28), seed=0, ids=torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        f, p = model.stem(x), model(x).softmax(1)
        for k, view in enumerate(drawn):
            image = warp(x, view.theta[None], [view.size])[0]
            inverse = invert(view.theta)[None]
            g = warp(model.stem(image), inverse, [tuple(f.shape[2:])])[0]
            q = warp(model(image).softmax(1), inverse, [tuple(p.shape[2:])])[0]
            cosine = nn.functional.cosine_similarity
            expected = [
                1 - cosine(f.flatten(1), g.flatten(1)),
                1 - cosine(f, g).mean((1, 2)),
                1 - cosine(f.mean((2, 3)), model.stem(image).mean((2, 3))),
                torch.stack((p, q)).var(0, correction=0).sum(1).mean((1, 2)),
            ]
            found = measured[:, 4 * k : 4 * k + 4]
            torch.testing.assert_close(found, torch.stack(expected, 1).add(1e-4).log(), rtol=1e-5, atol=1e-5)
    detector.fit([batch.double() for batch in clean()])
    mean, precision = (np.array(detector.description()[key]) for key in ("mean", "precision"))
    apart = detector._seen(x).numpy() - mean
    expected_score = np.sqrt(np.einsum("ni,ij,nj->n", apart, precision, apart))
    np.testing.assert_allclose(detector.score(x).numpy(), expected_score, rtol=1e-9)
    assert np.linalg.eigvalsh(precision).min() > 0


def test_deviation_of_several_kinds_of_features(tmp_path: Path) -> None:
    """Of a further kind the cosine of whole maps; what was fitted on other numbers is refused."""
    model, x = cases.dense().eval(), cases.images()
    ids, both = torch.zeros(2, dtype=torch.int64), [None, "stem"]
    several, own, early = (Deviation(model, features, dtype="float32") for features in (both, None, "stem"))
    found, output, stem = (detector._measured(x, ids, 0) for detector in (several, own, early))
    torch.testing.assert_close(found, torch.cat((output[:, :1], stem[:, :1], output[:, 1:]), 1))
    several.fit(clean()).save(tmp_path / "fit.json")
    fitted = json.loads((tmp_path / "fit.json").read_text())
    (tmp_path / "fit.json").write_text(json.dumps({**fitted, "mean": [0.0] * 7, "precision": [[0.0] * 7] * 7}))
    with pytest.raises(ValueError, match="fitted are 7 numbers of an image, here are 5; call fit again"):
        several.load(tmp_path / "fit.json").score(x)


@pytest.mark.parametrize("where", ["features", "head of a function", None])
def test_detectors_run_a_folded_copy(where: str | None) -> None:
    """Of classifiers too, whose features and output differ in shape; a function of one's own runs as it is."""
    model = nn.Sequential()
    model.features = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model.features[1].running_mean.normal_()
    features: Any = (lambda x: model.features(x)) if where == "head of a function" else where
    made = OutputVariance(model, dtype="float32") if where is None else Deviation(model, features, dtype="float32")
    made.fit(clean())
    x = cases.images()
    scores = made.score(x)
    assert made._folded is None or made._folded.made
    assert (made._folded is None) == (where == "head of a function")
    made._folded = None
    torch.testing.assert_close(made.score(x), scores, rtol=1e-3, atol=1e-5)


def test_deviation_is_two_sided_and_its_threshold_that_of_unseen_images() -> None:
    class Given(Deviation):
        """Measurements by hand."""

        def _seen(self, x: Tensor) -> Tensor:
            return x[:, 0, 0, :2]

        def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
            return self._judge(self._seen(x))

    generator, rates = torch.Generator().manual_seed(0), []
    for _ in range(40):
        images = torch.rand(40, 3, 1, 2, generator=generator)
        detector = Given(cases.dense()).fit([images], false_positive_rate=0.1)
        rates.append(float(detector.predict(torch.rand(500, 3, 1, 2, generator=generator)).float().mean()))
    assert 0.06 < sum(rates) / 40 < 0.11  # left out, an image is a little further off than a new one is later
    corners = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])[:, None, None].expand(-1, 3, 1, 2)
    middle, *others = detector.score(corners).tolist()
    assert min(others) > middle


@pytest.mark.parametrize("name", DETECTORS)
def test_the_objective_of_attackers_who_evade(name: str) -> None:
    """Its gradient is that of the score above the threshold, in units of the clean scores' deviation."""
    model = cases.dense().double()
    detector = DETECTORS[name](model)
    for part in getattr(detector, "detectors", [detector]):
        if isinstance(part, Similarity):
            part.purifier.dtype = "float32"
        else:
            part.dtype = "float32"
    detector.fit([batch.double() for batch in clean()], false_positive_rate=0.5)
    x, ids = torch.cat(clean(4, seed=7)).double().clamp(0.05, 0.95), torch.arange(4)
    level = detector.threshold
    unit = max(float(detector.clean_scores.std(correction=0)), 1e-3 * abs(level))
    with detector.objective(x, ids) as objective:
        value, gradient = objective.gradient(x, 0)
        torch.testing.assert_close(objective.value(x), value, rtol=1e-5, atol=1e-6)
        (some, along), rows = objective.only(slice(1, 3)).gradient(x[1:3], 0), slice(1, 3)
        torch.testing.assert_close(along, gradient[rows], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(some, value[rows], rtol=1e-5, atol=1e-6)
    score = detector.score(x, ids)
    clean_scores = detector.clean_scores
    aim = max(level - unit / 4, float(clean_scores[clean_scores <= level].median()))
    expected = -((score - aim).clamp(min=0) / unit)
    torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-4, atol=1e-5)
    above = expected < 0
    assert above.any()
    assert (gradient[~above] == 0).all()
    step = 1e-6
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ahead, behind = (detector.score(x + sign * step * direction, ids) for sign in (1, -1))
    slope = -(ahead - behind) / (2 * step) / unit
    found = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(
        found[above], slope.to(found.dtype)[above], rtol=0.02, atol=1e-3 * float(slope.abs().max())
    )


@pytest.mark.parametrize("name", ["flip", "variance", "deviation"])
def test_who_evades_is_overlooked_where_who_does_not_is_seen(name: str) -> None:
    """On the demo's network and scenes, where attacks are what they are elsewhere."""
    model = demo.load_model()
    scenes, labels = demo.load_scenes()
    made = {
        "flip": Similarity(Purifier(model, views=[views.Flip()])),
        "variance": OutputVariance(model),
        "deviation": Deviation(model),
    }
    crops = [scenes[:8, :, i : i + 80, j : j + 112] for i in (0, 16) for j in (0, 16)]
    detector = made[name].fit(crops, false_positive_rate=0.1)
    x, y = scenes[8:14, :, :80, :112], labels[8:14, :80, :112]
    settings: dict[str, Any] = {"eps": 6 / 255, "start": "origin", "dtype": "auto"}
    plain = attacks.PGD(model, steps=20, **settings)(x, y)
    evading = attacks.Evading(model, detector, step_size=0.5 / 255, steps=30, **settings)(x, y)
    assert float((evading - x).abs().max()) <= 6 / 255 + 1e-6
    assert detector.predict(plain).sum() >= 5
    assert detector.predict(evading).sum() <= 1
    with torch.no_grad():
        right = [float((output(model(each)).argmax(1) == y)[y != 255].float().mean()) for each in (x, evading)]
    assert right[1] < right[0] - 0.03  # and damage is done all the same
    with pytest.raises(RuntimeError, match="no threshold yet"), OutputVariance(model).objective(x):
        pass
    with pytest.raises(TypeError, match="purifier is a Conv2d; it must be a Purifier, or a Detector"):
        attacks.Adaptive(model, nn.Conv2d(3, 3, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="detector is a Purifier; it must be a Detector"):
        attacks.Evading(model, Purifier(model))
    with pytest.raises(RuntimeError, match="no threshold yet"):
        attacks.Evading(model, OutputVariance(model))(x, y)


def test_attackers_aim_at_what_clean_images_reach() -> None:
    """Of scores with a long tail: a quarter of a deviation below the threshold there is nothing."""

    class Brightness(Detector):
        def settings(self) -> dict[str, Any]:
            return {}

        def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
            return x.double().mean((1, 2, 3))

        @contextlib.contextmanager
        def _scores(self, x: Tensor, ids: Tensor | None, draw: int) -> Iterator[Any]:
            yield SimpleNamespace(value=self.score, fixed=True)

    levels = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.9, 0.95, 1.0])
    detector = Brightness(cases.dense()).fit([levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)], false_positive_rate=0.5)
    assert detector.threshold == pytest.approx(0.05)
    assert detector.threshold - detector.clean_scores.std(correction=0) / 4 < 0
    with detector.objective(cases.images()) as objective:
        found = objective.value(torch.tensor([0.01, 0.0299, 0.031, 0.05]).view(-1, 1, 1, 1).expand(-1, 3, 4, 4))
    assert (found == 0).tolist() == [True, True, False, False]


def test_one_clean_image_is_enough_for_an_attacker() -> None:
    detector = OutputVariance(cases.dense()).fit([cases.images(1)], false_positive_rate=0.5)
    x = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(1))
    with detector.objective(x) as objective:
        assert all(part.isfinite().all() for part in objective.gradient(x, 0))


def test_maps_of_where_views_disagree() -> None:
    """A model that is equivariant but for one corner is suspected there."""

    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            mark = torch.zeros_like(y)
            mark[:, :, : y.shape[2] // 4, : y.shape[3] // 4] = torch.tensor([5.0, -5.0, 5.0, -5.0]).view(1, 4, 1, 1)
            return y + mark

    torch.manual_seed(0)
    model, x = Corner(), cases.images()
    flip = [views.Flip()]
    for detector in (Similarity(Purifier(model, views=flip)), OutputVariance(model, flip), Deviation(model)):
        heat = detector.map(x)
        assert heat.shape == (2, 20, 28)
        assert float(heat.min()) >= -1e-6
        # the corner disagrees with its mirror image, and the mirror image's place with the corner
        marked = torch.zeros(20, 28, dtype=torch.bool)
        marked[:5, :7] = marked[:5, -7:] = True
        assert float(heat[:, marked].mean()) > 10 * float(heat[:, ~marked].mean())
        assert detector.map(x[:0]).shape == (0, 20, 28)
    with pytest.raises(TypeError, match="sees an image as a whole; it has no map"):
        Similarity(defenses.Invariance(model)).map(x)
    with pytest.raises(TypeError, match=r"model gives logits .*; for a map they must be dense"):
        OutputVariance(cases.classifier()).map(x)


def test_the_threshold_is_an_order_statistic() -> None:
    detector = Similarity(Purifier(cases.dense(), views=[views.Flip()]))
    detector.fit(((x, "label") for x in clean(39)), false_positive_rate=0.1)
    scores = detector.clean_scores
    assert len(scores) == 39
    assert detector.threshold == scores[35]  # number 36 of 39: ceil(40 * 0.9)
    low, high = detector.interval
    assert low < 0.1 < high
    flagged = torch.cat([detector.predict(x) for x in clean(39)])
    assert flagged.dtype == torch.bool
    assert int(flagged.sum()) == 3
    narrow = detector.fit(clean(39), false_positive_rate=0.1, confidence=0.5).interval
    assert low < narrow[0] < narrow[1] < high


def test_the_rate_of_false_positives_is_in_the_mean_the_one_asked_for() -> None:
    """Over many draws of clean scores; the model is left out of it."""

    class Given(Detector):
        def settings(self) -> dict[str, Any]:
            return {}

        def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
            return x[:, 0, 0, 0].square()

    generator, rates, covered = torch.Generator().manual_seed(0), [], 0
    for _ in range(300):
        images = torch.rand(60, 3, 1, 1, generator=generator)
        detector = Given(cases.dense()).fit([images], false_positive_rate=0.1, confidence=0.9)
        rates.append(1 - detector.threshold**0.5)  # of uniform numbers, squared
        covered += detector.interval[0] <= rates[-1] <= detector.interval[1]
    assert sum(rates) / 300 == pytest.approx(0.1, abs=0.01)
    assert sum(rates) / 300 <= 0.1 + 0.005
    assert 0.85 <= covered / 300 <= 0.95


class Fragile(nn.Module):
    """Gives NaN where an image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = cases.dense()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.dense(x)
        return torch.where((x.mean((1, 2, 3)) > 0.9).view(-1, 1, 1, 1), torch.nan, logits)


@pytest.mark.parametrize("make", [OutputVariance, Deviation, lambda m, dtype: Similarity(Purifier(m, dtype=dtype))])
def test_a_score_of_nan_is_suspicious(make: Callable[..., Detector]) -> None:
    detector = make(Fragile(), dtype="float32").fit(clean())
    bright = torch.full((2, 3, 20, 28), 0.95)
    assert detector.score(bright).isnan().all()
    assert detector.predict(torch.cat((bright, cases.images()))).tolist()[:2] == [True, True]
    with pytest.raises(ValueError, match="gives 2 clean images a score of NaN"):
        detector.fit([*clean(), bright])


def test_weights_that_changed_are_noticed() -> None:
    model = cases.dense()
    detector = Deviation(model).fit(clean())
    x = cases.images()
    detector.predict(x)
    model.double().float()  # other memory, the same values
    detector.predict(x)
    with torch.no_grad():
        model.head.bias.add_(1)
    uses = (detector.predict, detector.examine, detector.score, lambda x: detector.objective(x).__enter__())
    for use in uses:
        with pytest.raises(ValueError, match=r"model has weights '\w+', the threshold is for '\w+'; call fit again"):
            use(x)
    detector.fit(clean()).predict(x)


@pytest.mark.parametrize("name", ["deviation", "variance", "similarity"])
def test_weights_that_changed_without_a_trace_are_noticed(name: str) -> None:
    """As those of a moving average that is swapped in."""
    detector = DETECTORS[name](cases.dense()).fit(clean())
    x, bias = cases.images(), detector.model.get_parameter("head.bias")
    before = detector.predict(x)
    bias.data.add_(1)
    for use in (detector.score, detector.predict):
        with pytest.raises(ValueError, match="call fit again"):
            use(x)
    bias.data.sub_(1)
    detector.fit(clean())
    assert torch.equal(detector.predict(x), before)


def test_a_head_that_is_trained_again_is_noticed() -> None:
    purifier = defenses.Rotation(cases.dense()).fit(clean(8), epochs=2)
    detector, x = Similarity(purifier).fit(clean()), cases.images()
    combined = Combined([OutputVariance(purifier.model), Similarity(purifier)]).fit(clean())
    detector.predict(x)
    combined.predict(x)
    purifier.fit(clean(8), epochs=3)
    for use in (detector.predict, combined.predict, lambda x: combined.objective(x).__enter__()):
        with pytest.raises(ValueError, match=r"model has settings .* call fit again"):
            use(x)


def test_several_of_several_are_saved_and_loaded(tmp_path: Path) -> None:
    def make() -> Combined:
        model = cases.dense()
        return Combined([Combined([Deviation(model), OutputVariance(model)]), Similarity(Purifier(model))])

    made, x = make().fit(clean(40), false_positive_rate=0.1), torch.cat(clean(6, seed=4))
    made.save(tmp_path / "a.json")
    assert torch.equal(make().load(tmp_path / "a.json").score(x), made.score(x))


def test_what_a_state_dict_leaves_out_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    class Normalized(nn.Module):
        def __init__(self, mean: float) -> None:
            super().__init__()
            self.dense = cases.dense()
            self.register_buffer("mean", torch.tensor(mean), persistent=False)

        def forward(self, x: Tensor) -> Any:
            return self.dense(x - self.mean)

        def get_extra_state(self) -> dict[str, int]:
            return {"extra": 1}

        def set_extra_state(self, state: object) -> None:
            pass

    OutputVariance(Normalized(0.5)).fit(clean()).save(tmp_path / "a.json")
    OutputVariance(Normalized(0.5)).load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is of a model or detector with weights"):
        OutputVariance(Normalized(0.0)).load(tmp_path / "a.json")


def test_the_largest_of_several() -> None:
    model, x = cases.dense(), torch.cat(clean(6, seed=4))
    parts = [Deviation(model), OutputVariance(model)]
    combined = Combined(parts).fit(clean(40), false_positive_rate=0.1)
    alone = [Deviation(model).fit(clean(40)), OutputVariance(model).fit(clean(40))]
    found = []
    for part, single in zip(combined.detectors, alone, strict=True):
        assert torch.equal(part.score(x), single.score(x))
        logs = single.clean_scores.log()
        found.append((part.score(x).log() - logs.mean()) / logs.std(correction=0))
    torch.testing.assert_close(combined.score(x), torch.stack(found).amax(0), rtol=1e-4, atol=1e-4, check_dtype=False)
    assert combined.map(x).shape == (6, 20, 28)
    for wrong, sentence in (
        ([parts[0]], "detectors has 1; there must be at least two"),
        ([parts[0], OutputVariance(cases.dense())], "detectors are of several models; they must be of one"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Combined(wrong)
    with pytest.raises(TypeError, match="detectors has a DenseNet; they must be Detectors"):
        Combined([parts[0], model])  # type: ignore[list-item]


def test_several_leave_the_thresholds_of_their_parts(tmp_path: Path) -> None:
    parts = [OutputVariance(cases.dense()), None]
    parts[1] = Deviation(parts[0].model)
    parts[0].fit(clean(40), false_positive_rate=0.3)
    before = parts[0].threshold
    Combined(parts).fit(clean(20), false_positive_rate=0.1)
    assert parts[0].threshold == before
    parts[0].save(tmp_path / "a.json")
    assert OutputVariance(parts[0].model).load(tmp_path / "a.json").threshold == before


def test_purifiers_of_a_similarity_are_told_apart() -> None:
    model, others = cases.dense(), (cases.dense(seed=1), cases.dense(seed=2))
    settings = [Similarity(Constrained(model, positions=n)).settings() for n in (4, 400)]
    settings += [Similarity(Purifier(model, other.forward)).settings() for other in others]
    assert len({json.dumps(each) for each in settings}) == 4


def test_the_threshold_of_another_rate() -> None:
    detector = OutputVariance(cases.dense()).fit(clean(39), false_positive_rate=0.1)
    other = detector.at(0.5)
    assert other.threshold == OutputVariance(cases.dense()).fit(clean(39), false_positive_rate=0.5).threshold
    assert other.threshold < detector.threshold
    assert other.predict(torch.cat(clean(39))).sum() > detector.predict(torch.cat(clean(39))).sum()
    with pytest.raises(
        ValueError, match=r"rate is 0\.01, which takes 99 clean images; of 39 it must be at least 0\.025"
    ):
        detector.at(0.01)
    with pytest.raises(RuntimeError, match="has no threshold yet"):
        OutputVariance(cases.dense()).at(0.5)


def test_gradients_after_inference_mode() -> None:
    model, x = cases.dense(), cases.images()
    y = torch.zeros(2, 20, 28, dtype=torch.int64)
    detector = Deviation(model, dtype="float32")
    with torch.inference_mode():
        detector.fit(clean())
        assert detector.score(x).isfinite().all()
    for kind in (attacks.Adaptive, attacks.Evading):
        assert kind(model, detector, steps=1)(x, y).shape == x.shape
    defended = Defended(model.double(), Purifier(model), dtype="auto")
    with torch.inference_mode():
        defended(x.double())
    leaf = x.double().requires_grad_()
    assert torch.autograd.grad(defended(leaf).sum(), leaf)[0].isfinite().all()


def test_a_detector_of_another_network_is_refused() -> None:
    model, other = cases.dense().eval(), cases.dense(seed=1).eval()
    detector = Deviation(other).fit(clean(40), false_positive_rate=0.1)
    with pytest.raises(ValueError, match="detector is of the same model with other weights; it must be of the"):
        Defended(model, Purifier(model), detector=detector)
    Defended(copy.deepcopy(other), Purifier(model), detector=detector)
    Defended(nn.Sequential(model), Purifier(model), detector=detector)  # a part of it, or another network


@pytest.mark.parametrize("make", [OutputVariance, Deviation], ids=lambda kind: kind.__name__)
def test_a_threshold_is_of_one_arithmetic(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.dense().eval()
    monkeypatch.setattr(detectors, "has_fast_bfloat16", lambda device: True)
    make(model).fit(clean(40), false_positive_rate=0.1).save(tmp_path / "detector.json")
    monkeypatch.setattr(detectors, "has_fast_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match=r"auto: bfloat16.*it must be.*auto: float32"):
        make(model).load(tmp_path / "detector.json")


def test_parts_of_a_combined_detector_are_saved_alone(tmp_path: Path) -> None:
    model = cases.dense().eval()

    def make() -> Combined:
        return Combined([Deviation(model), Combined([OutputVariance(model), Deviation(model)])])

    fitted = make().fit(clean(40), false_positive_rate=0.1)
    fitted.save(tmp_path / "all.json")
    for combined in (fitted, make().load(tmp_path / "all.json")):
        for part, fresh in zip(combined.detectors, make().detectors, strict=True):
            part.save(tmp_path / "part.json")
            assert fresh.load(tmp_path / "part.json").threshold == part.threshold


def test_parts_of_a_combined_detector_are_its_own() -> None:
    model, x = cases.dense().eval(), torch.cat(clean(3, seed=5))
    combined = Combined([Deviation(model), Combined([OutputVariance(model), Deviation(model)])])
    combined.fit(clean(40), false_positive_rate=0.1)
    before, threshold = combined.score(x), combined.threshold
    other = combined.at(0.3).fit(clean(40, seed=7), false_positive_rate=0.3)
    assert not torch.equal(other.score(x), before)
    assert torch.equal(combined.score(x), before)
    with pytest.raises(ValueError, match="for a covariance it must have at least"):  # of which the variance has enough
        Combined([OutputVariance(model), Deviation(model)]).fit(clean(4), false_positive_rate=0.3)
    with pytest.raises(ValueError, match="for a covariance"):
        combined.fit(clean(4, seed=9), false_positive_rate=0.3)
    assert torch.equal(combined.score(x), before)
    assert combined.threshold == threshold


def test_a_detector_of_another_dtype_does_not_predict() -> None:
    model, x = cases.dense().eval(), torch.cat(clean(4))
    detector = Deviation(model, dtype="bfloat16").fit(clean(40), false_positive_rate=0.1)
    defended = Defended(model, Purifier(model), detector=detector)
    mask = detector.predict(x)
    assert not mask.all()
    with torch.no_grad():
        assert torch.equal(defended(x)[~mask], model(x[~mask]))


def test_without_ids_a_detector_has_those_that_it_was_fitted_with() -> None:
    model, x = cases.dense().eval(), torch.cat(clean(6))
    detector = OutputVariance(model, [views.Rotation(45)]).fit(clean(40), false_positive_rate=0.4)
    assert not torch.equal(detector.score(x), detector.score(x, torch.zeros(6, dtype=torch.int64)))
    given = []
    detector.examine = lambda x, ids, draw: given.append(ids) or OutputVariance.examine(detector, x, ids, draw)  # type: ignore[method-assign, func-returns-value]
    defended = Defended(model, Purifier(model, steps=1), detector=detector)
    defended(x)
    assert given == [None]
    assert defended.suspected is not None
    assert torch.equal(defended.suspected, detector.predict(x))


def test_a_prediction_of_ones_own_is_that_of_what_is_not_suspected_too() -> None:
    class Doubled(Defended):
        def predict(self, x: Tensor) -> Tensor:
            return 2 * super().predict(x)

    model, x = cases.dense().eval(), torch.cat(clean(4))
    detector = Deviation(model, dtype="float32").fit(clean(40), false_positive_rate=0.1)
    mask = detector.predict(x)
    assert not mask.all()
    with torch.no_grad():
        assert torch.equal(Doubled(model, Purifier(model), detector=detector)(x)[~mask], 2 * model(x[~mask]))


def test_saved_and_loaded(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "detector.json"
    detector.fit(clean()).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["detector.json"]
    name = next(name for name, make in DETECTORS.items() if make(cases.dense()).settings() == detector.settings())
    other = DETECTORS[name](cases.dense()).load(path)
    kept = json.loads(path.read_text())["fitted_on"]
    assert kept["images"] == 24
    again = DETECTORS[name](cases.dense()).fit(clean())
    assert again.description()["fitted_on"] == kept
    assert again.fit(clean(seed=3)).description()["fitted_on"] != kept
    x = torch.cat(clean(8, seed=1))
    assert torch.equal(other.predict(x), detector.predict(x))
    assert other.interval == detector.interval
    assert describe(other) == describe(detector)
    changed = cases.dense()
    with torch.no_grad():
        changed.head.bias.add_(1)
    with pytest.raises(ValueError, match="is of a model or detector with weights"):
        DETECTORS[name](changed).load(path)
    with pytest.raises(ValueError, match="is of a model or detector with"):
        OutputVariance(cases.dense(), [views.Shift()]).load(path)


def test_a_head_is_part_of_what_was_fitted(tmp_path: Path) -> None:
    model = cases.dense()
    heads = [defenses.Rotation(model, seed=seed).fit(clean(8), epochs=2) for seed in (0, 1)]
    for head in heads:
        head.seed = 0
    Similarity(heads[0]).fit(clean()).save(tmp_path / "a.json")
    Similarity(heads[0]).load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="with settings"):
        Similarity(heads[1]).load(tmp_path / "a.json")


def test_what_is_wrong(detector: Detector, tmp_path: Path) -> None:
    for use in (lambda: detector.threshold, lambda: detector.predict(cases.images()), lambda: detector.save("x")):
        with pytest.raises(RuntimeError, match="has no threshold yet; call fit"):
            use()
    with pytest.raises(
        ValueError, match=r"loader has 18 images; for false_positive_rate 0\.05 it must have at least 19"
    ):
        detector.fit(clean(18))
    detector.fit(clean(19))
    with pytest.raises(ValueError, match="loader has 0 images"):
        detector.fit([])
    for rate in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match="false_positive_rate is"):
            detector.fit(clean(), false_positive_rate=rate)
    with pytest.raises(ValueError, match=r"features have shape \(.*\); they must be \(N, C, h, w\)"):
        Deviation(cases.classifier()).fit(clean())
    with pytest.raises(ValueError, match="loader has 5 images; for a covariance it must have at least 6"):
        Deviation(cases.dense()).fit(clean(5), false_positive_rate=0.5)
    for single in (OutputVariance, Deviation):
        with pytest.raises(ValueError, match="model gives 1 class; of two or more"):
            single(nn.Conv2d(3, 1, 1)).fit(clean())
    with pytest.raises(ValueError, match="features is empty"):
        Deviation(cases.dense(), [])
    with pytest.raises(ValueError, match="seed is None"):
        Deviation(cases.dense(), seed=None)  # type: ignore[arg-type]
    for text in ("no json", "[]", json.dumps({"detector": "Similarity"})):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong\.json is no"):
            detector.load(tmp_path / "wrong.json")
    with pytest.raises(TypeError, match="purifier is a DenseNet"):
        Similarity(cases.dense())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed=None"):
        Similarity(Purifier(cases.dense(), seed=None))


class Saying:
    """A detector that says what a function does."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def predict(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        return self.function(x)


class Suspects:
    """Suspects images whose first value is high."""

    def predict(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        return x.mean((1, 2, 3)) > 0.5


@pytest.mark.parametrize("gradient", ["straight-through", "unrolled"])
@pytest.mark.parametrize("dense", [True, False])
def test_only_what_is_suspected_is_purified(dense: bool, gradient: str) -> None:
    model = (cases.dense() if dense else cases.classifier()).eval()
    purifier = Purifier(model, None if dense else "features")
    defended = Defended(model, purifier, detector=Suspects(), gradient=gradient)
    always = Defended(model, purifier, gradient=gradient)
    x, ids = torch.cat(clean(6)), torch.arange(6)
    mask = Suspects().predict(x)
    assert 0 < int(mask.sum()) < 6
    leaf = x.clone().requires_grad_()
    logits = defended(leaf, ids=ids)
    with torch.no_grad():
        torch.testing.assert_close(logits[mask], always(x[mask], ids=ids[mask]))
        torch.testing.assert_close(logits[~mask], model(x[~mask]))
    assert (defended.seen, defended.purified) == (6, int(mask.sum()))
    weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((logits * weights).sum(), leaf)
    for rows, predict in ((mask, lambda x: always(x, ids=ids[mask])), (~mask, model)):
        part = x[rows].clone().requires_grad_()
        (expected,) = torch.autograd.grad((predict(part) * weights[rows]).sum(), part)
        torch.testing.assert_close(found[rows], expected, rtol=1e-4, atol=1e-6)
    for rows in (mask, ~mask):  # all of one kind
        torch.testing.assert_close(defended(x[rows], ids=ids[rows]), logits[rows].detach())
    assert defended.purified == 2 * int(mask.sum())


@pytest.mark.parametrize("name", ["similarity", "variance", "deviation"])
def test_what_is_not_suspected_is_not_run_again(name: str) -> None:
    model = cases.dense().eval()
    detector = DETECTORS[name](model)
    if isinstance(detector, Similarity):
        detector.purifier.dtype = "float32"
    else:
        detector.dtype = "float32"  # type: ignore[attr-defined]
    defended = Defended(model, Purifier(model), detector=detector.fit(clean(), false_positive_rate=0.5))
    x, ids = torch.cat(clean(6)), torch.arange(6)
    mask, own = detector.examine(x, ids)
    assert torch.equal(mask, detector.predict(x, ids))
    assert 0 < int(mask.sum()) < 6
    assert (own is None) == (name == "similarity")
    leaf = x.clone().requires_grad_()
    logits, followed = defended(x, ids=ids), defended(leaf, ids=ids)
    assert not logits.requires_grad
    assert followed.requires_grad
    torch.testing.assert_close(logits, followed.detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(logits[~mask], model(x)[~mask], rtol=1e-4, atol=1e-5)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda module, inputs, result: calls.append(len(inputs[0])))
    none = ~mask
    unsuspected = defended(x[none], ids=ids[none])
    handle.remove()
    torch.testing.assert_close(unsuspected, logits[none], rtol=1e-4, atol=1e-5)
    if name != "similarity":
        assert sum(calls) == (1 + len(detector.views)) * int(none.sum())  # type: ignore[attr-defined]
    for empty in (defended(x[:0]), defended(x[:0].requires_grad_())):
        assert empty.shape == (0, 5, 20, 28)


def test_large_maps_are_averaged_first() -> None:
    model, x = cases.dense().eval(), cases.images(2, 140, 200)
    detector = Deviation(model, dtype="float32")
    with torch.no_grad():
        small = nn.functional.avg_pool2d(model(x), 4)[:, :, :, :50]
        mirrored = nn.functional.avg_pool2d(model(x.flip(3)), 4)[:, :, :, :50].flip(3)
    expected = 1 - nn.functional.cosine_similarity(small.flatten(1), mirrored.flatten(1))
    torch.testing.assert_close(detector._seen(x)[:, 0].exp() - 1e-4, expected, rtol=1e-3, atol=1e-5)
    assert detector.map(x).shape == (2, 140, 200)


def test_an_attack_goes_through_both_branches() -> None:
    model = cases.dense()
    detector = Similarity(Purifier(model, views=[views.Flip()])).fit(clean(), false_positive_rate=0.5)
    defended = Defended(model, Purifier(model), detector=detector)
    x = torch.cat(clean(6))
    y = model.eval()(x).argmax(1)
    adversarial = attacks.BPDA(attacks.PGD(model, eps=0.1, step_size=0.05, steps=4), defended)(x, y, torch.arange(6))
    loss = nn.CrossEntropyLoss()
    with torch.no_grad():
        assert loss(defended(adversarial, draw=99), y) > loss(defended(x, draw=99), y)
    assert 0 < defended.purified < defended.seen
    for wrong in (lambda x: x.mean((1, 2, 3)), lambda x: x > 0.5):
        with pytest.raises(ValueError, match=r"detector predicts .* it must be bool, one for each"):
            Defended(model, Purifier(model), detector=Saying(wrong))(x)
    with pytest.raises(ValueError, match="detector predicts a list for images"):
        Defended(model, Purifier(model), detector=Saying(lambda x: [True] * len(x)))(x)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="x is a ndarray; it must be a tensor"):
        defended(x.numpy())
    with pytest.raises(TypeError, match="detector is given; a trajectory"):
        next(defended.trajectory(x))
    with pytest.raises(TypeError, match="detector is a Purifier"):
        Defended(model, Purifier(model), detector=Purifier(model))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("threshold", None, "has threshold None; it must be a number"),
        ("threshold", "abc", "has threshold abc; it must be a number"),
        ("threshold", float("nan"), "has threshold nan; it must be a number"),
        ("threshold", True, "has threshold True; it must be a number"),
        ("interval", [0.1], r"has interval \[0\.1\]; it must be two numbers"),
        ("scores", [], r"has scores \[\]; it must be numbers, at least one"),
        ("scores", [0.1, "b"], r"has scores .*; it must be numbers, at least one"),
    ],
)
def test_a_file_that_holds_no_threshold(key: str, value: object, sentence: str, tmp_path: Path) -> None:
    detector, path = OutputVariance(cases.dense()), tmp_path / "detector.json"
    detector.fit(clean()).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=sentence):
        OutputVariance(cases.dense()).load(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mean": None}, "part 1 has mean None; it must be numbers, at least one"),
        ({"mean": [0.0]}, "part 1 has precision .*; it must be 1 rows of as many numbers"),
        ({"precision": [[0.0]]}, "part 1 has precision .*; it must be 4 rows of as many numbers"),
        ({"settings": {}}, "part 1 is of a model or detector with settings"),
        ({"threshold": "a"}, "part 1 has threshold a; it must be a number"),
        ({"parts": []}, r"has parts \[\]; it must be 2 detectors"),
        ({"centers": [0.0]}, r"has centers \[0\.0\]; it must be 2 numbers"),
        ({"units": [0.0, float("nan")]}, "has units .*; it must be 2 numbers"),
    ],
)
def test_a_file_of_parts_that_are_not_whole(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    def made() -> Combined:
        model = cases.dense()
        return Combined([Deviation(model), OutputVariance(model)])

    path = tmp_path / "detector.json"
    made().fit(clean()).save(path)
    whole = json.loads(path.read_text())
    (whole if change.keys() <= {"parts", "centers", "units"} else whole["parts"][0]).update(change)
    path.write_text(json.dumps(whole))
    detector = made()
    with pytest.raises(ValueError, match=sentence):
        detector.load(path)
    with pytest.raises(RuntimeError, match="Combined has no threshold yet"):  # nothing of it was taken
        _ = detector.threshold
