import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import cases
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from equifast import Defended, Purifier
from equifast.models import Normalized, find_images, load_defense, load_model, read_image, write_image


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "PNG"])
def test_reading(tmp_path: Path, suffix: str) -> None:
    pixels = np.full((5, 7, 3), (200, 100, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (3, 5, 7)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image[:, 2, 3], torch.tensor([200.0, 100, 50]) / 255, atol=0.03, rtol=0)


def test_writing_is_lossless_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randint(0, 256, (3, 9, 4)) / 255
    write_image(tmp_path / "deep" / "a.png", image)
    assert torch.equal(read_image(tmp_path / "deep" / "a.png"), image)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_image(tmp_path / "deep" / "b.png", image)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_kinds_of_images(tmp_path: Path) -> None:
    for mode, color, shown in (
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (100, 100, 100)),
        ("P", 7, None),
        ("RGBA", (200, 100, 50, 0), (200, 100, 50)),
        ("CMYK", (55, 155, 205, 0), (200, 100, 50)),
        ("1", 1, (255, 255, 255)),
    ):
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        picture = Image.new(mode, (4, 3), color)
        if mode == "P":
            picture.putpalette([0, 0, 0] * 7 + [30, 60, 90])
        picture.save(path)
        expected = torch.tensor(shown or (30, 60, 90)).view(3, 1, 1).expand(3, 3, 4) / 255
        torch.testing.assert_close(read_image(path), expected, rtol=0, atol=0.02 if mode == "CMYK" else 1e-6)
    Image.new("I;16", (4, 3)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="it must have 8 bits per channel"):
        read_image(tmp_path / "deep.png")
    turned = Image.new("RGB", (64, 48))
    turned.paste((255, 0, 0), (0, 0, 32, 24))  # top left
    exif = turned.getexif()
    broken = Image.new("RGB", (4, 3))
    broken.save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01")
    with contextlib.suppress(OSError):  # whatever Pillow makes of it, nothing but an OSError comes out
        read_image(tmp_path / "broken.jpg")
    exif[0x0112] = 6  # shown a quarter turn clockwise
    turned.save(tmp_path / "turned.jpg", exif=exif)
    upright = read_image(tmp_path / "turned.jpg")
    assert upright.shape == (3, 64, 48)
    assert upright[0, :28, 28:].min() > 0.9  # top right now
    assert upright[0, 36:].max() < 0.1


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_broken_files_are_an_os_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(OSError, match=r"."):
        read_image(tmp_path / "a.png")
    whole = tmp_path / "whole.png"
    write_image(whole, torch.rand(3, 64, 64))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    with pytest.raises(OSError, match=r"."):
        read_image(tmp_path / "cut.png")


def test_finding(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(name) for _, name in find_images([tmp_path])] == ["a.JPG", "b.png", "sub/c.webp"]
    assert list(find_images([tmp_path / "b.png"])) == [(tmp_path / "b.png", Path("b.png"))]
    with pytest.raises(ValueError, match="does not exist"):
        list(find_images([tmp_path / "none"]))
    assert len(list(find_images([tmp_path], tmp_path / "sub"))) == 2
    assert len(list(find_images([tmp_path / "sub"], tmp_path))) == 1  # an output around the images hides none


MODEL_FILE = """
import torch
def build():
    return torch.nn.Conv2d(3, 4, 3, padding=1)
def beside():
    import helper_of_mine
    return helper_of_mine.model
def number():
    return 3
def broken():
    raise RuntimeError("no weights here\\nand more")
"""


def test_a_model_file_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of the same second and size as what was read before, of which Python may keep the bytecode."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "some.py"
    for channels in (1, 2):
        path.write_text(f"import torch\ndef build():\n    return torch.nn.Conv2d(3, {channels}, 1)\n")
        os.utime(path, (1e9, 1e9))
        assert load_model(f"{path}:build").out_channels == channels
    assert list(tmp_path.iterdir()) == [path]


def test_model_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(MODEL_FILE)
    (tmp_path / "helper_of_mine.py").write_text("import torch\nmodel = torch.nn.Conv2d(3, 2, 1)\n")
    assert load_model(f"{path}:beside").out_channels == 2
    model = load_model(f"{path}:build")
    assert not model.training
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 4, 8, 8)
    for spec, sentence in {
        f"{path}:number": "'number' in",
        f"{path}:broken": "failed: no weights here",
        f"{path}:missing": "it has no function 'missing'",
        f"{tmp_path}/none.py:build": "does not exist",
        "resnet": "model is 'resnet'; it must be demo, torchvision:NAME[:WEIGHTS], timm:NAME or file.py:function",
    }.items():
        with pytest.raises(ValueError) as caught:
            load_model(spec)
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)


DEFENSE_FILE = """
import torch
from equifast import Defended, Purifier
def whole(model):
    return Defended(model, Purifier(model, start="origin"))
def half(model):
    return lambda x, ids=None, draw=0: x.detach() / 2
def network(model):
    return model
def number(model):
    return 3
def nothing():
    return 3
"""


