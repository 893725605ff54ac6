import dataclasses

import cases
import pytest
import torch
from torch import Tensor, nn

from equifast import Defended, Purifier, attacks, defenses
from equifast.objectives import cross_entropy
from equifast.purifier import DefendedModel


def labels(model: nn.Module, x: Tensor, void: bool = True) -> Tensor:
    """The model's own predictions, so that there is something to lose; a void row where dense."""
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    if y.dim() == 3 and void:
        y[:, :3] = 255
    return y


MODELS = {"dense": cases.dense, "classifier": cases.classifier}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", cases.ATTACKS)
def test_attack(name: str, kind: str) -> None:
    """Raises the loss of every image, stays in its ball and in [0, 1], and does not depend on the batch."""
    model, x = MODELS[kind]().eval(), cases.images(4)
    y, ids = labels(model, x), torch.tensor([4, 2**35, 1, 1])
    attack = cases.ATTACKS[name](model)
    adversarial = attack(x, y, ids)
    with torch.no_grad():
        before, after = (cross_entropy(model(images), y) for images in (x, adversarial))
    assert (after > before).all()
    eps = attack.ascent.ball.eps
    delta = (adversarial - x).flatten(1)
    assert (delta.norm(dim=1) if "l2" in name else delta.abs().amax(1)).max() <= eps * (1 + 1e-5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert not adversarial.requires_grad
    if kind == "dense":  # a linear layer may round otherwise at another batch size
        assert torch.equal(
            torch.cat([attack(x[i : i + 1], y[i : i + 1], ids[i : i + 1]) for i in range(4)]), adversarial
        )
        order = torch.tensor([2, 0, 3, 1])
        assert torch.equal(attack(x[order], y[order], ids[order]), adversarial[order])


def test_fgsm_by_its_formula() -> None:
    model, x = cases.classifier().eval(), cases.images()
    y = labels(model, x)
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(leaf), y, reduction="sum")
    expected = (x + 4 / 255 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)
    torch.testing.assert_close(attacks.FGSM(model)(x, y), expected)


def test_mim_by_its_formula() -> None:
    model, x = cases.dense().eval(), cases.images()
    y = labels(model, x)
    adversarial, momentum = x.clone(), torch.zeros_like(x)
    for _ in range(3):
        leaf = adversarial.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(leaf), y).sum(), leaf)
        momentum = 0.7 * momentum + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        adversarial = adversarial + 1 / 255 * momentum.sign()
        adversarial = adversarial.clamp(x - 2 / 255, x + 2 / 255).clamp(0, 1)
    actual = attacks.MIM(model, eps=2 / 255, steps=3, momentum=0.7)(x, y)
    assert ((actual - adversarial).abs() < 1e-6).float().mean() > 0.999  # a sign may turn by rounding


def test_void_pixels_have_no_say() -> None:
    model, x = cases.dense().eval(), cases.images()
    y = labels(model, x)
    other = torch.where(y == 255, 254, y)
    assert torch.equal(attacks.PGD(model, steps=2)(x, y), attacks.PGD(model, steps=2, ignore_index=254)(x, other))
    assert not torch.equal(attacks.PGD(model, steps=2)(x, y), attacks.PGD(model, steps=2)(x, y.clamp(max=4)))
    everything = torch.full_like(y, 255)
    assert torch.isfinite(attacks.PGD(model, steps=2)(x, everything)).all()
    logits = model(x)
    half = y.clone()
    half[0] = 255
    assert cross_entropy(logits, half)[0] == 0
    expected = nn.functional.cross_entropy(logits[1:], y[1:], ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, y)[1], expected)


def test_targeted() -> None:
    model, x = cases.classifier().eval(), cases.images(8)
    target = (labels(model, x) + 1) % 5
    adversarial = attacks.PGD(model, eps=0.3, step_size=0.05, steps=20, targeted=True)(x, target)
    with torch.no_grad():
        assert (cross_entropy(model(adversarial), target) < cross_entropy(model(x), target)).all()


def test_class_255_of_a_classifier_is_a_class() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(300))
    x = cases.images(2, 8, 8)
    model(x)
    adversarial = attacks.FGSM(model)(x, torch.tensor([255, 254]))
    assert ((adversarial - x).abs().amax((1, 2, 3)) > 1 / 255).all()


def test_best_under_randomness_compares_like_with_like() -> None:
    """Iterates with different views are compared on the same ones: the best scores at least as well as the last."""
    model, x = cases.dense(), cases.images(6)
    score = Purifier(model).score
    last, best, restarted = (
        score(Purifier(model, **settings)(x))
        for settings in ({}, {"keep": "best"}, {"restarts": 3})  # type: ignore[arg-type]
    )
    assert (best >= last - 1e-6).all()
    assert (restarted >= last - 1e-6).all()


