"""Bad input is refused in one sentence that names the argument, what it was and what it must be."""

import math
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

from equifast import Defended, Purifier, attacks, defenses, reference
from equifast.detectors import OutputVariance
from equifast.evaluate import difference

X = cases.images()
MODEL = cases.dense()
THETA = cases.theta("flip", 2)
JITTER = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]] * 2, dtype=torch.float64)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[0], 4, 5, 5)


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = MODEL(x)
        return logits[:1]


def filled(value: float) -> Tensor:
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


def jitter(column: int, value: float) -> Tensor:
    parameters = JITTER.clone()
    parameters[1, column] = value
    return parameters


IMAGES: dict[str, tuple[Any, str]] = {
    "list": ([1.0], "x is a list; it must be a tensor (N, 3, H, W)"),
    "rank": (X[0], "x has shape (3, 20, 28); it must be (N, 3, H, W)"),
    "channels": (X[:, :1], "x has shape (2, 1, 20, 28); it must be (N, 3, H, W)"),
    "no pixels": (X[..., :0], "x has shape (2, 3, 20, 0); an image must have at least one pixel and channel"),
    "integers": ((X * 255).to(torch.uint8), "x has dtype torch.uint8; it must be floating point"),
    "above": (filled(1.1), "x has values from 0 to 1.1; they must lie in [0, 1]"),
    "below": (filled(-2e-6), "; they must lie in [0, 1]"),
    "nan": (filled(math.nan), "x has values that are NaN or infinite; they must lie in [0, 1]"),
    "inf": (filled(math.inf), "x has values that are NaN or infinite; they must lie in [0, 1]"),
}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize(
    "call",
    [Purifier(MODEL), Purifier(MODEL).score, defenses.Averaging(MODEL), Defended(MODEL, Purifier(MODEL))],
)
def test_images(case: str, call: Callable[[Any], Tensor]) -> None:
    x, sentence = IMAGES[case]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(x)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    # construction
    "eps": (lambda: Purifier(MODEL, eps=0), "eps is 0; it must be a finite number above 0"),
    "eps of 255ths": (
        lambda: attacks.PGD(MODEL, eps=4),
        "eps is 4; it must be at most 1, as images lie in [0, 1]: 6/255 rather than 6",
    ),
    "noise": (lambda: Purifier(MODEL, noise="yes"), "noise is 'yes'; it must be True or False"),  # type: ignore[arg-type]
    "targeted": (lambda: attacks.PGD(MODEL, targeted="no"), "targeted is 'no'; it must be True or False"),  # type: ignore[arg-type]
    "averaging views": (
        lambda: defenses.Averaging(MODEL, []),
        "views is []; it must be a sequence of at least one View",
    ),
    "averaging view": (lambda: defenses.Averaging(MODEL, [3]), "views has a int; every one must be a View"),  # type: ignore[list-item]
    "purifier signature": (
        lambda: Defended(MODEL, lambda x: x),
        "purifier is called as (x, ids=None, draw=0), which it does not take",
    ),
    "dtype of the model": (
        lambda: Purifier(cases.dense().half())(X),
        "x is torch.float32, and the model, of torch.float16, does not take that",
    ),
    "dtype of an attacked model": (
        lambda: attacks.PGD(cases.classifier().double())(X, torch.zeros(2, dtype=torch.int64)),
        "x is torch.float32, and the model, of torch.float64, does not take that",
    ),
    "outputs of an attacked model": (
        lambda: attacks.PGD(lambda x: x.mean((1, 2, 3)))(X, torch.zeros(2, dtype=torch.int64)),
        "model gives (2,) for 2 images; it must give logits (N, C) or (N, C, H, W)",
    ),
    "outputs of a model that averages": (
        lambda: defenses.Averaging(Cut())(X),
        "model gives (1, 5, 20, 28) for 6 images; it must give logits (N, C) or (N, C, H, W)",
    ),
    "outputs of a model that is scored": (
        lambda: OutputVariance(Cut()).score(X),
        "for 4 images; it must give logits (N, C) or (N, C, H, W)",
    ),
    "features of no size": (
        lambda: Purifier(nn.Conv2d(3, 2, 1), lambda x: x[:, :, :0]).score(X),
        "features have shape (2, 3, 0, 28); there must be a position and a channel",
    ),
    "device of the model": (
        lambda: Purifier(cases.dense().to("meta"))(X),
        "x is on cpu, the model on meta; they must be on one device",
    ),
    "device of an attack": (
        lambda: attacks.PGD(cases.dense().to("meta"))(X, torch.zeros(2, 20, 28, dtype=torch.int64)),
        "x is on cpu, the model on meta; they must be on one device",
    ),
    "meta": (lambda: Purifier(MODEL)(X.to("meta")), "x is on meta, which holds no values; it must be on a real device"),
    "eps nan": (lambda: Purifier(MODEL, eps=math.nan), "eps is nan; it must be a finite number above 0"),
    "eps text": (lambda: Purifier(MODEL, eps="6/255"), "eps is '6/255'; it must be a finite number above 0"),  # type: ignore[arg-type]
    "preset": (
        lambda: Purifier(MODEL, preset="quick"),
        "preset is 'quick'; it must be one of 'paper', 'fast', 'strong'",
    ),
    "seed": (lambda: Purifier(MODEL, seed=-1), "seed is -1; it must be an integer from 0 to 4294967295"),
    "seed float": (lambda: Purifier(MODEL, seed=1.5), "seed is 1.5; it must be an integer"),  # type: ignore[arg-type]
    "dtype": (
        lambda: Purifier(MODEL, dtype="int8"),
        "dtype is 'int8'; it must be one of 'auto', 'float32', 'bfloat16'",
    ),
    "norm": (lambda: Purifier(MODEL, norm="l1"), "norm is 'l1'; it must be one of 'linf', 'l2'"),
    "start": (lambda: Purifier(MODEL, start="center"), "start is 'center'; it must be one of"),
    "steps": (lambda: Purifier(MODEL, steps=-1), "steps is -1; it must be an integer from 0 to 65535"),
    "step size": (
        lambda: Purifier(MODEL, step_size=0.0),
        "step_size is 0.0; it must be a finite number above 0",
    ),
    "pairing": (
        lambda: Purifier(MODEL, pairing="each"),
        "pairing is 'each'; it must be one of 'anchor', 'all'",
    ),
    "view gradient": (
        lambda: Purifier(MODEL, view_gradient=1.5),
        "view_gradient is 1.5; it must be a finite number of at least 0 and at most 1",
    ),
    "followed": (lambda: Purifier(MODEL, followed=6), "followed is 6; it must be an integer from 1 to 3"),
    "followed of some": (lambda: Purifier(MODEL, followed=3, views_per_step=2), "followed is 3; it must be"),
    "followed by all pairs": (lambda: Purifier(MODEL, preset="paper", followed=1), "followed is 1 with pairing 'all'"),
    "reduction": (
        lambda: Purifier(MODEL, reduction="sum"),
        "reduction is 'sum'; it must be one of 'image', 'pixel'",
    ),
    "pair of them": (
        lambda: Purifier(MODEL, pairing="all", reduction="pixel"),
        "reduction is 'pixel' with pairing 'all'; it must be 'image'",
    ),
    "views": (lambda: Purifier(MODEL, views=[]), "views is []; it must be a sequence of at least one View"),
    "view": (lambda: Purifier(MODEL, views=["flip"]), "views has a str; every one must be a View"),  # type: ignore[list-item]
    "views per step": (
        lambda: Purifier(MODEL, views_per_step=7),
        "views_per_step is 7; it must be an integer from 1 to 5",
    ),
    "restarts": (
        lambda: attacks.PGD(MODEL, start="origin", restarts=2),
        "start is 'origin' with several restarts; it must be 'uniform' or 'corner'",
    ),
    "model": (lambda: Purifier(3), "model is a int; it must be callable"),  # type: ignore[arg-type]
    "features": (
        lambda: Purifier(MODEL, 3),
        "features is 3; it must be None, the name of a submodule or a callable",
    ),  # type: ignore[arg-type]
    "submodule": (
        lambda: Purifier(MODEL, "bodi"),
        "features is 'bodi', which is no submodule of the model; the nearest names are 'body'",
    ),
    "submodule of a function": (
        lambda: Purifier(lambda x: x, "body"),
        "features is 'body', but model is a function",
    ),
    "defended": (
        lambda: Defended(abs, Purifier(MODEL)),
        "model is a builtin_function_or_method; it must be a Module",
    ),  # type: ignore[arg-type]
    "purifier": (lambda: Defended(MODEL, 3), "purifier is a int; it must be callable"),  # type: ignore[arg-type]
    "noise eps": (lambda: defenses.RandomNoise(0), "eps is 0; it must be a finite number above 0"),
    "attack": (lambda: attacks.BPDA(MODEL, Purifier(MODEL)), "attack is a DenseNet; it must be an attack"),  # type: ignore[arg-type]
    "eot": (
        lambda: attacks.BPDA(attacks.PGD(MODEL), Purifier(MODEL), eot=0),
        "eot is 0; it must be an integer from 1",
    ),
    "momentum": (
        lambda: attacks.MIM(MODEL, momentum=-1),
        "momentum is -1; it must be a finite number of at least 0",
    ),
    "temperature": (
        lambda: Purifier(MODEL, temperature=-1),
        "temperature is -1; it must be a finite number above 0",
    ),
    "confidence": (
        lambda: attacks.CW(MODEL, confidence=-1),
        "confidence is -1; it must be a finite number of at least 0",
    ),
    "objective": (
        lambda: attacks.APGD(MODEL, objective="margin"),
        "objective is 'margin'; it must be one of 'ce', 'dlr', 'targeted-dlr'",
    ),
    "step size of auto-pgd": (
        lambda: attacks.APGD(MODEL, step_size=0.1),
        "step_size is given; APGD begins with twice the radius and finds its own",
    ),
    "targeted ratio": (
        lambda: attacks.APGD(MODEL, objective="dlr", targeted=True),
        "objective is 'dlr' with targeted; it must be 'ce'",
    ),
    "adaptive steps of the last iterate": (
        lambda: attacks.PGD(MODEL, adaptive_steps=True),
        "keep is 'last' with adaptive steps; it must be 'best'",
    ),
    "adaptive steps with momentum": (
        lambda: attacks.PGD(MODEL, adaptive_steps=True, keep="best", momentum=1.0),
        "adaptive_steps is True with noise or momentum; it must be without",
    ),
    "adaptive without a purifier": (
        lambda: attacks.Adaptive(MODEL, defenses.RandomNoise()),  # type: ignore[arg-type]
        "purifier is a RandomNoise; it must be a Purifier",
    ),
    "evading without a detector": (
        lambda: attacks.Evading(MODEL, Purifier(MODEL)),
        "detector is a Purifier; it must be a Detector",
    ),
    "evading in no ball": (
        lambda: attacks.Evading(MODEL, OutputVariance(MODEL), eps=0),
        "eps is 0; it must be a finite number above 0",
    ),
    "weight": (
        lambda: attacks.Adaptive(MODEL, Purifier(MODEL), weight=()),
        "weight is empty; it must be a number, or several",
    ),
    "square in another norm": (
        lambda: attacks.Square(MODEL, norm="l2"),
        "norm is 'l2'; for Square it must be 'linf'",
    ),
    "share": (lambda: attacks.Square(MODEL, share=0), "share is 0; it must be a finite number above 0"),
    "draw of an attack": (
        lambda: attacks.BPDA(attacks.PGD(MODEL), Purifier(MODEL), draw=-1),
        "draw is -1; it must be an integer from 0 to 65535",
    ),
    "draws of a search": (
        lambda: attacks.BPDA(attacks.CWL2(MODEL), Purifier(MODEL), eot=40),
        "eot is 40; it must be an integer from 1 to 36",
    ),
    "draw and eot": (
        lambda: attacks.BPDA(attacks.PGD(MODEL), Purifier(MODEL), eot=2, draw=0),
        "draw is given with eot 2; of one draw the expectation is its value",
    ),
    "trajectory": (
        lambda: attacks.BPDA(attacks.PGD(MODEL), defenses.Averaging(MODEL), trajectory=True),
        "trajectory is True for a Averaging; it must be for a Purifier",
    ),
    "too few classes": (
        lambda: attacks.APGD(cases.dense(classes=3), objective="targeted-dlr")(
            X, torch.zeros(2, 20, 28, dtype=torch.int64)
        ),
        "logits have 3 classes; APGD needs at least 4",
    ),
    "stop": (lambda: Purifier(MODEL, stop=1.5), "stop is 1.5; it must be"),
    "stop and restarts": (
        lambda: Purifier(MODEL, stop=0.9, restarts=2),
        "stop is given with several restarts or keep='best'; it is for one run's last iterate",
    ),
    "max_batch": (lambda: Purifier(MODEL, max_batch=0), "max_batch is 0; it must be an integer from 1 to"),
    # calls
    "ids shape": (
        lambda: Purifier(MODEL)(X, ids=torch.arange(3)),
        "ids has shape (3,); it must be (2,), one id per image",
    ),
    "ids dtype": (
        lambda: Purifier(MODEL)(X, ids=torch.zeros(2)),
        "ids has dtype torch.float32; it must be int64",
    ),
    "draw": (lambda: Purifier(MODEL)(X, draw=2**16), "draw is 65536; it must be an integer from 0 to 65535"),
    "constant": (
        lambda: Purifier(Constant())(X),
        "model gives an output that does not depend on the image; there is no gradient to follow",
    ),
    "constant, attacked": (
        lambda: attacks.CWL2(Constant())(X, torch.zeros(2, 5, 5, dtype=torch.int64)),
        "model gives an output that does not depend on the image; there is no gradient to follow",
    ),
    "not dense": (
        lambda: Purifier(cases.classifier())(X),
        "); they must be (N, C, h, w)",
    ),
    "dict": (
        lambda: Purifier(lambda x: {"logits": x})(X),
        "model returned a dict with keys ['logits']; it must have 'out'",
    ),
    "tuple": (
        lambda: Purifier(lambda x: (x, x))(X),
        "model returned a tuple; it must be a tensor, or a dict with 'out'",
    ),
    "unused submodule": (
        lambda: Purifier(Unused(), "spare")(X),
        "features is 'spare', a submodule that the model's forward pass does not call",
    ),
    "labels": (
        lambda: attacks.PGD(MODEL)(X, torch.zeros(2, dtype=torch.int64)),
        "y has shape (2,); for logits (2, 5, 20, 28) it must be (2, 20, 28)",
    ),
    "label dtype": (
        lambda: attacks.PGD(MODEL)(X, torch.zeros(2, 20, 28)),
        "y is torch.float32; it must be an int64 tensor",
    ),
    "label range": (
        lambda: attacks.PGD(MODEL)(X, torch.full((2, 20, 28), 7)),
        "y has values from 7 to 7; they must be 0 to 4",
    ),
    "defense shape": (
        lambda: Defended(MODEL, lambda x, ids, draw: x[:, :, 1:])(X),
        "purifier returned (2, 3, 19, 28) for images (2, 3, 20, 28); it must return their shape",
    ),
    "different images": (
        lambda: difference(torch.zeros(3).numpy(), torch.zeros(4).numpy()),
        "they must be results on the same images",
    ),
    # operators
    "theta rank": (
        lambda: reference.warp(X, THETA[0], [(2, 2)]),
        "theta has shape (2, 2, 3); it must be (K, N, 2, 3)",
    ),
    "theta n": (
        lambda: reference.warp(X, THETA[:, :1], [(2, 2)]),
        "theta has shape (1, 1, 2, 3); it must be (K, 2, 2, 3)",
    ),
    "theta k": (
        lambda: reference.similarity(X, [X, X], THETA),
        "theta has shape (1, 2, 2, 3); it must be (2, 2, 2, 3)",
    ),
    "no view": (
        lambda: reference.warp(X, THETA[:0], []),
        "theta has shape (0, 2, 2, 3); there must be at least one view",
    ),
    "theta dtype": (
        lambda: reference.warp(X, THETA.half(), [(2, 2)]),
        "theta has dtype torch.float16; it must be float32 or",
    ),
    "theta nan": (
        lambda: reference.warp(X, THETA * math.nan, [(2, 2)]),
        "theta has values that are NaN or infinite",
    ),
    "theta singular": (
        lambda: reference.similarity(X, [X], THETA * 0),
        "theta has a singular matrix; every matrix must be invertible",
    ),
    "sizes": (
        lambda: reference.warp(X, THETA, []),
        "sizes has 0 entries; it must have 1, one per view of theta",
    ),
    "size": (
        lambda: reference.warp(X, THETA, [(0, 2)]),
        "sizes is (0, 2); it must be a pair (h, w) of positive integers",
    ),
    "integer images": (
        lambda: reference.warp(X.int(), THETA, [(2, 2)]),
        "images has dtype torch.int32; it must be floating",
    ),
    "view dtype": (
        lambda: reference.similarity(X, [X.double()], THETA),
        "views[0] has dtype torch.float64; it must have that of anchor, torch.float32",
    ),
    "view channels": (
        lambda: reference.similarity(X, [X[:, :2]], THETA),
        "views[0] has shape (2, 2, 20, 28); it must be (2, 3, h, w) as anchor",
    ),
    "devices": (
        lambda: reference.warp(X, THETA.to("meta"), [(2, 2)]),
        "theta is on meta, images on cpu; they must be on one device",
    ),
    "jitter channels": (
        lambda: reference.color_jitter(X[:, :2], JITTER),
        "images has shape (2, 2, 20, 28); it must be (N, 3, H, W)",
    ),
    "jitter rank": (
        lambda: reference.color_jitter(X[0], JITTER),
        "images has shape (3, 20, 28); it must be (N, 3, H, W)",
    ),
    "jitter integers": (
        lambda: reference.color_jitter((X * 255).to(torch.uint8), JITTER),
        "images has dtype torch.uint8; it must be floating point",
    ),
    "jitter rows": (
        lambda: reference.color_jitter(X, JITTER[:1]),
        "parameters has shape (1, 5); it must be (2, 5), one row per image",
    ),
    "jitter columns": (
        lambda: reference.color_jitter(X, JITTER[:, :4]),
        "parameters has shape (2, 4); it must be (2, 5), one row per image",
    ),
    "jitter dtype": (
        lambda: reference.color_jitter(X, JITTER.half()),
        "parameters has dtype torch.float16; it must be float32 or float64",
    ),
    "jitter list": (lambda: reference.color_jitter(X, [1.0]), "parameters is a list; it must be a tensor (N, 5)"),  # type: ignore[arg-type]
    "jitter device": (
        lambda: reference.color_jitter(X, JITTER.to("meta")),
        "parameters is on meta, images on cpu; they must be on one device",
    ),
    "jitter nan": (
        lambda: reference.color_jitter(X, jitter(2, math.nan)),
        "parameters has a saturation that is NaN or infinite; it must be finite",
    ),
    "jitter inf": (
        lambda: reference.color_jitter(X, jitter(0, math.inf)),
        "parameters has a brightness that is NaN or infinite; it must be finite",
    ),
    "jitter factor": (
        lambda: reference.color_jitter(X, jitter(1, -0.1)),
        "parameters has a contrast of -0.1; it must be at least 0",
    ),
    "jitter hue": (
        lambda: reference.color_jitter(X, jitter(3, 0.7)),
        "parameters has a hue of 0.7; it must be from -0.5 to 0.5",
    ),
    "jitter gray": (
        lambda: reference.color_jitter(X, jitter(4, 2)),
        "parameters has a gray of 2; it must be from 0 to 1",
    ),
    "no maps": (
        lambda: reference.pair_similarity([]),
        "maps is empty or no sequence; it must have at least one tensor (N, C, H, W)",
    ),
    "maps of shapes": (
        lambda: reference.pair_similarity([X, X[:1]]),
        "maps[1] has shape (1, 3, 20, 28); it must be that of maps[0], (2, 3, 20, 28)",
    ),
    "maps of dtypes": (
        lambda: reference.pair_similarity([X, X.double()]),
        "maps[1] has dtype torch.float64; it must have that of maps[0], torch.float32",
    ),
    "step shapes": (
        lambda: reference.signed_step(X, X[:1], X, 0.1, 0.1, 0.0, 0, torch.zeros(2, dtype=torch.int64), 0, 0),
        "gradient has shape (1, 3, 20, 28); it must be that of x, (2, 3, 20, 28)",
    ),
    "step eps": (
        lambda: reference.signed_step(X, X, X, -0.1, 0.1, 0.0, 0, torch.zeros(2, dtype=torch.int64), 0, 0),
        "eps is -0.1; it must be a finite number above 0",
    ),
}


class Unused(cases.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize("case", CALLS)
def test_sentence(case: str) -> None:
    call, sentence = CALLS[case]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