def test_defense_from_a_file(tmp_path: Path) -> None:
    path, model, x = tmp_path / "mine.py", torch.nn.Conv2d(3, 4, 3, padding=1), torch.rand(1, 3, 8, 8)
    path.write_text(DEFENSE_FILE)
    found = load_defense(f"{path}:whole", model)
    assert isinstance(found, Defended)
    assert found.model is model
    assert isinstance(found.purifier, Purifier)
    assert found.purifier.ascent.start == "origin"
    torch.testing.assert_close(load_defense(f"{path}:half", model)(x), model(x / 2))
    for spec, sentence in {
        f"{path}:number": f"'number' in '{path}' returned a int; it must be a DefendedModel, such as equifast.Defended",
        f"{path}:network": "returned a Conv2d; it must be a DefendedModel, such as equifast.Defended(model, purifier)",
        f"{path}:nothing": "failed: nothing() takes 0 positional arguments but 1 was given",
        f"{path}:missing": "it has no function 'missing'",
        f"{tmp_path}/none.py:build": "defense file",
        "fast": "defense is 'fast'; it must be file.py:function",
    }.items():
        with pytest.raises(ValueError) as caught:
            load_defense(spec, model)
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)


def test_normalization() -> None:
    x = torch.rand(2, 3, 4, 5)
    model = Normalized(torch.nn.Identity(), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    for channel, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.25, 2.0), strict=True)):
        torch.testing.assert_close(model(x)[:, channel], (x[:, channel] - mean) / std)
    assert not list(model.parameters())
    assert set(model.state_dict()) == {"mean", "std"}


def test_a_model_of_timm_is_normalized_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, pretrained: bool) -> torch.nn.Module:
        assert (name, pretrained) == ("some", True)
        made = torch.nn.Identity().train()
        made.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0)}  # type: ignore[assignment]
        return made

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    model, x = load_model("timm:some"), torch.rand(1, 3, 2, 2)
    assert not model.training
    torch.testing.assert_close(model(x), (x - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(1, 3, 1, 1))


def _works(name: str) -> bool:
    try:
        __import__(name)
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision that does not fit torch
        return False
    return True


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer4"), ("mobilenet_v3_small", "features")])
def test_torchvision_models_are_defended(name: str, layer: str) -> None:
    """Models that work in place: an image alone and in a batch, with the gradients that attackers follow."""
    if not _works("torchvision"):
        pytest.skip("torchvision is not here, or does not fit this torch")
    torch.manual_seed(0)
    model = load_model(f"torchvision:{name}:none")
    x, ids = cases.images(3, 48, 48), torch.arange(3)
    for gradient in ("straight-through", "unrolled"):
        defended = Defended(model, Purifier(model, f"model.{layer}", "fast", steps=1), gradient=gradient)

        def run(rows: slice, defended: Defended = defended) -> tuple[Tensor, Tensor]:
            given = x[rows].clone().requires_grad_()
            logits = defended(given, ids=ids[rows])
            return logits.detach(), torch.autograd.grad(logits.square().sum(), given)[0]

        whole, parts = run(slice(3)), [run(slice(i, i + 1)) for i in range(3)]
        assert torch.equal(torch.cat([logits for logits, _ in parts]), whole[0])
        found = torch.cat([each for _, each in parts])
        torch.testing.assert_close(found, whole[1], rtol=0, atol=1e-6 * float(whole[1].abs().max()))
        assert found.flatten(1).any(1).all()


def test_a_model_with_random_weights_leaves_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if not _works("torchvision"):
        pytest.skip("torchvision is not here, or does not fit this torch")
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    load_model("torchvision:mobilenet_v3_small:none")
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


def test_torchvision_models() -> None:
    if not _works("torchvision"):
        with pytest.raises(ValueError, match="torchvision cannot be used"):
            load_model("torchvision:resnet18")
        pytest.skip("torchvision is not here, or does not fit this torch; the sentence that says so was checked")
    model = load_model("torchvision:lraspp_mobilenet_v3_large:none")
    assert isinstance(model, Normalized)
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(model.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
    again = load_model("torchvision:lraspp_mobilenet_v3_large:none").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert model(torch.rand(1, 3, 32, 32))["out"].shape == (1, 21, 32, 32)
    for spec, sentence in {
        "torchvision:resnet19": "torchvision has no model 'resnet19'; near are",
        "torchvision:resnet18:BEST": "has no weights 'BEST'; it has IMAGENET1K_V1",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            load_model(spec)


def test_timm_models() -> None:
    if not _works("timm"):
        with pytest.raises(ValueError, match="timm cannot be used"):
            load_model("timm:resnet18")
        pytest.skip("timm is not here, or does not fit this torch; the sentence that says so was checked")
    with pytest.raises(ValueError, match="timm model 'no_such_model' cannot be loaded"):
        load_model("timm:no_such_model")
