"""Purify every image of a folder: python examples/purify_a_folder.py [FOLDER] [OUT]

Without a folder it takes the demo's scenes. The command `equifast purify` does this and more (it resumes).
"""

import sys
from pathlib import Path

import equifast
from equifast import demo
from equifast.models import find_images, read_image, write_image

model = demo.load_model()
out = Path(sys.argv[2] if len(sys.argv) > 2 else "purified")
if len(sys.argv) > 1:
    images = [(read_image(path), out / name.with_suffix(".png")) for path, name in find_images([Path(sys.argv[1])])]
else:
    scenes, _ = demo.load_scenes()
    images = [(scene, out / f"scene_{i}.png") for i, scene in enumerate(scenes[:2])]

purifier = equifast.Purifier(model, preset="fast", eps=6 / 255)
for image, path in images:
    purified = purifier(image[None])
    before, after = purifier.score(image[None]).item(), purifier.score(purified).item()
    write_image(path, purified[0])
    print(f"{path}: similarity {before:.3f} -> {after:.3f}")
