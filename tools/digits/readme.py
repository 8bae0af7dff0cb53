"""The README of models/, written from the facts that were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from digits.data import Digits

WHAT = {
    "residual": "ResNet: BatchNorm as its own node, residual adds, strides, 1x1 shortcuts",
    "depthwise": "MobileNetV3: inverted residuals, depthwise convolutions, squeeze-excite, HardSwish",
    "concat": "dense layers, inception branches, grouped convolutions, channel shuffle, Flatten of a 2x2 map into Gemm",
    "attention": "vision transformer: patches, class token, LayerNorm, packed-QKV attention of 4 heads, GELU",
    "recurrent": "bidirectional LSTM over the rows, GRU over its outputs, Gemm on the last step",
}

TASKS = """\
## A detector and a tagger

Two more have outputs of other kinds; `python examples/task_metrics.py` prints their points.

| file | elements | bytes | points | made of |
|---|--:|--:|--:|---|
{rows}

- `detector.onnx`: digits on a canvas, `images` float32 `[batch, 1, 64, 64]` in 0..1. `output0` `[batch, 14, 64]` is
  that of a YOLO model: x, y, width and height in pixels and ten scores, for each of 8x8 cells. Points are the mean
  average precision at an overlap of 0.5. `detector_test.npz` has 104 canvases `images` and their `boxes` `[104, 4, 5]`
  (class, x, y, width, height; class -1 for none), `detector_calibration.npz` 104 others, made of digits that no model
  was trained on.
- `tagger.onnx`: sentences of a small grammar as ids of words, `input_ids` and `attention_mask`, int64
  `[batch, sequence]`, up to 32 words. `logits` `[batch, sequence, 15]` are scores of slots (a sender, a deadline, ...).
  Points are the share of words in a slot that it finds, in percent; one word in twenty is unknown, so that 100 is out
  of reach. `tagger_test.npz` has 400 sentences with their `slots`, the `words` and the `names` of slots,
  `tagger_calibration.npz` 256 others; `tools/tasks/tagging.py` made them up.

Opset 17, exported by torchscript; `tasks.json` has the figures. Make them again (two minutes on one core):
`python tools/make_task_models.py --out models`.

## Measure and make again

"""

OF_TASKS = {
    "detector": "YOLO-like: split blocks, SiLU, BatchNorm as its own node, two heads, decoded boxes beside scores",
    "tagger": "BERT-like: word and position tables, masked attention of 4 heads, LayerNorm behind every shortcut, GELU",
}

TEMPLATE = """\
# Small trained models

Five classifiers of handwritten digits, small enough to keep here and larger than the task needs, so there is something
to cut. Each has one input, `input`, float32 `[batch, 1, 8, 8]` with pixels in 0..1, and one output, `logits`, float32
`[batch, 10]`; the batch size is dynamic.

| file | parameters | bytes | opset | exporter | accuracy | made of |
|---|--:|--:|--:|---|--:|---|
{rows}

Accuracy is the share of the {test} held-out images that onnxruntime names rightly; `accuracy.json` has the counts.

- `digits_test.npz`: the {test} held-out images `input` and their classes `label` (int64).
- `digits_calibration.npz`: {calibration} images `input` without labels. No model was trained on them and none is in the
  test set.

`residual.onnx` was trained to be cut: a penalty on the BatchNorm scales and a strong weight decay empty the channels it
does not need (network slimming, Liu et al. 2017). The other four were trained plainly and lose more by a cut.

{tasks}Measure them, or a model cut from one of them (needs numpy and onnxruntime only):

```
python tools/measure_models.py
python tools/measure_models.py models/residual.onnx --model residual.pruned.onnx
```

Make them again (about two and a half minutes on one core):

```
pip install '.[models]'
python tools/make_models.py --out models
```

Training is seeded and runs on one thread: the same machine and the same versions of the packages give the same bytes.
Another processor or another version of torch may round differently, and the accuracy can then differ by a few images.

The images are the digits that ship with scikit-learn: the test part of
[Optical Recognition of Handwritten Digits][uci], E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
CC BY 4.0. Pixels are divided by 16, and the images are split into {train} for training, {calibration} for calibration
and {test} for the test.

[uci]: https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits
"""


def text(facts: Mapping[str, Mapping[str, Any]], digits: Digits, tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """README text for the models in `facts` and `tasks` (the contents of accuracy.json and tasks.json)."""
    rows = "\n".join(
        f"| `{name}.onnx` | {fact['parameters']:,} | {fact['bytes']:,} | {fact['opset']} | {fact['exporter']} "
        f"| {fact['accuracy']:.2%} | {WHAT[name]} |"
        for name, fact in facts.items()
    )
    of_tasks = "\n".join(
        f"| `{name}.onnx` | {fact['elements']:,} | {fact['bytes']:,} | {fact['points']} | {OF_TASKS[name]} |"
        for name, fact in tasks.items()
    )
    return TEMPLATE.format(
        rows=rows,
        tasks=TASKS.format(rows=of_tasks) if tasks else "",
        train=len(digits.train),
        calibration=len(digits.calibration),
        test=len(digits.test),
    )


def write(folder: Path, digits: Digits) -> None:
    """Write the README of the models in a folder from the facts in it."""
    known = [folder / "accuracy.json", folder / "tasks.json"]
    facts, tasks = (json.loads(path.read_text()) if path.exists() else {} for path in known)
    (folder / "README.md").write_text(text(facts, digits, tasks))
