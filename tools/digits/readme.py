"""The README of models/, written from the facts that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from digits.data import Digits

WHAT = {
    "residual": "ResNet: BatchNorm as its own node, residual adds, strides, 1x1 shortcuts",
    "depthwise": "MobileNetV3: inverted residuals, depthwise convolutions, squeeze-excite, HardSwish",
    "concat": "dense layers, inception branches, grouped convolutions, channel shuffle, Flatten of a 2x2 map into Gemm",
    "attention": "vision transformer: patches, class token, LayerNorm, packed-QKV attention of 4 heads, GELU",
    "recurrent": "bidirectional LSTM over the rows, GRU over its outputs, Gemm on the last step",
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

Measure them, or a model cut from one of them (needs numpy and onnxruntime only):

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


def text(facts: Mapping[str, Mapping[str, Any]], digits: Digits) -> str:
    """README text for the models in `facts` (the contents of accuracy.json)."""
    rows = "\n".join(
        f"| `{name}.onnx` | {fact['parameters']:,} | {fact['bytes']:,} | {fact['opset']} | {fact['exporter']} "
        f"| {fact['accuracy']:.2%} | {WHAT[name]} |"
        for name, fact in facts.items()
    )
    return TEMPLATE.format(
        rows=rows, train=len(digits.train), calibration=len(digits.calibration), test=len(digits.test)
    )
