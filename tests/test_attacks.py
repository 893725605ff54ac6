import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equifast import Defended, Purifier, attacks, defenses, reference, rng, views
from equifast._cheap import has_fast_bfloat16
from equifast.evaluate import confusion
from equifast.objectives import Selective, cross_entropy
from equifast.purifier import DefendedModel
from equifast.spatial import Grid


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
        before, after = (attack.loss(model(images), y) for images in (x, adversarial))
    assert (after > before).all()
    eps = attack.ascent.ball.eps
    delta = (adversarial - x).flatten(1)
    assert (delta.norm(dim=1) if "l2" in name else delta.abs().amax(1)).max() <= eps * (1 + 1e-5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert not adversarial.requires_grad
    assert torch.equal(torch.cat([attack(x[i : i + 1], y[i : i + 1], ids[i : i + 1]) for i in range(4)]), adversarial)
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
    actual = attacks.MIM(model, eps=2 / 255, step_size=1 / 255, steps=3, momentum=0.7)(x, y)
    assert ((actual - adversarial).abs() < 1e-6).float().mean() > 0.999  # a sign may turn by rounding


def gradient_at(attack: attacks.Attack, x: Tensor, y: Tensor, t: int, sign: float = 1.0) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(sign * attack.step_loss(attack.model(leaf), y, t).sum(), leaf)[0]


def test_mim_takes_longer_steps_by_itself() -> None:
    model = cases.dense()
    assert attacks.MIM(model, eps=2 / 255).ascent.step_size == pytest.approx(1 / 255)
    assert attacks.MIM(model, eps=2 / 255, step_size=0.001).ascent.step_size == 0.001


def test_steps_are_a_quarter_of_the_radius_where_nothing_else_is_said() -> None:
    for norm, eps in (("linf", 4 / 255), ("linf", 0.3), ("l2", 2.0)):
        for kind in (attacks.PGD, attacks.CW, attacks.Houdini, attacks.SegPGD, attacks.CosPGD):
            assert kind(cases.classifier(), eps=eps, norm=norm).ascent.step_size == eps / 4


def test_ifgsm_takes_as_many_steps_as_published() -> None:
    model = cases.dense()
    steps = [attacks.IFGSM(model, eps=eps / 255).ascent.steps for eps in (0.25, 4, 8, 16, 32)]
    assert steps == [1, 5, 10, 20, 36]


@pytest.mark.parametrize("kind", MODELS)
def test_cw_by_its_formula(kind: str) -> None:
    model, x = MODELS[kind]().eval(), cases.images(3)
    y = labels(model, x)
    logits = model(x).detach()
    for targeted in (False, True):
        attack = attacks.CW(model, confidence=0.4, targeted=targeted)
        values = []
        for image, label in zip(logits.flatten(2) if y.dim() > 1 else logits[..., None], y.reshape(3, -1), strict=True):
            margins = []
            for z, c in zip(image.T, label, strict=True):
                if y.dim() == 1 or c != 255:
                    margin = float(torch.cat((z[:c], z[c + 1 :])).max() - z[c])
                    margins.append(max(margin, -0.4) if targeted else min(margin, 0.4))
            values.append(sum(margins) / len(margins))
        torch.testing.assert_close(attack.loss(logits, y), torch.tensor(values))


def test_houdini_by_its_formula() -> None:
    """Its value, and that what its steps follow has the gradient of it; also where that would underflow."""
    model, x = cases.dense().eval(), cases.images(2)
    y = labels(model, x)
    y[:, 10:] = (y[:, 10:] + 1) % 5  # some are wrong
    y[:, :3] = 255
    attack = attacks.Houdini(model)
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    other = logits.scatter(1, y.clamp(max=4)[:, None], -torch.inf).amax(1)
    exceeded = 1 - torch.distributions.Normal(0, 1).cdf(logits.gather(1, y.clamp(max=4)[:, None])[:, 0] - other)
    counted = (y != 255).float()
    probability = (exceeded * counted).sum((1, 2)) / counted.sum((1, 2))
    totals = confusion(logits.argmax(1), y, 5).astype(float)
    hit, union = (np.stack([f(m) for m in totals]) for f in (np.diagonal, lambda m: m.sum(0) + m.sum(1) - np.diag(m)))
    iou = np.array([np.mean(h[u > 0] / u[u > 0]) for h, u in zip(hit, union, strict=True)])
    torch.testing.assert_close(attack.loss(logits, y), probability * torch.tensor(1 - iou, dtype=torch.float32))
    (expected,) = torch.autograd.grad(probability.sum(), leaf)
    found = gradient_at(attack, x, y, 0)
    torch.testing.assert_close(
        *(g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for g in (found, expected)), atol=1e-5, rtol=1e-3
    )
    with torch.no_grad():
        model.head.weight.mul_(1000)
        model.head.bias.mul_(1000)
    assert (gradient_at(attack, x, y, 0).flatten(1).abs().amax(1) > 0).all()


def test_segpgd_and_cospgd_by_their_formulas() -> None:
    model, x = cases.dense().eval(), cases.images(2)
    y = labels(model, x)
    y[:, 10:] = (y[:, 10:] + 1) % 5
    y[:, :3] = 255
    logits = model(x).detach()
    entropy = nn.functional.cross_entropy(logits, y, ignore_index=255, reduction="none")
    counted = (y != 255).sum((1, 2))
    right = logits.argmax(1) == y
    p = logits.softmax(1)
    cosine = nn.functional.cosine_similarity(p, nn.functional.one_hot(y.clamp(max=4), 5).permute(0, 3, 1, 2).float())
    for targeted in (False, True):
        seg = attacks.SegPGD(model, steps=8, targeted=targeted)
        for t in (0, 3, 7):
            share = t / 16
            heavy = right if not targeted else ~right
            weight = torch.where(heavy, 1 - share, share)
            torch.testing.assert_close(seg.step_loss(logits, y, t), (entropy * weight).sum((1, 2)) / counted)
        weight = 1 - cosine if targeted else cosine
        cos = attacks.CosPGD(model, targeted=targeted)
        torch.testing.assert_close(cos.step_loss(logits, y, 2), (entropy * weight).sum((1, 2)) / counted)
    # restarts begin anew with the weights
    once, again = (attacks.SegPGD(model, steps=4, restarts=restarts) for restarts in (1, 2))
    value = [cross_entropy(model(attack(x, y)).detach(), y) for attack in (once, again)]
    assert (value[1] >= value[0]).all()


def test_auto_pgd_halves_where_the_paper_says() -> None:
    from equifast.ascent import _checkpoints

    assert sorted(_checkpoints(100, 0.22, 0.03, 0.06)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(_checkpoints(5, 0.22, 0.03, 0.06))[:2] == [2, 3]


def auto_pgd(
    loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, eps: float, steps: int
) -> tuple[Tensor, list[Tensor]]:
    """Of one image, as the paper writes it, in the largest norm: the best point, and all that were visited."""
    visited: list[Tensor] = []

    def at(z: Tensor) -> tuple[float, Tensor]:
        visited.append(z)
        leaf = z.clone().requires_grad_()
        value = loss(leaf)
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]

    def project(z: Tensor) -> Tensor:
        return z.clamp(x - eps, x + eps).clamp(0, 1)

    marks = [math.ceil(p * steps - 1e-9) for p in (0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99)]
    size, points = 2 * eps, [start]
    f, g = at(start)
    values, best, best_x, best_g = [f], f, start, g
    points.append(project(start + size * g.sign()))
    halved, best_then = False, best
    for k in range(1, steps):
        f, g = at(points[k])
        values.append(f)
        if f > best:
            best, best_x, best_g = f, points[k], g
        current = points[k]
        if k in marks:
            since = marks[marks.index(k) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(since, k))
            halve = rises < 0.75 * (k - since) or (since > 0 and not halved and best == best_then)
            halved, best_then = halve, best
            if halve:
                size, current, g, values[k] = size / 2, best_x, best_g, best
        moved = project(current + size * g.sign())
        ahead = project(current + 0.75 * (moved - current) + 0.25 * (current - points[k - 1]))
        points[k] = current
        points.append(ahead)
    f, _ = at(points[-1])
    return points[-1] if f > best else best_x, visited


class Passing(nn.Module):
    """Class 0 is lost to class 1 half the way up, and not any more at the end, where its cross-entropy is largest."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        s = 10 * (x.mean((1, 2, 3)) - 0.5)  # from -1 to 1 in the ball
        return torch.stack([torch.zeros_like(s), 0.1 - 0.2 * s.square(), 1.9 * s - 2], 1)


@pytest.mark.parametrize("draw", [None, 0])
def test_a_point_that_turns_the_label_is_kept_before_one_of_larger_loss(draw: int | None) -> None:
    model, x, y = Passing(), torch.full((2, 3, 4, 4), 0.4), torch.zeros(2, dtype=torch.int64)
    settings: dict[str, Any] = {"eps": 0.2, "start": "origin", "steps": 20}
    found, told = {}, list[Tensor]()
    for keep in ("last", "best"):
        attack: Any = attacks.PGD(model, keep=keep, step_size=0.01, **settings)
        if draw is not None:
            attack = attacks.BPDA(attack, lambda x, ids=None, draw=0: x, draw=draw)
        told.clear()
        found[keep] = attack(x, y, watch=lambda t, value, gradient: told.append(value))
    assert model.passes == 20 + 21  # the loss of a point is that of the pass for its gradient
    last, best = model(found["last"]), model(found["best"])
    assert (last.argmax(1) == 0).all()
    assert (best.argmax(1) == 1).all()
    assert (cross_entropy(last, y) > cross_entropy(best, y)).all()
    assert (torch.stack(told).diff(dim=0) > 0).all()
    assert (told[-1] < cross_entropy(last, y)).all()


def test_ranks_go_by_draws_that_are_turned_and_then_by_the_loss() -> None:
    """Of a random defense too; what a step is told stays the loss."""

    class Shown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, 0, 0] * 20

    y, ids = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    shifts = {1: 0.0, 2: 0.0, 3: 0.5, 4: 0.5}

    def defense(x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        return x + torch.tensor([shifts.get(draw, 0.0), 0.0, 0.0]).view(1, 3, 1, 1)

    attack = attacks.BPDA(attacks.SegPGD(Shown(), restarts=2), defense, eot=4)._attack
    halves = torch.tensor([0.2, 0.5, 0.0]).view(1, 3, 1, 1)  # turned by far in two draws, not in the others
    always = torch.tensor([0.0, 0.55, 0.0]).view(1, 3, 1, 1)  # turned in all, by little
    with torch.no_grad():
        objective = attack._objective(attack._prediction(halves, y), halves, y, ids, ranked=True)
        assert objective.value(always) > objective.value(halves)
        plain = attack._objective(attack._prediction(halves, y), halves, y, ids)
        assert 0 <= float(objective.value(always)) - 4 < 1
        torch.testing.assert_close(objective.gradient(always, 0)[0], plain.gradient(always, 0)[0])


def test_adaptive_keeps_the_weight_that_turned_the_label() -> None:
    model, x, y = Passing(), torch.full((2, 3, 4, 4), 0.4), torch.zeros(2, dtype=torch.int64)

    class Held:
        """Holds the image half the way up where it has the weight."""

        @contextlib.contextmanager
        def objective(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Iterator[Any]:
            class Pull:
                fixed = True

                def value(self, x: Tensor) -> Tensor:
                    return -(x.mean((1, 2, 3)) - 0.5).square()

                def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
                    return self.value(x), (0.5 - x.mean((1, 2, 3))).view(-1, 1, 1, 1).expand_as(x)

                def only(self, rows: Any) -> "Pull":
                    return self

            yield Pull()

    settings: dict[str, Any] = {"eps": 0.2, "start": "origin", "steps": 30, "step_size": 0.01}
    for weight in ([0.0, 1e4], [1e4, 0.0]):
        found = attacks.Adaptive(model, Held(), weight=weight, **settings)(x, y)
        assert (model(found).argmax(1) == 1).all()


def test_auto_pgd_step_by_step() -> None:
    model, x = cases.classifier().eval().double(), cases.images(5).double()
    y = labels(model, x)
    attack = attacks.APGD(model, steps=30, eps=0.05, start="origin")
    assert attack.ascent.step_size == 0.1
    found = attack(x, y)
    for i in range(5):
        image, label = x[i : i + 1], y[i : i + 1]
        expected, _ = auto_pgd(lambda z, y=label: nn.functional.cross_entropy(model(z), y), image, image, 0.05, 30)
        torch.testing.assert_close(found[i : i + 1], expected)


def test_auto_pgd_at_a_class_step_by_step() -> None:
    """Its steps halve by the ratio that it climbs; points compare by that of whatever class is next."""
    model, x = cases.classifier().eval().double(), cases.images(5).double()
    y = labels(model, x)
    attack = attacks.APGD(model, objective="targeted-dlr", restarts=2, steps=30, eps=0.05, start="uniform")
    told: list[Tensor] = []
    found = attack(x, y, watch=lambda t, value, gradient: told.append(value))
    for i in range(5):
        image, label = x[i : i + 1], y[i : i + 1]
        order = [int(c) for c in model(image).detach()[0].argsort(descending=True) if int(c) != int(label)]
        points: list[Tensor] = []
        for run, aim in enumerate(order[:2]):

            def ratio(z: Tensor, aim: int = aim, own: int = int(label)) -> Tensor:
                (logits,) = model(z)
                top = logits.topk(4).values
                return (logits[aim] - logits[own]) / (top[0] - (top[2] + top[3]) / 2)  # type: ignore[no-any-return]

            ball, where = attack.ascent.ball, {"seed": 0, "ids": torch.zeros(1, dtype=torch.int64), "draw": 0}
            start = ball.start(image, "uniform", **where, step=run, stream=rng.Stream.START.of(1))
            _, visited = auto_pgd(ratio, image, start, 0.05, 30)
            points += visited
            values = torch.stack([ratio(z).detach() for z in visited[:-1]])
            torch.testing.assert_close(torch.stack(told)[30 * run : 30 * (run + 1), i].double(), values)
        best = max(points, key=lambda z, y=label: float(attack.loss(model(z).detach(), y)))
        torch.testing.assert_close(found[i : i + 1], best)


def test_ratios_of_lost_labels_do_not_take_over() -> None:
    """A label that has come third counts 1, without a gradient, however far below it is; a single one counts on."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [2.0, 3.0, 0.0, 1.0], [1.0, 3.0, 2.5, 2.0], [0.0, 3.0, 2.9, 2.8]])
    ratios = torch.tensor([-0.5, 0.5, 2.0, 15.0])  # of class 0: (largest other - own) / (first - third)
    attack = attacks.APGD(cases.dense(), objective="dlr")
    torch.testing.assert_close(attack.loss(logits, torch.zeros(4, dtype=torch.int64)), ratios)
    pixels = logits.T.reshape(1, 4, 2, 2).requires_grad_()
    loss = attack.loss(pixels, torch.zeros(1, 2, 2, dtype=torch.int64))
    torch.testing.assert_close(loss, ratios.clamp(max=1).mean()[None])
    loss.backward()
    assert pixels.grad is not None
    assert (pixels.grad.abs().sum(1).flatten() > 0).tolist() == [True, True, False, False]


def test_targeted_ratio_aims_at_another_class_in_every_restart() -> None:
    model, x = cases.classifier().eval(), cases.images(3)
    y = labels(model, x)
    aimed: list[Tensor] = []

    class Noted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = model(images)
            if logits.requires_grad:
                logits.register_hook(lambda gradient: aimed.append(gradient.argmax(1)))
            return logits

    attacks.APGD(Noted(), objective="targeted-dlr", steps=2, restarts=4, eps=1e-4)(x, y)
    order = model(x).detach().argsort(dim=1, descending=True)
    assert torch.equal(torch.stack(aimed[::2], 1), order[:, 1:])


def test_adaptive_follows_both_terms_of_the_attacked_image() -> None:
    model, x = cases.dense().eval(), cases.images(3)
    y = labels(model, x)
    purifier = Purifier(model, dtype="float32", seed=3, temperature=2.0)
    settings: dict[str, object] = {"steps": 2, "start": "corner", "step_size": 2 / 255}
    plain = attacks.PGD(model, **settings)(x, y)  # type: ignore[arg-type]
    assert torch.equal(attacks.Adaptive(model, purifier, weight=0.0, **settings)(x, y), plain)  # type: ignore[arg-type]
    weight = 0.7
    start = attacks.PGD(model, **{**settings, "steps": 0})(x, y)  # type: ignore[arg-type]
    leaf = start.clone().requires_grad_()
    sampled = views.sample(purifier.views, (20, 28), seed=3, ids=torch.zeros(3, dtype=torch.int64), draw=1, step=0)
    logits = model(leaf)
    total = cross_entropy(logits, y).sum()
    features = (logits / 2).log_softmax(1)
    for view in sampled:
        rendered = reference.warp(view.color(leaf), view.theta[None], [view.size])[0]
        similarity = reference.similarity(features, [(model(rendered) / 2).log_softmax(1)], view.theta[None])
        total = total + weight * similarity.sum() / len(sampled)
    (gradient,) = torch.autograd.grad(total, leaf)
    expected = (start + 2 / 255 * gradient.sign()).clamp(x - 4 / 255, x + 4 / 255).clamp(0, 1)
    found = attacks.Adaptive(model, purifier, weight=weight, **{**settings, "steps": 1})(x, y)  # type: ignore[arg-type]
    assert ((found - expected).abs() < 1e-6).float().mean() > 0.999


def test_adaptive_weight_buys_similarity_and_a_sequence_keeps_the_worst() -> None:
    model, x = cases.dense().eval(), cases.images(3)
    y = labels(model, x)
    purifier = Purifier(model, dtype="float32")
    # through the averaging of "fast" too
    for defense in (None, defenses.Averaging(model), Defended(model, Purifier(model, steps=1))):
        found = {}
        for weight in (0, 30.0, (0, 30)):
            attack = attacks.Adaptive(model, purifier, weight=weight, steps=4, step_size=2 / 255)  # type: ignore[arg-type]
            found[weight] = (attack if defense is None else attacks.BPDA(attack, defense))(x, y)
        assert (purifier.score(found[30.0]) > purifier.score(found[0])).all()
        best = found[0, 30]
        assert all(any(torch.equal(best[i], found[w][i]) for w in (0, 30.0)) for i in range(3))
        if defense is None:
            values = [cross_entropy(model(found[w]).detach(), y) for w in (0, 30.0, (0, 30))]
            torch.testing.assert_close(values[2], torch.maximum(*values[:2]))


def test_selective_ascent_follows_the_task_where_the_constraint_holds() -> None:
    """Towards 1 in the first channel, with 0.5 in the second at most: of either image what it lacks."""

    class Towards:
        fixed = True

        def __init__(self, channel: int, sign: float, most: float) -> None:
            self.channel, self.sign, self.most = channel, sign, most

        def value(self, x: Tensor) -> Tensor:
            return (self.sign * (x[:, self.channel].mean((1, 2)) - 0.5)).clamp(max=self.most)

        def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            along = torch.zeros_like(x)
            along[:, self.channel] = torch.where(self.value(x) < self.most, self.sign, 0.0).view(-1, 1, 1)
            return self.value(x), along

        def only(self, rows: Any) -> "Towards":
            return self

    task, constraint = Towards(0, 1.0, 9.0), Towards(1, -1.0, 0.0)
    objective = Selective(task, constraint)
    x = torch.tensor([[0.2, 0.3], [0.2, 0.8], [0.9, 0.7], [0.1, 0.5]])[:, :, None, None].expand(4, 2, 3, 3)
    value, gradient = objective.gradient(x, 0)
    torch.testing.assert_close(value, task.value(x))
    held = [True, False, False, True]
    for row, holds in enumerate(held):
        assert (gradient[row, 0] == (1.0 if holds else 0.0)).all()
        assert (gradient[row, 1] == (0.0 if holds else -1.0)).all()
    ranks = objective.value(x).tolist()
    assert sorted(range(4), key=lambda i: -ranks[i]) == [0, 3, 2, 1]  # held, by the task; then by what is too much
    assert [rank > 0 for rank in ranks] == held
    torch.testing.assert_close(objective.only(slice(1, 3)).value(x[1:3]), objective.value(x)[1:3])
    free = Selective(task, constraint, lambda t: t < 2).only(slice(0, 4))
    assert torch.equal(free.gradient(x, 1)[1], task.gradient(x, 1)[1])
    assert torch.equal(free.gradient(x, 2)[1], gradient)
    assert objective.value(torch.full((1, 2, 1, 1), torch.nan)).isnan().all()


def test_evading_takes_turns_after_a_quarter_of_its_steps() -> None:
    """By a detector that suspects every image, and looks at the sum of its values."""

    class Suspicious:
        predict = print

        @contextlib.contextmanager
        def objective(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Iterator[Any]:
            class Sum:
                fixed = True

                def value(self, x: Tensor) -> Tensor:
                    return -1.0 - x.mean((1, 2, 3))

                def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
                    return self.value(x), -torch.ones_like(x)

                def only(self, rows: Any) -> "Sum":
                    return self

            assert draw == 1  # the evaluation has 0
            yield Sum()

    model, x = cases.classifier().eval(), cases.images()
    y = labels(model, x)
    margin, turns = [], []
    settings: dict[str, Any] = {"steps": 8, "step_size": 1 / 255, "keep": "best", "momentum": 0.75, "restarts": 2}
    attacks.CW(model, confidence=1.0, **settings)(x, y, watch=lambda t, value, gradient: margin.append(gradient))
    found = attacks.Evading(model, Suspicious(), **settings)(x, y, watch=lambda t, value, g: turns.append(g))
    for t in range(16):
        if t % 8 == 0:  # from the same start
            assert torch.equal(turns[t], margin[t])
        assert bool((turns[t] == -1).all()) == (t % 8 >= 2)
    assert found.mean() < x.mean() - 1 / 255  # of iterates that are all suspected the least


def test_adaptive_of_a_half_precision_model() -> None:
    """Its similarity's gradient is not scaled, as a purifier's is: the weight would count for nothing else."""
    model, x = cases.classifier().eval().half(), cases.images(2).half()
    purifier = Purifier(model, "features", dtype="float32", view_gradient=1)
    with purifier.objective(x) as objective:
        value, gradient = objective.gradient(x, 0)
    wide = Purifier(model.float(), "features", dtype="float32", view_gradient=1)
    with wide.objective(x.float()) as objective:
        expected, right = objective.gradient(x.float(), 0)
    torch.testing.assert_close(value.float(), expected, atol=1e-3, rtol=0)
    lengths = [g.float().flatten(1).norm(dim=1) for g in (gradient, right)]
    assert (lengths[0] < 2 * lengths[1]).all()


def test_square_asks_for_logits_alone_and_stops_where_it_has_won() -> None:
    model, x = cases.classifier().eval(), cases.images(3)
    with torch.no_grad():
        model.head.weight.mul_(30)
        model.head.bias.sub_(model(x).mean(0))  # all classes are near
    y = labels(model, x)
    seen: list[int] = []

    class Counted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            seen.append(len(images))
            logits: Tensor = model(images)
            return logits

    attack = attacks.Square(Counted(), eps=1.0, steps=100)
    with torch.no_grad():
        found = attack(x, y)
        wrong = model(found).argmax(1) != y
    assert wrong.any()
    assert len(seen) <= 100
    assert sorted(seen, reverse=True) == seen  # images leave
    seen.clear()
    attack(found[wrong], y[wrong])  # the first query shows that nothing is left to do, or a later one
    assert len(seen) < 100
    target = (y + 1) % 5
    aimed = attacks.Square(model, eps=0.3, steps=50, targeted=True)
    with torch.no_grad():
        assert (aimed.loss(model(aimed(x, target)), target) <= aimed.loss(model(x), target)).all()


def test_searches_compare_at_the_same_draws() -> None:
    model, x = cases.dense(), cases.images()
    for attack in (attacks.Square(model, steps=5), attacks.CWL2(model, steps=5, searches=1)):
        recorder = Recorder()
        attacks.BPDA(attack, recorder, eot=2)(x, labels(model, x))
        assert sorted(recorder.draws) == [1] * 5 + [2] * 5


def test_searches_turn_a_random_defense_in_other_draws_too() -> None:
    """A label that turns in one draw of several is no success: without noise these images are near a border."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)).double().eval()
    x = (0.3 + 0.4 * cases.images(24, 8, 8)).double()
    with torch.no_grad():
        model[1].bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    noisy, ids = defenses.RandomNoise(0.1), torch.arange(24)

    def wrong(images: Tensor) -> float:
        with torch.no_grad():
            return float(
                torch.stack(
                    [(model(noisy(images, ids, draw)).argmax(1) != y).double() for draw in range(50, 80)]
                ).mean()
            )

    for attack in (
        attacks.Square(model, eps=0.03, steps=150),
        attacks.CWL2(model, steps=60, searches=3, constant=0.1, rate=0.02),
    ):
        assert wrong(attacks.BPDA(attack, noisy, eot=3)(x, y, ids)) > wrong(x) + 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_draws_that_all_turn_are_a_success(dtype: torch.dtype) -> None:
    """Twelfths, and sixths in double, do not add up to 1."""
    model, x = cases.classifier().to(dtype), cases.images(2, 16, 16).to(dtype)
    model.eval()
    defense = Defended(model, lambda x, ids=None, draw=0: x)
    with torch.no_grad():
        y = model(x).argmax(1)
        turned = []
        for eot in (1, 6, 12):
            found = attacks.BPDA(attacks.CWL2(model, steps=20, searches=2, rate=0.05), defense, eot=eot)(x, y)
            turned.append((model(found).argmax(1) != y).tolist())
        assert any(turned[0])
        assert turned[1] == turned[2] == turned[0]


def test_a_grid_through_a_defense_takes_all_its_draws() -> None:
    class Lucky(DefendedModel):
        """Wrong at draw 1 alone, and at every draw where the image is turned."""

        draws: ClassVar[list[int]] = []

        def forward(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
            self.draws.append(draw)
            wrong = torch.full((len(x),), draw == 1) | (x[:, :, 0, 0].sum(1) == 0)
            return torch.stack((~wrong, wrong), 1).to(x.dtype)

    x, y = (cases.images(2, 16, 16) + 0.01).clamp(max=1), torch.zeros(2, dtype=torch.int64)
    grid = Grid(degrees=30, pixels=0, counts=(3, 1, 1))
    model = Lucky(cases.classifier())
    for eot, turned in ((1, False), (3, True)):
        found = attacks.BPDA(attacks.Spatial(model, grid=grid, order=(2, 0, 1)), model, eot=eot)
        model.draws.clear()
        moved = found(x, y)
        assert set(model.draws) == set(range(1, eot + 1))
        assert bool((moved[:, :, 0, 0].sum(1) == 0).all()) == turned


def test_adaptive_in_double() -> None:
    model = cases.dense().double()
    x = cases.images().double()
    found = attacks.Adaptive(model, Purifier(model), steps=2, weight=(0.1, 1.0))(x, labels(model, x))
    assert found.dtype == torch.float64
    assert not torch.equal(found, x)


def test_square_compares_in_more_than_half() -> None:
    """Steps of bfloat16 at 3 are a hundred times what a square does here."""

    class Slight(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            margin = 0.01 * x.float().mean((1, 2, 3)) - 3
            return torch.stack((torch.zeros_like(margin), margin), 1)

    x = cases.images(2, 16, 16).to(torch.bfloat16)
    found = attacks.Square(Slight(), steps=40, eps=0.1)(x, torch.zeros(2, dtype=torch.int64))
    assert (found.float().mean((1, 2, 3)) > x.float().mean((1, 2, 3)) + 0.01).all()


def test_square_refuses_what_it_does_not_have() -> None:
    for name in ("step_size", "start", "keep", "momentum", "adaptive_steps"):
        with pytest.raises(TypeError, match=f"{name} is given; Square is a search"):
            attacks.Square(cases.dense(), **{name: 1})


@pytest.mark.parametrize(
    "kind", [attacks.PGD, attacks.CW, attacks.Houdini, attacks.SegPGD, attacks.CosPGD, attacks.APGD]
)
def test_many_labels_of_half_images(kind: type[attacks.Attack]) -> None:
    """More labels than float16 can count: the loss is finite, and the attack does what it does in float32."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, padding=1).eval()
    x = cases.images(1, 264, 264)
    y = model(x).argmax(1).detach()
    seen: list[tuple[Tensor, Tensor]] = []
    right = []
    for dtype in (torch.float32, torch.float16):
        seen.clear()
        given = model.to(dtype)
        found = kind(given, steps=4, seed=0)(x.to(dtype), y, watch=lambda t, *rest: seen.append(rest))
        assert all(value.isfinite().all() for value, _ in seen)
        assert all((gradient != 0).float().mean() > 0.9 for _, gradient in seen[1:])
        with torch.no_grad():
            right.append(float((given(found).argmax(1) == y).float().mean()))
    assert abs(right[0] - right[1]) < 0.03
    model.float()


def test_cw_l2_of_half_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 2)).eval()
    x = (0.4 + 0.2 * cases.images(4, 6, 6)).half()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1  # whose inverse hyperbolic tangents are infinite
    y = model(x.float()).argmax(1)
    found = attacks.CWL2(model.half(), steps=100, rate=0.02, constant=1.0, searches=4)(x, y)
    assert found.dtype == torch.float16
    with torch.no_grad():
        assert (model(found).argmax(1) != y).all()


