"""The pass for Olive, with the classes that it takes from Olive in a stand-in: Olive itself needs PyTorch."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
from build import Net

from onnxprune.errors import UsageError


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``onnxprune.olive``, imported beside what it reads of Olive."""
    names = {
        "olive": {},
        "olive.model": {"ONNXModelHandler": lambda model_path: SimpleNamespace(model_path=model_path)},
        "olive.model.utils": {"resolve_onnx_path": lambda folder, name: str(Path(folder) / name)},
        "olive.passes": {"Pass": object},
        "olive.passes.pass_config": {"PassConfigParam": SimpleNamespace},
    }
    for name, attributes in names.items():
        stand_in = ModuleType(name)
        vars(stand_in).update(attributes)
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.delitem(sys.modules, "onnxprune.olive", raising=False)
    return importlib.import_module("onnxprune.olive")


def test_the_pass_prunes_the_model_of_a_workflow(module: Any, tmp_path: Path) -> None:
    net = Net(17)
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 16))
    onnx.save(net.model(net.conv(y, 16, 4)), tmp_path / "model.onnx")
    (tmp_path / "out").mkdir()
    defaults = module.OnnxPrune._default_config(None)
    values = {name: param.default_value for name, param in defaults.items()}
    config = SimpleNamespace(**{**values, "ratio": 0.5, "settings": {"criterion": "l1", "round_to": 1}})
    handler = SimpleNamespace(model_path=str(tmp_path / "model.onnx"))
    result = module.OnnxPrune()._run_for_config(handler, config, str(tmp_path / "out"))
    assert list(onnx.load(result.model_path).graph.initializer[0].dims) == [8, 3, 3, 3]
    assert json.loads((tmp_path / "out" / "model.report.json").read_text())["exactness"]["passed"]
    with pytest.raises(UsageError, match="'ratoi' is no argument"):
        module.arguments_of({"settings": {"ratoi": 0.5}})


def test_olive_finds_the_pass_by_its_configuration(module: Any) -> None:
    (entry,) = json.loads(module.CONFIG.read_text())["passes"].values()
    path, _, name = entry["module_path"].rpartition(".")
    assert getattr(importlib.import_module(path), name) is module.OnnxPrune
