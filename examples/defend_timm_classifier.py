"""Defend a timm classifier: name the submodule where its dense features end.

Random weights, so that nothing is downloaded; pass pretrained=True for trained ones.
"""

import sys

import torch

import equifast
from equifast.demo import load_scenes
from equifast.features import suggest
from equifast.models import Normalized

try:
    import timm
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
    sys.exit(f"left out, timm cannot be used: {error}")

network = timm.create_model("resnet18", pretrained=False)
model = Normalized(network, network.pretrained_cfg["mean"], network.pretrained_cfg["std"]).eval()
x = torch.nn.functional.interpolate(load_scenes()[0][:2], (96, 96), mode="bilinear")

where = suggest(model, x)  # the last submodule with an output (N, C, h, w)
print("features end at", where)
defended = equifast.Defended(model, equifast.Purifier(model, features=where, eps=4 / 255))
print("logits", tuple(defended(x).shape), "similarity", defended.purifier.score(x).tolist())
