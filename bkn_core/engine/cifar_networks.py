"""Small residual and plain networks for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3×3 convolutions with a shortcut, normalized after each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add the block to its input."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return F.relu(y)


class PreActivationBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut, normalized before each convolution (arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Add the block to its input."""
        z = F.relu(self.bn1(x))
        kept: Tensor = x if self.shortcut is None else self.shortcut(z)
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(z))))
        return y + kept


class CifarResNet(nn.Module):
    """The residual network for 32×32 images: three stages of 16, 32 and 64 channels (arXiv 1512.03385, section 4.2).

    Args:
        depth: 6 n + 2 for n blocks a stage.
        classes: number of logits.
        channels: colours of the images.
        preactivation: normalize before each convolution instead of after it.
        width: channels of the first stage.
    """

    def __init__(
        self, depth: int, *, classes: int = 10, channels: int = 3, preactivation: bool = False, width: int = 16
    ) -> None:
        super().__init__()
        block = PreActivationBlock if preactivation else Block
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.Identity() if preactivation else nn.BatchNorm2d(width)
        widths, stages = [width, width, 2 * width, 4 * width], []
        for i in range(3):
            blocks = [block(widths[i], widths[i + 1], 1 if i == 0 else 2)]
            blocks += [block(widths[i + 1], widths[i + 1], 1) for _ in range((depth - 2) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final = nn.BatchNorm2d(widths[-1]) if preactivation else nn.Identity()
        self.head = nn.Linear(widths[-1], classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.conv1(x)
        x = x if isinstance(self.bn1, nn.Identity) else F.relu(self.bn1(x))
        x = self.stages(x)
        x = x if isinstance(self.final, nn.Identity) else F.relu(self.final(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class CifarPlain(nn.Module):
    """Six 3×3 convolutions without shortcuts, in the spirit of the paper's small network for 32×32 images.

    Args:
        classes: number of logits.
        channels: colours of the images.
        width: channels of the first two convolutions.
    """

    def __init__(self, *, classes: int = 10, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [channels, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        for i in range(6):
            stride = 2 if i in (2, 4) else 1
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False)]
            layers += [nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def initialize(model: nn.Module) -> None:
    """Draw convolution weights from He's normal distribution, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
