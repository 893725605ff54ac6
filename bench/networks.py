"""The networks of the studies for the command line: `--model bench/networks.py:camvid` and the like.

They are trained the first time, those against attacks too, which takes minutes; data are where `_data.py` looks, or
where EQUIFAST_DATA says. The features of those of CIFAR-10 end at `layer3`.
"""

import os
from pathlib import Path

import camvid as _camvid
import cifar as _cifar
from _data import DATA
from torch import nn


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
