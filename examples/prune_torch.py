"""Prune a classifier of timm or torchvision, from the exporter to a model that is trained further in PyTorch.

python examples/prune_torch.py resnet18.a1_in1k IMAGES/     needs timm and torch
python examples/prune_torch.py                              models/residual.onnx and its arrays in their place

``prune_arrays`` is the heart: a plan applied to arrays by their names. Exporters keep the names of parameters, so that
the arrays of a ``state_dict`` are pruned like the initializers of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"


def prune_arrays(plan: op.Plan, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays without what a plan removes; others as they are."""
    result = dict(arrays)
    removed: dict[tuple[str, int], set[int]] = {}
    for group in plan.groups:
        for slot in group.slots:
            if slot.tensor in result:
                removed.setdefault((slot.tensor, slot.axis), set()).update(slot.removed)
    for (name, axis), indices in removed.items():
        result[name] = np.delete(result[name], sorted(indices), axis=axis)
    return result


def prune_module(module: Any, plan: op.Plan) -> Any:
    """Prune a PyTorch module in place: a convolution or linear layer takes its sizes from its weights."""
    import torch

    state = {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}
    for name, value in prune_arrays(plan, state).items():
        home, _, own = name.rpartition(".")
        owner = module.get_submodule(home)
        if value.shape == state[name].shape:
            continue
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        if own in owner._parameters:
            owner._parameters[own] = torch.nn.Parameter(tensor)
        else:
            owner._buffers[own] = tensor
    for owner in module.modules():  # what layers print and check
        if isinstance(owner, torch.nn.BatchNorm2d):
            owner.num_features = owner.running_mean.numel()
        if isinstance(owner, torch.nn.Conv2d):
            depthwise = owner.groups > 1 and owner.weight.shape[1] == 1
            owner.groups = owner.weight.shape[0] if depthwise else owner.groups
            owner.out_channels, owner.in_channels = owner.weight.shape[0], owner.weight.shape[1] * owner.groups
        if isinstance(owner, torch.nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
    return module


def from_timm(name: str, images: str) -> None:
    """Export, prune, and return to PyTorch for a training of your own."""
    try:
        import timm
        import torch
    except ImportError as error:
        raise SystemExit(f"This recipe needs {error.name}: pip install timm torch onnxscript") from None
    module = timm.create_model(name, pretrained=True).eval()
    size = module.default_cfg["input_size"]
    # Without optimisation parameters keep their names, and BatchNormalization stays a layer of its own.
    training = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        *(module, torch.zeros(1, *size), "model.onnx"),
        **{"dynamo": False, "training": training, "do_constant_folding": False},
        **{"input_names": ["images"], "dynamic_axes": {"images": {0: "N"}}},
    )
    look = op.ImageOptions(mean=module.default_cfg["mean"], std=module.default_cfg["std"])
    result = op.prune("model.onnx", target="macs=0.6", data=images, images=look, factorize=False)
    result.save("small.onnx", plan="small.plan.json")
    small = prune_module(module, result.plan)
    print(sum(p.numel() for p in small.parameters()), "parameters to train further in PyTorch")
    # Trained, exported as above and named trained.onnx, the model can be recovered towards the original:
    # onnxprune recover model.onnx trained.onnx --plan small.plan.json --data IMAGES/


def main() -> None:
    """Prune the model of the command line, or show on the stand-in that arrays and file are pruned alike."""
    if len(sys.argv) == 3:
        from_timm(*sys.argv[1:])
        return
    original = onnx.load(MODELS / "residual.onnx")
    result = op.prune(original, ratio=0.4, validate=False)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in original.graph.initializer}
    small = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    pruned = prune_arrays(result.plan, arrays)
    alike = [name for name in small if np.array_equal(pruned[name], small[name])]
    print(f"{len(alike)} of {len(small)} arrays pruned by the plan equal those of the file")
    assert len(alike) == len(small)


if __name__ == "__main__":
    main()
