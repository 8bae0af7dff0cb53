"""What a cut costs: size and accuracy of the models under models/ before and after, as the tables in README.md.

python tools/measure_cuts.py                    ratio 0.3, criteria l2 and gm, no training
python tools/measure_cuts.py --ratio 0.1 --criteria l1 random --round-to 8
python tools/measure_cuts.py --recover          ratio 0.5, l2: what a repair from calibration data wins back
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from measure_models import FOLDER, load_test_set, measure

import onnxprune as op

CALIBRATION = FOLDER / "digits_calibration.npz"
NAMES = ("residual", "depthwise", "concat", "attention", "recurrent")


def count(value: float) -> str:
    """Three digits with K or M."""
    return f"{value / 1e6:.2f} M" if value >= 999_500 else f"{value / 1e3:.1f} K"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def size_cells(result: op.Result) -> list[str]:
    """Parameters, MACs and file size, before and after."""
    sums = result.report.totals
    return [
        f"{count(sums.params_before)} → {count(sums.params_after)}",
        f"{count(sums.macs_before)} → {count(sums.macs_after)}",
        f"{sums.bytes_before / 1e3:.0f} → {sums.bytes_after / 1e3:.0f} kB",
    ]


def row(name: str, criteria: Sequence[str], ratio: float, round_to: int) -> str:
    """One line of the table. The first criterion gives the sizes, which hardly depend on it."""
    path = FOLDER / f"{name}.onnx"
    images, labels = load_test_set()
    results = [op.prune(path, criterion=c, ratio=ratio, round_to=round_to, latency=False) for c in criteria]
    shares = [measure(result.model.SerializeToString(), images, labels).share for result in results]
    cells = [*size_cells(results[0]), percent(measure(path, images, labels).share), *map(percent, shares)]
    return f"| `{path.name}` | {' | '.join(cells)} |"


def shares(name: str, criterion: str, ratio: float, mode: str) -> list[float]:
    """Accuracy of the original, of the cut, and of the cut after a repair from the calibration digits."""
    path, (images, labels) = FOLDER / f"{name}.onnx", load_test_set()
    settings: Any = {"criterion": criterion, "ratio": ratio, "round_to": 1, "latency": False}
    cut = op.prune(path, **settings)
    mended = op.prune(path, data=CALIBRATION, recover=mode, **settings)
    models = [path, cut.model.SerializeToString(), mended.model.SerializeToString()]
    return [measure(model, images, labels).share for model in models]


def recovered(criterion: str, ratio: float, mode: str) -> None:
    """Prints the table of repairs."""
    print("| model | accuracy | cut | cut and repaired |\n|---|--:|--:|--:|")
    for name in NAMES:
        print(f"| `{name}.onnx` | {' | '.join(map(percent, shares(name, criterion, ratio, mode)))} |", flush=True)


def main() -> int:
    """Prints the table; every cut is checked for exactness on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, help="share of units to remove; 0.3, with --recover 0.5")
    parser.add_argument("--round-to", type=int, default=1, metavar="N", help="keep a multiple of N per group")
    parser.add_argument("--criteria", nargs="+", default=["l2", "gm"], metavar="NAME", help="default: l2 gm")
    parser.add_argument("--recover", nargs="?", const="full", metavar="MODE", help="show what a repair wins back")
    given = parser.parse_args()
    if given.recover:
        recovered(given.criteria[0], 0.5 if given.ratio is None else given.ratio, given.recover)
        return 0
    ratio = 0.3 if given.ratio is None else given.ratio
    heads = ["model", "parameters", "MACs", "file size", "accuracy", *(f"`{c}`" for c in given.criteria)]
    print(f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}")
    try:
        for name in NAMES:
            print(row(name, given.criteria, ratio, given.round_to))
    except op.OnnxpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
