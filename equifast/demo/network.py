"""The demo's network: small, residual, dilated, fully convolutional."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SceneNet"]


def _conv(channels_in: int, channels: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, padding=dilation, dilation=dilation, bias=False)


class Halving(nn.Module):
    """Half the resolution: (N, channels_in, h, w) -> (N, channels, ceil(h/2), ceil(w/2)), not negative.

    The kernel is even and the padding follows the parity, so that cells stay centered on the pixels that they
    summarize: where the size is even, the features of a flipped image sit where a flip puts them. With a
    kernel of 3 they would be half a pixel off.
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 4, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.relu(self.bn(self.conv(F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2)))))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, channels_in, h, w) -> (N, channels, h, w), not negative."""

    def __init__(self, channels_in: int, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SceneNet(nn.Module):
    """Dense prediction at a quarter of the resolution, enlarged to that of the image.

    ``stem`` halves the resolution twice, rounding up; ``stage1`` to ``stage4`` keep it and see farther by
    dilation. All five are names for ``features=``, of maps (N, C, ceil(H/4), ceil(W/4)).

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int = 11) -> None:
        super().__init__()
        self.stem = nn.Sequential(Halving(3, 16), Halving(16, 24))
        self.stage1 = ResidualBlock(24, 32, dilation=1)
        self.stage2 = ResidualBlock(32, 48, dilation=2)
        self.stage3 = ResidualBlock(48, 48, dilation=4)
        self.stage4 = ResidualBlock(48, 48, dilation=2)
        self.head = nn.Conv2d(48, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes, H, W) of images (N, 3, H, W) in [0, 1], H and W at least 1."""
        y = self.stem((x - 0.5) * 4)
        y = self.stage4(self.stage3(self.stage2(self.stage1(y))))
        logits: Tensor = self.head(y)
        return F.interpolate(logits, size=(x.shape[-2], x.shape[-1]), mode="bilinear", align_corners=False)
