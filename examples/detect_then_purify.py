"""Purify only what is suspicious: fit a threshold on clean images, attack others, and see who notices."""

import torch

import equifast
from equifast import attacks, demo, views
from equifast.detectors import OutputVariance
from equifast.features import output

model = demo.load_model()
scenes, labels = demo.load_scenes()


def crops(images: torch.Tensor) -> torch.Tensor:
    """Four of each image: too few images make no threshold."""
    return torch.cat([images[..., i : i + 80, j : j + 112] for i in (0, 16) for j in (0, 16)])


clean, x, y = crops(scenes[:8]), crops(scenes[8:])[::4], crops(labels[8:])[::4]
detector = OutputVariance(model, views.guard()).fit(clean.split(8), false_positive_rate=0.1)
guarded = equifast.Defended(model, equifast.Purifier(model), detector=detector)
points = {
    "clean": x,
    "PGD": attacks.PGD(model, eps=4 / 255, steps=10)(x, y),
    "PGD that evades": attacks.Evading(model, detector, eps=4 / 255)(x, y),
}
for name, images in points.items():
    before = guarded.purified
    with torch.no_grad():
        alone, defended = (
            100 * (output(network(images)).argmax(1) == y)[y != 255].float().mean() for network in (model, guarded)
        )
    print(
        f"{name:16} {guarded.purified - before} of {len(x)} purified; pixels right: model {alone:.1f}%, "
        f"guarded {defended:.1f}%"
    )
