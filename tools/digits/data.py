"""The handwritten digits that ship with scikit-learn, split once and for all into train, calibration and test."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLIT_SEED = 20240
TEST_SIZE = 450
CALIBRATION_SIZE = 256


class Digits(NamedTuple):
    """Three disjoint sets of images, float32 [N, 1, 8, 8] in 0..1; labels are int64 [N]."""

    train: NDArray[np.float32]
    train_label: NDArray[np.int64]
    calibration: NDArray[np.float32]
    test: NDArray[np.float32]
    test_label: NDArray[np.int64]


def load() -> Digits:
    """Split the 1797 digits with a fixed seed, every class in the same proportion in each part."""
    bunch = load_digits()
    # The pixels are counts 0..16; dividing by 16 is exact in float32.
    images = (bunch.images[:, None] / 16).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    rest, test, rest_label, test_label = train_test_split(
        images, labels, test_size=TEST_SIZE, random_state=SPLIT_SEED, stratify=labels
    )
    train, calibration, train_label, _ = train_test_split(
        rest, rest_label, test_size=CALIBRATION_SIZE, random_state=SPLIT_SEED, stratify=rest_label
    )
    return Digits(train, train_label, calibration, test, test_label)


def save(digits: Digits, folder: Path) -> None:
    """Write `digits_test.npz` (input, label) and `digits_calibration.npz` (input only) into `folder`."""
    np.savez_compressed(folder / "digits_test.npz", input=digits.test, label=digits.test_label)
    np.savez_compressed(folder / "digits_calibration.npz", input=digits.calibration)
