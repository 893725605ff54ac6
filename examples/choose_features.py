"""Choose where the features end: by default, by submodule name, or by a callable."""

import torch

import equifast
from equifast import attacks, demo
from equifast.evaluate import confusion, mean_iou

model = demo.load_model()
x, y = (tensor[:4] for tensor in demo.load_scenes())
adversarial = attacks.PGD(model, eps=4 / 255, steps=10)(x, y)
choices = {
    "the model's own output": None,
    "by name, stage2": "stage2",
    "by name, stage4": "stage4",
    "a callable, probabilities": lambda images: model(images).softmax(1),
}
for name, features in choices.items():
    purifier = equifast.Purifier(model, features=features, eps=6 / 255)
    with torch.no_grad():
        prediction = equifast.Defended(model, purifier)(adversarial).argmax(1)
    score = mean_iou(confusion(prediction, y, len(demo.CLASSES)))
    print(f"{name:28} mIoU {score}   similarity {purifier.score(adversarial).mean():.3f}")
