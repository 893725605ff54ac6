import cases
import pytest
import torch
from torch import Tensor, nn

from equifast.features import Features, evaluating, suggest


def run(model: nn.Module, x: Tensor, lean: bool) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    with evaluating(x, model, lean=lean):
        out = model(leaf)
        return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]


def normed(**settings: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, **settings)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Tanh(), nn.Conv2d(6, 2, 1)).double()
    model(torch.rand(8, 3, 9, 9, dtype=torch.float64))  # so that the statistics are some
    return model


def test_lean_batch_norm_is_batch_norm() -> None:
    x = cases.images(3, 9, 9).double()
    for settings in ({}, {"affine": False}, {"track_running_stats": False}):
        model = normed(**settings)
        for lean, plain in zip(run(model, x, True), run(model, x, False), strict=True):
            torch.testing.assert_close(lean, plain)


def test_lean_batch_norm_keeps_less() -> None:
    x, model = cases.images(4, 64, 64), cases.dense()

    def kept(lean: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        alive = x.clone().requires_grad_()
        with evaluating(x, model, lean=lean), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(alive)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept(True) < 0.8 * kept(False)


def test_a_lone_image_is_treated_as_one_of_several() -> None:
    """The convolutions where PyTorch would do otherwise; without the mode this fails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1))
    model.append(nn.Conv2d(64, 64, 1))
    x = torch.rand(5, 3, 12, 12)
    for lean in (False, True):
        out, gradient = run(model, x, lean)
        alone = [run(model, x[i : i + 1], lean) for i in range(5)]
        assert torch.equal(torch.cat([o for o, _ in alone]), out)
        assert torch.equal(torch.cat([g for _, g in alone]), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(20, 28), (88, 120)])
def test_a_strided_convolution_does_not_see_the_batch(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Its gradient is the one that oneDNN computes otherwise for three images than for eight, with two threads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, stride=2, padding=1))
    x = torch.rand(8, 3, *size)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out, gradient = run(model, x, True)
        for count in (1, 2, 3, 5):
            parts = [run(model, part, True) for part in x.split(count)]
            assert torch.equal(torch.cat([o for o, _ in parts]), out)
            assert torch.equal(torch.cat([g for _, g in parts]), gradient)


def test_suggestions() -> None:
    x = cases.images()
    assert suggest(cases.dense(), x) == "head"
    assert suggest(nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 28, 4)), x) is None


def test_features_follow_the_model_they_are_of() -> None:
    model, x = cases.classifier().eval(), cases.images()
    features = Features(model, "features.1")
    assert torch.equal(features(x), model.features[:2](x))
    assert not model.features[1]._forward_hooks
