"""Defend a torchvision segmentation model: its dict output is understood.

Random weights ("none"), so that nothing is downloaded; leave that word out for trained ones.
"""

import sys

import torch

import equifast
from equifast import attacks
from equifast.demo import load_scenes
from equifast.models import load_model

try:
    model = load_model("torchvision:lraspp_mobilenet_v3_large:none")
except ValueError as error:
    sys.exit(f"left out: {error}" if "cannot be used" in str(error) else f"failed: {error}")

scenes, _ = load_scenes()
x = torch.nn.functional.interpolate(scenes[:2], (128, 160), mode="bilinear")
with torch.no_grad():
    y = model(x)["out"].argmax(1)

purifier = equifast.Purifier(model, eps=6 / 255)  # features: the output; or a submodule, "model.classifier"
defended = equifast.Defended(model, purifier)
adversarial = attacks.PGD(model, eps=4 / 255, steps=10)(x, y)
print("similarity: clean", purifier.score(x).tolist(), "attacked", purifier.score(adversarial).tolist())
for name, network in (("undefended", lambda images: model(images)["out"]), ("defended", defended)):
    with torch.no_grad():
        agreement = (network(adversarial).argmax(1) == y).float().mean()
    print(f"{name}: {100 * agreement:.1f}% of the pixels keep their class under attack")
