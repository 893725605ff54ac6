"""Attack and defend a ResNet-20 on CIFAR-10, print the table.

python bench/cifar.py --output bench/results/cifar.json
"""

import numpy as np
import typer
from _data import DATA, load_cifar
from _models import CifarResNet, load_weights
from _study import BpdaSteps, Data, Eot, Images, Output, Quick, StandIn, Steps, Study, WhereFeatures, run
from numpy.typing import NDArray
from torch import Tensor

from equifast.evaluate import accuracy


def judge(logits: Tensor, labels: Tensor) -> NDArray[np.bool_]:
    """Whether each image is right, (N,C), (N,) -> (N,)."""
    return (logits.argmax(1) == labels).numpy()


def main(
    data: Data = DATA,
    images: Images = 512,
    steps: Steps = 50,
    bpda_steps: BpdaSteps = 20,
    eot: Eot = 1,
    features: WhereFeatures = "layer3",
    stand_in: StandIn = False,
    quick: Quick = False,
    output: Output = None,
) -> None:
    """Rows none, random, averaging, paper, fast; columns clean, PGD 2/255 and BPDA; s/image."""
    if quick:
        images, steps, bpda_steps, stand_in = min(images, 32), min(steps, 5), min(bpda_steps, 2), True
    pixels, labels = load_cifar(data, "test", images)
    study = Study(
        name="cifar",
        figure="accuracy in %",
        model=load_weights(CifarResNet(20), data / "cifar10" / "resnet20.safetensors"),
        images=pixels,
        labels=labels,
        judge=judge,
        estimate=accuracy,
        batch=64,
        slow_images=64,
        eps=2 / 255,
        step_size=0.5 / 255,
        eps_purify=4 / 255,
        steps=steps,
        bpda_steps=bpda_steps,
        eot=eot,
        features=features,
        stand_in=stand_in,
    )
    run(study, output)


if __name__ == "__main__":
    typer.run(main)
