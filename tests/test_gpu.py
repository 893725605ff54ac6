"""On a CUDA device: the same arithmetic up to rounding, and the same randomness."""

import cases
import pytest
import torch

from equifast import Purifier, attacks, reference, rng

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def test_operators_agree_with_the_cpu() -> None:
    x, theta = cases.images(2), cases.theta("rotation", 2)
    host = reference.warp(x, theta, [(17, 33)])[0]
    torch.testing.assert_close(reference.warp(x.cuda(), theta.cuda(), [(17, 33)])[0].cpu(), host)
    for reduction in ("image", "pixel"):
        expected = reference.similarity(x, [host], theta, reduction)
        actual = reference.similarity(x.cuda(), [host.cuda()], theta.cuda(), reduction)
        torch.testing.assert_close(actual.cpu(), expected)


def test_random_numbers_agree_with_the_cpu() -> None:
    ids = torch.tensor([3, 2**40])
    torch.testing.assert_close(rng.normal(1, 2, ids.cuda(), 3, 4, 99).cpu(), rng.normal(1, 2, ids, 3, 4, 99))


def test_purifier_and_attack_run() -> None:
    model, x = cases.dense().cuda(), cases.images().cuda()
    y = torch.zeros(2, 20, 28, dtype=torch.int64, device="cuda")
    purifier = Purifier(model, dtype="float32")
    adversarial = attacks.BPDA(attacks.PGD(model, steps=2), purifier)(x, y)
    assert (purifier.score(purifier(adversarial)) > purifier.score(adversarial)).all()
