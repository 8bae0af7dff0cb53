"""Prune an encoder or a decoder of Hugging Face, exported by Optimum, with data from its tokenizer.

python examples/prune_transformer.py distilbert-base-uncased-finetuned-sst-2-english TEXTS.txt
python examples/prune_transformer.py                          models/tagger.onnx in its place

The first needs optimum[exporters].

TEXTS.txt has one text per line, 256 or more, such as the model will see. Decoders are exported without their cache
(task text-generation): every position of a text is then a sample, and all of it is compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"


def export(name: str, folder: Path) -> Path:
    """Export a model by its name and return the file.

    Raises:
        SystemExit: Optimum is not installed.
    """
    try:
        from optimum.exporters.onnx import main_export
        from optimum.exporters.tasks import TasksManager
    except ImportError:
        raise SystemExit("This recipe needs Optimum: pip install 'optimum[exporters]'") from None
    task = TasksManager.infer_task_from_model(name).removesuffix("-with-past")
    main_export(name, output=folder, task=task)
    return folder / "model.onnx"


def tokens(name: str, texts: Path, length: int = 64) -> dict[str, np.ndarray]:
    """Return the inputs of the model for a file of texts: ids, masks, and positions where the model reads them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    coded = tokenizer(lines, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return {key: value.astype(np.int64) for key, value in coded.items()}


def main() -> None:
    """Prune heads and hidden units by what the text shows, and report."""
    if len(sys.argv) == 3:
        model = export(sys.argv[1], Path("exported"))
        inputs = {i.name for i in op.analyze(model).graph.proto.graph.input}
        data = {key: value for key, value in tokens(sys.argv[1], Path(sys.argv[2])).items() if key in inputs}
        if "position_ids" in inputs:
            data["position_ids"] = np.broadcast_to(np.arange(64), data["input_ids"].shape).copy()
        result = op.prune(model, target="macs=0.7", data=data)
        result.save("small.onnx")
        print(result.report)
        return
    data = MODELS / "tagger_calibration.npz"  # ids and masks of padded sentences
    result = op.prune(MODELS / "tagger.onnx", ratio=0.25, data=data, samples=64, latency=False)
    print(f"exact: {result.report.exactness.passed}, {result.report.fidelity.points:.1f} of 100 points")


if __name__ == "__main__":
    main()
