"""The networks of the studies for the command line: `--model bench/networks.py:camvid` and the like.

They are trained the first time, those against attacks too, which takes minutes; data are where `_data.py` looks, or
where EQUIFAST_DATA says. The features of those of CIFAR-10 end at `layer3`.
"""

import functools
import os
from pathlib import Path

import camvid as _camvid
import cifar as _cifar
import torch
from _data import DATA, load_cifar
from _study import CACHE
from torch import nn
from torch.utils.data import TensorDataset

from equifast import attacks
from equifast.nn import P4, Group, ResNet18, as_convolutions
from equifast.train import Recipe, crop_and_flip, train


def _data() -> Path:
    return Path(os.environ.get("EQUIFAST_DATA", DATA))


def camvid() -> nn.Module:
    """A small dilated ResNet."""
    return _camvid.network(_data())


def camvid_robust() -> nn.Module:
    """The same, trained against attacks within 4/255."""
    return _camvid.network(_data(), adversarial=True)


def cifar() -> nn.Module:
    """A ResNet-20."""
    return _cifar.network(_data())


def cifar_robust() -> nn.Module:
    """The same, trained against attacks within 8/255."""
    return _cifar.network(_data(), adversarial=True)


def _symmetric(name: str, group: Group | None, recipe: Recipe) -> nn.Module:
    """A narrow ResNet-18 that downsamples by means, trained for 12 epochs; features end at `blocks`."""
    torch.manual_seed(0)
    model = ResNet18(group=group, width=0.125, invariant=group is not None)
    data = TensorDataset(*load_cifar(_data(), "train"))
    train(model, data, recipe, epochs=12, batch=64, rate=0.1, folder=CACHE / name)
    # filters of a trained group network are what they are: plain ones, whose batch norm can be folded
    return as_convolutions(model).eval().requires_grad_(False)


def cifar_plain() -> nn.Module:
    """Without any symmetry but that of convolutions."""
    return _symmetric("cifar-plain", None, Recipe(augment=crop_and_flip))


def cifar_group() -> nn.Module:
    """Exactly invariant to quarter turns, of about as many weights."""
    return _symmetric("cifar-group", P4, Recipe(augment=crop_and_flip))


def cifar_spatial() -> nn.Module:
    """The plain one, trained on the worse of two rotations and translations of each image."""
    worst = functools.partial(attacks.Spatial, search="worst-of-k", k=2)
    return _symmetric("cifar-spatial", None, Recipe(augment=crop_and_flip, adversary=worst))
