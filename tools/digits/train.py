"""Seeded training of one network on one thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BATCH = 64
LABEL_SMOOTHING = 0.05


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image by up to one pixel in each direction; zeros come in at the border."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    count, _, height, width = images.shape
    top, left = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows = (top + torch.arange(height))[:, :, None]
    columns = (left + torch.arange(width))[:, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


def train(
    network: Callable[[], nn.Module],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    epochs: int,
    rate: float,
    decay: float,
    sparsity: float,
    seed: int,
) -> nn.Module:
    """Build and train a network; the last epoch is kept, so no held-out image picks a checkpoint.

    AdamW with a one-cycle learning rate that peaks at `rate`. `sparsity` weighs the sum of the absolute BatchNorm
    scales in the loss (Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming); with a
    strong `decay` the filters behind small scales shrink too. Returns the network in evaluation mode.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network().train()
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    steps = len(inputs) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    scales = [layer.weight for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)] if sparsity else []
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for picked in order[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = loss_of(model(_shifted(inputs[picked], generator)), targets[picked])
            if scales:
                loss = loss + sparsity * torch.stack([scale.abs().sum() for scale in scales]).sum()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
