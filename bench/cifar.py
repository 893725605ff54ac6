"""Attack and defend a ResNet-20 on CIFAR-10, print the table.

python bench/cifar.py --output bench/results/cifar.json
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from _data import DATA, load_cifar
from _models import CifarResNet, load_weights
from _study import Study, run
from numpy.typing import NDArray
from torch import Tensor

from equifast.evaluate import accuracy


def judge(logits: Tensor, labels: Tensor) -> NDArray[np.bool_]:
    """Whether each image is right, (N,C), (N,) -> (N,)."""
    return (logits.argmax(1) == labels).numpy()


def main(
    data: Annotated[Path, typer.Option(help="Folder that holds cifar10/.", show_default=False)] = DATA,
    images: Annotated[int, typer.Option(help="Number of test images.")] = 512,
    steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 50,
    bpda_steps: Annotated[int, typer.Option(help="Steps of BPDA.")] = 20,
    eot: Annotated[int, typer.Option(help="Draws per step of BPDA.")] = 1,
    features: Annotated[str, typer.Option(help="Submodule where the features end.")] = "layer3",
    stand_in: Annotated[bool, typer.Option(help="BPDA on paper follows its last step alone.")] = False,
    quick: Annotated[bool, typer.Option(help="A few images and steps, to see that it runs.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
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
