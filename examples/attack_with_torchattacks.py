"""Attack a defended classifier with a library that knows nothing of equifast, and with an attacker who knows it."""

import torch
import torchattacks
from torch import nn

import equifast
from equifast import attacks, demo


class Counter(nn.Module):
    """A classifier made of the demo's dense model: which digit covers most of the scene."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = demo.load_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x)[:, :10].logsumexp((2, 3))


model = Counter().eval()
x = demo.load_scenes()[0][:6]
with torch.no_grad():
    y = model(x).argmax(1)
purifier = equifast.Purifier(model, features="dense", eps=6 / 255)
defended = equifast.Defended(model, purifier)
eps, step_size, steps = 1 / 255, 0.25 / 255, 10
points = {
    "no attack": x,
    "torchattacks PGD on the model": torchattacks.PGD(model, eps=eps, alpha=step_size, steps=steps)(x, y),
    "torchattacks PGD on the defended model": torchattacks.PGD(defended, eps=eps, alpha=step_size, steps=steps)(x, y),
    "equifast BPDA": attacks.BPDA(attacks.PGD(model, eps=eps, step_size=step_size, steps=steps), purifier)(x, y),
}
for name, images in points.items():
    with torch.no_grad():
        kept = [(network(images).argmax(1) == y).float().mean() * 100 for network in (model, defended)]
    print(f"{name:40} undefended {kept[0]:5.1f}%   defended {kept[1]:5.1f}%")
