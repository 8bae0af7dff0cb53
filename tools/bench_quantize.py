"""Size against accuracy of pruning, quantization and both in both orders, on the models under models/.

python tools/bench_quantize.py                    the table of docs/methods/quantize.md, a minute or two
python tools/bench_quantize.py --ratio 0.4 --model residual

Pruning and quantization see 256 inputs without labels; accuracy is that of 450 other digits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"
DATA = MODELS / "digits_calibration.npz"
MODES = ("dynamic", "qdq")


def top1(model: onnx.ModelProto) -> float:
    """Return the share of held-out digits that a model classifies correctly, in percent."""
    test = np.load(MODELS / "digits_test.npz")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: test["input"]})
    return 100 * float((logits.argmax(axis=1) == test["label"]).mean())


def size(model: onnx.ModelProto) -> float:
    """Return the size of the file in kB."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return path.stat().st_size / 1e3


def candidates(model: Path, ratio: float) -> Iterator[tuple[str, Any]]:
    """Yield the models of one table by name, None where a step refuses."""
    common: dict[str, Any] = {"data": DATA, "finetune": False, "latency": False}
    yield "original", onnx.load(model)
    yield "pruned", op.prune(model, ratio=ratio, **common).model
    for mode in MODES:
        coded = op.passes.Pipeline([op.passes.Quantize(mode)]).run(model, data=DATA).model
        yield f"quantized ({mode})", coded
        yield f"pruned, then quantized ({mode})", op.prune(model, ratio=ratio, quantize=mode, **common).model
        try:
            yield f"quantized, then pruned ({mode})", op.prune(coded, ratio=ratio, **common).model
        except op.OnnxpruneError as error:
            print(f"{model.stem}, {mode}: {error}", file=sys.stderr)
            yield f"quantized, then pruned ({mode})", None


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--model", nargs="*", default=["residual", "depthwise", "attention"])
    options = parser.parse_args()
    rows: dict[str, list[str]] = {}
    for name in options.model:
        for step, model in candidates(MODELS / f"{name}.onnx", options.ratio):
            text = "refused" if model is None else f"{size(model):.0f} kB, {top1(model):.1f}"
            rows.setdefault(step, []).append(text)
    print("| |" + "|".join(f" {name} " for name in options.model) + "|")
    print("|---|" + "--:|" * len(options.model))
    for step, cells in rows.items():
        print(f"| {step} |" + "|".join(f" {cell} " for cell in cells) + "|")


if __name__ == "__main__":
    main()
