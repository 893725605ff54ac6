"""The networks of the studies for the command line: `--model bench/networks.py:camvid`, `camvid_robust` or `cifar`."""

import torch
from _data import CAMVID_CLASSES, DATA
from _models import CifarResNet, SegmentationNet, load_weights
from _study import CACHE
from torch import nn


def _camvid(weights: str) -> nn.Module:
    model = SegmentationNet(CAMVID_CLASSES).to(memory_format=torch.channels_last)
    return load_weights(model, CACHE / weights)


def camvid() -> nn.Module:
    """Trained by `bench/camvid.py`."""
    return _camvid("camvid.safetensors")


def camvid_robust() -> nn.Module:
    """Trained against attacks by `bench/front.py measure --model robust`."""
    return _camvid("camvid-robust.safetensors")


def cifar() -> nn.Module:
    """A ResNet-20; its features end at `layer3`."""
    return load_weights(CifarResNet(20), DATA / "cifar10" / "resnet20.safetensors")
