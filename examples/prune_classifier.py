"""Prune a classifier, recover it from unlabelled data, and go on in Python.

python examples/prune_classifier.py [OUT.onnx]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"


def top1(model: str | Path) -> float:
    """Return the share of held-out digits that a model classifies correctly, in per cent."""
    test = np.load(MODELS / "digits_test.npz")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": test["input"]})
    return 100 * float((logits.argmax(axis=1) == test["label"]).mean())


def main(out: Path) -> None:
    """Prune, report, save the model and its plan, and measure both models."""
    original = MODELS / "residual.onnx"
    data = MODELS / "digits_calibration.npz"  # 256 inputs without labels
    result = op.prune(original, ratio=0.4, data=data, latency=False)

    report = result.report
    print(f"exact: {report.exactness.passed}, verdict: {report.verdict.word}, {report.fidelity.points:.1f} points")
    print(f"MACs: {report.totals.macs_before:,} -> {report.totals.macs_after:,}")
    for layer in report.layers:
        print(f"  {layer.name}: {layer.channels_before} -> {layer.channels_after} channels {layer.reason}")

    result.save(out)
    print(f"accuracy: {top1(original):.1f} % -> {top1(out):.1f} %")

    # The plan repeats the same removal: on another machine, or on the same model with other weights of the same shapes.
    again = op.prune(original, plan=op.Plan.from_dict(result.plan.to_dict()), recover="none", latency=False)
    assert again.report.totals.macs_after == report.totals.macs_after


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "small.onnx")
