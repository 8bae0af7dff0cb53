"""Prune with a folder of images as data; the options say how the model was fed in its training.

python examples/image_folder.py MODEL.onnx IMAGES/     needs pillow
python examples/image_folder.py                        digits, written as PNG files, for models/residual.onnx
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"
IMAGENET = op.ImageOptions(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def write_digits(folder: Path, count: int) -> op.ImageOptions:
    """Write some digits as grey images; return how they become the model's inputs again.

    Raises:
        SystemExit: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("This recipe needs Pillow: pip install 'onnxprune[images]'") from None
    digits = np.load(MODELS / "digits_calibration.npz")["input"][:count, 0]
    low, high = float(digits.min()), float(digits.max())
    for number, digit in enumerate(digits):
        pixels = np.rint(255 * (digit - low) / (high - low)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    # (x - mean) / std of pixels from 0 to 1 leads back to the range from low to high.
    scale = 1 / (high - low)
    return op.ImageOptions(mean=(-low * scale,), std=(scale,))


def main() -> None:
    """Prune the model of the command line, or the stand-in."""
    if len(sys.argv) == 3:
        result = op.prune(sys.argv[1], ratio=0.3, data=sys.argv[2], images=IMAGENET)
        result.save("small.onnx")
        print(result.report)
        return
    with tempfile.TemporaryDirectory() as name:
        look = write_digits(Path(name), 48)
        result = op.prune(
            MODELS / "residual.onnx", ratio=0.2, criterion="l2", data=name, images=look, recover="bn", latency=False
        )
    print(f"{result.report.fidelity.points:.1f} of 100 points from {result.report.recovery.samples} images")
    assert result.report.fidelity.points > 90


if __name__ == "__main__":
    main()
