"""Compare a model with its original, and exit with 5 where it lost too much.

python examples/gate_in_ci.py [ORIGINAL.onnx SMALL.onnx DATA.npz]

As a command: onnxprune compare ORIGINAL.onnx SMALL.onnx --data DATA.npz --min-fidelity 95
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"


def gate(original: Any, small: Any, data: Any, points: float) -> int:
    """Return 0 where the model keeps so many points of fidelity, else the exit code of the error."""
    try:
        report = op.compare(original, small, data=data, min_fidelity=points, latency=False)
    except op.OnnxpruneError as error:
        print(f"failed: {error}")
        return error.exit_code
    print(f"passed: {report.verdict.word}, {report.fidelity.points:.1f} of 100 points")
    return 0


def main() -> int:
    """Gate the models of the command line, or a good and a bad small model."""
    if len(sys.argv) > 1:
        return gate(*sys.argv[1:4], points=95)
    original, data = MODELS / "residual.onnx", MODELS / "digits_test.npz"
    recovered = op.prune(original, ratio=0.5, data=MODELS / "digits_calibration.npz", latency=False)
    plain = op.prune(original, ratio=0.5, latency=False)  # no data: no recovery
    codes = gate(original, recovered.model, data, points=95), gate(original, plain.model, data, points=95)
    return 0 if codes == (0, 5) else 1


if __name__ == "__main__":
    sys.exit(main())
