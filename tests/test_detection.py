"""Detectors against anomalies: figures, what is recorded, corruptions, and the commands."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cases
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from typer.testing import CliRunner

from equifast import Defended, Purifier, attacks, views
from equifast.cli import app, evaluate
from equifast.detectors import Deviation, OutputVariance, Similarity
from equifast.evaluate import (
    CORRUPTIONS,
    Detection,
    Evaluation,
    Strength,
    adaptive,
    corrupt,
    corruptions,
    known,
    mean_iou,
    open_images,
    plots,
    separation,
)
from equifast.evaluate.corruptions import _deformation
from equifast.evaluate.detection import STUDIES, Anomaly, attacked, corrupted, evading, foreign, noise, patient
from equifast.evaluate.metrics import Estimate, _separations, mean_auroc, mean_auroc_difference
from equifast.models import write_image

MODEL = cases.dense().eval()


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are measured once, which takes a third of the time."""
    monkeypatch.setattr(evaluate, "_ROUNDS", 1)


def images(n: int, seed: int = 0) -> Tensor:
    """Smooth ones, unlike noise."""
    coarse = torch.rand(n, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (32, 40), mode="bicubic").clamp(0, 1)


def scenes(n: int = 6, seed: int = 0) -> TensorDataset:
    x = images(n, seed)
    with torch.no_grad():
        return TensorDataset(x, MODEL(x).argmax(1))


def detectors() -> dict[str, Any]:
    made = {
        "similarity": Similarity(Purifier(MODEL, views=[views.Flip()])),
        "variance": OutputVariance(MODEL),
        "deviation": Deviation(MODEL),
    }
    return {name: detector.fit(images(40, seed=9).split(8)) for name, detector in made.items()}


STRENGTH = Strength(eps=8 / 255, steps=2, seed=1, dtype="float32")


def test_separation_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    for shift, digits in ((0.0, 6), (1.0, 6), (1.0, 0), (9.0, 6)):
        clean = generator.normal(size=37).round(digits)
        other = generator.normal(shift, size=23).round(digits)
        found = separation(clean, other)
        truth, scores = np.arange(60) >= 37, np.concatenate([clean, other])
        false, true, _ = metrics.roc_curve(truth, scores)
        assert found.auroc.value == pytest.approx(100 * metrics.roc_auc_score(truth, scores))
        assert found.aupr.value == pytest.approx(100 * metrics.average_precision_score(truth, scores))
        assert found.fpr95.value == pytest.approx(100 * min(false[true >= 0.95]))
        for interval in (found.auroc, found.aupr, found.fpr95):
            assert interval.low - 1e-9 <= interval.value <= interval.high + 1e-9
        # a sample of the bootstrap: scores that occur as often as a weight says
        ranks = np.unique(scores, return_inverse=True)[1]
        weights = generator.multinomial(60, np.full(60, 1 / 60), size=5)
        for weight, figures in zip(weights, _separations(ranks, truth, weights), strict=True):
            false, true, _ = metrics.roc_curve(truth, scores, sample_weight=weight, drop_intermediate=False)
            assert figures[0] == pytest.approx(metrics.auc(false, true))
            assert figures[1] == pytest.approx(metrics.average_precision_score(truth, scores, sample_weight=weight))
            assert figures[2] == pytest.approx(min(false[true >= 0.95 - 1e-9]))
        assert mean_auroc(clean[:23], np.stack([other, other])).value == pytest.approx(
            100 * metrics.roc_auc_score(truth[14:], np.concatenate([clean[:23], other]))
        )
    nan = separation(np.array([0.0, 1.0]), np.array([np.nan, 2.0]))
    assert nan.auroc.value == 100
    # of two images one can not say more, and of 24 not everything
    assert str(nan.auroc) == "100.0 (15.8-100.0)"
    apart = separation(np.arange(24.0), np.arange(24.0) + 50)
    assert (str(apart.auroc), str(apart.fpr95)) == ("100.0 (85.8-100.0)", "0.0 (0.0-14.2)")
    other = generator.normal(size=30)
    loose, paired = (separation(other, other + 0.3, paired=each).auroc for each in (False, True))
    assert paired.value == loose.value
    assert paired.high - paired.low < (loose.high - loose.low) / 2
    with pytest.raises(ValueError, match="clean has 2 scores, anomalous 3; paired, they must be as many"):
        separation(np.arange(2.0), np.arange(3.0), paired=True)
    kinds = np.stack([np.arange(10.0), np.arange(10.0) + 20])
    assert mean_auroc(np.arange(10.0), kinds).value == pytest.approx(75)


def test_the_difference_of_mean_areas() -> None:
    """Of two detectors, images drawn together: what both share cancels."""
    generator = np.random.default_rng(0)
    clean, made = generator.normal(size=40), generator.normal(0.5, size=(3, 40))
    other = clean + 0.1 * generator.normal(size=40), made + 0.1 * generator.normal(size=(3, 40))
    apart = mean_auroc_difference((clean, made), other)
    means = [mean_auroc(clean, made), mean_auroc(*other)]
    assert apart.value == pytest.approx(means[0].value - means[1].value)
    assert 0 < apart.standard_error < (means[0].high - means[0].low) / 8
    swapped = mean_auroc_difference(other, (clean, made))
    assert (swapped.value, swapped.standard_error) == pytest.approx((-apart.value, apart.standard_error))
    assert mean_auroc_difference(other, other) == Estimate(0.0, 0.0)
    with pytest.raises(ValueError, match=r"a has scores \(3, 40\), b \(2, 40\); they must be of the same images"):
        mean_auroc_difference((clean, made), (clean, made[:2]))