def test_cw_l2_of_a_linear_model_goes_to_its_border() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 2)).double()
    x = (0.4 + 0.2 * cases.images(4, 6, 6)).double()
    logits = model(x).detach()
    y = logits.argmax(1)
    weight = model[1].weight.detach()
    nearest = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm()
    found = attacks.CWL2(model, steps=150, rate=0.02, constant=1.0, searches=6)(x, y)
    with torch.no_grad():
        assert (model(found).argmax(1) != y).all()
    distance = (found - x).flatten(1).norm(dim=1)
    assert (distance >= nearest * (1 - 1e-9)).all()
    assert (distance < 1.05 * nearest).all()
    target = torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        assert torch.equal(
            model(attacks.CWL2(model, steps=50, rate=0.02, constant=10.0, searches=2, targeted=True)(x, target)).argmax(
                1
            ),
            target,
        )
    assert torch.equal(attacks.CWL2(model, steps=1, searches=1)(x, y), x)  # not fooled: as it was


def test_cw_l2_of_dense_labels() -> None:
    model, x = cases.dense().eval(), cases.images(3, 12, 12)
    y, ids = labels(model, x), torch.arange(3)
    attack = attacks.CWL2(model, steps=60, searches=4, rate=0.02, constant=1.0, share=0.5)
    found = attack(x, y, ids)
    with torch.no_grad():
        wrong = (model(found).argmax(1) != y) & (y != 255)
    assert (2 * wrong.sum((1, 2)) >= (y != 255).sum((1, 2))).all()
    assert torch.equal(attack(x[:1], y[:1], ids[:1]), found[:1])


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


