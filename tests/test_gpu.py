"""On a CUDA device: the same arithmetic up to rounding, and the same randomness.

The tables of test_native.py and test_step_triton.py also run there; here is what only a device can show.
"""

import importlib.util
import os
from collections.abc import Iterator

import cases
import pytest
import test_native
import torch

from equifast import _C, Purifier, attacks, ops, reference, rng

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(autouse=True)
def _whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # convolutions in TF32 have the eleven bits of half precision
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def _native() -> Iterator[None]:
    # with EQUIFAST_BACKEND=native kernels that are absent or do not load fail the suite
    if "_ops_cuda" not in _C.operator_libraries and os.environ.get("EQUIFAST_BACKEND") != "native":
        pytest.skip("this build has no CUDA kernels: no nvcc, or no torch with CUDA, was there when it was built")
    with ops.use("native"):
        assert ops.choose(torch.device("cuda")) == "native"
        yield


def test_operators_agree_with_the_cpu() -> None:
    x, theta = cases.images(2), cases.theta("rotation", 2)
    host = reference.warp(x, theta, [(17, 33)])[0]
    torch.testing.assert_close(reference.warp(x.cuda(), theta.cuda(), [(17, 33)])[0].cpu(), host)
    for reduction in ("image", "pixel"):
        expected = reference.similarity(x, [host], theta, reduction)
        actual = reference.similarity(x.cuda(), [host.cuda()], theta.cuda(), reduction)
        torch.testing.assert_close(actual.cpu(), expected)
    parameters = torch.tensor([[1.31, 0.71, 1.53, 0.13, 0], [0.7, 1.2, 0.4, -0.3, 1]], dtype=torch.float64)
    jittered = ops.color_jitter(x.cuda(), parameters.cuda())
    torch.testing.assert_close(jittered.cpu(), reference.color_jitter(x, parameters))
    maps = [x, x.flip(3), x.flip(2)]
    pairs = ops.pair_similarity([f.cuda() for f in maps])
    torch.testing.assert_close(pairs.cpu(), reference.pair_similarity(maps))


