"""The halves of CamVid's test drives, as folders of links: clean images for a threshold, and others to test it on.

A threshold holds for images like those that it was fitted on, and the drives of CamVid's splits are not alike
(docs/detection.md). Halves are contiguous, since frames that follow each other are nearly the same.
"""

import itertools
from pathlib import Path
from typing import Annotated

import typer
from _data import DATA


def main(
    data: Annotated[Path, typer.Option(help="Folder of camvid/.")] = DATA,
    output: Annotated[Path, typer.Option(help="Folder that gets first/ and second/.")] = Path(__file__).parent
    / "cache"
    / "halves",
) -> None:
    """Write first/ and second/, each with images/ and labels/."""
    folder = (data / "camvid" / "test").resolve()
    images = sorted((folder / "images").glob("*.jpg"))
    if not images:
        raise SystemExit(f"data: {folder / 'images'} holds no JPEG files")
    for _, group in itertools.groupby(images, key=lambda path: path.stem.partition("_")[0]):
        drive = list(group)
        for half, part in (("first", drive[: len(drive) // 2]), ("second", drive[len(drive) // 2 :])):
            for image in part:
                for source in (image, folder / "labels" / f"{image.stem}.png"):
                    target = output / half / source.parent.name / source.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.unlink(missing_ok=True)
                    target.symlink_to(source)
    print(*(f"{half}: {len(list((output / half / 'images').iterdir()))} images" for half in ("first", "second")))


if __name__ == "__main__":
    typer.run(main)