def test_scores_are_of_images_that_a_model_in_place_has_not_changed(tmp_path: Path) -> None:
    model, data = cases.InPlace().eval(), scenes(3)
    study = Detection(model, data, {"variance": OutputVariance(model).fit([images(20)])}, [noise()])
    x = data.tensors[0][[image.index for image in study.images]]
    ids = torch.tensor([image.id for image in study.images])
    expected = study.detectors["variance"].score(x, ids).numpy()
    assert np.array_equal(study.run(tmp_path).scores["variance"]["clean"], expected)


def test_intervals_cover() -> None:
    """The truth lies inside about as often as they say."""
    generator, truth, inside = np.random.default_rng(0), 0.76025, 0  # of normal scores one apart
    for _ in range(200):
        found = separation(generator.normal(size=40), generator.normal(1, size=40), resamples=200).auroc
        inside += found.low <= 100 * truth <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_a_study_records_what_detectors_say(tmp_path: Path) -> None:
    data, made = scenes(), detectors()
    kinds = [attacked(STRENGTH), attacked(STRENGTH, Purifier(MODEL, steps=1)), noise(), evading(STRENGTH, 0.5)]
    study = Detection(MODEL, data, made, kinds, batch=4)
    told: list[str] = []
    report = study.run(tmp_path / "a", lambda what, done, total: told.append(what))
    assert told
    order = [image.index for image in study.images]
    x, y = data.tensors[0][order], data.tensors[1][order]
    ids = torch.tensor([image.id for image in study.images])
    pgd = attacks.PGD(MODEL, **STRENGTH.settings())(x, y, ids)
    for name, detector in made.items():
        for kind, changed in (("clean", x), ("PGD 8/255", pgd)):
            assert report.scores[name][kind] == pytest.approx(detector.score(changed, ids).numpy())
            flagged = detector.predict(changed, ids).float().mean()
            assert report.flagged(name, kind).value == pytest.approx(100 * float(flagged))
            with torch.no_grad():
                judged = MODEL(changed).argmax(1)
            assert report.damage(name, kind).value == pytest.approx(
                mean_iou(np.stack([np.histogramdd((a.numpy().ravel(), b.numpy().ravel()), [np.arange(6)] * 2)[0]
                                   for a, b in zip(y, judged, strict=True)]), 2).value
            )  # fmt: skip
        asked = detector.at(0.5)  # by whose threshold those are judged that evade it
        evaded = attacks.Evading(MODEL, asked, **STRENGTH.patient())(x, y, ids)
        flagged = asked.predict(evaded, ids).float().mean()
        assert report.flagged(name, "evading 8/255, rate 50%").value == pytest.approx(100 * float(flagged))
    assert report.damage("deviation", "clean").value == 100
    # who evades is another for every detector
    assert not np.array_equal(*(report.scores["variance"][k] for k in ("PGD 8/255", "evading 8/255, rate 50%")))
    document = json.loads(json.dumps(report.document()))
    assert set(document["rows"]["deviation"]) == {"clean", *(kind.name for kind in kinds)}
    assert document["rows"]["deviation"]["PGD 8/255"]["auroc"].keys() == {"value", "low", "high"}
    for figure in (plots.characteristics(report), plots.histograms(report), plots.evasion(report)):
        assert figure is not None

    # killed in between, and in other batches: the same records
    lines = (tmp_path / "a" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "study.json").write_text((tmp_path / "a" / "study.json").read_text())
    (tmp_path / "b" / "records.jsonl").write_text("".join(lines[: len(lines) // 2]) + lines[-1][:20])
    again = Detection(MODEL, data, made, kinds, batch=3).run(tmp_path / "b")
    for name, row in report.scores.items():
        for kind, scores in row.items():
            assert np.array_equal(again.scores[name][kind], scores)
    for changed in ({"data": scenes(5)}, {"detectors": {"variance": OutputVariance(MODEL, seed=1).fit([images(40)])}}):
        other: dict[str, Any] = {"model": MODEL, "data": data, "detectors": made, "anomalies": kinds, **changed}
        what = r"(data \(6 images, now 5\)|defense variance \(settings.seed: 0, now 1\))"
        with pytest.raises(ValueError, match=f"holds results of another {what}; choose another"):
            Detection(**other).run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds results of another .*kind"):
        Evaluation(MODEL, data, [], {"none": Defended(MODEL, Purifier(MODEL))}, eps=None).run(tmp_path / "a")
    (tmp_path / "a" / "records.jsonl").write_text('{"some": "line"}\n')
    with pytest.raises(ValueError, match="has a line that equifast did not write"):
        study.run(tmp_path / "a")


def test_what_a_study_refuses(tmp_path: Path) -> None:
    data, made = scenes(2), detectors()
    with pytest.raises(ValueError, match="names must differ"):
        Detection(MODEL, data, made, [noise(), noise(1)])
    with pytest.raises(ValueError, match="detectors is empty"):
        Detection(MODEL, data, {}, [noise()])
    with pytest.raises(RuntimeError, match="has no threshold yet"):
        Detection(MODEL, data, {"variance": OutputVariance(MODEL)}, [noise()])
    for make in (attacked, patient, lambda strength: evading(strength, 0.5)):
        with pytest.raises(ValueError, match="strength is targeted; anomalies flee the true labels"):
            make(Strength(targeted=True))
    few = foreign("few", TensorDataset(images(1), torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="few has 1 images; there must be as many as clean ones"):
        Detection(MODEL, data, made, [few]).run(tmp_path / "few")
    shrunk = Anomaly("shrunk", lambda model, detector: lambda x, y, ids, places: x[:, :, ::2])
    with pytest.raises(ValueError, match=r"the model gives logits .* for labels"):
        Detection(MODEL, data, made, [shrunk]).run(tmp_path / "shrunk")


def test_foreign_images_take_the_size_of_those_in_their_place(tmp_path: Path) -> None:
    x = torch.rand(3, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    made = foreign("others", TensorDataset(x, torch.zeros(3, dtype=torch.int64))).make(MODEL, None)  # type: ignore[arg-type]
    found = made(images(2), torch.zeros(2, 32, 40), torch.arange(2), [2, 0])
    assert found.shape == (2, 3, 32, 40)
    expected = torch.nn.functional.interpolate(x[[2, 0]], (32, 40), mode="bilinear")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions(name: str, opencv: None) -> None:
    x, ids = images(3), torch.tensor([5, -(2**62), 7])
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    found = {severity: corrupt(x, name, severity, ids) for severity in (1, 5)}
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    for severity, changed in found.items():
        assert changed.shape == x.shape
        assert changed.dtype == x.dtype
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
        assert torch.equal(corrupt(x[1:2], name, severity, ids[1:2]), changed[1:2])
    random = not torch.equal(corrupt(x, name, 5, ids, seed=1), found[5])
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert random == (name not in fixed)
    assert corrupt(x[:0], name, 1).shape == (0, 3, 32, 40)
    if name not in {"frost", "snow", "glass_blur", "elastic_transform"}:  # of which severities differ in kind
        distances = [float((changed - x).abs().mean()) for changed in found.values()]
        assert distances[0] < distances[1]


def test_a_corruption_is_the_published_one(opencv: None) -> None:
    """Gaussian noise and contrast by their definitions, at the published strengths."""
    x = torch.full((1, 3, 64, 64), 0.5)
    for severity, deviation in enumerate((0.08, 0.12, 0.18, 0.26, 0.38), 1):
        spread = float((corrupt(x, "gaussian_noise", severity) - 0.5).std())
        inside = deviation if severity < 4 else None  # beyond, clamping takes some
        assert inside is None or spread == pytest.approx(inside, rel=0.03)
    pattern = images(1)
    for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1):
        mean = pattern.mean((2, 3), keepdim=True)
        expected = mean + factor * (pattern - mean)
        assert float((corrupt(pattern, "contrast", severity) - expected).abs().max()) < 1.5 / 255


def test_elastic_transforms_are_those_of_imagenet_c(opencv: None) -> None:
    """Of uniform numbers in [-a, a] a Gaussian of s pixels leaves a / sqrt(3) / (2 sqrt(pi) s)."""
    for severity, (far, smooth, corners) in enumerate(
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)), 1
    ):
        before, after, moved = _deformation(150, 200, severity, np.random.default_rng(severity))
        assert np.abs(after - before).max() <= corners
        assert np.abs(after - before).max() > corners / 3
        assert before.tolist() == [[150, 125], [150, 25], [50, 25]]
        if severity > 2:  # of the others there are few numbers
            expected = far / 3**0.5 / (2 * np.pi**0.5 * smooth)
            assert moved.std(axis=(1, 2)).tolist() == pytest.approx([expected] * 2, rel=0.15)
    flat = torch.full((1, 3, 40, 50), 0.6)
    assert torch.equal(corrupt(flat, "elastic_transform", 5), flat)
    # to the corners' place and no other, where nothing else moves
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    square = np.array([[60, 50], [60, 10], [20, 10]], np.float32)
    given = square, square + np.array([3, -2], np.float32), np.zeros((2, 60, 80))
    with mock.patch.object(corruptions, "_deformation", return_value=given):
        found = corruptions._elastic(image, 3, np.random.default_rng(0))
    assert np.array_equal(found[5:50, 10:70], image[7:52, 7:67])


def test_what_corruptions_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(1)
    for arguments, sentence in (
        ((x, "rain", 1), "name is 'rain'; it must be one of"),
        ((x, "fog", 6), "severity is 6"),
        ((x[:, :, :31], "fog", 1), "corruptions take sides of at least 32"),
        ((x * 2, "fog", 1), "x has values"),
    ):
        with pytest.raises(ValueError, match=sentence):
            corrupt(*arguments)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(RuntimeError, match=r"corruptions need imagecorruptions-imaug, .* pip install"):
        corrupt(x, "fog", 1)


def test_an_opencv_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the libraries of a desktop are not there."""
    failing = "import sys\nsys.path.insert(0, 'of its own')\nraise ImportError('libGL.so.1: cannot open')\n"
    (tmp_path / "imagecorruptions.py").write_text(failing)
    monkeypatch.delitem(sys.modules, "imagecorruptions", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    path = list(sys.path)
    with pytest.raises(RuntimeError, match=r"OpenCV, which does not load here \(libGL.so.1: .* opencv-python-headless"):
        corrupt(images(1), "fog", 1)
    assert sys.path == path


def test_studies() -> None:
    others: dict[str, Dataset[Any]] = {"others": scenes(2)}
    names = {study: [a.name for a in make(STRENGTH, Purifier(MODEL), others)] for study, make in STUDIES.items()}
    assert len(names["corruptions"]) == 75
    assert names["ood"] == ["others", "uniform noise"]
    assert names["detection"] == ["PGD 2/255", "PGD 4/255", "PGD 8/255", "CW 8/255, 10 steps", "PGD 8/255, purified"]
    assert names["evasion"] == [
        "PGD 8/255",
        "CW 8/255, 10 steps",
        *(f"evading 8/255, rate {rate}%" for rate in (5, 10, 20, 50)),
    ]
    assert corrupted("fog", 3).group == "severity 3"
    euclidean = Strength(eps=0.5, norm="l2", steps=2)
    assert [make(euclidean).name for make in (attacked, patient)] == ["PGD 0.5 in l2", "CW 0.5 in l2, 10 steps"]
    assert evading(euclidean, 0.1).name == "evading 0.5 in l2, rate 10%"


def test_the_protocol_against_a_model_that_purifies_what_it_suspects() -> None:
    detector = Deviation(MODEL).fit(images(40, seed=9).split(8))
    guarded = Defended(MODEL, Purifier(MODEL, steps=2), detector=detector)
    attackers = {name: made.make(MODEL, guarded) for name, made in known(STRENGTH).items()}
    assert attackers["BPDA, trajectory"] is None
    evades = attackers["Evading"]
    assert "Evading" in {attacker.name for attacker in adaptive(STRENGTH)}
    assert evades is not None
    assert evades._attack.detector is detector  # type: ignore[attr-defined]
    assert attackers["unrolled"]._attack.model.detector is detector  # type: ignore[union-attr]
    always = Defended(MODEL, Purifier(MODEL, steps=2))
    assert known(STRENGTH)["Evading"].make(MODEL, always) is None
    x, y = scenes(2).tensors
    assert evades(x, y).shape == x.shape


def write_data(folder: Path, n: int, seed: int = 0) -> Path:
    x, y = scenes(n, seed).tensors
    (folder / "labels").mkdir(parents=True)
    for i in range(n):
        write_image(folder / "images" / f"{i}.png", x[i])
        Image.fromarray(y[i].byte().numpy()).save(folder / "labels" / f"{i}.png")
    return folder


MODEL_FILE = "import sys\nsys.path.insert(0, {path!r})\nimport cases\ndef build():\n    return cases.dense()\n"


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL_FILE.format(path=str(Path(__file__).parent)))
    return f"{tmp_path / 'model.py'}:build"


@pytest.mark.parametrize("study", ["detection", "evasion", "ood"])
def test_studies_from_the_command_line(study: str, tmp_path: Path, spec: str) -> None:
    data, clean = write_data(tmp_path / "data", 3), write_data(tmp_path / "clean", 20, seed=5)
    fixed = ["evaluate", data, "-o", tmp_path / "out", "--model", spec, "--study", study, "--steps", "1"]
    fit = write_data(tmp_path / "fit", 20, seed=9)
    given = ["--fit", fit, "--clean", clean, *(["--foreign", clean] if study == "ood" else [])]
    few = ["variance", "combined"]
    given += [] if study == "detection" else [part for name in few for part in ("--detector", name)]
    done = CliRunner().invoke(app, [str(a) for a in (*fixed, *given)])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "out" / "table.json").read_text())
    everyone = [
        "similarity",
        "variance",
        "guard",
        "error",
        "deviation",
        "invariance",
        "rotation",
        "contrastive",
        "combined",
    ]
    assert set(document["rows"]) == set(everyone if study == "detection" else few)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "area under the characteristic in %, 3 images" in text
    assert ("what attackers leave of the model" in text) == (study != "ood")
    for name in ("scores", "characteristics"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    if study != "detection":  # whose figures take their time
        before = (tmp_path / "out" / "records.jsonl").read_text()
        done = CliRunner().invoke(app, [str(a) for a in (*fixed, *given)])  # nothing is left to do
        assert done.exit_code == 0, done.output
        assert (tmp_path / "out" / "records.jsonl").read_text() == before
        assert (tmp_path / "out" / "table.md").read_text() == text
    done = CliRunner().invoke(app, [str(a) for a in (*fixed, "-o", tmp_path / "none", "--fit", clean)])
    assert done.exit_code == 2
    assert "detector similarity needs clean images; name data for it with --clean" in done.output
    done = CliRunner().invoke(app, [str(a) for a in (*fixed, *given, "--detector", "magic")])
    assert done.exit_code == 2
    assert "detector is 'magic'; it must be one of similarity" in done.output
    for more, sentence in (
        (("--target", "1", "--defense", "fast"), f"study '{study}' is of detectors; it takes no --target, --defense"),
        (("--fit", clean, "--detector", "combined"), "--clean has 20 of the images of --fit; a head knows those, and"),
        (
            ("--fit-images", "9", "--detector", "error"),
            "--clean has 9 images; for --rate 0.05 it must have at least 19",
        ),
        (("--rate", "2", "--detector", "rotation"), "--rate is 2.0; it must be above 0 and below 1"),
        (("--rate", "0.01", "--detector", "error"), "--clean has 20 images; for --rate 0.01 it must have at least 99"),
        *(
            (
                ("-o", tmp_path / "overlap", option, data, "--detector", "rotation"),
                "has 3 of the images that are tested; a threshold, or a head, is of others",
            )
            for option in ("--clean", "--fit")
        ),
    ):
        done = CliRunner().invoke(app, [str(a) for a in (*fixed, *given, *more)])
        assert done.exit_code == 2, done.output
        assert sentence in done.output.replace("\n", " ")


def test_a_study_of_corruptions_from_the_command_line(
    tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch, opencv: None
) -> None:
    few = [corrupted(name, severity) for name in ("fog", "contrast") for severity in (1, 3)]
    monkeypatch.setattr(evaluate, "DETECTION", {"corruptions": lambda strength, purifier, others: few})
    data, clean = write_data(tmp_path / "data", 3), write_data(tmp_path / "clean", 20, seed=5)
    given = ["evaluate", data, "-o", tmp_path / "out", "--model", spec, "--study", "corruptions", "--clean", clean]
    fit = write_data(tmp_path / "fit", 20, seed=9)
    done = CliRunner().invoke(app, [str(a) for a in (*given, "--fit", fit, "--layer", "stem")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "table.md").read_text()
    for row in ("| fog 1 |", "| fog 3 |", "| contrast 3 |", "| mean, severity 1 |", "| mean, severity 3 |"):
        assert row in text
    printed = " ".join(done.output.split())
    assert "severity 3" in printed
    assert "fog 1" not in printed
    assert (tmp_path / "out" / "corruptions-deviation.png").exists()
    few_of_them = ["--detector", "variance", "--detector", "error", "--against", "error", "-o", tmp_path / "few"]
    done = CliRunner().invoke(app, [str(a) for a in (*given, *few_of_them)])
    assert done.exit_code == 0, done.output
    assert "minus that of error, in points" in " ".join(done.output.split())
    document = json.loads((tmp_path / "few" / "table.json").read_text())
    means, apart = document["means"], document["differences"]["variance"]["severity 3"]
    expected = means["variance"]["severity 3"]["value"] - means["error"]["severity 3"]["value"]
    assert apart["value"] == pytest.approx(expected)
    done = CliRunner().invoke(app, [str(a) for a in (*given, *few_of_them, "--against", "guard")])
    assert done.exit_code == 2
    assert "against is 'guard'; it must be one of variance, error" in done.output.replace("\n", " ")
    alone = ["--detector", "error", "--against", "error", "--clean", data, "-o", tmp_path / "alone"]
    done = CliRunner().invoke(app, [str(a) for a in (*given, *alone)])  # shows before clean images are looked at
    assert done.exit_code == 2
    assert "against is 'error', the only one there is; differences are between two" in " ".join(done.output.split())
    assert json.loads((tmp_path / "out" / "study.json").read_text())["defenses"]["deviation"]["settings"][
        "features"
    ] == [
        None,
        "stem",
    ]


def test_a_map_of_corruptions(tmp_path: Path, opencv: None) -> None:
    kinds = [corrupted(name, severity) for name in ("fog", "contrast") for severity in (1, 3)]
    report = Detection(MODEL, scenes(3), detectors(), kinds).run(tmp_path)
    assert set(report.means()["deviation"]) == {"severity 1", "severity 3"}
    expected = np.mean([report.separations["deviation"][f"{name} 3"].auroc.value for name in ("fog", "contrast")])
    assert report.means()["deviation"]["severity 3"].value == pytest.approx(expected)
    texts = [text.get_text() for text in plots.corruption_map(report, "deviation").axes[0].texts]
    assert len(texts) == 4


def test_a_model_that_purifies_what_it_suspects_from_the_command_line(tmp_path: Path, spec: str) -> None:
    data, clean = write_data(tmp_path / "data", 2), write_data(tmp_path / "clean", 20, seed=5)
    fixed = ["evaluate", data, "-o", tmp_path / "out", "--model", spec, "--defense", "none", "--defense", "detect"]
    rest = ["--attack", "PGD", "--attack", "Evading", "--steps", "1", "--clean", clean]
    done = CliRunner().invoke(app, [str(a) for a in (*fixed, *rest)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert "Evading" in rows["detect"]
    assert "Evading" not in rows["none"]
    lines = [json.loads(text) for text in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    guarded = [line["purified"] for line in lines if line["defense"] == "detect" and line["attack"] == "PGD"]
    assert rows["detect"]["PGD"]["purified"]["value"] == 100 * sum(guarded) / 2
    looking = json.loads((tmp_path / "out" / "study.json").read_text())["defenses"]["detect"]["detector"]
    assert (looking["detector"], looking["settings"]["views"]) == (
        "OutputVariance",
        [repr(view) for view in views.guard()],
    )
    assert "PGD: purified, %" in (tmp_path / "out" / "table.md").read_text()
    assert all("purified" not in line for line in lines if line["defense"] == "none")
    fixed[3] = tmp_path / "other"
    done = CliRunner().invoke(app, [str(a) for a in (*fixed, *rest, "--detector", "variance")])
    assert done.exit_code == 0, done.output
    study = json.loads((tmp_path / "other" / "study.json").read_text())
    assert study["defenses"]["detect"]["detector"]["detector"] == "OutputVariance"
    fixed[3], somewhere = tmp_path / "somewhere", [a if a != "detect" else "detect@body" for a in rest]
    done = CliRunner().invoke(app, [str(a) for a in (*fixed, *somewhere, "--detector", "similarity")])
    assert done.exit_code == 0, done.output
    for wrong, sentence in (
        (("--foreign", "variance"), "foreign is given without the study 'ood', which it is for"),
        (
            ("--detector", "variance", "--detector", "deviation"),
            "detector is given; it is for the defense 'detect', which has one, or for a study, one of",
        ),
        (("--detector", "magic"), "detector is 'magic'; it must be one of similarity"),
    ):
        done = CliRunner().invoke(app, [str(a) for a in (*fixed, *wrong, "--clean", clean)])
        assert done.exit_code == 2
        assert sentence in done.output.replace("\n", " ")


def test_heads_and_thresholds_for_several_runs(tmp_path: Path, spec: str) -> None:
    data, clean = write_data(tmp_path / "data", 3), write_data(tmp_path / "clean", 20, seed=5)
    fixed = ["evaluate", data, "--model", spec, "--steps", "1", "--fit", write_data(tmp_path / "fit", 20, seed=9)]
    fixed += ["--clean", clean]
    fixed += ["--heads", tmp_path / "heads", "--detector", "combined"]
    made: list[set[tuple[str, int]]] = []
    for study in ("detection", "ood"):
        out = tmp_path / study
        done = CliRunner().invoke(app, [str(a) for a in (*fixed, "-o", out, "--study", study)])
        assert done.exit_code == 0, done.output
        made.append({(path.name, path.stat().st_mtime_ns) for path in (tmp_path / "heads").iterdir()})
        assert not list(out.glob("*.safetensors"))
    assert made[0] == made[1]
    assert len(made[0]) == 2  # a head and a threshold, of the first run
    fixed[fixed.index("combined")] = "variance"
    for seed in ("0", "3"):  # a threshold of another seed is another file
        out = tmp_path / f"seed {seed}"
        done = CliRunner().invoke(app, [str(a) for a in (*fixed, "-o", out, "--study", "ood", "--seed", seed)])
        assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "heads").glob("detector-variance-*"))) == 2


def test_clean_images_without_labels(tmp_path: Path, spec: str) -> None:
    """A folder of image files does for thresholds, heads and foreign images; and a rate is that of the thresholds."""
    data, clean = write_data(tmp_path / "data", 3), write_data(tmp_path / "clean", 20, seed=5)
    fixed = ["evaluate", data, "--model", spec, "--study", "ood", "--heads", tmp_path / "heads"]
    fixed += ["--detector", "variance", "--detector", "rotation"]
    without = ["--clean", clean / "images", "--foreign", clean / "images"]
    without += ["--fit", write_data(tmp_path / "fit", 20, seed=9) / "images"]
    documents = []
    for name, given in (
        ("none", without),
        ("labels", [*without, "--clean", clean]),
        ("rate", [*without, "--rate", "0.5"]),
    ):
        done = CliRunner().invoke(app, [str(a) for a in (*fixed, *given, "-o", tmp_path / name)])
        assert done.exit_code == 0, done.output
        documents.append(json.loads((tmp_path / name / "table.json").read_text()))
    assert documents[0]["rows"] == documents[1]["rows"]
    assert documents[0]["false positive rate"] == {"variance": 0.05, "rotation": 0.05}
    assert documents[2]["false positive rate"] == {"variance": 0.5, "rotation": 0.5}
    kept = [
        json.loads((tmp_path / name / "study.json").read_text())["defenses"]["variance"] for name in ("none", "rate")
    ]
    assert kept[1]["threshold"] < kept[0]["threshold"]
    assert kept[1]["scores"] == kept[0]["scores"]
    done = CliRunner().invoke(app, [str(a) for a in (*fixed, "--clean", clean, "-o", tmp_path / "e", "--heads", data)])
    assert done.exit_code == 2
    assert "rotation needs one trained head" in done.output
    assert not list(data.glob("detector-*"))  # which showed before any threshold was sought


@pytest.mark.parametrize(
    ("command", "more", "sentence"),
    [
        (
            "evaluate",
            ("--study", "detection", "--foreign", "DATA"),
            "foreign is given with study 'detection'; it is for",
        ),
        (
            "evaluate",
            ("--study", "ood", "--foreign", "DATA", "--foreign", "DATA"),
            "names and their folders' must differ",
        ),
        (
            "detect",
            ("--clean", "DATA", "--detector", "variance", "--layer", "stem"),
            "layer is given with detector 'variance'",
        ),
        ("detect", ("--clean", "EMPTY"), "which has no PNG, JPEG or WebP file"),
        ("evaluate", ("--preset", "strong"), "preset is given without a study; name it as a defense"),
        ("evaluate", ("--layer", "stem"), "layer is given without the detector 'deviation' or 'combined'"),
        ("evaluate", ("--rate", "0.1"), "rate is given without a detector, whose threshold it is for"),
        ("evaluate", ("--defense", "detect", "--layer", "stem"), "layer is given without the detector 'deviation'"),
        (
            "evaluate",
            ("--study", "detection", "--detector", "error", "--layer", "stem"),
            "layer is given without the detector",
        ),
    ],
)
def test_what_the_commands_refuse(
    command: str, more: tuple[str, ...], sentence: str, tmp_path: Path, spec: str
) -> None:
    data = write_data(tmp_path / "data", 3)
    (tmp_path / "empty").mkdir()
    folders = {"DATA": str(data), "EMPTY": str(tmp_path / "empty")}
    given = [command, str(data), "-o", str(tmp_path / "out"), "--model", spec, *(folders.get(a, a) for a in more)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2, done.output
    assert sentence in " ".join(done.output.split())
    assert command == "evaluate" or not (tmp_path / "out").exists()


def test_an_output_is_no_class_of_the_data(tmp_path: Path, spec: str) -> None:
    write_image(tmp_path / "data" / "a" / "0.png", images(1)[0])
    for output in (tmp_path / "data", tmp_path / "data" / "results"):
        given = ["evaluate", tmp_path / "data", "-o", output, "--model", spec]
        done = CliRunner().invoke(app, [str(a) for a in given])
        assert done.exit_code == 2
        assert "is in the data, whose folders are classes" in " ".join(done.output.split())


def test_detect_fits_on_no_overlays_of_its_own(tmp_path: Path, spec: str) -> None:
    clean = write_data(tmp_path / "clean", 30, seed=5) / "images"
    write_image(tmp_path / "in" / "a.png", images(1, seed=20)[0])
    given = ["detect", tmp_path / "in", "-o", clean / "out", "--model", spec, "--clean", clean]
    for _ in range(2):
        done = CliRunner().invoke(app, [str(a) for a in given])
        assert done.exit_code == 0, done.output
        assert (clean / "out" / "overlays" / "a.png").is_file()
        assert json.loads((clean / "out" / "detector.json").read_text())["fitted_on"]["images"] == 30
    own = [*given[:1], clean, *given[2:]]  # nor are they scored
    done = CliRunner().invoke(app, [str(a) for a in own])
    assert len(json.loads((clean / "out" / "scores.json").read_text())["images"]) == 30


@pytest.mark.parametrize("detector", ["similarity", "error", "deviation", "combined"])
def test_detect(detector: str, tmp_path: Path, spec: str) -> None:
    clean = write_data(tmp_path / "clean", 60 if detector == "combined" else 30, seed=5) / "images"
    for i in range(3):
        write_image(tmp_path / "in" / f"a{i}.png", images(1, seed=20 + i)[0])
    write_image(tmp_path / "in" / "sub" / "noise [/x].png", torch.rand(3, 32, 40))
    (tmp_path / "in" / "0-broken.png").write_text("no image")  # the first
    out = tmp_path / "out"
    given = ["detect", tmp_path / "in", "-o", out, "--model", spec, "--clean", clean, "--detector", detector]
    done = CliRunner().invoke(app, [str(a) for a in given], env={"COLUMNS": "300"})
    assert done.exit_code == 1, done.output  # one cannot be read, the others are done
    assert "0-broken.png" in done.output
    assert "noise [/x].png" in done.output  # brackets are no markup
    scores = json.loads((out / "scores.json").read_text())
    names = ("a0.png", "a1.png", "a2.png", "sub/noise [/x].png")
    assert {line["image"] for line in scores["images"]} == {str(tmp_path / "in" / name) for name in names}
    assert all(line["flagged"] == (line["score"] > scores["threshold"]) for line in scores["images"])
    values = [line["score"] for line in scores["images"]]
    assert values == sorted(values, reverse=True)
    assert len(values) == 4
    overlays = sorted(path.relative_to(out / "overlays").as_posix() for path in (out / "overlays").rglob("*.png"))
    assert overlays == ["a0.png", "a1.png", "a2.png", "sub/noise [/x].png"]
    with Image.open(out / "overlays" / "a0.png") as image:
        assert image.size == (40, 32)
    if detector == "error":  # the same clean images, by two folders
        parts = [tmp_path / "part", tmp_path / "rest"]
        for place, path in enumerate(sorted(clean.iterdir())):
            folder = parts[place >= 12]
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.name)
        both = [*given[:3], tmp_path / "both", *given[4:6], "--fit", parts[0], "--clean", parts[1], *given[8:]]
        done = CliRunner().invoke(app, [str(a) for a in both])
        assert json.loads((tmp_path / "both" / "scores.json").read_text()) == scores
    # the threshold of an earlier run
    (tmp_path / "in" / "0-broken.png").unlink()
    again = [*given[:4], "--model", spec, "--fit", out / "detector.json", "--detector", detector]  # or --clean
    again[3] = tmp_path / "again"
    done = CliRunner().invoke(app, [str(a) for a in again])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "again" / "scores.json").read_text()) == scores
    done = CliRunner().invoke(app, [str(a) for a in (*again, "--rate", "0.4")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "again" / "scores.json").read_text())["threshold"] < scores["threshold"]
    Image.open(tmp_path / "in" / "a0.png").save(tmp_path / "in" / "a0.jpg")
    done = CliRunner().invoke(app, [str(a) for a in again])
    assert done.exit_code == 2
    assert "would both be written to 'a0.png'" in done.output.replace("\n", " ")


def test_what_detect_refuses(tmp_path: Path, spec: str) -> None:
    clean = write_data(tmp_path / "clean", 4, seed=5) / "images"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    (tmp_path / "bad").mkdir()
    for i in range(19):
        (tmp_path / "bad" / f"{i}.png").write_text("no image")
    many = write_data(tmp_path / "many", 20, seed=6) / "images"
    (tmp_path / "none.json").write_text("no JSON")
    out = tmp_path / "out"
    for arguments, sentence in (
        ((tmp_path / "empty",), "no PNG, JPEG or WebP file in"),
        ((clean,), "--clean has 4 images; for --rate 0.05 it must have at least 19"),
        (
            (clean, "--detector", "magic"),
            "detector is 'magic'; it must be one of similarity, variance, guard, error, deviation, combined",
        ),
        ((clean, "--clean", tmp_path / "none.json"), "is no JSON"),
        ((clean, "--clean", tmp_path / "none.json", "--detector", "combined"), "rotation.safetensors"),
        ((clean, "--clean", tmp_path / "model.py"), "for --rate 0.05 it must have at least 19"),
        ((clean, "--clean", tmp_path / "none.json", "--clean", many), "none.json of an earlier run is given alone"),
        (  # an image counts once
            (clean, *(a for _ in range(5) for a in ("--clean", clean)), "--clean", clean / "0.png"),
            "--clean has 4 images; for",
        ),
        ((tmp_path / "broken", "--clean", many), "none of 1 images can be read"),
        ((clean, "--clean", tmp_path / "bad"), "0.png: "),
        (
            (clean, "--clean", many, "--detector", "combined"),
            "--clean has 20 images, every second one for the head; for",
        ),
        ((clean, "--clean", many, "--detector", "combined", "--rate", "1.5"), "false_positive_rate is 1.5; it must"),
        ((tmp_path / "broken", "--clean", many, "--features", "body"), "none of 1 images can be read"),
    ):
        given = ["detect", *arguments[:1], "-o", out, "--model", spec, *arguments[1:]]
        given += [] if "--clean" in given else ["--clean", clean]
        done = CliRunner().invoke(app, [str(a) for a in given])
        assert done.exit_code == 2, done.output
        assert sentence in done.output.replace("\n", " ")
        assert not (out / "scores.json").exists()
        assert not (out / "overlays").exists()


def test_no_overlays_where_an_image_is_seen_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        MODEL_FILE.format(path=str(Path(__file__).parent)).replace("dense()", "classifier()")
    )
    clean = write_data(tmp_path / "clean", 20, seed=5) / "images"
    given = ["detect", clean, "-o", tmp_path / "out", "--model", f"{tmp_path / 'model.py'}:build", "--clean", clean]
    given += ["--features", "features", "--detector"]
    done = CliRunner().invoke(app, [str(a) for a in (*given, "guard")])
    assert done.exit_code == 0, done.output
    assert "there are no overlays, since this detector sees an image of this model as a whole" in " ".join(
        done.output.split()
    )
    assert not (tmp_path / "out" / "overlays").exists()
    done = CliRunner().invoke(app, [str(a) for a in (*given, "similarity")])  # of features, which are dense
    assert done.exit_code == 0, done.output
    assert "overlays are in" in " ".join(done.output.split())
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 20


def test_a_score_of_nan_comes_first(tmp_path: Path) -> None:
    from rich.progress import Progress

    from equifast.cli.detect import _scored

    detector = detectors()["variance"]
    for i, value in enumerate((0.2, math.nan, 0.4)):
        write_image(tmp_path / f"{i}.png", torch.full((3, 8, 8), 0.1 * i))
        detector.__dict__.setdefault("values", []).append(value)
    values = iter(detector.values)
    detector.score = lambda x: torch.tensor([next(values)])
    found = [(tmp_path / f"{i}.png", Path(f"{i}.png")) for i in range(3)]
    lines, failed, _ = _scored(detector, found, tmp_path, torch.device("cpu"), Progress(disable=True))
    assert [Path(line["image"]).name for line in lines] == ["1.png", "2.png", "0.png"]
    assert (lines[0]["score"], lines[0]["flagged"], failed) == (None, True, 0)


def test_scores_of_nan_are_the_most_anomalous_in_histograms() -> None:
    scores = {"a": {"clean": np.array([0.1, 0.2, math.nan]), "PGD": np.array([0.3, 0.4, math.nan])}}
    figure = plots.histograms(SimpleNamespace(scores=scores, thresholds={"a": 0.25}))  # type: ignore[arg-type]
    bars = [patch.get_xy() for patch in figure.axes[0].patches]
    assert all(bar[:, 0].max() >= 0.39 for bar in bars)  # NaN is in the last bin, of both


def test_an_overlay() -> None:
    heat = torch.zeros(4, 6)
    heat[1, 2] = 3.0
    painted = plots.overlay(torch.full((3, 4, 6), 0.5), heat)
    assert painted.shape == (3, 4, 6)
    torch.testing.assert_close(painted[:, 0, 0], torch.full((3,), 0.5))
    assert float(painted[0, 1, 2]) > float(painted[2, 1, 2])  # yellow
    assert torch.equal(plots.overlay(torch.full((3, 4, 6), 0.5), torch.zeros(4, 6)), torch.full((3, 4, 6), 0.5))


def test_images_whose_labels_do_not_count(tmp_path: Path) -> None:
    """Of a folder of files alone; a file that lies beside folders is none of its data."""
    data = write_data(tmp_path / "data", 3)
    assert len(open_images(data / "images")) == 3
    assert float(open_images(data / "images", size=(8, 12))[1][0].mean()) > 0
    write_image(data / "stray.png", images(1)[0])
    assert len(open_images(data)) == 3
    (tmp_path / "classes" / "a").mkdir(parents=True)
    for name in ("a/0.png", "a/1.png", "stray.png"):
        write_image(tmp_path / "classes" / name, images(1)[0])
    assert len(open_images(tmp_path / "classes")) == 2
