"""Digits on a canvas of 64x64, and an anchor-free detector of one scale with the output of a YOLO model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from digits.conv_nets import conv_bn
from numpy.typing import NDArray
from torch import Tensor, nn

SIDE, STRIDE, CLASSES = 64, 8, 10
CELLS = SIDE // STRIDE
LEAST, MOST = 12, 22
"""Sides of the square that a digit is scaled to, in pixels."""
MOST_DIGITS = 4
Images = NDArray[np.float32]


class Canvases(NamedTuple):
    """Canvases [N, 1, 64, 64] in 0..1, and boxes [N, 4, 5]: class, x, y, width, height; class -1 for none."""

    images: Images
    boxes: NDArray[np.float32]


def _scaled(digit: Images, side: int) -> Images:
    """Scale a digit [8, 8] to a square by linear interpolation."""
    at = np.clip((np.arange(side) + 0.5) * 8 / side - 0.5, 0, 7)
    low = np.minimum(at.astype(int), 6)
    share = at - low
    rows = digit[low] * (1 - share)[:, None] + digit[low + 1] * share[:, None]
    return np.asarray(rows[:, low] * (1 - share) + rows[:, low + 1] * share)


def canvases(digits: Images, labels: NDArray[np.int64], number: int, draw: np.random.Generator) -> Canvases:
    """Place one to four digits at random, apart from each other, in front of a few thin lines.

    Pixels are multiples of 1/16, as those of the digits are: files stay small.
    """
    images = np.zeros((number, 1, SIDE, SIDE), np.float32)
    boxes = np.full((number, MOST_DIGITS, 5), -1, np.float32)
    for image, box in zip(images[:, 0], boxes, strict=True):
        for _ in range(draw.integers(0, 3)):
            line = image[draw.integers(SIDE)] if draw.random() < 0.5 else image[:, draw.integers(SIDE)]
            line[draw.integers(SIDE // 2) : draw.integers(SIDE // 2, SIDE)] = draw.integers(2, 9) / 16
        taken = np.zeros((SIDE, SIDE), bool)
        for k in range(draw.integers(1, MOST_DIGITS + 1)):
            side = int(draw.integers(LEAST, MOST + 1))
            top, left = draw.integers(0, SIDE - side + 1, 2)
            place = np.s_[top : top + side, left : left + side]
            if taken[place].any():
                continue
            which = draw.integers(len(digits))
            bright = draw.uniform(0.5, 1.0)
            pixels = np.round(16 * bright * _scaled(digits[which, 0], side)) / 16
            image[place], taken[place] = np.maximum(image[place], pixels), True
            rows, columns = (np.flatnonzero((pixels > 0).any(axis)) for axis in (1, 0))
            y, x, height, width = top + rows[0], left + columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
            box[k] = labels[which], x + width / 2, y + height / 2, width, height
    return Canvases(images, boxes)


class SplitBlock(nn.Module):
    """A 1x1 convolution whose halves go on apart, one through two 3x3 convolutions; all parts are joined again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.first = conv_bn(width, width, 1, act=nn.SiLU)
        self.inner = nn.Sequential(conv_bn(half, half, 3, act=nn.SiLU), conv_bn(half, half, 3, act=nn.SiLU))
        self.last = conv_bn(half * 3, width, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, 1)
        return self.last(torch.cat([left, right, right + self.inner(right)], 1))


class Detector(nn.Module):
    """Canvas -> [N, 14, 64]: x, y, width, height in pixels and ten scores of each of 8x8 cells."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(1, 16, 3, stride=2, act=nn.SiLU),
            conv_bn(16, 24, 3, stride=2, act=nn.SiLU),
            SplitBlock(24),
            conv_bn(24, 40, 3, stride=2, act=nn.SiLU),
            SplitBlock(40),
        )
        self.box = nn.Sequential(conv_bn(40, 24, 3, act=nn.SiLU), nn.Conv2d(24, 4, 1))
        self.scores = nn.Sequential(conv_bn(40, 32, 3, act=nn.SiLU), nn.Conv2d(32, CLASSES, 1))
        nn.init.constant_(self.scores[1].bias, -4.0)
        rows, columns = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
        self.register_buffer("cells", torch.stack([columns, rows]).reshape(1, 2, -1).float(), persistent=False)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [N, 4, 64] in pixels, and scores [N, 10, 64] before the sigmoid."""
        features = self.body(x)
        raw = self.box(features).flatten(2).sigmoid()
        centres = (raw[:, :2] * 2 - 0.5 + self.cells) * STRIDE
        return torch.cat([centres, (raw[:, 2:] * 2) ** 2 * (2 * STRIDE)], 1), self.scores(features).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        boxes, scores = self.parts(x)
        return torch.cat([boxes, scores.sigmoid()], 1)


def loss(model: Detector, batch: Canvases) -> Tensor:
    """Cross-entropy of every cell's scores, and the distance of the boxes of those cells that hold a centre."""
    boxes, scores = model.parts(torch.from_numpy(batch.images))
    which, slot = np.nonzero(batch.boxes[:, :, 0] >= 0)
    kinds, targets = batch.boxes[which, slot, 0].astype(int), torch.from_numpy(batch.boxes[which, slot, 1:])
    columns, rows = (batch.boxes[which, slot, 1:3] // STRIDE).astype(int).T
    cells = rows * CELLS + columns
    wanted = torch.zeros_like(scores)
    wanted[which, kinds, cells] = 1.0
    by_score = nn.functional.binary_cross_entropy_with_logits(scores, wanted, reduction="sum")
    by_box = nn.functional.smooth_l1_loss(boxes[which, :, cells], targets, reduction="sum") / 4
    return (by_score + by_box) / len(which)
