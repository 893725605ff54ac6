import math

import pytest
import torch
from scipy import stats

from equifast import rng

# Random123's known-answer vectors of philox4x32-10: counter, key, result
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    words = [[torch.tensor([int(word, 16)]) for word in text.split()] for text in (counter, key)]
    assert [f"{int(word):08x}" for word in rng.philox(*words)] == expected.split()


def test_counter_layout() -> None:
    """Element, draw, step, id and stream each sit in their word of counter and key."""
    ids = torch.tensor([5 + (7 << 32)])
    u = rng.uniform(11, 3, ids, draw=2, step=9, count=8)[0]
    counter = [torch.tensor([1]), torch.tensor([2 * 2**16 + 9]), torch.tensor([5]), torch.tensor([7])]
    words = rng.philox(counter, [torch.tensor([11]), torch.tensor([3])])
    assert u[4:].tolist() == [(int(word) + 0.5) / 2**32 for word in words]


def test_box_muller() -> None:
    ids = torch.tensor([1])
    u, z = rng.uniform(0, 0, ids, 0, 0, 4)[0], rng.normal(0, 0, ids, 0, 0, 4)[0]
    for i in (0, 2):
        radius = math.sqrt(-2 * math.log(u[i]))
        assert z[i] == pytest.approx(radius * math.cos(2 * math.pi * u[i + 1]))
        assert z[i + 1] == pytest.approx(radius * math.sin(2 * math.pi * u[i + 1]))


def test_distributions() -> None:
    ids = torch.arange(10)
    assert stats.kstest(rng.uniform(0, 0, ids, 0, 0, 5001).flatten(), "uniform").pvalue > 0.01
    assert stats.kstest(rng.normal(0, 0, ids, 0, 0, 5001).flatten(), "norm").pvalue > 0.01


def test_everything_matters() -> None:
    base = {"seed": 1, "stream": 1, "ids": torch.tensor([1]), "draw": 1, "step": 1}
    changed = [{**base, key: value + 1} for key, value in base.items()]
    rows = [rng.uniform(**settings, count=64) for settings in [base, *changed]]  # type: ignore[arg-type]
    for i, row in enumerate(rows):
        for other in rows[:i]:
            assert (row - other).abs().min() > 0


def test_prefix_and_negative_ids() -> None:
    ids = torch.tensor([-1, 2**62])
    assert torch.equal(rng.uniform(0, 0, ids, 0, 0, 5), rng.uniform(0, 0, ids, 0, 0, 50)[:, :5])
    words = rng.philox([torch.tensor([word]) for word in (0, 0, 0xFFFFFFFF, 0xFFFFFFFF)], [torch.tensor([0])] * 2)
    assert rng.uniform(0, 0, ids, 0, 0, 4)[0].tolist() == [(int(word) + 0.5) / 2**32 for word in words]
    assert not torch.equal(*rng.uniform(0, 0, ids, 0, 0, 4))
    assert rng.uniform(0, 0, ids, 0, 0, 0).shape == (2, 0)


def test_device_scalars() -> None:
    ids = torch.arange(3)
    scalars = [torch.tensor(value) for value in (7, 2, 3)]
    assert torch.equal(rng.normal(scalars[0], 1, ids, scalars[1], scalars[2], 9), rng.normal(7, 1, ids, 2, 3, 9))


def test_several_streams_at_once() -> None:
    ids, streams = torch.tensor([3, -1]), [0, 7, 44]
    for draw in (rng.uniform, rng.normal):
        together = draw(5, streams, ids, 2, 1, 9)
        assert together.shape == (3, 2, 9)
        assert torch.equal(together, torch.stack([draw(5, stream, ids, 2, 1, 9) for stream in streams]))


def test_torch_and_numpy_agree() -> None:
    """uniform asks numpy on the host and torch on a device."""
    generator = torch.Generator().manual_seed(0)
    words = list(torch.randint(2**32, (6, 100), generator=generator))
    for one, other in zip(
        rng.philox(words[:4], words[4:]),
        rng.philox([w.numpy() for w in words[:4]], [w.numpy() for w in words[4:]]),
        strict=True,
    ):
        assert torch.equal(one, torch.from_numpy(other))


def test_streams_do_not_meet() -> None:
    numbers = [stream.of(index) for stream in rng.Stream for index in range(20)]
    assert len(set(numbers)) == len(numbers)