def test_restarts_and_best_do_not_lose() -> None:
    model, x = cases.dense().eval(), cases.images(4)
    y = labels(model, x)

    def loss(**settings: object) -> Tensor:
        adversarial = attacks.PGD(model, steps=4, **settings)(x, y)  # type: ignore[arg-type]
        with torch.no_grad():
            return cross_entropy(model(adversarial), y)

    assert (loss(restarts=3) >= loss()).all()
    assert (loss(restarts=3, keep="best") >= loss(restarts=3)).all()


class Recorder(defenses.RandomNoise):
    """Random noise that notes which draws it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[int] = []

    def __call__(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        self.draws.append(draw)
        return super().__call__(x, ids, draw)


def test_bpda_uses_each_draw_once_and_never_the_evaluations() -> None:
    model, x = cases.dense(), cases.images()
    recorder = Recorder()
    attacks.BPDA(attacks.PGD(model, steps=3), recorder, eot=4)(x, labels(model, x))
    assert sorted(recorder.draws) == list(range(1, 13))


def test_bpda_follows_the_defended_gradient() -> None:
    model, x = cases.dense().eval(), cases.images()
    y, purifier = labels(model, x), Purifier(cases.dense(), steps=2, average=False)
    gradients = []
    for draw in (1, 2):
        purified = purifier(x, draw=draw).requires_grad_()
        gradients.append(torch.autograd.grad(cross_entropy(model(purified), y).sum(), purified)[0])
    expected = (x + 4 / 255 * (gradients[0] + gradients[1]).sign()).clamp(0, 1)
    actual = attacks.BPDA(attacks.FGSM(model), purifier, eot=2)(x, y)
    assert ((actual - expected).abs() < 1e-6).float().mean() > 0.999


@pytest.mark.parametrize("name", cases.ATTACKS)
def test_bpda_around_every_attack_and_defense(name: str) -> None:
    model, x = cases.dense(), cases.images()
    y = labels(model, x)
    whole: list[object] = [build(model) for build in cases.DEFENDED.values()]
    for defense in [*(build(model) for build in cases.PURIFIERS.values()), *whole]:
        attack = cases.ATTACKS[name](model)
        attack.ascent = dataclasses.replace(attack.ascent, steps=1)
        assert attacks.BPDA(attack, defense)(x, y).shape == x.shape  # type: ignore[arg-type]
        assert attack.model is model  # the attack given is left as it was
        assert attack.eot is None


def test_bpda_does_more_damage_than_pgd_to_a_defense() -> None:
    """The point of it: on the defended model the attacker who knows does better than one who does not."""
    from equifast.demo import load_model, load_scenes

    model = load_model()
    x, y = (tensor[:4] for tensor in load_scenes())
    purifier = Purifier(model, steps=4)
    defended = Defended(model, purifier)
    settings = {"eps": 4 / 255, "steps": 10}
    plain = attacks.PGD(model, **settings)(x, y)  # type: ignore[arg-type]
    knowing = attacks.BPDA(attacks.PGD(model, **settings), purifier)(x, y)  # type: ignore[arg-type]
    with torch.no_grad():
        assert cross_entropy(defended(knowing), y).mean() > cross_entropy(defended(plain), y).mean()


def test_a_purifier_that_is_a_module_is_put_before_the_model() -> None:
    class Denoiser(nn.Module):
        def forward(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
            return nn.functional.avg_pool2d(x, 3, 1, 1)

    model, x = cases.dense(), cases.images()
    y = labels(model, x)
    with_module = attacks.BPDA(attacks.PGD(model, steps=2), Denoiser())(x, y)
    plain = attacks.BPDA(attacks.PGD(model, steps=2), lambda x, ids, draw: nn.functional.avg_pool2d(x, 3, 1, 1))(x, y)
    assert torch.equal(with_module, plain)


def test_averaging_by_hand() -> None:
    from equifast import reference, views

    model, x = cases.dense().eval(), cases.images()
    flip = defenses.Averaging(model, [views.Flip()])
    torch.testing.assert_close(flip(x), (model(x) + model(x.flip(3)).flip(3)) / 2)
    turn = defenses.Averaging(model, [views.Rotation(40)])
    sampled = views.sample(
        [views.Rotation(40)], (20, 28), seed=0, ids=torch.zeros(2, dtype=torch.int64), step=2**16 - 1
    )
    theta = sampled[0].theta[None]
    back = reference.warp(model(reference.warp(x, theta, [(20, 28)])[0]), reference.invert(theta), [(20, 28)])[0]
    seen = reference.warp(torch.ones_like(x[:, :1]), reference.invert(theta), [(20, 28)])[0] > 0.5
    torch.testing.assert_close(turn(x), torch.where(seen, (model(x) + back) / 2, model(x)))
    classifier = cases.classifier().eval()
    flat = defenses.Averaging(classifier, [views.Flip()])
    torch.testing.assert_close(flat(x), (classifier(x) + classifier(x.flip(3))) / 2)


def test_random_noise() -> None:
    x = torch.full((2, 3, 50, 50), 0.5)
    ids = torch.tensor([0, 1])
    for noise in (defenses.RandomNoise(0.1)(x, ids), defenses.RandomNoise(0.1, "normal")(x, ids)):
        assert not torch.equal(noise[0], noise[1])
        assert abs(float(noise.mean()) - 0.5) < 0.005
    assert (defenses.RandomNoise(0.1)(x) - x).abs().max() <= 0.1
    assert defenses.RandomNoise(0.1, "normal")(x).std() == pytest.approx(0.1, rel=0.05)


def test_an_attack_starts_elsewhere_than_a_purifier_of_its_seed() -> None:
    x = torch.full((1, 3, 40, 50), 0.5)
    y = torch.zeros(1, 40, 50, dtype=torch.int64)
    model = cases.dense()
    attacked = attacks.PGD(model, steps=0, start="corner", eps=0.1)(x, y)
    purified = Purifier(model, steps=0, start="corner", eps=0.1)(x)
    alike = ((attacked > x) == (purified > x)).double().mean()
    assert 0.45 < float(alike) < 0.55


def test_progress_and_empty() -> None:
    model = cases.dense()
    seen: list[tuple[int, int]] = []
    x = cases.images()
    attacks.PGD(model, steps=2, restarts=2)(
        x, labels(model, x), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert attacks.PGD(model)(torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.int64)).shape == (
        0,
        3,
        4,
        4,
    )


def test_inference_mode() -> None:
    model = cases.dense()
    with torch.inference_mode():
        x = cases.images()
        y = torch.zeros(2, 20, 28, dtype=torch.int64)
        assert attacks.PGD(model, steps=2)(x, y).shape == x.shape


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", *cases.DEFENDED])
def test_gradients_of_a_cheaper_copy_are_those_of_the_model(kind: str, dtype: str) -> None:
    """By the signs of a step, which rounding turns where the gradient is next to nothing."""
    model, x = cases.dense().eval(), cases.images(2)
    y = labels(model, x)
    defended = None if kind == "plain" else cases.DEFENDED[kind](model)
    found = []
    for chosen in ("float32", dtype):
        attack = attacks.FGSM(model, dtype=chosen)
        found.append(attack(x, y) if defended is None else attacks.BPDA(attack, defended)(x, y))
    assert ((found[0] - found[1]).abs() < 1e-6).float().mean() > 0.9
    assert not torch.equal(*found)
    if isinstance(defended, DefendedModel):
        assert defended.predictor is None


def test_a_cheaper_copy_is_folded_and_follows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = cases.dense().eval(), cases.images(2)
    y = labels(model, x)
    # folding alone, which is exact up to rounding
    monkeypatch.setattr("equifast._cheap.has_fast_bfloat16", lambda device: False)
    attack = attacks.PGD(model, steps=2, dtype="auto")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    reference = attacks.PGD(model, steps=2)(x, y)
    assert ((attack(x, y) - reference).abs() < 1e-6).float().mean() > 0.99
    with torch.no_grad():
        for norm in norms:
            norm.weight.neg_()
    changed = attacks.PGD(model, steps=2)(x, y)
    assert ((attack(x, y) - changed).abs() < 1e-6).float().mean() > 0.99
    assert not torch.equal(changed, reference)
    for norm in norms:
        norm.forward = count  # type: ignore[method-assign, assignment]
    attack(x, y)
    assert calls == 0


def test_dtypes_of_an_attack() -> None:
    with pytest.raises(ValueError, match="dtype is 'float16'; it must be one of 'auto', 'float32', 'bfloat16'"):
        attacks.PGD(cases.dense(), dtype="float16")
    double = cases.dense().double().eval()
    x = cases.images(2).double()
    assert attacks.FGSM(double, dtype="auto")(x, labels(double, x)).dtype == torch.float64
    function = attacks.FGSM(cases.dense().eval().forward, dtype="auto")  # runs as it is
    x = x.float()
    assert function(x, labels(cases.dense(), x)).shape == x.shape
