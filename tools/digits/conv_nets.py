"""Convolutional networks for 8x8 digits: residual, depthwise and concat. Input [N, 1, 8, 8], output logits [N, 10]."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """A convolution without bias, its BatchNorm and, unless `act` is None, an activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if act is not None:
        layers.append(act())
    return nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(inputs, outputs, 3, stride=stride), conv_bn(outputs, outputs, 3, act=None))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride=stride, act=None)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class Residual(nn.Module):
    """A small ResNet: three stages, 8x8 down to 2x2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 24, 3)
        self.stages = nn.Sequential(
            BasicBlock(24, 24, 1),
            BasicBlock(24, 24, 1),
            BasicBlock(24, 48, 2),
            BasicBlock(48, 48, 1),
            BasicBlock(48, 64, 2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(self.stem(x))).flatten(1))


class SqueezeExcite(nn.Module):
    """A gate per channel, computed from the mean of every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = channels // 4
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-excite, project; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            conv_bn(inputs, hidden, 1, act=nn.Hardswish),
            conv_bn(hidden, hidden, 3, stride=stride, groups=hidden, act=nn.Hardswish),
            SqueezeExcite(hidden),
            conv_bn(hidden, outputs, 1, act=None),
        )
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Depthwise(nn.Module):
    """A small MobileNetV3: inverted residuals with squeeze-excite and hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 16, 3, act=nn.Hardswish)
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, 1),
            InvertedResidual(16, 32, 2),
            InvertedResidual(32, 32, 1),
            InvertedResidual(32, 48, 2),
            InvertedResidual(48, 48, 1),
        )
        self.last = conv_bn(48, 128, 1, act=nn.Hardswish)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.last(self.blocks(self.stem(x)))).flatten(1))


class DenseLayer(nn.Module):
    """BatchNorm before every convolution, and the input concatenated with the new channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 2 * growth, 1, bias=False),
            nn.BatchNorm2d(2 * growth),
            nn.ReLU(),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Inception(nn.Module):
    """Four branches with different receptive fields, concatenated."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = conv_bn(inputs, width, 1)
        self.three = nn.Sequential(conv_bn(inputs, width, 1), conv_bn(width, width, 3))
        self.five = nn.Sequential(conv_bn(inputs, width, 1), conv_bn(width, width, 3), conv_bn(width, width, 3))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class ShuffleUnit(nn.Module):
    """Grouped 1x1 convolution, channel shuffle, grouped 3x3 and 1x1 convolutions, and a shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.first = conv_bn(channels, channels, 1, groups=groups)
        self.groups = groups
        self.rest = nn.Sequential(
            conv_bn(channels, channels, 3, groups=groups), conv_bn(channels, channels, 1, groups=groups, act=None)
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        channels, height, width = y.shape[1:]
        y = y.reshape(-1, self.groups, channels // self.groups, height, width).transpose(1, 2)
        return self.act(x + self.rest(y.reshape(-1, channels, height, width)))


class Concat(nn.Module):
    """Dense layers, an inception block and a shuffle unit; the head reads a flattened 2x2 map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 24, 3)
        self.dense = nn.Sequential(DenseLayer(24, 16), DenseLayer(40, 16), DenseLayer(56, 16))
        self.transition = nn.Sequential(conv_bn(72, 48, 1), nn.AvgPool2d(2))
        self.inception = Inception(48, 24)
        self.shuffle = ShuffleUnit(96, 4)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Sequential(nn.Linear(96 * 4, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(self.dense(self.stem(x)))
        return self.head(self.pool(self.shuffle(self.inception(x))).flatten(1))
