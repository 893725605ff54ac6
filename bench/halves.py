"""The halves of CamVid's and CIFAR-10's test images: clean ones for a detector's threshold, and others to test it on.

A threshold holds for images like those that it was fitted on, and the drives of CamVid's splits are not alike
(docs/detection.md). Of each drive a half is contiguous, since frames that follow each other are nearly the same.
"""

import itertools
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from _data import DATA


def main(
    data: Annotated[Path, typer.Option(help="Folder of camvid/ and cifar10/.")] = DATA,
    output: Annotated[Path, typer.Option(help="Folder that gets camvid-first/, cifar-first.npz and so on.")] = Path(
        __file__
    ).parent
    / "cache"
    / "halves",
) -> None:
    """Write folders of links with images/ and labels/, and two arrays."""
    folder = (data / "camvid" / "test").resolve()
    images = sorted((folder / "images").glob("*.jpg"))
    if not images:
        raise SystemExit(f"data: {folder / 'images'} holds no JPEG files")
    for _, group in itertools.groupby(images, key=lambda path: path.stem.partition("_")[0]):
        drive = list(group)
        for half, part in (("first", drive[: len(drive) // 2]), ("second", drive[len(drive) // 2 :])):
            for image in part:
                for source in (image, folder / "labels" / f"{image.stem}.png"):
                    target = output / f"camvid-{half}" / source.parent.name / source.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.unlink(missing_ok=True)
                    target.symlink_to(source)
    with np.load(data / "cifar10" / "test.npz") as arrays:
        pixels, labels = arrays["images"], arrays["labels"]
    middle = len(labels) // 2
    for half, rows in (("first", slice(middle)), ("second", slice(middle, None))):
        np.savez(output / f"cifar-{half}.npz", images=pixels[rows], labels=labels[rows])
    counts = [
        f"camvid-{half}: {len(list((output / f'camvid-{half}' / 'images').iterdir()))}" for half in ("first", "second")
    ]
    print(*counts, f"cifar-first, cifar-second: {middle}")


if __name__ == "__main__":
    typer.run(main)
