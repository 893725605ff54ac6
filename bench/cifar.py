"""Attack and defend a ResNet-20 on CIFAR-10, print the table.

python bench/cifar.py --output bench/results/cifar.json

With `--adversarial` the network is trained on against attacks within 8/255 (kept in bench/cache/), and the same table
is of that one.
"""

from pathlib import Path

import numpy as np
import typer
from _data import DATA, load_cifar
from _models import CifarResNet, load_weights
from _robust import crop_and_flip
from _robust import train as train_against
from _study import (
    CACHE,
    Adversarial,
    BpdaSteps,
    Data,
    Eot,
    Images,
    Output,
    Quick,
    StandIn,
    Steps,
    Study,
    WhereFeatures,
    run,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from equifast.evaluate import accuracy


def judge(logits: Tensor, labels: Tensor) -> NDArray[np.bool_]:
    """Whether each image is right, (N,C), (N,) -> (N,)."""
    return (logits.argmax(1) == labels).numpy()


# of attacks and of purification, by training
EPS = {False: 2 / 255, True: 8 / 255}
EPS_PURIFY = {False: 4 / 255, True: 12 / 255}
ROBUST = CACHE / "cifar-robust.safetensors"


def network(data: Path = DATA, adversarial: bool = False) -> CifarResNet:
    """The network with its weights; against attacks it is trained where these are not there."""
    model = load_weights(CifarResNet(20), data / "cifar10" / "resnet20.safetensors")
    if adversarial:
        if not ROBUST.exists():
            x, y = load_cifar(data, "train")
            settings = {"path": ROBUST, "eps": EPS[True], "epochs": 10, "batch": 128, "rate": 0.05}
            train_against(model, x, y, crop_and_flip, nn.CrossEntropyLoss(), **settings)
        load_weights(model, ROBUST)
    return model


def main(
    data: Data = DATA,
    images: Images = 512,
    steps: Steps = 50,
    bpda_steps: BpdaSteps = 20,
    eot: Eot = 1,
    features: WhereFeatures = "layer3",
    stand_in: StandIn = False,
    adversarial: Adversarial = False,
    quick: Quick = False,
    output: Output = None,
) -> None:
    """Rows none, random, averaging, paper, fast; columns clean, PGD and BPDA; s/image."""
    if quick:
        images, steps, bpda_steps, stand_in = min(images, 32), min(steps, 5), min(bpda_steps, 2), True
    pixels, labels = load_cifar(data, "test", images)
    study = Study(
        name="cifar-adversarial" if adversarial else "cifar",
        figure="accuracy in %",
        model=network(data, adversarial),
        images=pixels,
        labels=labels,
        judge=judge,
        estimate=accuracy,
        batch=64,
        slow_images=64,
        eps=EPS[adversarial],
        step_size=EPS[adversarial] / 4,
        eps_purify=EPS_PURIFY[adversarial],
        steps=steps,
        bpda_steps=bpda_steps,
        eot=eot,
        features=features,
        stand_in=stand_in,
    )
    run(study, output)


if __name__ == "__main__":
    typer.run(main)
