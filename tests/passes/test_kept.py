"""A repair that was interrupted goes on behind the layers it has fitted, to the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.errors import UsageError
from onnxprune.passes import recover as module


class Interrupted(Exception):
    """What stops a run."""


def network() -> onnx.ModelProto:
    net = Net(17)
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8))
    for _ in range(3):
        y = net.op("Relu", net.conv(y, 8, 8))
    return net.model(net.conv(y, 8, 4))


def data(samples: int = 64, seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).standard_normal((samples, 3, 6, 6)).astype(np.float32)}


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers that were fitted, in order."""
    names: list[str] = []
    fitted = module._fitted

    def spy(layer: Any, *rest: Any, **named: Any) -> Any:
        names.append(layer.node.label)
        return fitted(layer, *rest, **named)

    monkeypatch.setattr(module, "_fitted", spy)
    return names


def stop_at(share: float) -> Callable[[str, float], None]:
    def progress(stage: str, done: float) -> None:
        if stage == "recover" and done >= share:
            raise Interrupted

    return progress


def pruned(folder: Path | None, **settings: Any) -> bytes:
    found = op.prune(network(), ratio=0.5, scope="global", **({"data": data()} | settings), cache=folder)
    return bytes(found.model.SerializeToString(deterministic=True))


def test_an_interrupted_repair_goes_on(tmp_path: Path, fits: list[str]) -> None:
    whole = pruned(None)
    count = len(fits)
    fits.clear()
    with pytest.raises(Interrupted):
        pruned(tmp_path / "kept", progress=stop_at(0.55))
    first = len(fits)
    assert 0 < first < count
    assert pruned(tmp_path / "kept") == whole
    assert len(fits) == count


@pytest.mark.parametrize("how", ["again", "data", "ratio", "mode", "criterion", "damaged"])
def test_only_the_same_repair_is_taken_from_the_folder(tmp_path: Path, fits: list[str], how: str) -> None:
    pruned(tmp_path)
    count = len(fits)
    changes: dict[str, dict[str, Any]] = {
        "data": {"data": data(seed=1)},
        "ratio": {"ratio": 0.25},
        "mode": {"recover": "lstsq"},
        "criterion": {"criterion": "random"},
    }
    if how == "damaged":
        for path in tmp_path.glob("repair-*/*.npz"):
            path.write_bytes(path.read_bytes()[:100])
    settings = {"ratio": 0.5, "scope": "global", "data": data()} | changes.get(how, {})
    fits.clear()
    kept_result = op.prune(network(), **settings, cache=tmp_path)
    assert len(fits) == (0 if how == "again" else count)
    assert kept_result.model == op.prune(network(), **settings).model


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UsageError, match="cannot be written: No space left"):
        pruned(tmp_path / "kept", criterion="l2")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        pruned(tmp_path / "file" / "kept", criterion="l2")
