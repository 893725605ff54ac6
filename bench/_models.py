"""The two networks that the studies attack. Both take images in [0,1] and normalize them inside."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    def __init__(self, mean: Iterable[float] = IMAGENET_MEAN, std: Iterable[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _conv(channels_in: int, channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


class DilatedBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, stride, dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 1, dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Backbone(nn.Module):
    """Stride 8, dilated from there on: (N,3,H,W) in [0,1] to (N,widths[-1],H/8,W/8)."""

    def __init__(self, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        a, b, c, d = widths
        self.normalize = Normalize()
        self.stem = nn.Sequential(_conv(3, a, 2), nn.BatchNorm2d(a), nn.ReLU())
        self.layer1 = nn.Sequential(DilatedBlock(a, b, 2), DilatedBlock(b, b))
        self.layer2 = nn.Sequential(DilatedBlock(b, c, 2), DilatedBlock(c, c))
        self.layer3 = nn.Sequential(DilatedBlock(c, d, 1, 2), DilatedBlock(d, d, 1, 2))
        self.layer4 = nn.Sequential(DilatedBlock(d, d, 1, 4), DilatedBlock(d, d, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(self.normalize(x)))
        return self.layer4(self.layer3(self.layer2(x)))


class SegmentationNet(nn.Module):
    """Small dilated ResNet for dense prediction: (N,3,H,W) in [0,1] to logits (N,classes,H,W)."""

    def __init__(self, classes: int, widths: tuple[int, int, int, int] = (32, 48, 64, 96)) -> None:
        super().__init__()
        self.backbone = Backbone(widths)
        self.head = nn.Conv2d(widths[-1], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.backbone(x))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


class CifarBlock(nn.Module):
    """Basic block with the parameter-free shortcut (option A): subsample, pad the channels with zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-20, -56, ... for 32x32 images in [0,1]: (N,3,32,32) to logits (N,10)."""

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.normalize = Normalize()
        self.conv1 = _conv(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(16, 16, 1, blocks)
        self.layer2 = self._layer(16, 32, 2, blocks)
        self.layer3 = self._layer(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _layer(channels_in: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = CifarBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(CifarBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def features(self, x: Tensor) -> Tensor:
        """(N,64,8,8), the map before pooling."""
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load strictly, but for batch norm's step counters, which the files may lack; eval mode."""
    if not path.exists():
        raise SystemExit(f"weights: {path} is absent")
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    model.load_state_dict(counters | load_file(path), strict=True)
    return model.eval().requires_grad_(False)
