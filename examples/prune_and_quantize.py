"""Prune and quantize, in both orders: size and accuracy of each.

python examples/prune_and_quantize.py
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"
DATA = MODELS / "digits_calibration.npz"


class Calibration(CalibrationDataReader):
    """The unlabelled inputs that recovery uses, in batches."""

    def __init__(self) -> None:
        """Read the inputs."""
        self.batches = iter(np.array_split(np.load(DATA)["input"], 8))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch; None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch}


def quantize(model: Path, out: Path) -> None:
    """Write a model with 8-bit weights and activations (QDQ, a scale per channel of the weights)."""
    prepared = out.with_suffix(".prepared.onnx")  # onnxruntime folds BatchNormalization first
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared, out, Calibration(), per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8
    )


def prune(model: Path, out: Path) -> None:
    """Write a model with half the channels, recovered."""
    op.prune(model, ratio=0.5, data=DATA, latency=False).save(out)


def top1(model: Path) -> float:
    """Return the share of held-out digits that a model classifies correctly, in per cent."""
    test = np.load(MODELS / "digits_test.npz")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": test["input"]})
    return 100 * float((logits.argmax(axis=1) == test["label"]).mean())


def main(folder: Path) -> None:
    """Make all four models, and print a table."""
    original = MODELS / "residual.onnx"
    pruned, quantized = folder / "pruned.onnx", folder / "quantized.onnx"
    prune(original, pruned)
    quantize(original, quantized)
    quantize(pruned, folder / "pruned_quantized.onnx")
    prune(quantized, folder / "quantized_pruned.onnx")
    rows = {
        "original": original,
        "pruned": pruned,
        "quantized": quantized,
        "pruned, then quantized": folder / "pruned_quantized.onnx",
        "quantized, then pruned": folder / "quantized_pruned.onnx",
    }
    print(f"{'model':<24}{'size':>9}{'top-1':>9}")
    for name, path in rows.items():
        print(f"{name:<24}{path.stat().st_size / 1e3:>6.0f} kB{top1(path):>7.1f} %")


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime recommends to prepare models for quantization
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
