"""Folders of trained models with labelled data: ``models/*.onnx`` and an ``evaluate.py`` that measures them.

``evaluate.py NAME [--model FILE]`` prints one JSON object of metrics, the most important first, alone or after the
name; ``evaluate.py NAME --record OUT.npz --samples N`` writes inputs that are not among those measured on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

UNLABELLED = "rel_err"  # metrics that start with it compare with the original: there are no labels


def evaluate(home: Path, name: str, model: Path | None) -> dict[str, float]:
    """The metrics that evaluate.py prints.

    Raises:
        RuntimeError: it fails, or prints no JSON object.
    """
    done = _call(home, name, *(["--model", str(model)] if model else []))
    line = next((x for x in reversed(done.stdout.splitlines()) if "{" in x), "")
    if done.returncode or not line:
        raise RuntimeError(f"evaluate.py {name}: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
    found: dict[str, float] = json.loads(line[line.index("{") :])
    return found


def record(home: Path, name: str, target: Path, samples: int) -> None:
    """Write calibration inputs to ``target`` (.npz).

    Raises:
        RuntimeError: it fails, or writes nothing.
    """
    done = _call(home, name, "--record", str(target), "--samples", str(samples))
    if done.returncode or not target.is_file():
        raise RuntimeError(f"evaluate.py {name} --record: {(done.stderr.strip() or done.stdout.strip())[-300:]}")


def recorded(home: Path, name: str, folders: Iterable[Path], samples: int) -> Path | None:
    """Calibration inputs from the first folder that has them, else recorded into the last; None where that fails."""
    folders = list(folders)
    for folder in folders:
        if (folder / f"{name}.npz").is_file():
            return folder / f"{name}.npz"
    target = folders[-1] / f"{name}.npz"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        record(home, name, target, samples)
    except (RuntimeError, OSError) as error:
        print(f"{name}: no calibration data: {error}", file=sys.stderr)
        return None
    return target


def leading_size(model: Path) -> int:
    """Rows that one call of a model takes where its file fixes them, else 1."""
    shape = onnx.load(model, load_external_data=False).graph.input[0].type.tensor_type.shape
    return max(1, shape.dim[0].dim_value) if shape.dim else 1


def limit(data: Path, samples: int) -> int | None:
    """The number of samples to read; None, which is all, where there are no more than that."""
    with np.load(data) as file:
        held = max((file[name].shape[0] for name in file.files if file[name].ndim), default=1)
    return samples if samples < held else None


def _call(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(home / "evaluate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
