"""The picture of README: a model before and after pruning, as bars: python tools/make_picture.py > docs/residual.svg.

The model is ``models/residual.onnx``, pruned as README's first command does it, for a processor with AVX-512; accuracy
is that of the 450 held-out digits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from measure_models import FOLDER, load_test_set, measure

import onnxprune as op

WIDTH, LEFT, BAR, ROW = 640, 110, 360, 52


def figures() -> list[tuple[str, float, float, str, str]]:
    """(name, before, after, both as text) of every row."""
    original = FOLDER / "residual.onnx"
    data = FOLDER / "digits_calibration.npz"
    result = op.prune(original, ratio=0.35, data=data, device="avx512", latency=False)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.onnx"
        result.save(small)
        shares = [100 * measure(path, *load_test_set()).share for path in (original, small)]
        sizes = [path.stat().st_size / 1e3 for path in (original, small)]
    sums = result.report.totals
    params, macs = (sums.params_before, sums.params_after), (sums.macs_before, sums.macs_after)
    return [
        ("parameters", *params, *(f"{n / 1e3:.1f} K" for n in params)),
        ("MACs", *macs, *(f"{n / 1e6:.2f} M" for n in macs)),
        ("file size", *sizes, *(f"{n:.0f} kB" for n in sizes)),
        ("accuracy", *shares, *(f"{n:.1f} %" for n in shares)),
    ]


def picture() -> str:
    """Two bars a row, before above after, each row to its own scale; readable on light and dark pages."""
    rows = figures()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {ROW * len(rows) + 8}" role="img"'
    parts = [f'{head} font-family="sans-serif" font-size="14">']
    parts.append("<title>residual.onnx before (grey) and after (green) pruning and recovery</title>")
    for i, (name, before, after, *texts) in enumerate(rows):
        top = 8 + i * ROW
        parts.append(f'<text x="{LEFT - 10}" y="{top + 24}" text-anchor="end" fill="#808080">{name}</text>')
        values = zip((before, after), texts, ("#9e9e9e", "#009485"), (top, top + 20), strict=True)
        for value, text, colour, y in values:
            width = BAR * value / max(before, after)
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="17" rx="2" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + width + 8:.1f}" y="{y + 13}" fill="{colour}">{text}</text>')
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    print(picture())
