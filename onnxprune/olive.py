"""A pass of Olive workflows; ``olive_config.json`` beside it is the package configuration by which Olive finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

import onnxprune
from onnxprune.errors import UsageError
from onnxprune.settings import checked, settings_of

CONFIG = Path(__file__).with_name("olive_config.json")
"""The file for ``olive run --package-config``."""
_OWN = ("ratio", "target", "max_drop", "data", "samples", "recover", "finetune", "quantize", "min_fidelity", "device")
"""Settings that are parameters of the pass; others go into ``settings``."""


class OnnxPrune(Pass):  # type: ignore[misc]  # Olive comes without types
    """Prune an ONNX model, prove the removal, recover it from the data, and optionally quantize it."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        """Return the parameters, with the texts of the settings."""
        known = settings_of("prune")
        params = {
            name: PassConfigParam(type_=Any, default_value=None, description=str(known[name].help)) for name in _OWN
        }
        text = "Further arguments of onnxprune.prune, by name, such as {'scope': 'global'}."
        return params | {"settings": PassConfigParam(type_=dict, default_value=None, description=text)}

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        """Prune the model of the workflow, and return the pruned file."""
        arguments = arguments_of({name: getattr(config, name) for name in (*_OWN, "settings")})
        path = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
        result = onnxprune.prune(Path(model.model_path), latency=False, **arguments)
        result.save(path, plan=path.with_suffix(".plan.json"))
        path.with_suffix(".report.json").write_text(json.dumps(result.report.to_dict(), default=str), encoding="utf-8")
        return ONNXModelHandler(model_path=str(path))


def arguments_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`onnxprune.prune` for the parameters of a pass.

    Raises:
        UsageError: ``settings`` names no argument, or a value is not allowed.
    """
    further = values.pop("settings", None) or {}
    known = {name for name, setting in settings_of("prune").items() if setting.python}
    unknown = sorted(set(further) - known)
    if unknown:
        raise UsageError(
            f"settings: {unknown[0]!r} is no argument of onnxprune.prune", hint=f"There are {sorted(known)}."
        )
    arguments = {**{name: value for name, value in values.items() if value is not None}, **further}
    return {name: checked(name, value) for name, value in arguments.items()}
