"""Prune, save model and plan, and train the pruned model later in plain onnxruntime: no other framework.

python examples/finetune_pruned.py [STEPS]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"
DATA = MODELS / "digits_calibration.npz"


def main(folder: Path, steps: int) -> None:
    """Prune without data, then train towards the answers of the original on unlabelled data."""
    original = MODELS / "residual.onnx"
    small, plan = folder / "small.onnx", folder / "small.plan.json"
    op.prune(original, ratio=0.3, validate=False).save(small, plan=plan)
    result = op.finetune(original, small, plan=plan, data=DATA, finetune=steps)
    result.save(folder / "trained.onnx")
    facts = result.report.finetuning
    print(f"{facts.before.points:.1f} -> {facts.after.points:.1f} points on {facts.aside} held-out samples")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 5)
