"""The baseline defenses that climb something else than equivariance."""

import copy
from pathlib import Path

import cases
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from equifast import Defended, Purifier, defenses, views
from equifast.defenses import Averaging
from equifast.purifier import DefendedModel

HEADS = {"rotation": defenses.Rotation, "contrastive": defenses.Contrastive}


class Pattern(nn.Module):
    """Features that tell which side is up: brightness of the four halves, and color."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.stack(
            (
                torch.linspace(-1, 1, x.shape[2])[:, None].expand(x.shape[2:]),
                torch.linspace(-1, 1, x.shape[3]).expand(x.shape[2:]),
            )
        )
        gray = x.mean(1, keepdim=True)
        return torch.cat((x, gray * weight), 1)


def scenes(n: int, seed: int) -> torch.Tensor:
    """Bright above and dark below, of some color."""
    generator = torch.Generator().manual_seed(seed)
    color = 0.3 + 0.7 * torch.rand(n, 3, 1, 1, generator=generator)
    noise = 0.1 * torch.rand(n, 3, 16, 16, generator=generator)
    return (color * torch.linspace(1, 0.2, 16)[:, None] + noise).clamp(0, 1)


def test_invariance_by_hand() -> None:
    model, x = cases.dense().eval(), cases.images()
    purifier = defenses.Invariance(model, views=[views.Flip()], dtype="float32", fold=False)
    with torch.no_grad():
        pooled = [model(image).mean((2, 3)) for image in (x, x.flip(3))]
    torch.testing.assert_close(purifier.score(x), nn.functional.cosine_similarity(*pooled))
    start = defenses.Invariance(model)
    assert (start.score(start(x)) > start.score(x)).all()


def test_rotation_learns_which_side_is_up() -> None:
    purifier = defenses.Rotation(Pattern(), lambda x: Pattern()(x), dtype="float32")
    seen: list[tuple[int, int]] = []
    purifier.fit([scenes(30, 0), (scenes(10, 1), "labels")], epochs=100, progress=lambda *at: seen.append(at))
    assert seen[-1] == (100, 100)
    upright, turned = scenes(8, 2), scenes(8, 2).rot90(1, (2, 3))
    assert (purifier.score(upright) > -0.05).all()  # log-probabilities of the four truths
    assert (purifier.score(turned) < -1).all()
    gray = (0.5 * upright + 0.5 * upright.flip(2)).clamp(0, 1)  # neither is up
    assert (purifier.score(purifier(gray)) > purifier.score(gray)).all()


def test_a_head_does_not_depend_on_how_many_images_run_at_once() -> None:
    heads = [
        defenses.Contrastive(cases.dense(), "body", dtype="float32", max_batch=most).fit([scenes(8, 0)], epochs=2).head
        for most in (4, 8)
    ]
    for a, b in zip(*(head.parameters() for head in heads if head is not None), strict=True):
        assert torch.equal(a, b)


def test_contrastive_tells_an_image_from_others() -> None:
    purifier = defenses.Contrastive(Pattern(), lambda x: Pattern()(x), dtype="float32", views=[views.Resize(0.5)])
    before = defenses.Contrastive(Pattern(), lambda x: Pattern()(x), dtype="float32", views=[views.Resize(0.5)])
    before.fit([scenes(40, 0)], epochs=1)
    purifier.fit([scenes(40, 0)], epochs=200)
    x = scenes(8, 3)
    assert purifier.score(x).mean() > before.score(x).mean() + 0.5
    bank = purifier.bank
    assert bank is not None
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(40))
    # negatives are of the bank alone: the batch has no say (bit for bit, tests/test_purifier.py)
    torch.testing.assert_close(purifier.score(x[:1]), purifier.score(x)[:1])


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_saved_whole_or_not_at_all(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, path = cases.dense(), cases.images(), tmp_path / "head.safetensors"
    purifier = HEADS[name](model)
    for call in (lambda: purifier(x), lambda: purifier.save(path)):
        with pytest.raises(RuntimeError, match=r"has no head yet; call fit\(loader\) or load\(path\)"):
            call()
    cases.fitted(purifier).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]
    assert torch.equal(HEADS[name](model).load(path)(x), purifier(x))
    again = cases.fitted(HEADS[name](model))
    assert torch.equal(again(x), purifier(x))  # under one seed training gives one head
    other = next(kind for key, kind in HEADS.items() if key != name)
    with pytest.raises(ValueError, match=f"has defense '{HEADS[name].__name__}'; it must have"):
        other(model).load(path)
    with pytest.raises(ValueError, match=r"has features .*model's output.*; it must have 'body'"):
        HEADS[name](model, "body").load(path)
    with pytest.raises(ValueError, match=r"has model '[0-9a-f]{16}'; it must have"):
        HEADS[name](cases.dense(seed=1)).load(path)  # of as many channels
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(ValueError, match="is no safetensors file"):
        HEADS[name](model).load(tmp_path / "text")
    save_file({"a": x}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="has defense None; it must have"):
        HEADS[name](model).load(tmp_path / "foreign")

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("equifast.defenses.save_file", broken)
    before = path.read_bytes()
    with pytest.raises(OSError, match="no space left"):
        purifier.save(path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_what_they_refuse() -> None:
    model = cases.dense()
    with pytest.raises(ValueError, match="loader has no images; there must be at least one"):
        defenses.Rotation(model).fit([])
    with pytest.raises(ValueError, match="loader's images has shape"):
        defenses.Rotation(model).fit([torch.zeros(2, 1, 8, 8)])
    with pytest.raises(TypeError, match="pairing is given; Invariance has no such setting"):
        defenses.Invariance(model, pairing="all")
    with pytest.raises(TypeError, match="views is given; Rotation has no such setting"):
        defenses.Rotation(model, views=[views.Flip()])


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    purifier = defenses.Contrastive(cases.dense())
    before = torch.get_rng_state()
    cases.fitted(purifier).save(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    purifier.load(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["purified", "averaged"])
def test_predictions_from_a_cheaper_copy(kind: str) -> None:
    """They are the model's up to rounding, with its gradient, follow its weights, and survive copies."""
    model, x = cases.dense().eval(), cases.images()

    def make(dtype: str) -> DefendedModel:
        return Averaging(model, dtype=dtype) if kind == "averaged" else Defended(model, Purifier(model), dtype=dtype)

    exact, cheap = make("float32"), make("bfloat16")
    with torch.no_grad():
        before = cheap(x)
        torch.testing.assert_close(before, exact(x), rtol=0.1, atol=0.05)
        assert before.dtype == torch.float32
        assert not torch.equal(before, exact(x))
    assert cheap._cheap is not None
    assert cheap._cheap._folded.made
    found = []
    for defended in (exact, cheap):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(defended(leaf)[:, 0].sum(), leaf)[0].flatten())
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.98
    assert torch.equal(copy.deepcopy(cheap)(x), before)
    with torch.no_grad():
        model.head.bias.add_(1.0)
        torch.testing.assert_close(cheap(x), exact(x), rtol=0.1, atol=0.05)
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of"):
        make("int8")