def test_random_numbers_agree_with_the_cpu() -> None:
    ids = torch.tensor([3, 2**40])
    torch.testing.assert_close(rng.normal(1, 2, ids.cuda(), 3, 4, 99).cpu(), rng.normal(1, 2, ids, 3, 4, 99))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_the_step_is_tritons_and_agrees_with_the_reference(sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, origin, gradient = (torch.rand(3, 3, 40, 50, generator=generator).cuda() for _ in range(3))
    ids = torch.tensor([5, -1, 2**40], device="cuda")
    arguments = (gradient - 0.5, origin, 0.1, 0.03, sigma, 7, ids, 2, 3)
    differ = (ops.signed_step(x, *arguments) - reference.signed_step(x, *arguments)).abs() > 1e-6
    assert differ.double().mean() <= 1e-4  # where the direction is nearly 0, rounding decides its sign


def test_purifier_and_attack_run() -> None:
    model, x = cases.dense().cuda(), cases.images().cuda()
    y = torch.zeros(2, 20, 28, dtype=torch.int64, device="cuda")
    purifier = Purifier(model, dtype="float32")
    adversarial = attacks.BPDA(attacks.PGD(model, steps=2), purifier)(x, y)
    assert (purifier.score(purifier(adversarial)) > purifier.score(adversarial)).all()


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_unrolled_gradients_are_those_of_the_cpu(dtype: str) -> None:
    model, x = cases.dense(), cases.images()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def gradient(device: str, dtype: str) -> torch.Tensor:
        purifier = Purifier(model.to(device), steps=1, noise=False, start="origin", dtype=dtype)
        leaf = x.to(device, copy=True).requires_grad_()
        loss = (purifier.unrolled(leaf, 1) * weights.to(device)).sum()
        return torch.autograd.grad(loss, leaf)[0].cpu() - weights

    found, expected = gradient("cuda", dtype).flatten(1), gradient("cpu", "float32").flatten(1)
    assert torch.nn.functional.cosine_similarity(found, expected).min() > (0.999 if dtype == "float32" else 0.9)


@pytest.mark.usefixtures("_native")
def test_results_are_the_same_in_every_run() -> None:
    anchor, views, theta = test_native.problem("wide", 0, "channels_last", torch.bfloat16, "cuda")
    leaves = [f.requires_grad_() for f in (anchor, *views)]
    for reduction in ("image", "pixel"):
        runs = []
        for _ in range(3):
            s = ops.similarity(leaves[0], leaves[1:], theta, reduction)
            runs.append([s.detach(), *torch.autograd.grad(s.sum(), leaves)])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.usefixtures("_native")
def test_an_image_alone_has_the_result_that_it_has_in_a_batch() -> None:
    anchor, views, theta = test_native.problem("even", 2, "contiguous", torch.float32, "cuda")
    together = ops.similarity(anchor, views, theta)
    for n in range(anchor.shape[0]):
        alone = ops.similarity(anchor[n : n + 1], [v[n : n + 1] for v in views], theta[:, n : n + 1])
        assert torch.equal(alone, together[n : n + 1])


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("reduction", ["image", "pixel"])
def test_a_captured_graph_replays(reduction: str) -> None:
    anchor, views, theta = test_native.problem("even", 0, "contiguous", torch.float32, "cuda")
    leaves = [f.requires_grad_() for f in (anchor, *views)]
    sizes = [(9, 7), (4, 20)]

    def step() -> list[torch.Tensor]:
        s = ops.similarity(leaves[0], leaves[1:], theta, reduction)
        warped = ops.warp(leaves[0], theta[:2], sizes)
        total = s.sum() + sum(w.square().sum() for w in warped)
        return [s.detach(), *torch.autograd.grad(total, leaves)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(-0.7).add_(0.1)
        theta.copy_(theta.flip(0))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_more_than_2_to_the_31_elements(layout: torch.memory_format) -> None:
    shape = (1, 40, 8192, 8192)  # 2.7e9 elements, 5.4 GB, and three more of that size
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("24 GB of free device memory are needed")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout)
    for channel in range(shape[1]):
        x[:, channel] = torch.randint(-99, 99, shape[2:], device="cuda", dtype=torch.bfloat16)
    flip = cases.theta("flip").cuda()
    warped = ops.warp(x, flip, [shape[2:]])[0]
    back = torch.ops.equifast.warp_adjoint([warped], flip, *shape[2:])
    for channel in range(shape[1]):
        assert torch.equal(warped[:, channel], x[:, channel].flip(2))
        assert torch.equal(back[:, channel], x[:, channel])
    s = ops.similarity(x, [warped], flip)
    torch.testing.assert_close(s.cpu(), torch.ones(1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [{}, {"view_gradient": 0}, {"preset": "paper"}, {"preset": "strong"}, {"dtype": "bfloat16"}], ids=str
)
def test_captured_steps_agree_with_those_one_by_one(settings: dict[str, object]) -> None:
    model, settings = cases.dense().cuda(), {"dtype": "float32", "palette": 2, "steps": 1} | settings
    captured, plain = (Purifier(model, capture=capture, **settings) for capture in (True, False))
    for number in range(6):
        x = torch.rand(2, 3, 44, 60, generator=torch.Generator().manual_seed(number)).cuda()
        ids = torch.tensor([number, 9 - number], device="cuda")
        actual, expected = (purifier(x, ids, draw=number) for purifier in (captured, plain))
        differ = (actual - expected).abs() > 1e-6  # where a gradient is nearly 0, rounding decides its sign
        assert differ.double().mean() <= (1e-3 if settings["dtype"] == "float32" else 2e-2)
    assert captured._capture is not None
    assert not captured._capture.refused
    assert len(captured._capture) >= 1


def test_a_captured_purifier_follows_its_model() -> None:
    model, x = cases.dense().cuda(), cases.images().cuda()
    captured, plain = (Purifier(model, capture=c, palette=1, dtype="float32", steps=1) for c in (True, False))
    captured(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    assert ((captured(x) - plain(x)).abs() > 1e-6).double().mean() <= 1e-3


def test_views_in_one_batch_within_a_budget_of_memory() -> None:
    model, x = cases.dense().cuda(), cases.images(9, 44, 60).cuda()
    whole, bounded = (Purifier(model, dtype="float32", steps=1, max_memory=m)(x) for m in (None, 2**22))
    assert ((whole - bounded).abs() > 1e-6).double().mean() <= 1e-3