def test_bpda_with_one_draw_sees_no_other() -> None:
    model, x = cases.dense(), cases.images()
    recorder = Recorder()
    attacks.BPDA(attacks.PGD(model, steps=3, keep="best"), recorder, draw=0)(x, labels(model, x))
    assert set(recorder.draws) == {0}


def test_bpda_along_the_trajectory() -> None:
    """The mean of the gradients at the images after every step; the value is that of the last."""
    model, x = cases.dense().eval(), cases.images()
    y, purifier = labels(model, x), Purifier(cases.dense(), steps=3, average=False)
    iterates = purifier.iterates(x, draw=1)
    assert len(iterates) == 3
    assert torch.equal(iterates[-1], purifier(x, draw=1))
    gradients = []
    for iterate in iterates:
        leaf = iterate.clone().requires_grad_()
        gradients.append(torch.autograd.grad(cross_entropy(model(leaf), y).sum(), leaf)[0])
    expected = (x + 4 / 255 * torch.stack(gradients).mean(0).sign()).clamp(0, 1)
    actual = attacks.BPDA(attacks.FGSM(model), purifier, trajectory=True)(x, y)
    assert ((actual - expected).abs() < 1e-6).float().mean() > 0.999
    assert not torch.equal(actual, attacks.BPDA(attacks.FGSM(model), purifier)(x, y))


@pytest.mark.parametrize("name", cases.ATTACKS)
def test_bpda_around_every_attack_and_defense(name: str) -> None:
    model, x = cases.dense(), cases.images(2, 8, 12)
    y = labels(model, x)
    every = {**cases.PURIFIERS, **cases.DEFENDED}
    for chosen in every if name == "pgd" else ("fast", "random", "averaging", "unrolled"):
        defense = every[chosen](model)
        attack = cases.ATTACKS[name](model)
        attack.ascent = dataclasses.replace(attack.ascent, steps=1, restarts=1)
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
    settings = {"eps": 4 / 255, "steps": 6}
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
    if dtype == "bfloat16" or has_fast_bfloat16(x.device):
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
